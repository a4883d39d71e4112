"""The threads of a rank: the user's number is kept, they wait passively, and waiting changes no digit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from stagecoach_trainer.launcher.__main__ import worker_environment
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.runtime.threads import thread_environment
from tests import ROOT
from tests.trainer.loop.makers import RandomPlan, context, tiny_model, training


def test_the_drivers_number_is_used_and_else_a_share_of_the_cores() -> None:
    given = thread_environment({"STAGECOACH_THREADS": "3"}, 2)
    assert {given[name] for name in ("STAGECOACH_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    cores = len(os.sched_getaffinity(0))
    assert thread_environment({}, 1)["OMP_NUM_THREADS"] == str(cores)
    assert thread_environment({}, 64 * cores)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("written", "threads"), [("1", "1"), ("6", "6"), ("4,2", "4"), ("many", "3")])
def test_what_the_user_has_set_is_never_overwritten(written: str, threads: str) -> None:
    user = {"OMP_NUM_THREADS": written, "MKL_NUM_THREADS": "5", "STAGECOACH_THREADS": "3"}
    worker = worker_environment(user, 2)
    assert (worker["OMP_NUM_THREADS"], worker["MKL_NUM_THREADS"]) == (written, "5")
    assert worker["STAGECOACH_THREADS"] == threads, "recorded with the artifact"


def test_threads_wait_passively_unless_the_user_says_otherwise() -> None:
    worker = worker_environment({}, 1)
    assert (worker["OMP_WAIT_POLICY"], worker["KMP_BLOCKTIME"]) == ("PASSIVE", "0")
    active = worker_environment({"OMP_WAIT_POLICY": "ACTIVE"}, 1)
    assert active["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "KMP_BLOCKTIME" not in active


@pytest.mark.parametrize("written", ["0", "-2", "two", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused_before_anything_starts(written: str) -> None:
    with pytest.raises(ValueError, match=rf"STAGECOACH_THREADS: got `{written}`; it must be a positive whole number"):
        worker_environment({"STAGECOACH_THREADS": written}, 1)


def trained_adapter(folder: str) -> str:
    """Train an adapter with large enough batches for two threads; return the hash of its weights."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    plan = RandomPlan(num_steps=2, num_rows=32, length=96)
    train(TrainingJob(model, training(micro_batch_rows=32), plan), context(Path(folder)))
    weights = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    return hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()


@pytest.mark.slow
def test_passive_waiting_changes_no_byte_of_an_adapter(tmp_path: Path) -> None:
    script = f"from {__name__} import trained_adapter; print(trained_adapter({str(tmp_path / 'passive')!r}))"
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    passive = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**environment, **thread_environment(environment, 1)},
        stdout=subprocess.PIPE,
        text=True,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        active = trained_adapter(str(tmp_path / "active"))
    finally:
        torch.set_num_threads(before)
    output, _ = passive.communicate(timeout=200)
    assert output.split()[-1] == active
