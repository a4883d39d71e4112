from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, Format
from stagecoach_trainer.data.formats import detect_format, parser_for
from stagecoach_trainer.data.records import Record, RecordError, ToolCall, Turn, arguments_of, record_to_json
from tests import SHARED_DATA as SHARED

NO_FIELDS = FieldMapping()
USER, ASSISTANT, SYSTEM, TOOL = Role.USER, Role.ASSISTANT, Role.SYSTEM, Role.TOOL


def parse(value: dict[str, Any], format_: Format = Format.AUTO, fields: FieldMapping = NO_FIELDS) -> Record:
    if format_ is Format.AUTO:
        format_ = detect_format(value, fields)
    return parser_for(format_, fields, value)(value)


@pytest.mark.parametrize(
    ("value", "format_", "expected"),
    [
        pytest.param({"text": "a", "id": 3}, Format.TEXT, Record(text="a"), id="text"),
        pytest.param(
            {"instruction": "do", "input": "it", "output": "done"},
            Format.ALPACA,
            Record(messages=(Turn(USER, "do", "it"), Turn(ASSISTANT, "done"))),
            id="alpaca keeps instruction and input separate",
        ),
        pytest.param(
            {"instruction": "do", "input": None, "output": "done", "system": "be kind"},
            Format.ALPACA,
            Record(messages=(Turn(SYSTEM, "be kind"), Turn(USER, "do"), Turn(ASSISTANT, "done"))),
            id="alpaca without input, with a system prompt",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "甲"}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "f"}]',
                "system": "s",
            },
            Format.SHAREGPT,
            Record(
                messages=(
                    Turn(SYSTEM, "s"),
                    Turn(USER, "q"),
                    Turn(ASSISTANT, "", calls=(ToolCall("f", '{"x": "甲"}'),)),
                    Turn(TOOL, "3"),
                    Turn(ASSISTANT, "a"),
                ),
                tools='[{"type": "function", "function": {"name": "f"}}]',
            ),
            id="sharegpt with a tool call",
        ),
        pytest.param(
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                    },
                    {"role": "tool", "content": "1"},
                    {"role": "assistant", "content": "a"},
                ],
                "tools": [{"name": "f"}],
            },
            Format.MESSAGES,
            Record(
                messages=(
                    Turn(SYSTEM, "s"),
                    Turn(USER, "q"),
                    Turn(ASSISTANT, "", calls=(ToolCall("f", '{"x": 1}'),)),
                    Turn(TOOL, "1"),
                    Turn(ASSISTANT, "a"),
                ),
                tools='[{"type": "function", "function": {"name": "f"}}]',
            ),
            id="messages with OpenAI's tool calls",
        ),
        pytest.param(
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            Format.MESSAGES,
            Record(messages=(Turn(USER, "q"), Turn(ASSISTANT, "a"))),
            id="messages under ShareGPT's field name",
        ),
    ],
)
def test_each_layout_is_detected_and_parsed(value: dict[str, Any], format_: Format, expected: Record) -> None:
    assert detect_format(value, NO_FIELDS) is format_
    assert parse(value) == expected
    assert parse(value, format_) == expected


def test_fields_are_read_under_configured_names() -> None:
    assert parse({"body": "a", "text": "b"}, fields=FieldMapping(text="body")).text == "a"
    names = FieldMapping(instruction="question", input="context", output="answer")
    found = parse({"question": "q", "context": "c", "answer": "a"}, fields=names)
    assert found.messages == (Turn(USER, "q", "c"), Turn(ASSISTANT, "a"))
    dialog = {"dialog": [{"from": "human", "value": "q"}], "conversations": "not these"}
    assert parse(dialog, fields=FieldMapping(messages="dialog")).messages == (Turn(USER, "q"),)


@pytest.mark.parametrize(
    ("value", "format_", "message"),
    [
        pytest.param(
            {"txt": "a"}, Format.TEXT, r"`text` must be a string, got no such field \(there are: txt\)", id="no text"
        ),
        pytest.param({"text": 3}, Format.TEXT, "`text` must be a string, got int", id="text is a number"),
        pytest.param({"text": "a\ud800b"}, Format.TEXT, "lone surrogate at character 1", id="half a surrogate pair"),
        pytest.param({"instruction": "a"}, Format.ALPACA, "`output` must be a string", id="alpaca without output"),
        pytest.param({"conversations": []}, Format.SHAREGPT, "at least one turn, got an empty list", id="no turns"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "q"}, {"from": "alien", "value": "x"}]},
            Format.SHAREGPT,
            r"`conversations\[1\]`: unknown `from` 'alien'; allowed are assistant",
            id="an unknown speaker",
        ),
        pytest.param(
            {"messages": ["hello"]}, Format.MESSAGES, "a turn must be an object, got str", id="a turn of text"
        ),
        pytest.param({"messages": [{"role": "user"}]}, Format.MESSAGES, "`content` must be a string", id="no content"),
    ],
)
def test_a_malformed_record_is_reported_with_field_and_value(
    value: dict[str, Any], format_: Format, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        parse(value, format_)


def test_an_unknown_layout_names_what_each_layout_needs() -> None:
    with pytest.raises(RecordError, match=r"\['answer', 'question'\].*`alpaca` `instruction`"):
        detect_format({"question": "q", "answer": "a"}, NO_FIELDS)


def test_real_tool_calls_keep_every_turn_and_tool() -> None:
    data = json.loads((SHARED / "sft" / "toolcall_sharegpt_zh.json").read_text(encoding="utf-8"))
    records = [parse(value) for value in data]
    roles = Counter(turn.role for record in records for turn in record.messages)
    assert roles == {USER: 722, ASSISTANT: 940, TOOL: 218}
    for record, value in zip(records, data, strict=True):
        described = [{"type": "function", "function": tool} for tool in json.loads(value["tools"] or "[]")]
        assert json.loads(record.tools or "[]") == described
        for turn, item in zip(record.messages, value["conversations"], strict=True):
            if item["from"] == "function_call":
                [call] = turn.calls
                assert {"name": call.name, "arguments": arguments_of(call)} == json.loads(item["value"])
            else:
                assert (turn.content, turn.calls) == (item["value"], ())


def turns_of(*items: dict[str, Any]) -> tuple[Turn, ...]:
    return parse({"messages" if "role" in items[0] else "conversations": list(items)}).messages


def test_words_and_calls_of_a_message_are_one_turn() -> None:
    """LLaMA-Factory#10530: a message with content and two calls."""
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":  1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {"y": "é"}}},
    ]
    _, said, result = turns_of(
        {"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
    )
    assert said == Turn(
        ASSISTANT, "I look.", calls=(ToolCall("f", '{"x":  1}', "c1"), ToolCall("g", '{"y": "é"}', "c2"))
    )
    assert result == Turn(TOOL, "1", name="f", call_id="c1")


def test_sharegpt_turns_of_calls_join_the_text_before_them() -> None:
    """LLaMA-Factory#9107: several `function_call` turns, or a list in one of them."""
    question, words = {"from": "human", "value": "q"}, {"from": "gpt", "value": "I look."}
    one, two = ({"from": "function_call", "value": json.dumps({"name": name, "arguments": {}})} for name in "fg")
    both = {"from": "function_call", "value": json.dumps([json.loads(one["value"]), json.loads(two["value"])])}
    joined = (Turn(USER, "q"), Turn(ASSISTANT, "I look.", calls=(ToolCall("f", "{}"), ToolCall("g", "{}"))))
    assert turns_of(question, words, one, two) == turns_of(question, words, both) == joined
    # Text after a call is another turn, and so is a call that is not trained as the text before it is.
    assert [len(turn.calls) for turn in turns_of(question, one, words)] == [0, 1, 0]
    assert [turn.trained for turn in turns_of(question, words, {**one, "weight": 0})] == [None, None, False]
    with pytest.raises(RecordError, match=r"`conversations\[1\]`: `value` must be the JSON of a tool call"):
        turns_of(question, {"from": "function_call", "value": "f(1)"})


@pytest.mark.parametrize("field", ["weight", "train", "loss", "trained", "training"])
def test_a_turn_may_say_whether_it_is_trained(field: str) -> None:
    """fw-ai/cookbook#387, verl#5316, slime#377: flags of a turn."""
    question = {"role": "user", "content": "q"}
    for value, trained in ((0, False), (1, True), (False, False), (True, True), (0.0, False), (None, None)):
        assert turns_of(question, {"role": "assistant", "content": "a", field: value})[1].trained is trained
    refused: list[Any] = [0.5, 2, "0", [1]]
    for value in refused:
        with pytest.raises(RecordError, match=f"`{field}` must be 0 or 1, false or true"):
            turns_of(question, {"role": "assistant", "content": "a", field: value})
    # OpenAI's `weight` and ms-swift's `loss` are defined for the assistant alone.
    expected = None if field in ("weight", "loss") else True
    assert turns_of({**question, field: 1})[0].trained is expected
    assert turns_of({**question, field: 0})[0].trained is False


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RecordError, match="contradict"):
        turns_of({"role": "assistant", "content": "a", "weight": 1, "train": False})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_part_of_the_turn(field: str) -> None:
    """fw-ai/cookbook#378, NeMo Automodel#2348: reasoning next to text, and next to a call."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    said, called = turns_of(
        {"role": "assistant", "content": "a", field: "hm"},
        {"role": "assistant", "content": None, field: "so", "tool_calls": [call]},
    )
    assert said == Turn(ASSISTANT, "a", reasoning="hm")
    assert called == Turn(ASSISTANT, "", reasoning="so", calls=(ToolCall("f", "{}"),))
    with pytest.raises(RecordError, match="reasoning; only the assistant's"):
        turns_of({"role": "user", "content": "q", field: "hm"})


def test_content_in_parts_is_text_and_thinking_or_refused() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    assert turns_of({"role": "assistant", "content": parts}) == (Turn(ASSISTANT, "a", reasoning="hm"),)
    with pytest.raises(RecordError, match=r"`content\[1\]` must be a part of type.*got 'image_url'"):
        turns_of({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]})
    with pytest.raises(RecordError, match="2 parts of text"):
        turns_of({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})


def test_tools_are_wrapped_as_servers_pass_them() -> None:
    bare = {"name": "f", "parameters": {}}
    wrapped = {"type": "function", "function": bare}
    turns = {"messages": [{"role": "user", "content": "q"}]}
    written: list[Any] = [[bare], [wrapped], json.dumps([bare]), [{"function": bare}], [{"type": "function", **bare}]]
    for tools in written:
        assert json.loads(parse({**turns, "tools": tools}).tools or "") == [wrapped]
    assert json.loads(parse({**turns, "functions": [bare]}).tools or "") == [wrapped]
    none: list[Any] = [None, "", "[]", []]
    assert all(parse({**turns, "tools": empty}).tools is None for empty in none)
    malformed: list[Any] = ["{", '{"name": "x"}', "[1]", [{"parameters": {}}], [{"type": "web_search", "name": "x"}]]
    for broken in malformed:
        with pytest.raises(RecordError, match="`tools"):
            parse({**turns, "tools": broken})


def test_shards_keep_every_part_of_a_conversation() -> None:
    record = Record(
        messages=(
            Turn(SYSTEM, "s"),
            Turn(USER, "q", input="i", name="Ann", trained=False),
            Turn(ASSISTANT, "w", reasoning="r", calls=(ToolCall("f", '{"x":  1}', "c"), ToolCall("g", "not JSON"))),
            Turn(TOOL, "1", name="f", call_id="c"),
            Turn(ASSISTANT, "a", trained=True),
        ),
        tools='[{"type": "function", "function": {"name": "f"}}]',
    )
    stored = json.loads(json.dumps(record_to_json(record)))
    assert parse(stored, Format.MESSAGES) == record
    assert all(part in record.content for part in ("s", "q", "i", "w", "r", "f", '{"x":  1}', "not JSON", "a"))


def test_shards_of_earlier_versions_are_read() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = turns_of(
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "w"},
        {"role": "toolCall", "content": call},
        {"role": "environment", "content": "1"},
    )
    assert turns == (
        Turn(USER, "q"),
        Turn(ASSISTANT, "w", calls=(ToolCall("f", '{"x": 1}'),)),
        Turn(TOOL, "1"),
    )
