"""Chat templates in the manner of published models, with what their conversations may have. Written for these tests."""

from __future__ import annotations

from dataclasses import dataclass

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|end_of_text|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>", "<｜User｜>",
    "<｜Assistant｜>", "<｜call｜>", "<｜endcall｜>", "<｜end｜>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A template of a model family, and the parts of conversations that it renders."""

    name: str
    template: str | dict[str, str]
    bos: str
    eos: str
    """End token of the vocabulary, which need not be the one that ends an answer."""

    end: str
    """Token with which an answer ends."""

    system: bool = True
    tools: bool = True
    several_calls: bool = True
    text_with_calls: bool = True
    reasoning: bool = False


LLAMA_3 = """{{- bos_token -}}
{%- set ns = namespace(tools=tools or []) -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
    {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' -}}
    {%- if m.role == 'user' and ns.tools -%}
      {%- for tool in ns.tools -%}{{- tool | tojson(indent=4) + '\n\n' -}}{%- endfor -%}
      {%- set ns.tools = [] -%}
    {%- endif -%}
    {{- m.content | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

QWEN_CALLS = """{%- macro calls_of(m) -%}
  {%- for call in m.tool_calls -%}
    {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
    {{- call.function.arguments | tojson + '}\n</tool_call>' -}}
  {%- endfor -%}
{%- endmacro -%}
{%- macro system_of() -%}
  {%- set own = messages[0].content if messages[0].role == 'system' else 'You are helpful.' -%}
  {{- '<|im_start|>system\n' + own -}}
  {%- if tools -%}
    {{- '\n\n<tools>' -}}{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}{{- '\n</tools>' -}}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endmacro -%}
{%- macro result(m, first, last) -%}
  {{- '<|im_start|>user' if first -}}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
  {{- '<|im_end|>\n' if last -}}
{%- endmacro -%}"""

QWEN_25 = (
    QWEN_CALLS
    + """{{- system_of() -}}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {{- result(m, messages[loop.index0 - 1].role != 'tool', loop.last or messages[loop.index0 + 1].role != 'tool') -}}
  {%- elif m.role == 'assistant' and m.tool_calls -%}
    {{- '<|im_start|>assistant' + ('\n' + m.content if m.content else '') + calls_of(m) + '<|im_end|>\n' -}}
  {%- elif m.role != 'system' or not loop.first -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
)

QWEN_3 = (
    QWEN_CALLS
    + """{{- system_of() -}}
{%- set ns = namespace(asked=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {{- result(m, messages[loop.index0 - 1].role != 'tool', loop.last or messages[loop.index0 + 1].role != 'tool') -}}
  {%- elif m.role == 'assistant' -%}
    {%- set content, thought = m.content or '', m.reasoning_content or '' -%}
    {%- if not thought and '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.asked and (loop.last or thought) -%}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
    {%- else -%}
      {{- content -}}
    {%- endif -%}
    {{- calls_of(m) if m.tool_calls -}}{{- '<|im_end|>\n' -}}
  {%- elif m.role != 'system' or not loop.first -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
)

MISTRAL = """{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in turns -%}
  {%- if m.role == 'user' -%}
    {%- if tools and m == users[-1] -%}
      {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST] ' + (messages[0].content + '\n\n' if loop.first and messages[0].role == 'system' else '') -}}
    {{- m.content + '[/INST]' -}}
  {%- elif m.role == 'tool' -%}
    {{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + '}[/TOOL_RESULTS]' -}}
  {%- elif m.tool_calls -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m.tool_calls -%}{{- (call.function | tojson) + (', ' if not loop.last else '') -}}{%- endfor -%}
    {{- ']' + eos_token -}}
  {%- else -%}
    {{- ' ' + m.content + eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

GEMMA = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim -}}
  {{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""

DEEPSEEK = """{%- set ns = namespace(system='') -%}
{%- for m in messages -%}{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endif -%}{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for tool in tools or [] -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<｜User｜>' + m.content -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<｜Assistant｜>' + (m.content or '') -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '<｜call｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<｜endcall｜>' -}}
    {%- endfor -%}
    {{- '<｜end｜>' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<｜User｜>result: ' + m.content -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""

R1_ANSWER = "(m.content or '').split('</think>')[-1]"
DEEPSEEK_R1 = (
    DEEPSEEK.replace("(m.content or '')", R1_ANSWER).replace(
        "{{- '<｜Assistant｜>' -}}{%- endif -%}", "{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}"
    )
)  # fmt: skip
"""Its generation prompt opens a thought, and answers are rendered without any: those of a record cannot be trained."""

HERMES = """{{- bos_token -}}
{%- if tools -%}
  {{- '<|im_start|>system\nSignatures: <tools>' -}}
  {%- for tool in tools -%}{{- tool | tojson -}}{{- '\n' if not loop.last -}}{%- endfor -%}
  {{- '</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {{- '<|im_start|>assistant' + ('\n' + m.content if m.content else '') -}}
    {%- for call in m.tool_calls -%}
      {{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|im_start|>tool\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

COMMAND_R_TURNS = """{%- for m in messages -%}
  {%- set author = {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(m.role, '<|SYSTEM_TOKEN|>') -%}
  {{- '<|START_OF_TURN_TOKEN|>' + author -}}
  {%- if m.role == 'tool' -%}{{- '<results>\n' + m.content + '\n</results>' -}}
  {%- else -%}{{- m.content | trim -}}{%- endif -%}
  {%- if m.tool_calls -%}
    {{- 'Action: ```json\n[' -}}
    {%- for call in m.tool_calls -%}
      {{- '\n{"tool_name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) + '}' -}}
    {%- endfor -%}
    {{- ']```' -}}
  {%- endif -%}
  {{- '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"""

COMMAND_R = {
    "default": "{{- bos_token -}}" + COMMAND_R_TURNS.replace("{%- if m.tool_calls -%}", "{%- if false -%}"),
    "tool_use": "{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' -}}{%- for tool in tools -%}"
    "{{- tool.function | tojson -}}{%- endfor -%}{{- '<|END_OF_TURN_TOKEN|>' -}}" + COMMAND_R_TURNS,
    "rag": "{{- raise_exception('no documents') -}}",
}

PHI_3 = """{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

PUBLISHED = (
    Published("llama3", LLAMA_3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
              several_calls=False, text_with_calls=False),
    Published("qwen2.5", QWEN_25, "", "<|im_end|>", "<|im_end|>"),
    Published("qwen3", QWEN_3, "", "<|im_end|>", "<|im_end|>", reasoning=True),
    Published("mistral", MISTRAL, "<s>", "</s>", "</s>", text_with_calls=False),
    Published("gemma", GEMMA, "<bos>", "<eos>", "<end_of_turn>", system=False, tools=False),
    Published("deepseek", DEEPSEEK, "<s>", "<｜end｜>", "<｜end｜>"),
    Published("hermes", HERMES, "<|begin_of_text|>", "<|im_end|>", "<|im_end|>"),
    Published("command-r", COMMAND_R, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    Published("phi3", PHI_3, "<s>", "<|endoftext|>", "<|end|>", tools=False),
)  # fmt: skip
