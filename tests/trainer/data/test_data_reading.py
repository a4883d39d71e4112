from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, Format, RecordSource, Split
from stagecoach_trainer.data.notes import Notes, warnings_of
from stagecoach_trainer.data.reading import Malformed, read_path, read_records
from stagecoach_trainer.data.records import Record, Turn
from stagecoach_trainer.runtime.errors import UserError
from tests import SHARED_DATA as SHARED
from tests.trainer.data.makers import make_context, write_jsonl


@pytest.mark.parametrize(
    ("name", "count", "turns"),
    [
        ("corpus/c4_en.jsonl", 300, 0),
        ("corpus/wiki_en.txt", 30, 0),
        ("sft/alpaca_zh.json", 1000, 2),
        ("sft/alpaca_en.json", 999, 2),
        ("sft/huangdi_tcm_sample.json", 100, 2),
        ("sft/toolcall_sharegpt_zh.json", 300, 4),
    ],
)
def test_real_files_are_read_completely_without_settings(tmp_path: Path, name: str, count: int, turns: int) -> None:
    path = SHARED / name
    records = list(read_records(make_context(tmp_path), RecordSource(uri=str(path))))
    assert len(records) == count
    assert len(records[0].messages) == turns
    assert {record.source for record in records} == {path.name}
    assert records[0].where.startswith(f"{path.name}:")


def test_classical_poems_equal_plain_json(tmp_path: Path) -> None:
    path = SHARED / "corpus" / "chinese_classics.jsonl"
    records = read_records(make_context(tmp_path), RecordSource(uri=str(path), max_samples=2000))
    with path.open(encoding="utf-8") as file:
        expected = [json.loads(line)["text"] for line in islice(file, 2000)]
    assert [record.text for record in records] == expected


def test_a_glob_reads_only_matching_files_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write_jsonl(tmp_path / "in" / name, [{"text": f"{name} {n}"} for n in range(2)])
    source = RecordSource(uri=str(tmp_path / "in" / "*.jsonl"))
    found = [(record.text, record.where) for record in read_records(make_context(tmp_path), source)]
    assert found == [
        ("a.jsonl 0", "a.jsonl:1"),
        ("a.jsonl 1", "a.jsonl:2"),
        ("b.jsonl 0", "b.jsonl:1"),
        ("b.jsonl 1", "b.jsonl:2"),
    ]


def test_a_folder_is_read_recursively_without_its_readme(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "deep" / "a.jsonl", [{"text": "one"}])
    (tmp_path / "in" / "b.txt").write_text("two\n", encoding="utf-8")
    (tmp_path / "in" / "README.md").write_text("about this data\n", encoding="utf-8")
    (tmp_path / "in" / "_SUCCESS").write_bytes(b"")
    found = list(read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / "in"))))
    assert [(record.text, record.where) for record in found] == [("two", "b.txt:1"), ("one", "deep/a.jsonl:1")]


def test_a_folder_reads_every_layout_and_names_the_files_it_does_not(tmp_path: Path) -> None:
    """A CSV file next to JSON lines was skipped without a word."""
    folder, other = tmp_path / "in", tmp_path / "other"
    write_jsonl(folder / "a.jsonl", [{"instruction": "one", "output": "1"}])
    (folder / "b.csv").write_text("instruction,output\ntwo,2\n", encoding="utf-8")
    (folder / "c.tsv").write_text("instruction\toutput\nthree\t3\n", encoding="utf-8")
    write_jsonl(other / "d.jsonl", [{"instruction": "four", "output": "4"}])
    (folder / "linked").symlink_to(other)
    unread = ("LICENSE", "README.md", "_SUCCESS", "chart.png", "license.txt", "notes.docx")
    for name in (*unread, ".hidden"):
        (folder / name).write_bytes(b"x")
    notes: Counter[str] = Counter()
    records = read_records(make_context(tmp_path), RecordSource(uri=str(folder)), notes)
    assert [record.messages[0].content for record in records] == ["one", "two", "three", "four"]
    assert notes == {f"fileNotRead.{name}": 1 for name in unread}


@pytest.mark.parametrize("name", ["a.docx", "a.html", "a", "a.log"])
@pytest.mark.parametrize("format_", [Format.TEXT, Format.AUTO])
def test_a_file_that_cannot_be_read_is_not_text(tmp_path: Path, name: str, format_: Format) -> None:
    """`format: text` made fragments of any file."""
    (tmp_path / name).write_bytes(b"words\n\nmore words\n")
    with pytest.raises(UserError, match=rf"^{name}: .*end its name in \.txt if it is plain text"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / name), format=format_)))


def test_calls_and_tools_in_parquet_have_their_own_arguments_only(tmp_path: Path) -> None:
    """ms-swift#10125, #6467: a model learnt `{"city": "A", "x": null, "y": null}`."""

    def talk(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        properties = {key: {"type": "string", **({"enum": ["A"]} if key == "city" else {})} for key in arguments}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        call = {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "content": "ok", "tool_call_id": f"call_{name}"}
        return {"messages": [{"role": "user", "content": "ask"}, answer, result], "tools": [tool]}

    values = [talk("weather", {"city": "A"}), talk("add", {"x": 1, "y": 2})]
    table = pa.Table.from_pylist(values)
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / "a.parquet"))))
    path = write_jsonl(tmp_path / "a.jsonl", values)
    expected = list(read_records(make_context(tmp_path, 2), RecordSource(uri=str(path))))
    assert [(record.messages, json.loads(record.tools or "")) for record in found] == [
        (record.messages, json.loads(record.tools or "")) for record in expected
    ]
    assert [turn.calls[0].arguments for record in found for turn in record.messages if turn.calls] == [
        '{"city": "A"}',
        '{"x": 1, "y": 2}',
    ]


def test_csv_is_read_with_field_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Frage,"Meine Antwort",n\n"a\nb",c,1\n', encoding="utf-8")
    fields = FieldMapping(instruction="Frage", output="Meine Antwort")
    (record,) = read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / "a.csv"), fields=fields))
    assert record.messages == (Turn(Role.USER, "a\nb"), Turn(Role.ASSISTANT, "c"))
    assert (record.where, record.unread) == ("a.csv:2", ("n",))
    with pytest.raises(UserError, match=r"a\.csv:2: `text` must be a string, got no such field"):
        list(read_records(make_context(tmp_path, 2), RecordSource(uri=str(tmp_path / "a.csv"), format=Format.TEXT)))


def test_ignored_fields_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}]
    value = {"messages": turns, "label": 1, "text": "another", "conversations": turns, "images": ["a.png"]}
    fields = FieldMapping(ignore=("label", "text", "conversations", "images"))
    source = RecordSource(uri=str(write_jsonl(tmp_path / "a.jsonl", [value])), fields=fields)
    notes: Counter[str] = Counter()
    (record,) = read_records(make_context(tmp_path), source, notes)
    assert record.messages == (Turn(Role.USER, "ask"), Turn(Role.ASSISTANT, "reply"))
    assert notes == {}


def test_a_folder_of_documents_alone_is_read(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "README.md"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(f"about {name}\n", encoding="utf-8")
    found = list(read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / "in"))))
    assert [record.text for record in found] == ["about a.md", "about b.md"]


def test_a_folder_without_data_is_refused_with_what_is_there(tmp_path: Path) -> None:
    """What `datasets` writes with `save_to_disk`."""
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"no data files found \(there are: data-00000-of-00001\.arrow"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / "in"))))


def test_a_record_of_another_format_is_refused_with_the_format_that_fits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match="it looks like `alpaca`: set `format: alpaca`"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(path), format=Format.SHAREGPT)))


def test_a_message_is_never_long(tmp_path: Path) -> None:
    many = {f"a field with a long name {n}" * 9: n for n in range(500)}
    path = write_jsonl(tmp_path / "a.jsonl", [many])
    for number, format_ in enumerate((Format.AUTO, Format.MESSAGES, Format.PAIRS), start=3):
        with pytest.raises(UserError) as caught:
            list(read_records(make_context(tmp_path, number), RecordSource(uri=str(path), format=format_)))
        assert len(str(caught.value)) < 1500
        assert "488 more" in str(caught.value) or "…" in str(caught.value)


def test_a_malformed_record_stops_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(UserError, match=r"^a\.jsonl:2: malformed JSON"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(path))))


def test_an_unknown_layout_is_rejected_with_the_fields_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: the layout cannot be detected from the fields \['question'\]"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(path))))


def test_a_text_file_among_conversations_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt: a text file has no `alpaca` records"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(tmp_path / "a.txt"), format=Format.ALPACA)))


def test_an_empty_split_is_rejected_with_advice(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    splits = {"train": {"shards": [], "records": 0}, "heldout": {"shards": [], "records": 0}}
    index = {"format": "text", "splits": splits, "sources": {}}
    (tmp_path / "set" / "index.json").write_text(json.dumps(index), encoding="utf-8")
    context = make_context(tmp_path, stages={"corpus": tmp_path / "set"})
    with pytest.raises(UserError, match=r"stage:corpus: .*`heldout`; set `heldOutShare`"):
        list(read_records(context, RecordSource(stage="corpus", split=Split.HELD_OUT)))


def test_the_content_of_a_record_is_all_its_text() -> None:
    record = Record(messages=(Turn(Role.USER, "do", "it"), Turn(Role.ASSISTANT, "done")))
    assert record.content == "do\nit\ndone"
    assert Record(text="a").content == "a"


def test_reading_records_imports_no_torch() -> None:
    code = (
        "import sys, stagecoach_trainer.stages.data, stagecoach_trainer.stages.tokenizer; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_what_is_not_read_is_a_warning_unless_the_caller_counts_it(tmp_path: Path) -> None:
    """Exact match, rewards and the fit of propositions read records without counting what is in them."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "topic": 1}, {"text": "b", "lang": "x"}, {"text": "c"}])
    source = RecordSource(uri=str(path))
    context = make_context(tmp_path)
    assert [record.text for record in islice(read_records(context, source), 2)] == ["a", "b"]
    assert context.progress.warnings == [f"{source.label}: fields not read: lang (1 records), topic (1 records)"]
    counting, notes = make_context(tmp_path, 2), Notes()
    assert len(list(read_records(counting, source, notes))) == 3
    assert (counting.progress.warnings, notes) == ([], {"fieldNotRead.topic": 1, "fieldNotRead.lang": 1})


def test_a_field_that_occurs_twice_is_an_error_and_a_file_without_records_is_named(tmp_path: Path) -> None:
    """Python keeps the last of two fields of one name; an upload that was cut off at its start is an empty file."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    (folder / "b.jsonl").write_text("\n")
    notes = Notes()
    malformed, record = read_path(folder, RecordSource(uri="in"), notes)
    assert isinstance(malformed, Malformed)
    assert malformed.reason == "malformed JSON: the field 'text' occurs twice"
    assert isinstance(record, Record)
    assert record.text == "c"
    assert warnings_of(notes, "in") == ["in: files without a record: b.jsonl"]
