"""Sets of LLaMA-Factory's `dataset_info.json`, with the entries that its documentation shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, RecordSource
from stagecoach_trainer.data.dataset_info import ENTRY_KEYS, HUB_KEYS, read_entries
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Record, ToolCall
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.data.makers import make_context

HUMAN, GPT = {"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def read(folder: Path, entry: Any, values: list[dict[str, Any]], **source: Any) -> list[Record]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "set.json").write_text(json.dumps(values), encoding="utf-8")
    entries = {"mine": entry, "other": {"hf_hub_url": "owner/set"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    chosen = RecordSource(uri=str(folder / "data"), **{"dataset": "mine", **source})
    context = make_context(folder, seed=len(list(folder.glob("work-*"))))
    return list(read_records(context, chosen))


def said(record: Record) -> list[tuple[Role, str]]:
    return [(turn.role, turn.content) for turn in record.messages]


FILE = {"file_name": "set.json"}
ASKED, REPLIED = (Role.USER, "ask"), (Role.ASSISTANT, "reply")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        pytest.param(FILE, {"instruction": "ask", "output": "reply"}, id="alpaca by default"),
        pytest.param(
            FILE | {"columns": {"prompt": "Q", "query": "", "response": "A"}}, {"Q": "ask", "A": "reply"}, id="columns"
        ),
        pytest.param(FILE | {"formatting": "sharegpt"}, {"conversations": [HUMAN, GPT]}, id="sharegpt"),
        pytest.param(
            FILE | {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS},
            {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]},
            id="OpenAI's turns by tags",
        ),
        pytest.param(
            FILE | {"formatting": "openai", "columns": {"messages": "messages"}},
            {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]},
            id="openai",
        ),
        pytest.param(
            FILE | {"split": "train", "ranking": False}, {"instruction": "ask", "output": "reply"}, id="defaults given"
        ),
    ],
)
def test_a_conversation_is_read_as_its_entry_states(tmp_path: Path, entry: Any, value: dict[str, Any]) -> None:
    (record,) = read(tmp_path, entry, [value])
    assert said(record) == [ASKED, REPLIED]
    assert (record.source, record.unread) == ("mine", ())


def test_named_columns_of_alpaca_are_read(tmp_path: Path) -> None:
    columns = {"prompt": "p", "query": "q", "response": "r", "history": "h", "system": "s"}
    value = {"p": "ask", "q": "more", "r": "reply", "h": [["q1", "a1"]], "s": "be kind"}
    (record,) = read(tmp_path, FILE | {"columns": columns}, [value])
    earlier = [(Role.SYSTEM, "be kind"), (Role.USER, "q1"), (Role.ASSISTANT, "a1")]
    assert said(record) == [*earlier, ASKED, REPLIED]
    assert record.messages[-2].input == "more"


def test_calls_are_read_under_their_tags(tmp_path: Path) -> None:
    call, result = '{"name": "f", "arguments": {"x": 1}}', "3"
    turns = [
        {"role": "u", "text": "ask"},
        {"role": "call", "text": call},
        {"role": "obs", "text": result},
        {"role": "a", "text": "reply"},
    ]
    tags = {
        **{"role_tag": "role", "content_tag": "text", "user_tag": "u", "assistant_tag": "a"},
        **{"observation_tag": "obs", "function_tag": "call"},
    }
    entry = FILE | {"formatting": "sharegpt", "columns": {"messages": "turns", "tools": "functions"}, "tags": tags}
    (record,) = read(tmp_path, entry, [{"turns": turns, "functions": '[{"name": "f"}]'}])
    assert said(record) == [ASKED, (Role.ASSISTANT, ""), (Role.TOOL, "3"), REPLIED]
    assert record.messages[1].calls == (ToolCall("f", '{"x": 1}'),)
    assert json.loads(record.tools or "")[0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (
            {"ranking": True, "columns": {"prompt": "instruction", "chosen": "good", "rejected": "poor"}},
            {"instruction": "ask", "good": "reply", "poor": "other"},
        ),
        (
            {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "c", "chosen": "g", "rejected": "p"}},
            {"c": [HUMAN], "g": GPT, "p": {"from": "gpt", "value": "other"}},
        ),
    ],
)
def test_rankings_are_pairs(tmp_path: Path, entry: dict[str, Any], value: dict[str, Any]) -> None:
    (record,) = read(tmp_path, FILE | entry, [value])
    assert said(record) == [ASKED]
    assert [(answer.content, answer.rank) for answer in record.answers] == [("reply", 1), ("other", 2)]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ({"columns": {"kto_tag": "good"}}, {"instruction": "ask", "output": "reply", "good": False}),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": TAGS},
            {
                "messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}],
                "label": False,
            },
        ),
    ],
)
def test_kto_tags_are_labels(tmp_path: Path, entry: dict[str, Any], value: dict[str, Any]) -> None:
    (record,) = read(tmp_path, FILE | entry, [value])
    assert said(record) == [ASKED]
    assert [(answer.content, answer.liked) for answer in record.answers] == [("reply", False)]


def test_the_smaller_number_of_samples_counts(tmp_path: Path) -> None:
    values = [{"instruction": f"q{n}", "output": "a"} for n in range(9)]
    entry = FILE | {"num_samples": 4}
    assert len(read(tmp_path, entry, values)) == 4
    assert len(read(tmp_path, entry, values, max_samples=2)) == 2
    assert [record.messages[0].content for record in read(tmp_path, entry, values, max_samples=7)][-1] == "q3"


def test_a_set_may_be_a_folder_and_ignore_fields(tmp_path: Path) -> None:
    (tmp_path / "data" / "parts").mkdir(parents=True)
    (tmp_path / "data" / "parts" / "a.csv").write_text("instruction,output,weight\nask,reply,x\n", encoding="utf-8")
    (record,) = read(tmp_path, {"file_name": "parts"}, [], fields=FieldMapping(ignore=("weight",)))
    assert said(record) == [ASKED, REPLIED]
    assert record.unread == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "owner/set"}, "`hf_hub_url` names a set of a hub; .* download it"),
        ({"ms_hub_url": "owner/set"}, "`ms_hub_url` names a set of a hub"),
        ({"script_url": "loader"}, "`script_url` names a set of a hub"),
        (FILE | {"colums": {}}, "unknown keys colums; allowed are file_name"),
        (FILE | {"columns": {"promt": "p"}}, "unknown `columns` promt; allowed are prompt"),
        (FILE | {"tags": {"bot_tag": "b"}, "formatting": "sharegpt"}, "unknown `tags` bot_tag"),
        (FILE | {"columns": {"images": "images"}}, "`columns.images`: media are not read"),
        (FILE | {"formatting": "vicuna"}, "unknown `formatting` 'vicuna'; allowed are alpaca"),
        (FILE | {"subset": "en"}, "`subset: en` selects a part"),
        (FILE | {"split": "test"}, "`split: test` selects a part"),
        (FILE | {"num_samples": 0}, "`num_samples` must be a whole number"),
        (FILE | {"ranking": "yes"}, "`ranking` must be true or false"),
        ({"file_name": "../set.json"}, "`file_name` must be a file or folder below"),
        ({"file_name": "absent.json"}, r"there is no file absent\.json"),
    ],
)
def test_an_entry_that_cannot_be_honoured_is_refused_by_name(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"dataset_info\.json: mine: .*{message}"):
        read(tmp_path, entry, [])


def test_a_set_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'your'; it has mine, other"):
        read(tmp_path, FILE, [], dataset="your")


def test_the_folder_alone_is_refused_with_its_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name one of its sets with `dataset` \(mine, other\)"):
        read(tmp_path, FILE, [], dataset=None)


def test_dataset_needs_the_folder(tmp_path: Path) -> None:
    read(tmp_path, FILE, [])
    context = make_context(tmp_path, seed=2)
    with pytest.raises(UserError, match="give the folder's URI"):
        list(read_records(context, RecordSource(uri=str(tmp_path / "data" / "dataset_info.json"), dataset="mine")))
    (tmp_path / "data" / "dataset_info.json").write_text('{"features": {}, "builder_name": "json"}', encoding="utf-8")
    with pytest.raises(UserError, match="needs LLaMA-Factory's dataset_info"):
        list(read_records(context, RecordSource(uri=str(tmp_path / "data"), dataset="mine")))
    assert len(list(read_records(context, RecordSource(uri=str(tmp_path / "data"))))) == 0
    with pytest.raises(ValueError, match="`dataset` names a set of the folder at `uri`"):
        RecordSource(stage="corpus", dataset="mine")


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.text(max_size=5), min_size=1, max_size=3))
def test_unknown_keys_are_always_refused(tmp_path_factory: pytest.TempPathFactory, more: dict[str, str]) -> None:
    more = {key: value for key, value in more.items() if key not in (*ENTRY_KEYS, *HUB_KEYS)}
    if more:
        with pytest.raises(UserError, match="unknown keys"):
            read(tmp_path_factory.mktemp("set"), FILE | more, [])


def test_a_description_by_others_is_none(tmp_path: Path) -> None:
    assert read_entries(tmp_path) is None
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": {}}}', encoding="utf-8")
    assert read_entries(tmp_path) is None
