from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, Format
from stagecoach_trainer.data.formats import detect_format, parser_for
from stagecoach_trainer.data.records import Record, RecordError, Turn
from tests import SHARED_DATA as SHARED

NO_FIELDS = FieldMapping()
USER, ASSISTANT, SYSTEM, CALL, ENVIRONMENT = (
    Role.USER,
    Role.ASSISTANT,
    Role.SYSTEM,
    Role.TOOL_CALL,
    Role.ENVIRONMENT,
)


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
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": "[]",
                "system": "s",
            },
            Format.SHAREGPT,
            Record(
                messages=(
                    Turn(SYSTEM, "s"),
                    Turn(USER, "q"),
                    Turn(CALL, "{}"),
                    Turn(ENVIRONMENT, "3"),
                    Turn(ASSISTANT, "a"),
                ),
                tools="[]",
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
                    Turn(CALL, '{"name": "f", "arguments": {"x": 1}}'),
                    Turn(ENVIRONMENT, "1"),
                    Turn(ASSISTANT, "a"),
                ),
                tools='[{"name": "f"}]',
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
    assert roles == {USER: 722, ASSISTANT: 724, CALL: 216, ENVIRONMENT: 218}
    assert [record.tools for record in records] == [value["tools"] or None for value in data]
    assert [[turn.content for turn in record.messages] for record in records] == [
        [item["value"] for item in value["conversations"]] for value in data
    ]
