"""One stage from context to artifact, and the exit codes of errors."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import ResolvedStage, attempt_prefix
from stagecoach_api.kinds.data import DataStage
from stagecoach_api.outcomes import Cause, ExitCode
from stagecoach_api.store import AccessDenied, Corrupt, InvalidLocation, Unreachable
from stagecoach_trainer.__main__ import pin_threads, read_stage
from stagecoach_trainer.run_stage import AttemptSettings, run_stage
from stagecoach_trainer.runtime.context import StageContext, StageOutcome, World
from stagecoach_trainer.runtime.distributed import world_from
from stagecoach_trainer.runtime.errors import Diverged, GateFailed, Interrupted, UserError
from stagecoach_trainer.runtime.failures import outcome_of
from tests.trainer.contexts import resolved_stage
from tests.trainer.makers import DATA_CONFIG, DIGEST


def resolved(folder: Path, **changes: Any) -> ResolvedStage:
    values: dict[str, Any] = {"stage": "corpus", "kind": "data", "config": DATA_CONFIG, "seed": 3}
    return resolved_stage(folder / "store", **(values | changes))


def attempt(folder: Path, world: World | None = None) -> AttemptSettings:
    return AttemptSettings(
        resolved=resolved(folder),
        config=DataStage.model_validate(DATA_CONFIG),
        work=folder / "work",
        cache=folder / "cache",
        progress_file=None,
        world=world or World(),
        started=time.time(),
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr("stagecoach_trainer.run_stage.load_stage", lambda kind: run)


def test_a_stage_writes_into_an_empty_output_and_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "output").mkdir(parents=True)
    (tmp_path / "work" / "output" / "left-over").write_text("")

    def run(config: DataStage, context: StageContext) -> StageOutcome:
        assert not list(context.output.iterdir())
        assert context.seed == 3
        (context.output / "report.json").write_text(json.dumps(len(config.sources)))
        (context.work / "logs" / "log.jsonl").write_text("1\n")
        return StageOutcome()

    stand_in(monkeypatch, run)
    assert run_stage(attempt(tmp_path), threading.Event()) is not None
    stored = tmp_path / "store" / "artifacts" / DIGEST
    (report,) = stored.glob("attempts/0001/*/output/report.json")
    assert report.read_text() == "1"
    assert (tmp_path / "store" / attempt_prefix(DIGEST, "0001") / "logs" / "log.jsonl").is_file()


def test_a_storage_that_cannot_be_written_ends_the_attempt_before_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--storage` that is a file: the stage did all its work, failed when it was published, and was tried 20 times."""
    stand_in(monkeypatch, lambda config, context: pytest.fail("called"))
    (tmp_path / "store").write_text("")
    with pytest.raises(InvalidLocation) as caught:
        run_stage(attempt(tmp_path), threading.Event())
    result = outcome_of(caught.value).result
    assert result.cause is Cause.USER
    assert f"{tmp_path}/store cannot be a folder of the storage" in result.message


def test_other_ranks_skip_a_stage_that_does_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda config, context: pytest.fail("called"))
    assert run_stage(attempt(tmp_path, World(rank=1, size=2)), threading.Event()) is None


def test_the_report_of_a_missed_gate_is_kept_and_no_artifact_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: DataStage, context: StageContext) -> StageOutcome:
        (context.output / "report.md").write_text("too high")
        raise GateFailed("perplexity 9 is above 8")

    stand_in(monkeypatch, run)
    with pytest.raises(GateFailed):
        run_stage(attempt(tmp_path), threading.Event())
    assert (tmp_path / "store" / attempt_prefix(DIGEST, "0001") / "output" / "report.md").read_text() == "too high"
    assert not (tmp_path / "store" / "artifacts" / DIGEST / "manifest.json").exists()


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        pytest.param(UserError("bad"), ExitCode.USER_ERROR, Cause.USER, id="user error"),
        pytest.param(GateFailed("low"), ExitCode.GATE_FAILED, Cause.USER, id="gate"),
        pytest.param(Diverged("nan"), ExitCode.DIVERGED, Cause.USER, id="diverged"),
        pytest.param(Interrupted("stop"), ExitCode.INTERRUPTED, Cause.PREEMPTION, id="stopped"),
        pytest.param(KeyboardInterrupt(), ExitCode.INTERRUPTED, Cause.PREEMPTION, id="Ctrl-C"),
        pytest.param(Unreachable("k", "no answer"), ExitCode.STORAGE, Cause.INFRASTRUCTURE, id="no answer"),
        pytest.param(AccessDenied("k", "denied"), ExitCode.USER_ERROR, Cause.USER, id="wrong credentials"),
        pytest.param(Corrupt("k", "differs"), ExitCode.USER_ERROR, Cause.USER, id="flipped byte"),
        pytest.param(OSError(errno.ENOSPC, "full", "/x"), ExitCode.STORAGE, Cause.INFRASTRUCTURE, id="full disk"),
        pytest.param(MemoryError(), ExitCode.USER_ERROR, Cause.USER, id="out of memory"),
        pytest.param(TypeError("bug"), 1, Cause.INFRASTRUCTURE, id="bug"),
    ],
)
def test_every_error_has_its_exit_code_and_cause(error: BaseException, code: int, cause: Cause) -> None:
    result = outcome_of(error, last_step=12).result
    assert (result.exit_code, result.cause, result.last_step) == (code, cause, 12)


def test_a_named_error_is_found_as_the_cause_of_another() -> None:
    outer = RuntimeError("upload failed")
    outer.__cause__ = OSError(errno.ENOSPC, "full", "/scratch/x")
    assert outcome_of(outer).result.message.startswith("disk full: /scratch/x")


def test_all_problems_of_a_stage_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text(resolved(tmp_path, config={"sources": [{"uri": "x", "colour": 1}], "size": 2}).model_dump_json())
    with pytest.raises(UserError, match=r"sources\.0\.colour.*size"):
        read_stage(path)
    path.write_text(resolved(tmp_path, kind="bake").model_dump_json())
    with pytest.raises(UserError, match="`bake` is not a stage kind; one of data, tokenizer"):
        read_stage(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_stage(tmp_path / "nowhere.json")


def test_threads_are_pinned_to_the_drivers_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STAGECOACH_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "99")
    pin_threads({"STAGECOACH_THREADS": "3"})
    import os

    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("3", "3")


def test_a_process_alone_is_rank_0_of_1() -> None:
    assert world_from({}) == World()
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert world_from(torchrun) == World(rank=5, local_rank=1, size=8, local_size=4)
