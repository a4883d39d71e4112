"""Conversations of every kind with the templates of published models: what is trained is what is served, id for id."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecoach_api.conversation import Loss, Role, Template, TemplateName, TooLong
from stagecoach_trainer.data.records import Answer, Record, ToolCall, Turn, as_message
from stagecoach_trainer.generation.generation import Prompter
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import ConversationEncoder, Sample, conversation_of
from stagecoach_trainer.samples.preferences import GroupEncoder, Grouping
from stagecoach_trainer.samples.scoring import encode_answered
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import CHATML_START, Renderer, apply_template, stop_token_ids
from tests.trainer.models.makers import make_tokenizer
from tests.trainer.text.published import DEEPSEEK_R1, PUBLISHED, R1_ANSWER, SPECIAL, Published

MODEL = Template(name=TemplateName.MODEL)
OURS = [
    Published(name, "", "<s>", "</s>", "<|im_end|>" if name == "chatml" else "</s>",
              tools=name == "chatml", reasoning=name == "chatml")
    for name in ("alpaca", "alpacaWithInput", "vicuna", "chatml", "humanBot")
]  # fmt: skip
EVERY = [*PUBLISHED, *OURS]
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Find.", "parameters": {"type": "object"}}}

USER, CALL = Turn(Role.USER, "q"), ToolCall("look_up", '{"x": 7}')

FRAGMENTS = (
    "Hello", "a", "1", " ", "  ", "\n", "\n\n", "甲乙", "é", "{x}", "{{ y }}", "{% z %}", '"', "'", "\\", "user",
    "assistant", "</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<｜end｜>",
    "[/INST]", "<|END_OF_TURN_TOKEN|>", "<tool_call>",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
SAID = TEXTS.map(lambda text: text + "Zz")  # not blank: a turn of the user that is blank may be left out
VALUES = st.recursive(
    st.integers(-9, 9) | st.booleans() | st.none() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SAID, inner, max_size=2),
    max_leaves=4,
)


def by_name(name: str) -> Published:
    return next(family for family in EVERY if family.name == name)


def tokenizer_of(family: Published) -> Any:
    return tokenizer_named(family.name)


@cache
def tokenizer_named(name: str) -> Any:
    family = by_name(name)
    tokenizer = make_tokenizer(special=SPECIAL)
    tokenizer.bos_token = family.bos or None
    tokenizer.eos_token = family.eos
    tokenizer.chat_template = family.template or None
    apply_template(tokenizer, MODEL if family.template else Template(name=TemplateName(family.name)))
    return tokenizer


@st.composite
def calls(draw: st.DrawFn, family: Published) -> tuple[ToolCall, ...]:
    made = st.builds(
        lambda name, values: ToolCall(name, json.dumps(values, ensure_ascii=False)),
        st.sampled_from(("look_up", "add")),
        st.dictionaries(SAID, VALUES, max_size=2),
    )
    return tuple(draw(st.lists(made, min_size=1, max_size=3 if family.several_calls else 1)))


@st.composite
def records(draw: st.DrawFn, family: Published) -> Record:
    turns = [Turn(Role.SYSTEM, draw(SAID))] if family.system and draw(st.booleans()) else []
    with_tools = family.tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn(Role.USER, draw(SAID), input=draw(TEXTS)))
        thought = TEXTS.map(str.strip) if family.reasoning else st.just("")
        if with_tools and draw(st.booleans()):
            asked = draw(calls(family))
            words = draw(SAID) if family.text_with_calls and draw(st.booleans()) else ""
            turns.append(Turn(Role.ASSISTANT, words, reasoning=draw(thought), calls=asked))
            turns += [Turn(Role.TOOL, draw(SAID)) for _ in asked]
        turns.append(Turn(Role.ASSISTANT, draw(TEXTS), reasoning=draw(thought)))
    return Record(messages=tuple(turns), tools=json.dumps([TOOL]) if with_tools else None, where="x.json:1")


def original(record: Record, family: Published) -> list[dict[str, Any]]:
    """Return the record as a client writes it for a server: OpenAI's messages, made without the code under test."""
    messages: list[dict[str, Any]] = []
    for turn in record.messages:
        message: dict[str, Any] = {"role": turn.role.value, "content": turn.content}
        if turn.input and family.name == "alpacaWithInput":
            message["input"] = turn.input
        elif turn.input:
            message["content"] = "\n".join(part for part in (turn.content, turn.input) if part)
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            as_text = family.name == "deepseek"  # this template joins the arguments' text
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in turn.calls
            ]
            for call in message["tool_calls"] if as_text else ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        messages.append(message)
    return messages


def runs(sample: Sample) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sample.trained, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def encoder_of(tokenizer: Any, loss: Loss | None = None) -> ConversationEncoder:
    return ConversationEncoder(Encoder(tokenizer), Renderer(tokenizer), loss or Loss(), TooLong.FAIL, 1 << 20)


def check(record: Record, family: Published) -> None:
    tokenizer = tokenizer_of(family)
    tools = None if record.tools is None else json.loads(record.tools)
    messages = original(record, family)
    end = tokenizer.convert_tokens_to_ids(family.end)
    samples = list(encoder_of(tokenizer).encode([record]))
    found = [(sample.ids.tolist(), start, stop) for sample in samples for start, stop in runs(sample)]
    answered = [index for index, turn in enumerate(record.messages) if turn.role is Role.ASSISTANT]
    assert len(found) == len(answered)
    for (ids, start, stop), index in zip(found, answered, strict=True):
        until, prefix = messages[: index + 1], messages[:index]
        served = tokenizer.apply_chat_template(prefix, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ids[:start] == served
        assert ids[stop - 1] == end
        prompt = tokenizer.apply_chat_template(prefix, tools=tools, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(until, tools=tools, tokenize=False)
        generated = tokenizer.decode(ids[:stop]).removeprefix(tokenizer.decode(ids[:start]))
        assert text.startswith(prompt + generated)
        rest = text.removeprefix(prompt + generated)
        assert rest.strip() in ("", family.eos)  # what the template writes after the end token
        whole = tokenizer.apply_chat_template(until, tools=tools, return_dict=False)
        spelled = any(token in part for token in SPECIAL for part in (record.content,))
        if not spelled and "</s>" not in record.content and "<s>" not in record.content and whole[:start] == served:
            assert whole[:stop] == ids[:stop]
        if not record.messages[index].calls:
            assert ids[start:stop].count(end) == 1


@pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)
def test_what_is_trained_is_what_is_served(family: Published) -> None:
    """LLaMA-Factory#10530, NeMo Automodel#2325, transformers#34214, open-instruct#1734, axolotl#3824."""

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(record=records(family))
    def holds(record: Record) -> None:
        check(record, family)

    holds()


@pytest.mark.parametrize("family", [family for family in EVERY if family.tools], ids=lambda family: family.name)
def test_words_calls_and_results_are_rendered_as_they_are_served(family: Published) -> None:
    """LLaMA-Factory#10530: two calls and a text in one turn, where the family has them."""
    calls = (CALL, ToolCall("add", '{"text": "</s>é\\n", "more": [1.5, true, null, {"k": "<|im_end|>"}]}'))
    asked = Turn(
        Role.ASSISTANT, "I look." if family.text_with_calls else "", calls=calls if family.several_calls else calls[1:]
    )
    turns = (
        USER,
        asked,
        *(Turn(Role.TOOL, str(index)) for index in range(len(asked.calls))),
        Turn(Role.ASSISTANT, "a"),
    )
    check(Record(messages=turns, tools=json.dumps([TOOL])), family)


@pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)
def test_generation_stops_at_the_token_that_ends_an_answer(family: Published) -> None:
    tokenizer = tokenizer_of(family)
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    assert set(stops) == {tokenizer.eos_token, family.end}


CALLED = (USER, Turn(Role.ASSISTANT, "", calls=(CALL,)), Turn(Role.TOOL, "42"), Turn(Role.ASSISTANT, "a"))
REFUSALS = {
    "a call's text": ("llama3", (USER, Turn(Role.ASSISTANT, "I look.", calls=(CALL,))), True, r"turn 1 .*'I look\.'"),
    "a second call": ("llama3", (USER, Turn(Role.ASSISTANT, "", calls=(CALL, CALL))), True, "turn 1 .*one call at a"),
    "the system's turn": ("gemma", (Turn(Role.SYSTEM, "s"), USER, Turn(Role.ASSISTANT, "a")), False, "turn 0 .*System"),
    "a tool's turn": ("gemma", CALLED[:3] + CALLED[3:], False, r"turn 1 \(assistant\): .* call of 'look_up'"),
    "the tools": ("vicuna", (USER, Turn(Role.ASSISTANT, "a")), True, "does not render the conversation's `tools`"),
    "reasoning": ("vicuna", (USER, Turn(Role.ASSISTANT, "a", reasoning="hm")), False, "turn 1 .* its reasoning 'hm'"),
    "a call": ("alpaca", CALLED, False, "turn 1 .* leaves out its call of 'look_up'"),
}


@pytest.mark.parametrize(("name", "turns", "tools", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_template_that_leaves_something_out_is_refused_with_record_and_turn(
    name: str, turns: tuple[Turn, ...], tools: bool, message: str
) -> None:
    record = Record(messages=turns, tools=json.dumps([TOOL]) if tools else None, where="x.json:7")
    with pytest.raises(UserError, match=f"x.json:7: .*{message}"):
        list(encoder_of(tokenizer_of(by_name(name))).encode([record]))


def custom(jinja: str, **changes: Any) -> Any:
    tokenizer = make_tokenizer(special=("<|im_start|>", "<|im_end|>"))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    apply_template(tokenizer, Template(name=TemplateName.CUSTOM, jinja=jinja))
    return tokenizer


LOSSY = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- 'tool: ' + m.content -}}"
    "{%- elif m.role == 'assistant' -%}{{- 'A:' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'A:' -}}{%- endif -%}"
)


def test_a_short_text_that_occurs_elsewhere_does_not_hide_that_its_turn_is_left_out() -> None:
    """axolotl#3824: a template without the role `tool`; the turn's text, "tool", is in the template's own text."""
    record = Record(messages=(USER, Turn(Role.TOOL, "tool"), Turn(Role.ASSISTANT, "a")), where="x.json:2")
    with pytest.raises(UserError, match=r"x.json:2: turn 1 \(tool\): the chat template leaves out"):
        list(encoder_of(custom(LOSSY)).encode([record]))


def test_alpacas_input_is_kept_by_templates_that_do_not_read_it() -> None:
    tokenizer = tokenizer_of(by_name("qwen2.5"))
    record = Record(messages=(Turn(Role.USER, "Sum up.", "A long text."), Turn(Role.ASSISTANT, "Short.")))
    [sample] = encoder_of(tokenizer).encode([record])
    assert "user\nSum up.\nA long text.<|im_end|>" in tokenizer.decode(sample.ids)
    reading = custom(LOSSY.replace("m.content -}}", "m.content + '|' + m.get('input', '') -}}", 1))
    [sample] = encoder_of(reading).encode([record])
    assert "tool: Sum up.|A long text.A:" in reading.decode(sample.ids)


def test_an_answer_that_spells_the_end_token_ends_once() -> None:
    """transformers#34214, open-instruct#1734: content that begins with a blank, and a template that trims it."""
    tokenizer = custom(LOSSY.replace("'A:' + m.content", "'A:' + m.content | trim"))
    record = Record(messages=(USER, Turn(Role.ASSISTANT, " write </s> last")))
    encoder = encoder_of(tokenizer)
    [sample] = encoder.encode([record])
    assert sample.ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(sample.ids[sample.trained]) == "write </s> last</s>"
    assert encoder.counts["spelledTokens"] == 1


def test_a_bos_token_that_is_chatmls_first_marker_is_written_once() -> None:
    """DeepSeek-R1#151: no second BOS token."""
    tokenizer = make_tokenizer(special=("<|im_start|>", "<|im_end|>"))
    tokenizer.bos_token = CHATML_START
    apply_template(tokenizer, Template(name=TemplateName.CHATML))
    assert Renderer(tokenizer).prompt([{"role": "user", "content": "q"}]).startswith("<|im_start|>user\nq")
    with pytest.raises(UserError, match="begins with the BOS token '<s>' twice"):
        custom("{{- bos_token + bos_token -}}" + LOSSY)


def test_turns_are_trained_as_their_flags_tell() -> None:
    """fw-ai/cookbook#387, verl#5316, slime#377."""
    tokenizer = tokenizer_of(by_name("chatml"))
    turns = (
        USER,
        Turn(Role.ASSISTANT, "wrong", trained=False),
        Turn(Role.USER, "no", trained=True),
        Turn(Role.ASSISTANT, "right"),
    )
    [sample] = encoder_of(tokenizer).encode([Record(messages=turns)])
    trained = [tokenizer.decode(sample.ids[start:stop]) for start, stop in runs(sample)]
    assert [text.strip() for text in trained] == ["<|im_start|>user\nno<|im_end|>", "right<|im_end|>"]
    first = Record(messages=(Turn(Role.USER, "q", trained=True), Turn(Role.ASSISTANT, "a")), where="x.json:9")
    with pytest.raises(UserError, match=r"x\.json:9: turn 0 .* marked as trained"):
        list(encoder_of(tokenizer).encode([first]))


def test_without_a_template_of_its_own_a_model_needs_one_by_name() -> None:
    with pytest.raises(UserError, match=r"template: the model's tokenizer has no chat template; name one of alpaca"):
        apply_template(make_tokenizer(), None)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "hermes", "command-r", "deepseek"])
def test_preferences_prompts_and_scores_have_the_calls_results_and_tools_of_their_prompts(name: str) -> None:
    """axolotl#3824: a prompt with a call and its result, and answers that think or call."""
    family = by_name(name)
    tokenizer = tokenizer_of(family)
    again = Answer("", 1, calls=(ToolCall("add", '{"k": 7}'),), reasoning="hm" if family.reasoning else "")
    record = Record(messages=CALLED[:3], answers=(again, Answer("no", 2)), tools=json.dumps([TOOL]), where="x.json:1")
    served = tokenizer.apply_chat_template(
        original(replace(record, answers=()), family), tools=[TOOL], add_generation_prompt=True, return_dict=False
    )
    [group] = GroupEncoder(tokenizer, 4096, Grouping.PAIRS).encode([record])
    count, num_prompt = group[:2].tolist()
    assert count == 2
    assert group[2 + 2 * count :][:num_prompt].tolist() == served
    answers = tokenizer.decode(group[2 + 2 * count + num_prompt :])
    assert all(part in answers for part in ("add", '"k": 7', "no", again.reasoning))
    conversation = conversation_of(replace(record, answers=()))
    [scored] = encode_answered(tokenizer, [(conversation.messages, "no")], tools=[conversation.tools])
    assert scored[: len(served)].tolist() == served
    assert Prompter(tokenizer).encode(conversation.messages, conversation.tools).tolist() == served


def r1_tokenizer() -> Any:
    tokenizer = make_tokenizer(special=SPECIAL)
    tokenizer.eos_token, tokenizer.chat_template = "<｜end｜>", DEEPSEEK_R1
    return tokenizer


THOUGHT = Turn(Role.ASSISTANT, "42", reasoning="six times seven")


@pytest.mark.parametrize("answer", [Turn(Role.ASSISTANT, "42"), THOUGHT, Turn(Role.ASSISTANT, "<think>\nhm</think>42")])
def test_answers_rendered_without_the_thought_that_the_prompt_opens_are_refused(answer: Turn) -> None:
    """DeepSeek-R1's own template: the model is served `<think>`, which no answer of a record would follow."""
    tokenizer = r1_tokenizer()
    record = Record(messages=(USER, answer), where="x.json:3")
    with pytest.raises(UserError) as caught:
        list(encoder_of(tokenizer).encode([record]))
    message = str(caught.value)
    assert message.startswith("x.json:3: turn 1 (assistant): the chat template does not render")
    assert "a served model is given …" in message
    assert r"<｜Assistant｜><think>\n'" in message
    assert "use a template whose turns begin with the generation prompt: `template: {name: …}` with alpaca" in message
    prompt = Renderer(tokenizer).prompt([as_message(USER), as_message(answer), as_message(USER)])
    assert prompt.endswith("42<｜end｜><｜User｜>q<｜Assistant｜><think>\n"), "served and evaluated as it is"


@pytest.mark.parametrize("answer", [Turn(Role.ASSISTANT, "42"), THOUGHT])
def test_an_r1_is_trained_with_chatml_or_with_its_template_repaired(answer: Turn) -> None:
    thought = "<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' + "
    repaired = DEEPSEEK_R1.replace("<｜Assistant｜>' + " + R1_ANSWER, "<｜Assistant｜>" + thought + R1_ANSWER)
    for template, said in (
        (Template(name=TemplateName.CUSTOM, jinja=repaired), f"{answer.reasoning}\n</think>\n\n42<｜end｜>"),
        (
            Template(name=TemplateName.CHATML),
            (f"<think>\n{answer.reasoning}\n</think>\n\n" if answer.reasoning else "") + "42<|im_end|>",
        ),
    ):
        tokenizer = r1_tokenizer()
        apply_template(tokenizer, template)
        [sample] = encoder_of(tokenizer).encode([Record(messages=(USER, answer))])
        assert tokenizer.decode(sample.ids[sample.trained]) == said
        served = tokenizer.apply_chat_template([as_message(USER)], add_generation_prompt=True, return_dict=False)
        assert sample.ids.tolist()[: len(served)] == served
