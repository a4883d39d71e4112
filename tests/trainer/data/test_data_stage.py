from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.kinds.data import DataStage
from stagecoach_api.references import RecordSource, Split
from stagecoach_api.store import open_store
from stagecoach_trainer.data.funnel import Funnel
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Record
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.stages.data import run
from tests import SHARED_DATA as SHARED
from tests.s3 import REGION, S3Server, make_bucket
from tests.trainer.data.makers import FolderContext, make_context, write_jsonl


def stage(**fields: Any) -> DataStage:
    return DataStage.model_validate(fields)


def report_of(context: FolderContext) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((context.output / "report.json").read_text(encoding="utf-8"))
    return report


def records_of(context: FolderContext, split: Split = Split.TRAIN) -> list[Record]:
    reader = FolderContext(**{**vars(context), "stages": {"corpus": context.output}})
    return list(read_records(reader, RecordSource(stage="corpus", split=split)))


def content_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


CODE = "Here:\n\n```python\ndef f(x):\n    if x:\n        return 1\n```\n\n\n| a   | b |\n|-----|---|\n| 1\t| 2 |\n"


def test_default_steps_keep_code_and_tables(tmp_path: Path) -> None:
    """open_llama#43, sentencepiece#650: a default must not flatten what the model learns to write."""
    answer = {"role": "assistant", "content": CODE}
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"messages": [{"role": "user", "content": "  code, please "}, answer]}])
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(tmp_path / "in")}]), context)
    (record,) = records_of(context)
    assert [turn.content for turn in record.messages] == ["  code, please ", CODE]
    assert report_of(context)["steps"][0]["changed"] == 0


def test_what_is_not_read_is_counted_and_named_once(tmp_path: Path) -> None:
    values = [{"text": f"text {n}", "id": n, **({"tag": "x"} if n % 2 else {})} for n in range(10)]
    write_jsonl(tmp_path / "in" / "a.jsonl", values)
    (tmp_path / "in" / "README.md").write_text("about", encoding="utf-8")
    (tmp_path / "in" / "scores.xlsx").write_bytes(b"PK")
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(tmp_path / "in"), "name": "web"}]), context)
    report = report_of(context)
    assert report["warnings"] == [
        "web: fields not read: id (10 records), tag (5 records)",
        "web: files not read: README.md, scores.xlsx",
    ]
    assert report["sources"]["web"]["notes"]["fieldNotRead.id"] == 10
    assert "Warning: web: files not read" in (context.output / "report.md").read_text(encoding="utf-8")


def test_labels_of_one_kind_and_scores_that_disagree_are_told(tmp_path: Path) -> None:
    """LLaMA-Factory's KTO: liked answers only teach nothing; and pairs whose scores are the other way round."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_jsonl(tmp_path / "kto.jsonl", [{"messages": turns, "label": True, "n": n} for n in range(3)])
    pairs = [
        {"prompt": f"q{n}", "chosen": "a", "rejected": "b", "score_chosen": n, "score_rejected": 2} for n in range(4)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    context = make_context(tmp_path)
    sources = [{"uri": str(tmp_path / name), "name": name} for name in ("kto.jsonl", "pairs.jsonl")]
    run(stage(sources=sources), context)
    warnings = report_of(context)["warnings"]
    assert "pairs.jsonl: in 2 records the preferred answer has a lower score" in warnings[1]
    assert "all 3 answers are liked" in warnings[2]
    assert [answer.liked for record in records_of(context) for answer in record.answers if answer.rank is None] == [
        True
    ]


def test_blank_answers_are_counted(tmp_path: Path) -> None:
    values = [{"instruction": f"q{n}", "output": "  \n" if n < 2 else "a"} for n in range(5)]
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(write_jsonl(tmp_path / "a.jsonl", values))}]), context)
    assert "2 answers of the assistant are blank" in report_of(context)["warnings"][0]


def test_a_wrong_format_is_one_sentence_with_the_format_that_fits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": f"q{n}", "output": "a" * 500} for n in range(50)])
    with pytest.raises(UserError) as caught:
        run(stage(sources=[{"uri": str(path), "format": "sharegpt"}]), make_context(tmp_path))
    message = str(caught.value)
    assert message.count("`conversations`") == 1
    assert "a.jsonl:1 and 49 more: `conversations` must be a list" in message
    assert "it looks like `alpaca`: set `format: alpaca`" in message


@given(st.lists(st.dictionaries(st.text(max_size=30), st.text(max_size=400), min_size=1), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_messages_about_malformed_records_are_bounded(values: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = [
            {"messages": [{"role": key * 50, "content": text} for key, text in value.items()]} for value in values
        ]
        path = write_jsonl(Path(folder) / "a.jsonl", records)
        with pytest.raises(UserError) as caught:
            run(stage(sources=[{"uri": str(path), "format": "messages"}]), make_context(Path(folder)))
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)


def test_a_data_set_of_real_poems_and_english_reads_back(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    config = stage(
        sources=[
            {"uri": str(SHARED / "corpus" / "chinese_classics.jsonl"), "name": "zh", "maxSamples": 3000},
            {"uri": str(SHARED / "corpus" / "wiki_en.txt"), "name": "en"},
        ],
        heldOutShare=0.1,
    )
    outcome = run(config, context)
    train, held_out = records_of(context), records_of(context, Split.HELD_OUT)
    assert outcome.metrics["records.train"] == len(train)
    assert outcome.metrics["records.heldOut"] == len(held_out)
    assert outcome.metrics["records.read"] == 3030
    assert outcome.metrics["characters.train"] == sum(len(record.content) for record in train)
    assert 250 < len(held_out) < 350
    assert {record.source for record in train} == {"zh", "en"}
    assert not {record.text for record in train} & {record.text for record in held_out}
    assert "| read | 3,000 | 30 | 3,030 |" in (context.output / "report.md").read_text(encoding="utf-8")


def test_equal_runs_give_equal_bytes_and_another_seed_reorders(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n % 90}"} for n in range(100)])
    config = stage(sources=[{"uri": str(path)}], heldOutShare=0.2, shardBytes=1024)
    contexts = [make_context(tmp_path / name, seed) for name, seed in (("x", 1), ("y", 1), ("z", 2))]
    for context in contexts:
        run(config, context)
    first, again, other = (content_of(context.output) for context in contexts)
    assert first == again
    assert first["train/part-00000.jsonl.zst"] != other["train/part-00000.jsonl.zst"]


def test_order_as_given_keeps_the_order(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(path)}], order="asGiven"), context)
    assert [record.text for record in records_of(context)] == texts


def test_conversations_keep_turns_inputs_and_tools(tmp_path: Path) -> None:
    path = SHARED / "sft" / "toolcall_sharegpt_zh.json"
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(path)}], steps=[], order="asGiven"), context)
    original = list(read_records(context, RecordSource(uri=str(path))))
    assert records_of(context) == original
    alpaca = make_context(tmp_path / "alpaca")
    run(stage(sources=[{"uri": str(SHARED / "sft" / "alpaca_en.json")}], steps=[], order="asGiven"), alpaca)
    assert any(record.messages[0].input for record in records_of(alpaca))
    index = json.loads((alpaca.output / "index.json").read_text(encoding="utf-8"))
    assert (index["format"], index["splits"]["train"]["records"]) == ("conversation", 999)


def test_weights_write_records_more_or_less_often(tmp_path: Path) -> None:
    sources = []
    for name, weight in (("half", 0.5), ("once", 1), ("more", 2.5), ("none", 0)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(1000)])
        sources.append({"uri": str(path), "name": name, "weight": weight})
    context = make_context(tmp_path)
    run(stage(sources=sources), context)
    written = Counter(record.source for record in records_of(context))
    assert written["once"] == 1000
    assert 430 < written["half"] < 570
    assert 2430 < written["more"] < 2570
    assert "none" not in written
    funnels = report_of(context)["sources"]
    assert funnels["none"]["dropped"] == {"weight": 1000}
    assert funnels["more"]["train"] == 1000
    assert funnels["more"]["trainWritten"] == written["more"]


def test_malformed_records_are_counted_listed_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\n".join([b'{"text": "a"}', b'{"text": ', b'{"text": "\xff"}', b'{"txt": "b"}', b'{"text": "c"}'])
    )
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(path)}], maxMalformedShare=0.6), context)
    assert sorted(record.text or "" for record in records_of(context)) == ["a", "c"]
    listed = {item["where"]: item["reason"] for item in report_of(context)["malformed"]}
    assert list(listed) == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert "a.jsonl:3`: bad UTF-8" in (context.output / "report.md").read_text(encoding="utf-8")
    with pytest.raises(
        UserError, match=r"3 of 5 records are malformed \(60.00%; maxMalformedShare allows 59.00%\): a\.jsonl:2"
    ):
        run(stage(sources=[{"uri": str(path)}], maxMalformedShare=0.59), make_context(tmp_path / "b"))


def test_only_the_first_twenty_malformed_records_are_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, *({"text": n} for n in range(25))])
    with pytest.raises(UserError, match=r"25 of 26 .*a\.jsonl:2 and 24 more: `text` must be a string, got int\. "):
        run(stage(sources=[{"uri": str(path)}]), make_context(tmp_path))


@pytest.mark.parametrize(
    ("texts", "fields", "message"),
    [
        pytest.param([], {}, "the sources have no records", id="an empty file"),
        pytest.param(
            ["ab", "ab", "cd"],
            {"steps": [{"length": {"minCharacters": 9}}]},
            "most, 3, were dropped by `length.tooShort`",
            id="a step drops all",
        ),
        pytest.param(["ab", "cd"], {"heldOutShare": 1e-9}, "the split `heldout` is empty", id="nothing is held out"),
        pytest.param(["ab", "cd"], {"heldOutShare": 1 - 1e-9}, "the split `train` is empty", id="all is held out"),
    ],
)
def test_an_empty_data_set_is_rejected_with_the_reason(
    tmp_path: Path, texts: list[str], fields: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    with pytest.raises(UserError, match=message):
        run(stage(sources=[{"uri": str(path)}], **fields), make_context(tmp_path))


def test_documents_and_conversations_do_not_mix(tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    chat = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "q", "output": "a"}])
    with pytest.raises(UserError, match=r"b\.jsonl:1: source b\.jsonl has a conversation record"):
        run(stage(sources=[{"uri": str(text)}, {"uri": str(chat)}]), make_context(tmp_path))


def test_the_stop_flag_interrupts(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    context.stop.set()
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(Interrupted):
        run(stage(sources=[{"uri": str(path)}]), context)


def test_sources_of_the_same_name_get_distinct_labels(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / name / "a.jsonl", [{"text": name}]) for name in ("x", "y")]
    context = make_context(tmp_path)
    run(stage(sources=[{"uri": str(path)} for path in paths]), context)
    assert list(report_of(context)["sources"]) == ["a.jsonl", "a.jsonl#2"]


def test_a_glob_on_s3_is_read_like_a_folder(tmp_path: Path, s3_server: S3Server) -> None:
    make_bucket(s3_server.endpoint, "raw-data")
    store = open_store("s3://raw-data/in", endpoint=s3_server.endpoint, region=REGION)
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        store.upload(write_jsonl(tmp_path / name, [{"text": f"{name} {n}"} for n in range(3)]), name)
    context = make_context(tmp_path, store=store)
    run(stage(sources=[{"uri": "s3://raw-data/in/*.jsonl", "name": "s3"}], order="asGiven"), context)
    expected = [f"{name}.jsonl {n}" for name in "ab" for n in range(3)]
    assert [record.text for record in records_of(context)] == expected


def test_a_lost_record_raises_runtime_error() -> None:
    funnel = Funnel(read=3, malformed=1, train=1)
    with pytest.raises(RuntimeError, match="funnel of x: 3 records read, 2 accounted for"):
        funnel.check("x")


LINE = st.one_of(
    st.text(alphabet="ab \n床前", max_size=6).map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from([b'{"text": ', b'{"text": "\xff"}', b'{"txt": "a"}', b"[1]"]),
)
STEPS: list[dict[str, Any]] = [
    {"normalize": {}},
    {"length": {"minCharacters": 2, "maxCharacters": 4}},
    {"match": {"drop": "ab"}},
    {"characterShare": {"script": "cjk", "atLeast": 0.2}},
    {"repetition": {}},
    {"deduplicate": {}},
]


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.tuples(st.lists(LINE, max_size=25), st.sampled_from([0, 0.5, 1, 2])), min_size=1, max_size=3),
    steps=st.lists(st.sampled_from(STEPS), max_size=5),
    held_out_share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_record_read_is_written_or_dropped_for_a_reason(
    sources: list[tuple[list[bytes], float]], steps: list[dict[str, Any]], held_out_share: float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given_sources = []
        for index, (lines, weight) in enumerate(sources):
            (folder / f"{index}.jsonl").write_bytes(b'{"text": "first"}\n' + b"\n".join(lines))
            given_sources.append({"uri": str(folder / f"{index}.jsonl"), "format": "text", "weight": weight})
        context = make_context(folder)
        config = stage(sources=given_sources, steps=steps, heldOutShare=held_out_share, maxMalformedShare=1)
        try:
            run(config, context)
        except UserError as error:
            if "empty" not in str(error):
                raise
            return
        report = report_of(context)
        index = json.loads((context.output / "index.json").read_text(encoding="utf-8"))
        for (lines, _), funnel in zip(sources, report["sources"].values(), strict=True):
            assert funnel["read"] == len(lines) + 1
            assert funnel["read"] == sum(
                (funnel["malformed"], sum(funnel["dropped"].values()), funnel["train"], funnel["heldOut"])
            )
        written = [funnel["trainWritten"] for funnel in report["sources"].values()]
        assert index["splits"]["train"]["records"] == sum(written)
        assert index["splits"]["heldout"]["records"] == report["total"]["heldOut"]
        splits = [split for split in Split if index["splits"][split.value]["records"]]
        texts = {split: {(r.text or "").strip() for r in records_of(context, split)} for split in splits}
        assert len(texts) < 2 or not texts[Split.TRAIN] & texts[Split.HELD_OUT]
