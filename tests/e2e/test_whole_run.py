"""The real command line and the real trainer, from raw text to a released model: an undisturbed run on S3, and in
parallel a run of the same file in an empty folder that is killed and interrupted. Both are made once; the tests check
their results, or continue from the second one's storage."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from stagecoach_api.outcomes import Cause
from tests.e2e.makers import Bench, Ended, finish, pipeline, wait_until
from tests.s3 import S3Server, make_bucket

pytestmark = pytest.mark.timeout(1800)  # the first test makes both runs
BUCKET = "e2e-whole-run"
NAMES = [stage["name"] for stage in pipeline()]


@dataclasses.dataclass(frozen=True)
class Story:
    """The results of both runs."""

    disturbed: Bench
    """The second run, whose storage is in its workspace."""
    first: Ended
    again: Ended
    """The first run, run again."""
    verified: Ended
    attempts: tuple[int, int]
    """Number of attempts of the first run, before and after it was run again."""
    content: dict[str, str]
    """Content digests of the first run's stages."""
    ranks: Ended
    """The first run's model, trained again for a few steps and sharded over two ranks."""
    interrupted: Ended
    checkpoints: list[str]
    """The checkpoints in the storage after Ctrl-C ended the second run."""
    finished: Ended
    """The second run's last invocation."""


@pytest.fixture(scope="session")
def story(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, s3_credentials: None, request: pytest.FixtureRequest
) -> Story:
    """Make both runs in parallel, once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "whole-run"
    folder.mkdir(exist_ok=True)
    file, disturbed = folder / "story.json", Bench(folder / "disturbed", core=1)
    with locked(folder / "lock"):
        if not file.exists():
            server: S3Server = request.getfixturevalue("s3_server")
            make_bucket(server.endpoint, BUCKET)
            with ThreadPoolExecutor(2) as pool:
                quiet = pool.submit(undisturbed_run, Bench(folder / "undisturbed", core=0), server.endpoint)
                loud = pool.submit(disturbed_run, disturbed)
                file.write_text(json.dumps(quiet.result() | loud.result()), encoding="utf-8")
    about = json.loads(file.read_text(encoding="utf-8"))
    commands = ("first", "again", "verified", "ranks", "interrupted", "finished")
    fields: dict[str, Any] = {name: Ended(*about[name]) for name in commands}
    return Story(disturbed, **{**about, **fields, "attempts": tuple(about["attempts"])})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def undisturbed_run(bench: Bench, endpoint: str) -> dict[str, Any]:
    write(bench, uri=f"s3://{BUCKET}/models", endpoint=endpoint)
    first = bench.run()
    attempts = bench.attempts()
    again = bench.run()
    content, counts = bench.content(), (attempts, bench.attempts())
    verified = bench.call("artifacts", "verify", "tiny/release")
    sharded = ("stages.base.sharding.zero=2", "stages.base.budget.steps=40")
    ranks = bench.run("--until", "base", "--nproc", "2", *(part for change in sharded for part in ("--set", change)))
    return {
        "first": (first.code, first.output),
        "again": (again.code, again.output),
        "verified": dataclasses.astuple(verified),
        "ranks": dataclasses.astuple(ranks),
        "attempts": counts,
        "content": content,
    }


def disturbed_run(bench: Bench) -> dict[str, Any]:
    """Kill the worker, interrupt the run with Ctrl-C, kill the driver, each after the current attempt has saved a
    checkpoint of the model's training."""
    write(bench)
    driver = bench.start("run", "run.yaml")
    wait_until(lambda: len(bench.checkpoints("base")) >= 2, "two checkpoints")
    bench.worker("base", 1).kill()
    wait_for_progress(bench)
    driver.send_signal(signal.SIGINT)
    interrupted = finish(driver)
    checkpoints = [path.name for path in bench.checkpoints("base")]

    driver = bench.start("run", "run.yaml")
    launcher = wait_for_progress(bench)
    driver.kill()
    finish(driver)
    wait_until(lambda: not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE, "the orphan's end")
    return {
        "interrupted": dataclasses.astuple(interrupted),
        "checkpoints": checkpoints,
        "finished": dataclasses.astuple(bench.run("--until", "release")),
    }


def write(bench: Bench, **storage: str) -> None:
    bench.folder.mkdir()
    bench.write_data()
    bench.write(pipeline(), storage=storage)


def wait_for_progress(bench: Bench) -> psutil.Process:
    """Wait until the resumed training has saved a newer checkpoint; return the launcher."""
    before = bench.checkpoints("base")[-1].name
    wait_until(lambda: bench.checkpoints("base")[-1].name > before, "a newer checkpoint")
    return psutil.Process(bench.record().attempts[-1].pid)


@pytest.fixture
def bench(story: Story, tmp_path: Path) -> Bench:
    """Another folder with the same run."""
    bench = Bench(tmp_path / "other", core=0)
    write(bench, uri=str(story.disturbed.workspace.default_storage))
    return bench


def states(ended: Ended) -> dict[str, str]:
    """Return a plan's `Cache` column, by stage."""
    lines = [line.split("  ") for line in ended.output.splitlines() if line.split()]
    cells = {line[0].strip(): [cell.strip() for cell in line if cell.strip()] for line in lines}
    values = ("hit", "miss", "after")
    return {name: next(cell for cell in cells[name][2:] if cell.split()[0] in values) for name in NAMES}


# -- an undisturbed run ------------------------------------------------------------------------------------------------


def test_every_kind_of_stage_completes_on_s3_and_the_table_shows_its_figures(story: Story) -> None:
    assert story.first.code == 0, story.first.output
    for title in ("Stages", "Tokens per character", "Held-out bits per character", "Evaluation", "Answers of release"):
        assert title in story.first.output
    assert f"Output of release: s3://{BUCKET}/models/artifacts/" in story.first.output
    assert sorted(story.content) == sorted(NAMES)
    assert None not in story.content.values()


def test_the_same_run_again_starts_no_process(story: Story) -> None:
    assert story.again.code == 0
    assert story.attempts == (len(NAMES), len(NAMES))
    assert story.again.output.count("cached (") == len(NAMES)


def test_every_byte_of_the_lineage_matches_the_manifests(story: Story) -> None:
    assert story.verified.code == 0, story.verified.output
    assert story.verified.output.count("ok ") == len(NAMES) - 1 + 3  # no stage reads the evaluation; three files


def test_two_ranks_under_zero_2_start_with_the_same_model_and_it_learns(story: Story) -> None:
    assert story.ranks.code == 0, story.ranks.output
    assert "base: started on 2 ranks, attempt 2" in story.ranks.output
    assert story.ranks.output.count("cached (") == 3
    english_before, english_after, chinese_before, chinese_after = held_out(story.ranks)
    assert [english_before, chinese_before] == pytest.approx(held_out(story.first)[::2], rel=1e-3)
    assert english_after < 0.8 * english_before
    assert chinese_after < 0.8 * chinese_before


def held_out(ended: Ended) -> list[float]:
    """Return the model's held-out bits per character, before and after, from the printed table."""
    line = next(line for line in ended.output.splitlines() if line.startswith("base") and "→" in line)
    return [float(cell) for cell in line.split() if cell[0].isdigit()]


# -- a disturbed run ---------------------------------------------------------------------------------------------------


def test_ctrl_c_exits_with_130_and_leaves_a_checkpoint(story: Story) -> None:
    assert story.interrupted.code == 130
    assert "stopping base at a checkpoint" in story.interrupted.output
    assert "is interrupted; resume with `stagecoach run " in story.interrupted.output
    assert story.checkpoints


def test_each_interruption_costs_one_attempt_and_no_work(story: Story) -> None:
    attempts = [item for item in story.disturbed.record().attempts if item.stage == "base"]
    causes = [item.cause for item in attempts]
    assert causes == [Cause.INFRASTRUCTURE, Cause.PREEMPTION, Cause.PREEMPTION, None]
    assert "was killed by signal 9" in attempts[0].message
    assert story.interrupted.output.count("base: started") == 2
    logs = [story.disturbed.workspace.run("default", "tiny").attempt("base", item.number).log for item in attempts[1:]]
    assert all("resuming after step" in log.read_text(encoding="utf-8") for log in logs)


def test_every_stage_of_the_disturbed_run_has_the_undisturbed_runs_bytes(story: Story) -> None:
    assert story.finished.code == 0, story.finished.output
    measured = {name: digest for name, digest in story.content.items() if name != "score"}
    assert story.disturbed.content() == measured | {"score": None}


def test_a_manifest_records_the_environment_that_exact_results_depend_on(story: Story) -> None:
    environment = story.disturbed.manifest("base").environment
    assert (environment["ranks"], environment["threads"]) == (1, 1)
    assert environment["processor"]
    assert environment["torch"]
    assert story.disturbed.checkpoints("base") == []  # removed once the artifact is published


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_another_name_retries_or_resources_run_nothing_again(bench: Bench) -> None:
    changes = ("metadata.name=renamed", "spec.defaults.retries.user=3", "spec.defaults.resources.memory=1Gi")
    ended = bench.run("--until", "release", *(part for change in changes for part in ("--set", change)))
    assert ended.code == 0, ended.output
    assert bench.record("renamed").attempts == ()
    assert ended.output.count("cached (") == len(NAMES) - 1  # not the evaluation, which is not in this storage


def test_another_learning_rate_is_a_miss_of_that_stage_and_its_descendants(bench: Bench) -> None:
    ended = bench.call("plan", "run.yaml", "--set", "stages.tune.optimizer.learningRate=1.0e-4")
    found = {name: state.split()[0] for name, state in states(ended).items()}
    changed = {"tune": "miss", "score": "after", "release": "after"}
    assert found == dict.fromkeys(NAMES, "hit") | changed, ended.output


def test_one_changed_byte_of_input_is_a_miss_of_the_stage_that_reads_it(bench: Bench) -> None:
    path = bench.folder / "data" / "english.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"fox", b"box", 1))
    found = states(bench.call("plan", "run.yaml"))
    assert {name: state.split()[0] for name, state in found.items()} == {
        "en": "miss",
        "zh": "hit",
        **dict.fromkeys(NAMES[2:], "after"),
    }


# -- use without stagecoach --------------------------------------------------------------------------------------------

OUTSIDE = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
assert importlib.util.find_spec("stagecoach_trainer") is None, sys.path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
release, vocabulary = sys.argv[2:]
model, info = AutoModelForCausalLM.from_pretrained(release, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(release)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "幾個字 1？"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
merged = AutoTokenizer.from_pretrained(vocabulary)
text = "白日依山盡，a quick fox."
print(json.dumps({
    "loading": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    "rows": model.get_input_embeddings().weight.shape[0],
    "prompt": tokenizer.decode(prompt["input_ids"][0]),
    "new": answer.shape[1] - prompt["input_ids"].shape[1],
    "answer": tokenizer.decode(answer[0][prompt["input_ids"].shape[1]:], skip_special_tokens=True),
    "size": len(merged),
    "same": merged(text)["input_ids"] == tokenizer(text)["input_ids"],
    "back": merged.decode(merged(text)["input_ids"], skip_special_tokens=True),
    "pieces": len(merged.tokenize("白日依山盡")),
}))
"""


def test_release_and_vocabulary_open_in_plain_transformers_without_stagecoach(story: Story, tmp_path: Path) -> None:
    for name in ("release", "vocabulary"):
        assert story.disturbed.call("artifacts", "get", f"tiny/{name}", str(tmp_path / name)).code == 0
    folders = [sysconfig.get_path("purelib"), str(tmp_path / "release"), str(tmp_path / "vocabulary")]
    # -S: no .pth file is read, so that this checkout is not on the path.
    done = subprocess.run([sys.executable, "-IS", "-c", OUTSIDE, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout.splitlines()[-1])
    assert about["loading"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert "幾個字 1？" in about["prompt"]
    assert 1 <= about["new"] <= 4
    assert (about["same"], about["back"]) == (True, "白日依山盡，a quick fox.")
    assert about["size"] == about["rows"] > 300
    assert about["pieces"] < 10  # of 15 bytes
    report = json.loads((tmp_path / "release" / "report.json").read_text(encoding="utf-8"))
    assert report["samples"][0]["answer"] == about["answer"]
