"""`stagecoach validate` and `plan`: everything that can be known about a run before it starts, at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagecoach_local.prepare import check_on_this_machine, prepare
from stagecoach_local.workspace import Workspace
from tests.cli.makers import Bench, Cli, chain, data_stage

FILE = """\
apiVersion: stagecoach.dev/v1alpha1
kind: TrainingRun
metadata: {name: tune}
spec:
  storage:
    uri: occupied
  stages:
  - name: tune
    sft:
      model: {uri: base.bin}
      data:
      - {uri: data.json, format: sharegpt}
      template: {name: chatml}
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-4}
  - name: other
    sft:
      model: {uri: Qwen/Qwen2.5-7B}
      data: [{uri: data.json}]
      template: {name: chatml}
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-4}
  - name: release
    export: {model: {uri: "s3://models/base"}}
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file in which almost everything is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(FILE, encoding="utf-8")
    (tmp_path / "occupied").write_text("a file", encoding="utf-8")
    (tmp_path / "base.bin").write_bytes(b"")
    records = [{"instruction": "a", "input": "", "output": "b"}] * 3
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


EXPECTED = [
    (6, "spec.storage.uri", "must be a folder, and "),
    (10, "stages.tune.sft.model.uri", "a model is a folder in Hugging Face layout, this is a file"),
    (12, "stages.tune.sft.data[0].format", "of the first 3 records none can be read as `sharegpt`: data.json:1"),
    (18, "stages.other.sft.model.uri", "cannot be read: there is no such file"),
]


def test_validate_reports_all_problems_of_inputs_and_storage_with_their_lines(broken: Path, cli: Cli) -> None:
    code, output = cli("validate", "run.yaml")
    assert code == 2
    assert "4 problems in the run" in output
    for line, path, rule in EXPECTED:
        assert f"- run.yaml:{line}: {path}: {rule}" in output
    assert "`hf download Qwen/Qwen2.5-7B --local-dir models/Qwen2.5-7B`" in output
    assert "not looked into: s3://models/base is remote" in output


def test_validate_prints_json_for_scripts(broken: Path, cli: Cli) -> None:
    code, output = cli("validate", "run.yaml", "-o", "json")
    found: dict[str, Any] = json.loads(output)
    assert (code, found["valid"], found["run"], found["stages"]) == (2, False, "tune", ["tune", "other", "release"])
    places = [(problem["line"], problem["path"]) for problem in found["problems"]]
    assert places == [(line, path) for line, path, _ in EXPECTED]
    assert found["problems"][2]["value"] == "sharegpt"
    assert found["notLookedInto"] == ["s3://models/base is remote"]


def test_json_of_an_unreadable_file_has_its_problems_too(broken: Path, cli: Cli) -> None:
    (broken / "run.yaml").write_text("kind: [", encoding="utf-8")
    code, output = cli("validate", "run.yaml", "--output", "json")
    found = json.loads(output)
    assert (code, found["valid"], found["run"], len(found["problems"])) == (2, False, None, 1)


def test_plan_finds_what_validate_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    stage = data_stage("corpus")
    stage["data"]["sources"][0] |= {"uri": "data/corpus.jsonl"}
    bench.write([stage])
    (tmp_path / "data" / "corpus.jsonl").write_text('{"words": "a"}\n', encoding="utf-8")
    code, output = cli("plan", "run.yaml")
    assert code == 2
    assert "run.yaml:1: stages.corpus.data.sources[0].format: of the first 1 records none can be read" in output


@pytest.mark.parametrize("option", [True, False])
def test_a_storage_that_is_a_file_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, option: bool
) -> None:
    """The first stage did all its work, could not store it, and was tried again for an hour."""
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    bench.write(chain()[:1], **({} if option else {"storage": {"uri": "occupied"}}))
    (tmp_path / "occupied").write_text("a file", encoding="utf-8")
    code, output = cli("run", "run.yaml", *(("--storage", "occupied") if option else ()))
    assert code == 2
    assert ("--storage: must be a folder" if option else "run.yaml:1: spec.storage.uri: must be a folder") in output
    assert bench.started() == []


def test_a_home_folder_is_found_in_uris_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    (home / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    (home / "data" / "corpus.txt").write_text("a text\n", encoding="utf-8")
    bench = Bench(work)
    stage = data_stage("corpus")
    stage["data"]["sources"][0] |= {"uri": "~/data/corpus.txt"}
    bench.write([stage], storage={"uri": "~/artifacts"})
    loaded, look = check_on_this_machine(bench.file, Workspace(work / ".stagecoach"))
    assert (loaded.run.metadata.name, look.problems, look.unseen) == ("tiny", (), ())
    stores = [prepare(bench.file, Workspace(work), storage=option).store.uri for option in (None, "~/other")]
    assert stores == [f"file://{home}/artifacts", f"file://{home}/other"]


def test_the_home_of_an_unknown_user_is_a_problem_of_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    stage = data_stage("corpus")
    stage["data"]["sources"][0] |= {"uri": "~no-such-user/corpus.txt"}
    bench.write([stage])
    code, output = cli("validate", "run.yaml")
    assert code == 2
    assert "stages.corpus.data.sources[0].uri" in output
    assert "has no home folder" in output


def test_the_version_is_an_option_as_of_every_command(cli: Cli) -> None:
    code, output = cli("--version")
    assert code == 0
    assert output == cli("version")[1]
