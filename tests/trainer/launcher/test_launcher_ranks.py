"""Training that is stopped and resumed, several ranks under torchrun, and several pods: attempts of real processes.

Such an attempt takes ten seconds of processor time, so that one of each kind is started and several tests look at it.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from stagecoach_api.artifacts import Manifest, manifest_key
from stagecoach_api.kinds.pretrain import PretrainStage
from stagecoach_api.outcomes import Cause, ExitCode
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from tests.s3 import free_port
from tests.trainer.loop.makers import RandomPlan, WatchedSchedule, context, tiny_model
from tests.trainer.makers import DIGEST, PRETRAIN_CONFIG, SITE, STRANGERS, Attempt, make_attempt, make_pods

pytestmark = pytest.mark.timeout(300)

STEPS = 8
TRAINS = f"""
from stagecoach_trainer.runtime.context import StageOutcome
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from tests.trainer.loop.makers import RandomPlan, WatchedSchedule, tiny_model

def run(config, context):
    def wait_in_step_4(step):
        if step == 3 and (context.work / "wait").exists():
            (context.work / "reached").touch()
            context.stop.wait(60)

    model, schedule = tiny_model(), WatchedSchedule(num_steps={STEPS}, on_step=wait_in_step_4)
    result = train(TrainingJob(model, config, RandomPlan(num_steps={STEPS}), schedule=schedule), context)
    if context.world.is_main:
        (context.output / "weights").write_bytes(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    return StageOutcome(result.tokens, result.metrics)
"""
ONE_RANK_FAILS = """
import torch, torch.distributed as dist
from stagecoach_trainer.runtime.errors import UserError
def run(config, context):
    print(f"here is rank {context.world.rank}")
    if context.world.rank == 1:
        raise UserError("rank 1 found a bad record in corpus.jsonl:7")
    dist.all_reduce(torch.zeros(1))
"""
ONE_RANK_DIES = """
import os
def run(config, context):
    os.write(2, b"the last output of rank %d" % context.world.rank)
    if context.world.rank == 1:
        os.kill(os.getpid(), 9)
    context.stop.wait(60)
    raise RuntimeError("connection closed by peer")
"""
WAITS = """
import time
def run(config, context):
    print(f"rank {context.world.rank} waits")
    time.sleep(600)
"""


def wait_for(path: Path, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


# -- one rank ----------------------------------------------------------------------------------------------------------


def test_training_asked_to_stop_saves_and_resumes_in_the_next_attempt(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path / "stopped", TRAINS, "pretrain")
    (attempt.work / "wait").touch()
    launcher = attempt.start()
    wait_for(attempt.work / "reached")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == ExitCode.INTERRUPTED, attempt.log
    assert attempt.result.cause is Cause.PREEMPTION
    assert attempt.result.last_step == 4
    checkpoints = attempt.store / "artifacts" / DIGEST / "checkpoints"
    assert list(checkpoints.iterdir())
    (attempt.work / "wait").unlink()
    again = make_attempt(tmp_path / "stopped", TRAINS, "pretrain", number=2)
    assert again.run() == 0, again.log
    assert "resuming after step 4 of 8" in again.log
    assert not checkpoints.exists() or not list(checkpoints.iterdir())
    manifest = Manifest.model_validate_json((again.store / manifest_key(DIGEST)).read_bytes())
    assert (again.store / manifest.folder / "weights").read_bytes() == undisturbed_weights(tmp_path / "whole")


def undisturbed_weights(folder: Path) -> bytes:
    """The weights after the same training in this process."""
    model, config = tiny_model(), PretrainStage.model_validate(PRETRAIN_CONFIG)
    schedule = WatchedSchedule(num_steps=STEPS)
    train(TrainingJob(model, config, RandomPlan(num_steps=STEPS), schedule=schedule), context(folder, seed=0))
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


# -- several ranks on one machine --------------------------------------------------------------------------------------


def test_under_torchrun_the_rank_that_failed_first_is_named(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, ONE_RANK_FAILS, "pretrain", ranks=2)
    assert attempt.run() == ExitCode.USER_ERROR, attempt.log
    assert attempt.result.message == "rank 1 found a bad record in corpus.jsonl:7"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """An attempt at two ranks, one of which is killed."""
    folder = tmp_path_factory.mktemp("killed")
    attempt = make_attempt(folder, ONE_RANK_DIES, "pretrain", ranks=2, site=SITE + STRANGERS)
    attempt.run()
    return attempt


def test_a_rank_that_is_killed_under_torchrun_is_named_with_its_signal(killed: Attempt) -> None:
    assert "rank 1 was killed by signal 9 (SIGKILL)" in killed.result.message
    assert (killed.result.exit_code, killed.result.cause) == (-9, Cause.INFRASTRUCTURE)


def test_under_torchrun_each_rank_has_a_log_with_the_killed_ones_last_output(killed: Attempt) -> None:
    logs = killed.stored_logs()
    assert sorted(logs) == [0, 1]
    assert "the last output of rank 0" in logs[0]
    assert logs[1].endswith("the last output of rank 1")
    assert "rank 1" not in logs[0].split("the last output")[0]
    assert "[rank 1] the last output of rank 1\n" in killed.log
    assert not list((killed.work / "outcomes").glob("*.pipe"))


def test_when_torchrun_is_killed_its_workers_end_and_their_logs_are_kept(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, WAITS, "pretrain", ranks=2, site=SITE + STRANGERS)
    launcher = attempt.start()
    deadline = time.monotonic() + 120
    while not all(f"rank {rank} waits" in attempt.log for rank in (0, 1)):
        assert time.monotonic() < deadline, attempt.log
        time.sleep(0.1)
    workers = [int(path.read_text()) for path in (attempt.work / "outcomes").glob("rank-*.pid")]
    (torchrun,) = psutil.Process(launcher.pid).children()
    torchrun.kill()
    assert launcher.wait(30) == 137
    assert attempt.result.cause is Cause.INFRASTRUCTURE
    assert len(workers) == 2
    for pid in workers:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    waits = {rank: f"rank {rank} waits" in text for rank, text in attempt.stored_logs().items()}
    assert waits == {0: True, 1: True}


# -- several pods ------------------------------------------------------------------------------------------------------


def test_two_pods_give_the_result_of_two_ranks_of_one_machine(tmp_path: Path) -> None:
    local = make_attempt(tmp_path / "local", TRAINS, "pretrain", ranks=2)
    assert local.run() == 0, local.log
    pods = make_pods(tmp_path / "pods", TRAINS, 2, free_port())
    launchers = [pod.start() for pod in pods]
    assert [launcher.wait(200) for launcher in launchers] == [0, 0], pods[0].log + pods[1].log
    assert pods[0].result.content_digest == local.result.content_digest
    assert pods[1].result.content_digest is None


@dataclass(frozen=True)
class Pods:
    """The two pods of an attempt, after their end."""

    attempts: list[Attempt]
    codes: list[int]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Pods:
    """Two pods, the rank of one of which fails."""
    pods = make_pods(tmp_path_factory.mktemp("pods"), ONE_RANK_FAILS, 2, free_port())
    launchers = [pod.start() for pod in pods]
    return Pods(pods, [launcher.wait(200) for launcher in launchers])


def test_the_pod_whose_rank_failed_names_the_failure(failed: Pods) -> None:
    first, second = failed.attempts
    assert failed.codes[1] == ExitCode.USER_ERROR, second.log
    assert second.result.message == "rank 1 found a bad record in corpus.jsonl:7"
    assert first.result.cause is Cause.INFRASTRUCTURE, first.log


def test_each_pod_stores_the_log_of_its_own_rank(failed: Pods) -> None:
    first, second = failed.attempts
    logs = first.stored_logs()
    assert sorted(logs) == [0, 1]
    assert "here is rank 0" in logs[0]
    assert "here is rank 1" in logs[1]
    assert "[rank " not in second.log
