"""Templates: the text of training is the text of serving, on real conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.conversation import Loss, Role, Template, TemplateName, Turns
from stagecoach_api.references import RecordSource
from stagecoach_trainer.data.reading import read_path
from stagecoach_trainer.data.records import Record, as_message
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.templates import CHATML_END, Renderer, apply_template, chat_template, parse_tools
from tests import SHARED_DATA as DATA
from tests.trainer.models.makers import make_tokenizer

NAMED = [name for name in TemplateName if name not in (TemplateName.MODEL, TemplateName.CUSTOM)]
FILES = ["alpaca_zh.json", "alpaca_en.json", "huangdi_tcm_sample.json", "toolcall_sharegpt_zh.json"]
CALL: dict[str, Any] = {"type": "function", "function": {"name": "add", "arguments": {"甲": 1}}}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def conversations(name: str) -> list[tuple[list[dict[str, Any]], Any]]:
    found = read_path(DATA / "sft" / name, RecordSource(uri=name))
    return [
        ([as_message(turn) for turn in record.messages], parse_tools(record.tools))
        for record in found
        if isinstance(record, Record)
    ]


def renderer(template: Template, **vocabulary: Any) -> tuple[Any, Renderer]:
    tokenizer = make_tokenizer(**vocabulary)
    apply_template(tokenizer, template)
    return tokenizer, Renderer(tokenizer)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("file", FILES)
def test_segments_of_real_conversations_join_to_the_exported_chat_template(name: TemplateName, file: str) -> None:
    tokenizer, render = renderer(Template(name=name), special=("<|im_start|>", "<|im_end|>"))
    checked = 0
    for messages, tools in conversations(file)[:150]:
        if name is not TemplateName.CHATML and tools:
            continue
        pieces = render.segments(messages, Loss(), tools)
        served = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert "".join(piece.text for piece in pieces) == served
        answers = [piece.text for piece in pieces if piece.trained]
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert len(answers) == len(said)
        for answer, content in zip(answers, said, strict=True):
            assert content in answer
            assert answer.endswith(tokenizer.eos_token)
        checked += 1
    assert checked >= 40


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("alpaca", f"<s>{PREAMBLE}\n\n### Instruction:\nAdd\n1 2\n\n### Response: "),
        (
            "alpacaWithInput",
            "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:",
        ),
        (
            "vicuna",
            "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: Add\n1 2 ASSISTANT:",
        ),
        ("chatml", "<s><|im_start|>user\nAdd\n1 2<|im_end|>\n<|im_start|>assistant\n"),
        ("humanBot", "<s><human>:Add\n1 2\n<bot>:"),
    ],
)
def test_a_prompt_is_rendered_as_published(name: str, prompt: str) -> None:
    _, render = renderer(Template(name=TemplateName(name)))
    messages = [{"role": "user", "content": "Add", "input": "1 2"}]
    assert render.render(messages, add_generation_prompt=True) == prompt


def test_the_configured_system_prompt_is_in_training_and_in_the_exported_template() -> None:
    text = "It's \\ 你好\n{{ no jinja }} {%- if -%}"
    for name in NAMED:
        tokenizer, render = renderer(Template(name=name, system=text))
        messages = [{"role": "user", "content": "hi"}]
        assert text in render.render(messages)
        assert text in tokenizer.apply_chat_template(messages, tokenize=False)
        own = render.render([{"role": "system", "content": "mine"}, *messages])
        assert "mine" in own
        assert text not in own


def test_chatml_uses_its_end_marker_as_end_token_if_the_vocabulary_has_it() -> None:
    with_markers = make_tokenizer(special=("<|im_start|>", "<|im_end|>"))
    without = make_tokenizer()
    template = Template(name=TemplateName.CHATML)
    assert apply_template(with_markers, template) == []
    assert with_markers.eos_token == CHATML_END
    [warning] = apply_template(without, template)
    assert "specialTokens" in warning
    assert Renderer(without).render(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ).endswith("b<|im_end|></s>")  # fmt: skip


def test_only_the_chosen_turns_carry_loss() -> None:
    _, render = renderer(Template(name=TemplateName.CHATML))
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]

    def trained(loss: Loss) -> list[int]:
        return [turn.index for turn in render.trained_turns(messages, loss)]

    assert trained(Loss()) == [1, 3, 5]
    assert trained(Loss(roles=(Role.TOOL,))) == [2]
    assert trained(Loss(turns=Turns.LAST)) == [5]
    assert trained(Loss(roles=(Role.USER,))) == [4]
    assert "q2" in next(piece.text for piece in render.segments(messages, Loss(roles=(Role.USER,))) if piece.trained)


def test_a_template_whose_turns_lack_the_generation_prompt_is_rejected() -> None:
    jinja = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    _, render = renderer(Template(name=TemplateName.CUSTOM, jinja=jinja))
    with pytest.raises(UserError, match="prefix"):
        render.trained_turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], Loss())


def test_a_template_without_end_token_is_rejected() -> None:
    jinja = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q:{{ m['content'] }} A:"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    _, render = renderer(Template(name=TemplateName.CUSTOM, jinja=jinja))
    with pytest.raises(UserError, match="end token"):
        render.trained_turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], Loss())


def test_a_role_that_the_template_lacks_is_named() -> None:
    _, render = renderer(Template(name=TemplateName.VICUNA))
    with pytest.raises(UserError, match="tool"):
        render.render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("tools", ["{", '{"name": "x"}', "[1]"])
def test_tools_that_are_not_a_list_of_objects_are_rejected(tools: str) -> None:
    with pytest.raises(UserError, match="tools"):
        parse_tools(tools)


def test_templates_are_shipped_with_the_code(tmp_path: Path) -> None:
    for name in NAMED:
        assert "eos_token" in chat_template(Template(name=name))
