"""Checkpoints and resume at one rank: every way of stopping ends with the weights of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import checkpoint_name, checkpoints_prefix
from stagecoach_api.training import EarlyStop
from stagecoach_trainer.loop.checkpoint import steps_to_delete
from stagecoach_trainer.loop.job import HeldOutSet, TrainingJob, TrainingResult
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Interrupted
from tests.trainer.loop.makers import (
    RandomPlan,
    WatchedSchedule,
    complete_steps,
    context,
    disk_full_beyond,
    equal_weights,
    row,
    run_until_killed,
    tiny_model,
    training,
    weights,
)

HELD_OUT = (HeldOutSet("zh", (row((10, 9), 1), row((12,), 2)), 40),)


def configuration(precision: str = "fp32", **settings: Any) -> Any:
    return training(
        precision=precision, checkpoints={"every_steps": 2, **settings}, attention_dropout=0.1, micro_batch_rows=2
    )


def run(
    here: StageContext,
    precision: str = "fp32",
    num_steps: int = 6,
    on_step: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> Any:
    """Train to the end in `here`; return the result and the final weights. `on_step(step)` is called in each step."""
    model = tiny_model()
    schedule = WatchedSchedule(num_steps=num_steps, on_step=on_step)
    plan = RandomPlan(num_steps=num_steps)
    job = TrainingJob(model, configuration(precision, **settings), plan, HELD_OUT, schedule=schedule)
    return train(job, here), weights(model)


def stop_in(step: int, here: StageContext) -> Callable[[int], None]:
    """Return an `on_step` that asks the stage to stop in the step with index `step`."""
    return lambda current: here.stop.set() if current == step else None


def stop_after(folder: Path, steps: int, precision: str = "fp32", **settings: Any) -> None:
    """Train until the end of step `steps`, in which the stage is asked to stop."""
    here = context(folder)
    with pytest.raises(Interrupted, match=f"after step {steps} of 6; a checkpoint is saved"):
        run(here, precision, on_step=stop_in(steps - 1, here), **settings)


def checkpoints(here: StageContext) -> Path:
    home = here.store.local_path(f"{checkpoints_prefix(here.resolved.digest)}/{checkpoint_name(0)}")
    assert home is not None
    return home.parent


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_twice_a_run_ends_bit_for_bit_like_an_undisturbed_one(tmp_path: Path, precision: str) -> None:
    whole, whole_weights = run(context(tmp_path / "whole"), precision)
    stop_after(tmp_path / "stopped", 3, precision)
    stop_after(tmp_path / "stopped", 5, precision)
    resumed, resumed_weights = run(context(tmp_path / "stopped"), precision)
    assert equal_weights(resumed_weights, whole_weights)
    assert resumed == whole


def test_a_killed_run_loses_at_most_one_interval_and_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    whole, whole_weights = run(context(tmp_path / "whole"))
    folder = tmp_path / "killed"
    run_until_killed(be_killed, folder, 120)
    assert max(complete_steps(checkpoints(context(folder)))) == 4
    resumed, resumed_weights = run(context(folder))
    assert equal_weights(resumed_weights, whole_weights)
    assert resumed == whole


def be_killed(folder: str) -> None:
    """Train, and die by SIGKILL in the sixth step, when the checkpoint of step 4 is complete."""
    here = context(Path(folder))

    def die(step: int) -> None:
        if step == 5:
            while complete_steps(checkpoints(here)) != [2, 4]:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    run(here, on_step=die)


def test_a_broken_checkpoint_is_named_and_the_previous_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, whole_weights = run(context(tmp_path / "whole"))
    stop_after(tmp_path / "stopped", 5)
    here = context(tmp_path / "stopped")
    broken = checkpoints(here) / "step-00000005" / "exp_avg.safetensors"
    data = bytearray(broken.read_bytes())
    data[-7] ^= 1
    broken.write_bytes(data)
    with caplog.at_level("INFO"):
        resumed, resumed_weights = run(here)
    assert "step-00000005/exp_avg.safetensors: the content differs from what was saved" in caplog.text
    assert "resuming after step 4 of 6" in caplog.text
    assert equal_weights(resumed_weights, whole_weights)
    assert resumed == whole


def test_a_partial_checkpoint_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop_after(tmp_path, 3)
    half = checkpoints(context(tmp_path)) / "step-00000004"
    half.mkdir()
    (half / "master.safetensors").write_bytes(b"")
    with caplog.at_level("INFO"):
        run(context(tmp_path))
    assert "resuming after step 3" in caplog.text


def test_resumed_from_the_step_that_stopped_it_early_a_run_makes_no_further_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"held_out": {"every_steps": 1}}
    settings["early_stop"] = EarlyStop(set="zh", patience=1, min_delta=50.0)

    def run_early(here: StageContext, on_step: Callable[[int], None] = lambda step: None) -> Any:
        model = tiny_model()
        config = training(checkpoints={"every_steps": 2}, **settings)
        schedule = WatchedSchedule(num_steps=6, on_step=on_step)
        return train(TrainingJob(model, config, RandomPlan(num_steps=6), HELD_OUT, schedule=schedule), here), weights(
            model
        )

    whole, whole_weights = run_early(context(tmp_path / "whole"))
    assert whole.steps == 2
    here = context(tmp_path / "stopped")
    with pytest.raises(Interrupted, match="after step 2"):
        run_early(here, stop_in(1, here))
    resumed, resumed_weights = run_early(context(tmp_path / "stopped"))
    assert resumed.steps == 2
    assert equal_weights(resumed_weights, whole_weights)


def test_the_newest_and_the_multiples_are_kept(tmp_path: Path) -> None:
    here = context(tmp_path)
    run(here, num_steps=13, keep_last=2, keep_every_steps=6)
    assert complete_steps(checkpoints(here)) == [6, 10, 12]


def test_steps_to_delete_spares_the_newest_and_multiples() -> None:
    assert steps_to_delete([2, 4, 6, 8, 10], keep_last=2, keep_every=None) == [2, 4, 6]
    assert steps_to_delete([2, 4, 6, 8, 10], keep_last=1, keep_every=4) == [2, 6]
    assert steps_to_delete([2], keep_last=3, keep_every=None) == []


def test_a_checkpoint_holds_nothing_but_safetensors_and_json_and_no_frozen_weight(tmp_path: Path) -> None:
    here = context(tmp_path)
    model = tiny_model()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    train(TrainingJob(model, configuration(), RandomPlan(num_steps=3)), here)
    folder = checkpoints(here) / "step-00000002"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "manifest.json",
        "master.safetensors",
        "rng-00000.safetensors",
        "state.json",
    ]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert {item["path"] for item in manifest["objects"]} == set(names) - {"manifest.json"}
    from safetensors import safe_open

    with safe_open(folder / "master.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["lm_head.weight"]


def test_checkpoints_of_a_remote_store_are_found_on_a_machine_that_has_none(tmp_path: Path) -> None:
    from stagecoach_api.store import FolderStore

    class Remote(FolderStore):
        """A folder that behaves like S3: nothing in it can be read in place."""

        def local_path(self, key: str) -> Path | None:
            return None

    def remote(machine: str) -> StageContext:
        here = context(tmp_path / machine)
        from dataclasses import replace

        from stagecoach_api.stores.base import FolderLocation

        return replace(here, store=Remote(FolderLocation(tmp_path / "bucket")))

    first = remote("first")
    with pytest.raises(Interrupted):
        run(first, on_step=stop_in(3, first))
    whole: tuple[TrainingResult, Any] = run(context(tmp_path / "whole"))
    resumed = run(remote("second"))
    assert equal_weights(resumed[1], whole[1])
    assert complete_steps(tmp_path / "second" / "cache" / "checkpoints" / ("d" * 64))


def test_a_full_disk_raises_the_systems_error_and_leaves_no_partial_checkpoint(tmp_path: Path) -> None:
    here = context(tmp_path)
    with disk_full_beyond(4096), pytest.raises(OSError, match=r"master\.safetensors") as caught:
        run(here)
    assert caught.value.errno == errno.EFBIG
    assert complete_steps(checkpoints_folder(here.store, here.cache, here.resolved.digest)) == []
