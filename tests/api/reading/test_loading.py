"""Loading: a run file is read, or its problems are reported by line; `--set` changes one field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stagecoach_api.conversation import Template
from stagecoach_api.kinds.sft import SftStage
from stagecoach_api.problems import InvalidRun, Problem
from stagecoach_api.reading.loading import load_run, parse_run
from stagecoach_api.reading.yaml_reader import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_scalar
from stagecoach_api.spec import TrainingRun
from tests import ROOT
from tests.api.makers import document_text

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def problems_of(text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(InvalidRun) as caught:
        parse_run(text, overrides, Path("run.yaml"))
    return caught.value.problems


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_run_file_gives_the_run_its_folder_and_the_document(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(document_text(), encoding="utf-8")
    loaded = load_run(path, ["seed=7"])
    assert loaded.run.spec.seed == 7
    assert (loaded.source, loaded.folder) == (path, tmp_path.resolve())
    assert loaded.document["spec"]["seed"] == 7
    assert "suspend" not in loaded.document["spec"]  # defaults are not written into it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    assert load_run(path).run.spec.stages


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_reader_agrees_with_pyyaml_where_yaml_1_1_and_1_2_do(path: Path) -> None:
    assert load_run(path).document == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_json_is_yaml() -> None:
    text = '{"metadata": {"name": "x"}, "spec": {"stages": [{"name": "a", "data": {"sources": [{"uri": "b"}]}}]}}'
    assert parse_run(text).run.metadata.name == "x"


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(document_text(), encoding="utf-8-sig")
    assert load_run(path).run.metadata.name == "demo"


def test_files_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for name, words in [
        ("none.yaml", "no such file"),
        (".", "is a folder"),
        ("latin.yaml", "must be UTF-8, and byte 9"),
    ]:
        with pytest.raises(InvalidRun, match=words) as caught:
            load_run(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


# -- YAML --------------------------------------------------------------------------------------------------------------

# (sentence, text, line, text the problem must contain)
UNREADABLE = [
    ("an empty file", "", None, "is empty"),
    ("a file of comments", "# nothing\n", None, "is empty"),
    ("a list", "- a\n", 1, "must be a mapping"),
    ("a word", "run\n", 1, "must be a mapping"),
    ("an alias", "a: &x 1\nb: *x\n", 1, "anchors are not supported"),
    ("an alias without an anchor", "a: 1\nb: *x\n", 2, "aliases are not supported"),
    (
        "a duplicate field",
        "kind: TrainingRun\nmetadata: {name: a}\nkind: TrainingRun\n",
        3,
        "given twice, first on line 1",
    ),
    ("a tag that makes an object", "a: 1\nb: !!python/object:os.system {}\n", 2, "tags are not supported"),
    ("a tag of one's own", "a: !secret x\n", 1, "tags are not supported"),
    ("binary data", "a: !!binary aGk=\n", 1, "tags are not supported"),
    ("a merge key", "a:\n  <<: {b: 1}\n", 2, "merge keys are not supported"),
    ("a list as a name", "? [a, b]\n: 1\n", 1, "a field name must be text"),
    ("two documents", "a: 1\n---\nb: 2\n", 2, "must be one document"),
    ("a tab", "a:\n\tb: 1\n", 2, "is not valid YAML"),
    ("an open bracket", "a: [1, 2\nb: 3\n", 2, "is not valid YAML"),
    ("a control character", "a: \x07\n", None, "characters that YAML does not allow"),
    ("too many levels", "a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 1, f"at most {MAX_DEPTH} levels"),
    ("very many levels", "{a: " * 100_000, 1, f"at most {MAX_DEPTH} levels"),
    ("too many values", "a: [" + "1," * MAX_NODES + "]", 1, "values"),
    ("too many bytes", "a: " + "x" * MAX_BYTES, None, "bytes"),
    ("yes", "spec:\n  suspend: yes\n", 2, "a boolean to kubectl"),
    ("No", "metadata:\n  name: No\n", 2, "a boolean to kubectl"),
    ("an octal number", "spec:\n  seed: 010\n", 2, "octal to kubectl"),
]


@pytest.mark.parametrize(
    ("text", "line", "words"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE]
)
def test_unsupported_yaml_is_reported_with_its_line(text: str, line: int | None, words: str) -> None:
    found = [problem for problem in problems_of(text) if words in str(problem)]
    assert [problem.line for problem in found] == [line]
    assert found[0].source == "run.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1e9", 10**9),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("1_000_000", 1_000_000),
        ("0x10", 16),
        ("0", 0),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("true", True),
        ("FALSE", False),
        ("", None),
        ("~", None),
        ("nulls", "nulls"),
        (".inf", float("inf")),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalars_are_read_as_kubectl_reads_them(text: str, value: Any) -> None:
    read = parse_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_quotes_make_text() -> None:
    assert parse_run(document_text().replace("name: demo", 'name: "123"')).run.metadata.name == "123"


def test_problems_name_the_line_and_are_in_the_order_of_the_file() -> None:
    text = document_text().replace("learningRate: 1.0e-4", "learningRate: 20").replace("s3://", "gs://")
    text = text.replace("template: {name: alpaca}", "template: {name: no}")
    lines = text.splitlines()
    found = problems_of(text)
    assert [problem.path.rpartition(".")[2] for problem in found] == ["uri", "name", "learningRate"]
    for problem, word in zip(found, ["gs://", "name: no", "learningRate: 20"], strict=True):
        assert problem.line is not None
        assert word in lines[problem.line - 1]
        assert str(problem).startswith(f"run.yaml:{problem.line}: s")


def test_a_missing_field_is_reported_on_the_line_of_its_parent() -> None:
    text = document_text().replace("batch: {samples: 8}", "batch: {}", 1)
    (found,) = problems_of(text)
    assert found.line is not None
    assert "batch: {}" in text.splitlines()[found.line - 1]


# -- overrides ---------------------------------------------------------------------------------------------------------


def sft(run: TrainingRun) -> SftStage:
    config = run.spec.stages[3].config
    assert isinstance(config, SftStage)
    return config


def _template(run: TrainingRun) -> Template:
    template = sft(run).template
    assert template is not None
    return template


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("stages.sft.optimizer.learningRate=2e-5", lambda run: sft(run).optimizer.learning_rate, 2e-5),
        ("stages.sft.sft.optimizer.learningRate=2e-5", lambda run: sft(run).optimizer.learning_rate, 2e-5),
        ("spec.stages.sft.batch.samples=4", lambda run: sft(run).batch.samples, 4),
        ("stages.3.batch.samples=4", lambda run: sft(run).batch.samples, 4),
        ("seed=1", lambda run: run.spec.seed, 1),
        ("storage.uri=file:///tmp/store", lambda run: run.spec.storage.uri, "file:///tmp/store"),
        ("metadata.name=other", lambda run: run.metadata.name, "other"),
        ("metadata.labels.team=nlp", lambda run: run.metadata.labels, {"team": "nlp"}),
        ("stages.sft.data.0.weight=2", lambda run: sft(run).data[0].weight, 2.0),
        ("stages.sft.data[0].maxSamples=5", lambda run: sft(run).data[0].max_samples, 5),
        ("stages.sft.resources.nodes=2", lambda run: run.spec.stages[3].resources.nodes, 2),
        ("stages.sft.seed=9", lambda run: run.spec.stages[3].seed, 9),
        ("defaults.retries.hang=0", lambda run: run.spec.defaults.retries.hang, 0),
        ("stages.pretrain.tokenizer={uri: base}", lambda run: run.spec.stages[2].pretrain.tokenizer.uri, "base"),
        ("stages.pretrain.data[0].maxSamples=3", lambda run: run.spec.stages[2].pretrain.data[0].max_samples, 3),
        ("stages.corpus.data.heldOutShare=0.2", lambda run: run.spec.stages[0].data.held_out_share, 0.2),
        ("stages.release.after=[]", lambda run: run.spec.stages[5].after, ()),
        ("stages.release.after[1]=corpus", lambda run: run.spec.stages[5].after, ("score", "corpus")),
        ("stages.sft.optimizer.clip=", lambda run: sft(run).optimizer.clip, None),
        ("stages.sft.template.system=a=b", lambda run: _template(run).system, "a=b"),
    ],
)
def test_an_override_changes_one_field(override: str, read: Any, expected: Any) -> None:
    assert read(parse_run(document_text(), [override]).run) == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.sft.optimzer.learningRate=1", "did you mean `optimizer`?"),
        ("stages.sft.optimizer.learning_rate=1", "did you mean `learningRate`?"),
        ("stages.stf.seed=1", "did you mean `sft`?"),
        ("sed=1", "did you mean `seed`?"),
        ("stages.sft.data[3].weight=1", "a number from 0 to 1"),
        ("seed.x=1", "is a single value"),
        ("stages=1", "names no stage"),
        ("stages.sft=1", "names a whole stage"),
        ("spec=1", "names all of the spec"),
        ("seed", "must be PATH=VALUE"),
        ("=1", "must be PATH=VALUE"),
        ("seed=[1", "is not valid YAML"),
        ("suspend=yes", "a boolean to kubectl"),
    ],
)
def test_an_override_that_matches_no_field_is_reported(override: str, words: str) -> None:
    (found,) = problems_of(document_text(), override)
    assert words in str(found)
    assert found.source == f"--set {override}"
    assert found.line is None


def test_a_bad_value_is_reported_with_the_override_it_came_from() -> None:
    (found,) = problems_of(document_text(), "stages.sft.optimizer.learningRate=20")
    assert str(found).startswith("--set stages.sft.optimizer.learningRate=20: stages.sft.sft.optimizer.learningRate:")


def test_the_last_of_two_overrides_holds_and_all_bad_ones_are_reported() -> None:
    assert parse_run(document_text(), ["seed=1", "seed=2"]).run.spec.seed == 2
    assert len(problems_of(document_text(), "sed=1", "stages.x.y=2")) == 2


def test_an_override_does_not_change_the_document_it_was_given() -> None:
    before = parse_run(document_text()).document
    parse_run(document_text(), ["stages.sft.data[0].weight=2"])
    assert parse_run(document_text()).document == before
