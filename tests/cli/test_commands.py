"""The output and exit code of every command, on runs of the fake trainer."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.store import open_store
from stagecoach_api.stores.lookup import read_manifest
from stagecoach_cli.artifacts.store import list_all
from stagecoach_cli.commands.artifacts import artifacts_table
from stagecoach_cli.display.advice import run_command
from stagecoach_core.values import RunState, StageState
from stagecoach_local.workspace import Invocation
from tests.cli.makers import Bench, Cli, chain, data_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder in which the whole chain has run once, for tests that do not change it."""
    bench = Bench(tmp_path_factory.mktemp("finished"))
    bench.write(chain(), SCRIPT)
    bench.drive()
    return bench


SCRIPT = {
    "vocabulary": {"metrics": {"tokensPerCharacter.zh.before": 2.87, "tokensPerCharacter.zh.after": 0.71}},
    "base": {
        "tokens": 6400,
        "metrics": {
            "heldOut.zh.before.bitsPerCharacter": 12.1,
            "heldOut.zh.bitsPerCharacter": 6.54,
            "heldOut.en.before.bitsPerCharacter": 3.2,
            "heldOut.en.bitsPerCharacter": 3.9,
        },
    },
    "score": {"metrics": {"poetics.exactMatch": 0.935}},
    "release": {"report": {"samples": [{"prompt": "白日依山盡？", "answer": "五言絕句"}]}},
}


@pytest.fixture
def bench(finished: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(finished.folder)
    return finished


@pytest.fixture
def own_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path)


# -- run, plan, validate, render ---------------------------------------------------------------------------------------


def test_a_run_that_is_finished_starts_nothing_and_shows_the_whole_table(bench: Bench, cli: Cli) -> None:
    code, output = cli("run", "run.yaml")
    assert code == 0
    assert len(bench.started()) == len(chain())
    figures = ("cached (12 s)", "2.870 → 0.710", "12.100 → 6.540", "3.200 → 3.900", "0.935")
    for text in (*figures, "白日依山盡？", "五言絕句"):
        assert text in output
    assert "Output of release: file://" in output


def test_a_plan_shows_cache_hits_and_the_stages_that_an_edit_would_run(bench: Bench, cli: Cli) -> None:
    code, output = cli("plan", "run.yaml")
    assert (code, output.count("hit ")) == (0, 6)
    assert "all stages are finished" in output
    code, output = cli("plan", "run.yaml", "--set", "stages.base.optimizer.learningRate=0.002")
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert "hit " in lines["vocabulary"]
    assert "miss " in lines["base"]
    assert "after base" in lines["score"]
    assert "3 of 6 stages to run: 6.4k training tokens, time ~38 s" in output


def test_a_plan_is_also_json(bench: Bench, cli: Cli) -> None:
    code, output = cli("plan", "run.yaml", "-o", "json", "--set", "stages.base.optimizer.learningRate=0.002")
    found = json.loads(output[: output.rindex("}") + 1])
    assert (code, found["run"], [stage["cached"] for stage in found["stages"]]) == (0, "tiny", [True] * 3 + [False] * 3)
    base = next(stage for stage in found["stages"] if stage["name"] == "base")
    assert (base["after"], base["tokens"], base["gpuHours"]) == (["corpus", "vocabulary"], 6400, 0.0)
    assert base["seconds"] == pytest.approx(12.5)


def test_a_plan_names_the_store_and_what_it_has(own_bench: Bench, cli: Cli) -> None:
    """The same file in another folder would train everything again, which nothing showed."""
    own_bench.write(chain())
    _, output = cli("plan", "run.yaml")
    store = own_bench.folder / ".stagecoach" / "store"
    assert (
        f"Storage: file://{store} (0 of 6 stages found here)\n  Artifacts of runs started in another folder" in output
    )


def test_gpus_that_this_machine_lacks_are_named_before_a_stage_starts(own_bench: Bench, cli: Cli) -> None:
    """A stage with `gpusPerNode: 8` ran on a laptop's cores without a word."""
    own_bench.write([data_stage("one") | {"resources": {"gpusPerNode": 8}}], {})
    output = own_bench.stagecoach("run", "run.yaml").communicate()[0]
    assert "warning: one requests 8 GPUs, this machine has none, so it runs as 1 rank on the CPU" in output
    assert "1 stage requests GPUs that this machine lacks" in cli("plan", "run.yaml", "--set", "spec.seed=2")[1]


def test_a_plan_is_shown_even_if_inputs_cannot_be_reached(
    own_bench: Bench, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    own_bench.write(chain(), storage={"uri": "s3://models/x", "inputs": "s3://models/inputs"})
    code, output = cli("plan", "run.yaml")
    assert code == 0
    assert output.split("6 of 6 stages to run")[0].count(" unknown ") == 6
    assert "no usable credentials for s3://models/inputs" in output
    assert "are not reachable, so cache hits cannot be determined: " in output


def test_validate_reports_every_problem_with_exit_code_2(own_bench: Bench, cli: Cli) -> None:
    stages = [data_stage("one"), data_stage("two")]
    stages[1]["data"]["sources"][0] |= {"uri": "data/gone.txt"}
    own_bench.write(stages)
    code, output = cli("validate", "run.yaml")
    assert code == 2
    assert "run.yaml:1: stages.two.data.sources[0].uri" in output
    assert "gone.txt" in output
    stages[0]["data"]["sorces"] = stages[0]["data"].pop("sources")
    own_bench.write(stages)
    code, output = cli("validate", "run.yaml")
    assert code == 2
    assert "sorces" in output


def test_a_missing_input_ends_a_run_with_exit_code_2_before_anything_starts(own_bench: Bench, cli: Cli) -> None:
    own_bench.write([data_stage("one")])
    (own_bench.folder / "data" / "one.txt").unlink()
    code, output = cli("run", "run.yaml")
    assert code == 2
    assert "data/one.txt" in output
    assert own_bench.started() == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "gone.yaml"), "no such file"),
        (("run", "run.yaml", "--until", "scor"), "did you mean `score`?"),
        (("run", "run.yaml", "--from", "nothing"), "no stage `nothing`"),
        (("run", "run.yaml", "--set", "stages.bse.seed=1"), "base"),
        (("run", "run.yaml", "--nproc", "0"), "--nproc"),
        (("status", "gone"), "no run `gone`"),
        (("logs", "tiny", "gone"), "has no attempt of gone"),
        (("artifacts", "get", "tiny/gone", "copy"), "no artifact `tiny/gone`"),
        (("fly",), "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_invalid_input_is_reported_with_exit_code_2_and_a_message(
    arguments: tuple[str, ...], text: str, bench: Bench, cli: Cli
) -> None:
    code, output = cli(*arguments)
    assert code == 2
    assert text in output
    assert "Traceback" not in output


def test_validate_reports_a_valid_run(bench: Bench, cli: Cli) -> None:
    assert cli("validate", "run.yaml") == (0, "run.yaml: valid; run `tiny`, 6 stages\n")


def resolved_stages(objects: list[dict[str, Any]]) -> dict[str, ResolvedStage]:
    """Return the resolved stages in rendered ConfigMaps, by name."""
    files = [item["data"]["stage.json"] for item in objects if item["kind"] == "ConfigMap"]
    return {stage.stage: stage for stage in map(ResolvedStage.model_validate_json, files)}


def test_render_prints_the_run_and_the_operators_objects_as_yaml_or_json(bench: Bench, cli: Cli) -> None:
    code, output = cli("render", "run.yaml", "--storage", ".stagecoach/store")
    run, *objects = list(yaml.safe_load_all(output))
    assert (code, run["kind"]) == (0, "TrainingRun")
    assert [item["kind"] for item in objects] == ["ConfigMap", "JobSet"] * 6
    stages = resolved_stages(objects)
    assert stages["base"].config["optimizer"]["beta2"] == 0.95  # type: ignore[index, call-overload]
    assert stages["base"].inputs["stage:vocabulary"].stage_digest == stages["vocabulary"].digest
    _, output = cli("render", "run.yaml", "--storage", ".stagecoach/store", "-o", "json")
    assert json.loads(output) == [run, *objects]


def test_render_prints_placeholders_for_the_output_of_unfinished_stages(own_bench: Bench, cli: Cli) -> None:
    own_bench.write(chain())
    stages = resolved_stages(list(yaml.safe_load_all(cli("render", "run.yaml")[1]))[1:])
    assert re.fullmatch("[0-9a-f]{64}", stages["corpus"].digest)
    assert stages["base"].inputs["stage:vocabulary"].uri == "<output of vocabulary>"
    assert stages["release"].digest == "<known when base is finished>"
    assert stages["base"].storage_uri == "<the storage of the operator's settings>"


CUSTOM_IMAGE = "registry.example.com/custom@sha256:" + "a" * 64


def test_render_takes_images_from_the_run_and_other_settings_from_the_operators(own_bench: Bench, cli: Cli) -> None:
    own_bench.write([{**data_stage("one"), "image": CUSTOM_IMAGE}, data_stage("two")])
    (own_bench.folder / "settings.yaml").write_text("trainerImage: ours\ngraceSeconds: 60\nnamespace: x\n")
    code, output = cli("render", "run.yaml", "--settings", "settings.yaml", "-o", "json")
    pods = [
        item["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        for item in json.loads(output)
        if item["kind"] == "JobSet"
    ]
    assert code == 0
    assert [pod["containers"][0]["image"] for pod in pods] == [CUSTOM_IMAGE, "ours"]
    assert {pod["terminationGracePeriodSeconds"] for pod in pods} == {60}
    (own_bench.folder / "settings.yaml").write_text("graceSeconds: soon\n")
    code, output = cli("render", "run.yaml", "--settings", "settings.yaml")
    assert code == 2
    assert "graceSeconds" in output


def test_an_unwritable_folder_is_reported_with_a_message(own_bench: Bench, cli: Cli) -> None:
    own_bench.write([data_stage("one")])
    (own_bench.folder / ".stagecoach").write_text("in the way\n", encoding="utf-8")
    code, output = cli("run", "run.yaml")
    assert code == 1
    assert ".stagecoach" in output
    assert "Traceback" not in output


# -- status and logs ---------------------------------------------------------------------------------------------------


def test_status_shows_all_runs_or_the_stages_of_one(bench: Bench, cli: Cli) -> None:
    code, output = cli("status")
    assert code == 0
    assert "default/tiny complete 6/6" in " ".join(output.split())
    code, output = cli("status", "tiny")
    assert code == 0
    assert output.startswith("default/tiny: complete  file://")
    assert [line.split()[1] for line in output.splitlines()[1:]] == [stage["name"] for stage in chain()]


def test_status_of_a_run_without_a_driver_shows_how_to_resume(own_bench: Bench, cli: Cli) -> None:
    own_bench.write([data_stage("one")])
    own_bench.drive()
    folder = own_bench.workspace.run("default", "tiny")
    record = own_bench.record()
    running = record.stages["one"].model_copy(update={"state": StageState.RUNNING})
    folder.save(record.model_copy(update={"state": RunState.PROGRESSING, "stages": {"one": running}}))
    _, output = cli("status", "tiny")
    assert "interrupted (no driver is running; resume with `stagecoach run run.yaml`)" in output
    assert "waiting for the run to be resumed" in output


def test_the_advised_command_has_the_options_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice after `kill -9` left out `--set` and `--until`: following it trained something else."""
    monkeypatch.chdir(tmp_path)
    chosen = Invocation(overrides=("a=b c", "d=1"), storage="s3://x/y", until="one", nproc=2)
    assert run_command(tmp_path / "sub" / "run.yaml", chosen) == (
        "stagecoach run sub/run.yaml --set 'a=b c' --set d=1 --storage s3://x/y --until one --nproc 2"
    )
    assert run_command(Path("/else/run.yaml"), Invocation()) == "stagecoach run /else/run.yaml"


def test_logs_prints_the_newest_or_the_named_attempt(own_bench: Bench, cli: Cli) -> None:
    own_bench.write([data_stage("one")], {"one": [{"kill": True}, {}]})
    own_bench.drive()
    first = own_bench.workspace.run("default", "tiny").attempt("one", 1)
    first.log.write_text("the first\n", encoding="utf-8")
    code, output = cli("logs", "tiny")
    assert code == 0
    assert "working on one\n" in output
    assert "one, attempt 2" in output
    assert "the first\n" in cli("logs", "tiny", "one", "--attempt", "1", "-f")[1]
    code, output = cli("logs", "tiny", "one", "--attempt", "7")
    assert (code, "known attempts: one 1, one 2" in output) == (2, True)


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_artifacts_are_listed_by_file_by_name_and_for_all_runs(bench: Bench, cli: Cli) -> None:
    for what in (["run.yaml"], ["tiny"], ["default/tiny"], []):
        code, output = cli("artifacts", "ls", *what)
        assert code == 0
        assert [name for stage in chain() if (name := f"tiny/{stage['name']}") not in output] == []
    assert cli("artifacts", "ls", "other")[0] == 1


def test_a_list_of_artifacts_has_one_line_each_at_80_columns(
    bench: Bench, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each URI took seven lines, and there was no size, age or number of tokens."""
    found = list_all(open_store(str(bench.workspace.default_storage)), "tiny")
    (base,) = [item for item in found if item.pointer.pointer.stage == "base"]
    console = Console(file=io.StringIO(), width=80, color_system=None)
    renamed = replace(base, pointer=replace(base.pointer, run="chinese-alpaca"))
    assert base.manifest is not None
    console.print(artifacts_table([base, renamed], base.manifest.created + 125.0, wide=False, width=80))
    assert isinstance(console.file, io.StringIO)
    head, _, *lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    assert head.split() == ["Run/stage", "Kind", "Size", "Tokens", "Age", "Digest"]
    ends = f"{base.num_bytes} B     6.4k  2 m 05 s  {base.pointer.pointer.stage_digest[:12]}"
    assert [" ".join(line.split()) for line in lines] == [
        " ".join(f"tiny/base pretrain {ends}".split()),
        " ".join(f"chinese-alpaca/base pretrain {ends}".split()),
    ]
    assert "file://" in cli("artifacts", "ls", "tiny", "-o", "wide")[1]


def test_artifacts_and_status_are_also_json(bench: Bench, cli: Cli) -> None:
    code, output = cli("artifacts", "ls", "tiny", "-o", "json")
    listed = {item["stage"]: item for item in json.loads(output)}
    assert (code, set(listed)) == (0, {stage["name"] for stage in chain()})
    assert (listed["base"]["tokens"], listed["base"]["stageDigest"]) == (6400, bench.record().stages["base"].digest)
    assert listed["base"]["bytes"] > 0
    code, output = cli("status", "tiny", "-o", "json")
    found = json.loads(output)
    assert (code, found["run"], found["state"]) == (0, "tiny", "complete")
    assert [stage["name"] for stage in found["stages"]] == [stage["name"] for stage in chain()]
    assert {stage["state"] for stage in found["stages"]} <= {"Succeeded", "Cached"}
    assert cli("status", "-o", "json")[0] == 2


def test_warnings_and_gates_of_cached_stages_are_shown_again(own_bench: Bench, cli: Cli) -> None:
    """A run whose report had a warning ended green, and so did every later one."""
    gate = {
        "metric": "zh.loss",
        "value": 3.25,
        "atLeast": None,
        "atMost": 3.0,
        "onFailure": "continue",
        "passed": False,
    }
    report = {"warnings": ["the loss rose"], "gates": [gate], "samples": [{"prompt": "p", "answer": "a"}] * 9}
    own_bench.write([data_stage("one")], {"one": {"report": report}})
    own_bench.drive()
    code, output = cli("run", "run.yaml")
    assert code == 0
    assert "one: the loss rose" in output
    assert re.search(r"zh\.loss +3\.25 +≤ 3 +missed, the run continues", output)
    assert output.count("  > p") == 3, "all samples are in the report"
    assert "run `tiny` is complete: 1 stage done, 1 from the cache" in output
    assert "copy one with `stagecoach artifacts get tiny/one FOLDER`" in output
    assert "one: the loss rose" in cli("status", "tiny")[1]


def test_an_artifact_is_downloaded_by_name_digest_prefix_and_uri(bench: Bench, cli: Cli, tmp_path: Path) -> None:
    found = bench.record().stages["base"]
    assert found.digest is not None
    assert found.uri is not None
    names = ["tiny/base", "default/tiny/base", found.digest, found.digest[:8], found.uri]
    for index, name in enumerate(names):
        target = tmp_path / str(index)
        code, output = cli("artifacts", "get", name, str(target))
        assert code == 0, output
        assert (target / "model.txt").read_text(encoding="utf-8") == f"made by pretrain from {found.digest}\n"
    code, output = cli("artifacts", "get", "tiny/base", str(tmp_path / "0"))
    assert (code, "not an empty folder" in output) == (1, True)


def test_lineage_shows_every_ancestor_of_an_artifact(bench: Bench, cli: Cli) -> None:
    code, output = cli("artifacts", "lineage", "tiny/release")
    assert code == 0
    drawn = [line.lstrip("│├└─ ").split()[0] for line in output.splitlines()]
    assert drawn == ["tiny/release", "base", "corpus", "data/corpus.txt", "vocabulary", "corpus"]
    assert "(see above)" in output.splitlines()[-1]


def test_verify_accepts_intact_artifacts_and_names_the_object_with_a_flipped_byte(own_bench: Bench, cli: Cli) -> None:
    own_bench.write(chain())
    own_bench.drive()
    code, output = cli("artifacts", "verify", "tiny/release")
    assert (code, output.count("ok ")) == (0, 5)
    digest = own_bench.record().stages["vocabulary"].digest
    folder = read_manifest(open_store(str(own_bench.workspace.default_storage)), str(digest)).folder
    path = own_bench.workspace.default_storage / folder / "model.txt"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    code, output = cli("artifacts", "verify", "tiny/release")
    assert code == 1
    (line,) = [line for line in output.splitlines() if "bytes have changed" in line]
    assert f"{folder}/model.txt" in line
    assert cli("artifacts", "verify", "tiny/held")[0] == 0
    code, output = cli("artifacts", "get", "tiny/vocabulary", "copy")
    assert (code, f"{folder}/model.txt" in output) == (1, True)
    assert not (own_bench.folder / "copy" / "model.txt").exists()


def test_verify_names_missing_objects_extra_ones_and_changed_inputs(own_bench: Bench, cli: Cli) -> None:
    own_bench.write([data_stage("one")])
    own_bench.drive()
    digest = own_bench.record().stages["one"].digest
    storage = own_bench.workspace.default_storage
    output_folder = storage / read_manifest(open_store(str(storage)), str(digest)).folder
    (output_folder / "extra.txt").write_text("?", encoding="utf-8")
    code, output = cli("artifacts", "verify", "tiny/one")
    assert (code, "extra.txt: is not in the manifest" in output) == (0, True)
    (output_folder / "model.txt").unlink()
    (own_bench.folder / "data" / "one.txt").write_text("edited", encoding="utf-8")
    code, output = cli("artifacts", "verify", "tiny/one")
    assert code == 1
    assert "model.txt: is missing" in output
    assert "data/one.txt: has changed since it was read" in output
