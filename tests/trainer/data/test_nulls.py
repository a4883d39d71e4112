"""Nulls that writers of JSON lines fill in are no content; those that a model may be meant to write stay, counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.references import FieldMapping, RecordSource
from stagecoach_trainer.data.notes import Notes, warnings_of
from stagecoach_trainer.data.nulls import NULLS_KEPT, NULLS_LEFT_OUT, without_padding
from stagecoach_trainer.data.reading import read_path
from stagecoach_trainer.data.records import Record
from tests.trainer.data.makers import write_jsonl

Value = dict[str, Any]


def tool(name: str, **properties: Any) -> Value:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, **arguments: Any) -> Value:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(*calls: Value, **fields: Any) -> Value:
    turn = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    return {"messages": [{"role": "user", "content": "weather?"}, turn], **fields}


def padded(values: list[Value]) -> list[Value]:
    """Return values as `datasets.Dataset.to_json` writes them: each object has the members of all of its column."""
    rows: list[Value] = pa.Table.from_pylist(values).to_pylist()
    return rows


def read(folder: Path, values: list[Value], **source: Any) -> tuple[list[Any], Notes]:
    path, notes = write_jsonl(folder / "a.jsonl", values), Notes()
    return list(read_path(path, RecordSource(uri="a.jsonl", **source), notes)), notes


# -- filled in ---------------------------------------------------------------------------------------------------------

TEXT = {"type": "string"}
WEATHER, TIME = tool("weather", city=TEXT, unit=TEXT), tool("time", zone={"type": "string", "description": "IANA"})


def test_what_to_json_fills_in_is_not_learnt(tmp_path: Path) -> None:
    """ms-swift#10125 in JSON lines: the target was `{"city": "A", "zone": null}`."""
    values = [
        conversation(call("weather", city="A"), call("time", zone="UTC"), tools=[WEATHER, TIME]),
        conversation(call("weather", city="B", unit="C"), tools=[WEATHER]),
    ]
    before, _ = read(tmp_path / "one", values)
    after, notes = read(tmp_path / "two", padded(values))
    assert [item.messages for item in after] == [item.messages for item in before]
    assert after[0].messages[-1].calls[0].arguments == '{"city": "A"}'
    assert [json.loads(item.tools) for item in after] == [json.loads(item.tools) for item in before]
    assert notes[NULLS_LEFT_OUT] == 2
    assert warnings_of(notes, "a") == [
        "a: in 2 records, nulls were left out of tools and of calls whose tool does not allow them: writers of JSON "
        "lines fill them in"
    ]


names = st.sampled_from(["city", "unit", "zone", "day"])


@st.composite
def conversations(draw: st.DrawFn) -> Value:
    kinds = {name: draw(st.sets(names, min_size=1)) for name in draw(st.sets(st.sampled_from("pqr"), min_size=1))}
    called = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=3))
    calls = [call(name, **{key: draw(st.text("ab")) for key in draw(st.sets(st.sampled_from(sorted(kinds[name]))))})
             for name in called]  # fmt: skip
    more = draw(st.sampled_from([{}, {"name": "anna"}, {"weight": 1}]))
    value = conversation(*calls, tools=[tool(name, **dict.fromkeys(sorted(kinds[name]), TEXT)) for name in kinds])
    value["messages"][0] |= more
    if not calls:
        value["messages"][1] = {"role": "assistant", "content": "sunny", "reasoning_content": "hm"}
    return value


def said(record: Any) -> list[Any]:
    """Return a record with arguments and tools as values: Arrow changes the order of members."""
    assert isinstance(record, Record)
    turns = [(turn, [(item.name, json.loads(item.arguments)) for item in turn.calls]) for turn in record.messages]
    return [json.loads(record.tools or "[]"), *((replace(turn, calls=()), calls) for turn, calls in turns)]


@settings(max_examples=25, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=4))
def test_padded_records_are_read_as_they_were(tmp_path_factory: pytest.TempPathFactory, values: list[Value]) -> None:
    folder = tmp_path_factory.mktemp("nulls")
    before, _ = read(folder / "one", values)
    after, notes = read(folder / "two", padded(values))
    assert [said(item) for item in after] == [said(item) for item in before]
    assert notes[NULLS_KEPT] == 0


def test_a_column_that_is_null_fits_no_layout(tmp_path: Path) -> None:
    """Two data sets were joined: the rows of each have the other's columns, as null."""
    values = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
               "instruction": None, "output": None, "completion": None, "label": None}]  # fmt: skip
    (record,), _ = read(tmp_path, values)
    assert [turn.content for turn in record.messages] == ["a", "b"]
    labelled = [values[0] | {"label": True, "prompt": None}]
    (record,), _ = read(tmp_path / "labels", labelled)
    assert record.answers[0].liked is True


def test_turns_with_the_members_of_another_layout_as_null_are_read(tmp_path: Path) -> None:
    values = [{"messages": [{"role": "user", "content": "a", "from": None, "value": None},
                            {"role": "assistant", "content": "b", "from": None, "value": None}]}]  # fmt: skip
    (record,), _ = read(tmp_path, values)
    assert [turn.content for turn in record.messages] == ["a", "b"]


def test_arguments_in_parameters_are_read_next_to_null_arguments(tmp_path: Path) -> None:
    """A call whose `arguments` was null lost its `parameters`."""
    function = {"name": "weather", "arguments": None, "parameters": {"city": "A"}}
    (record,), _ = read(tmp_path, [conversation({"type": "function", "function": function})])
    assert record.messages[-1].calls[0].arguments == '{"city": "A"}'


def test_a_missing_field_that_is_there_as_null_is_named(tmp_path: Path) -> None:
    (found,), _ = read(tmp_path, [{"instruction": "a", "output": None}], format="alpaca")
    assert found.reason == "`output` must be a string, got no such field (there are: instruction) (null: output)"


WEATHER_WITHOUT_SCHEMA = {"type": "function", "function": {"name": "weather"}}


# -- meant -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"]},
        {"type": "string", "nullable": True},
        {"anyOf": [TEXT, {"type": "null"}]},
        {"enum": ["C", None]},
        {"const": None},
        {"$ref": "#/$defs/unit"},
        {"description": "any"},
    ],
)
def test_a_null_that_the_tool_allows_is_an_argument_and_told(tmp_path: Path, schema: Value) -> None:
    value = conversation(call("weather", city="A", unit=None), tools=[tool("weather", city=TEXT, unit=schema)])
    (record,), notes = read(tmp_path, [value])
    assert record.messages[-1].calls[0].arguments == '{"city": "A", "unit": null}'
    assert notes == {NULLS_KEPT: 1}
    assert "a call has arguments that are null, which a model learns to write" in warnings_of(notes, "a")[0]


@pytest.mark.parametrize("tools", [[], [tool("other", city=TEXT)], [WEATHER_WITHOUT_SCHEMA]])
def test_without_a_schema_a_null_stays(tmp_path: Path, tools: list[Value]) -> None:
    (record,), notes = read(tmp_path, [conversation(call("weather", unit=None), tools=tools)])
    assert (record.messages[-1].calls[0].arguments, notes[NULLS_KEPT]) == ('{"unit": null}', 1)


def test_arguments_and_tools_that_are_text_stay_as_written(tmp_path: Path) -> None:
    written = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "A", "unit": null}'}}
    (record,), notes = read(tmp_path, [conversation(written, tools=json.dumps([WEATHER | {"strict": None}]))])
    assert record.messages[-1].calls[0].arguments == '{"city": "A", "unit": null}'
    assert (json.loads(record.tools)[0]["strict"], notes) == (None, {})


def test_nested_arguments_are_settled_by_their_own_schemas() -> None:
    place = {"type": "object", "properties": {"city": TEXT, "zip": {"type": ["string", "null"]}}}
    tools = [tool("go", to={"type": "array", "items": place}, free={"type": "object"})]
    value = conversation(
        call("go", to=[{"city": None, "zip": None}, {"city": "B", "land": None}], free={"x": None}), tools=tools
    )
    cleaned, found = without_padding(value)
    assert cleaned["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "to": [{"zip": None}, {"city": "B"}],
        "free": {"x": None},
    }
    assert found == (NULLS_KEPT, NULLS_LEFT_OUT)


def test_defaults_of_a_schema_may_be_null_and_lists_keep_their_nulls() -> None:
    schema = {"type": ["string", "null"], "default": None, "description": None, "enum": ["C", None]}
    cleaned, found = without_padding({"tools": [tool("t", unit=schema)], "x": [None, {"y": None}]})
    unit = cleaned["tools"][0]["function"]["parameters"]["properties"]["unit"]
    assert unit == {"type": ["string", "null"], "default": None, "enum": ["C", None]}
    assert (cleaned["x"], found) == ([None, {}], (NULLS_LEFT_OUT,))


def test_tools_under_another_name_are_settled_too(tmp_path: Path) -> None:
    value = conversation(call("weather", city="A", unit=None), functions_=[WEATHER])
    (record,), notes = read(tmp_path, [value], fields=FieldMapping(tools="functions_"))
    assert record.messages[-1].calls[0].arguments == '{"city": "A"}'
    assert notes == {NULLS_LEFT_OUT: 1}
