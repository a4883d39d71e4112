"""The training loop: restore, prove packing, measure, make the steps, measure, return the weights."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from stagecoach_api.training import Offload, Training
from stagecoach_trainer.batches.rows import Unit
from stagecoach_trainer.batches.schedule import StepSchedule
from stagecoach_trainer.engine.engine import Engine, StepReport
from stagecoach_trainer.engine.objective import LanguageModelling, Objective
from stagecoach_trainer.engine.plain import PlainEngine
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.causal import causal_model, set_rope_theta
from stagecoach_trainer.kernels.dropout import set_attention_dropout
from stagecoach_trainer.loop.checkpoint import CheckpointManager, agree_on_checkpoint, read_checkpoint
from stagecoach_trainer.loop.health import concerns, exploding
from stagecoach_trainer.loop.job import HeldOutSet, Measurable, TrainingJob, TrainingResult
from stagecoach_trainer.loop.metrics import StepFlops, StepMetrics
from stagecoach_trainer.loop.prefetch import Prefetcher, StepInput
from stagecoach_trainer.loop.state import (
    Progression,
    TrainingState,
    gather_random_states,
    seed_everything,
    set_random_state,
)
from stagecoach_trainer.runtime.collectives import sum_over_ranks, wait_for_all
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.errors import Diverged, Interrupted, UserError
from stagecoach_trainer.runtime.progress_log import figures_text
from stagecoach_trainer.runtime.startup import frozen_heap

log = logging.getLogger(__name__)

HISTORY_POINTS = 200
SMALLEST_LOSS_SCALE = 1.0
__all__ = ["HeldOutSet", "TrainingJob", "TrainingResult", "train"]


def train(job: TrainingJob, context: StageContext) -> TrainingResult:
    """Train, starting from the newest complete checkpoint if there is one.

    Afterwards `job.model` holds the final weights in fp32 on the CPU of rank 0. Raises Interrupted after saving a
    checkpoint if `context.stop` is set, Diverged if the loss is not finite, UserError for batches without loss and for
    packing that leaks.
    """
    prepare_network(job.model, job.config)
    device = training_device(context.world)
    objective = job.objective or LanguageModelling()
    engine = build_engine(job.model, job.config, context.world, device, objective)
    checkpoints = CheckpointManager(context, job.config.checkpoints, job.steps.num_steps)
    logs = context.work / "logs" if context.world.is_main else None
    flops = StepFlops(job.model, device, context.world.size)
    metrics = StepMetrics(logs, context.progress, job.steps.num_steps, flops)
    with metrics, contextlib.closing(checkpoints), _accelerated(job, engine, objective, context.world):
        return Loop(job, context, engine, objective, checkpoints, metrics).run()


def _accelerated(
    job: TrainingJob, engine: Engine, objective: Objective, world: World
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the model is proved on the first step's data and computes as that allows."""
    units = job.steps.rows(0) if job.steps.num_steps else ()
    return accelerate(engine.loss, engine.device, engine.dtype, objective.samples(units), world)


def prepare_network(model: nn.Module, config: Training) -> None:
    """Configure gradient checkpointing and attention dropout, and switch the model to training mode."""
    causal = causal_model(model)
    if config.gradient_checkpointing:
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    set_attention_dropout(causal, config.attention_dropout)
    model.train()


def training_device(world: World) -> torch.device:
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def build_engine(
    model: nn.Module, config: Training, world: World, device: torch.device, objective: Objective
) -> Engine:
    """Return the plain engine if nothing is sharded or offloaded, else DeepSpeed's."""
    sharding = config.sharding
    offloads = Offload.CPU in (sharding.offload_optimizer, sharding.offload_parameters)
    if offloads or (world.size > 1 and sharding.zero > 0):
        from stagecoach_trainer.engine.sharded import ShardedEngine

        return ShardedEngine(model, config, world, device, objective)
    return PlainEngine(model, config, world, device, objective)


class Loop:
    """One run of a training stage. The methods are its steps, in order."""

    def __init__(
        self,
        job: TrainingJob,
        context: StageContext,
        engine: Engine,
        objective: Objective,
        checkpoints: CheckpointManager,
        metrics: StepMetrics,
    ) -> None:
        self._job = job
        self._config = job.config
        self._plan = job.steps
        self._schedule = job.schedule or StepSchedule.of(job.config, job.steps.num_steps)
        self._context = context
        self._world = context.world
        self._engine = engine
        self._objective = objective
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._progress = Progression()
        self._micro_rows = job.config.batch.micro_batch_rows or 1

    def run(self) -> TrainingResult:
        """Train to the end."""
        self._restore()
        # Before measuring, which takes long: a model that cannot be trained fails at once.
        if self._progress.step < self._plan.num_steps:
            self._metrics.between("check the first batch")
            self._prove(self._plan.rows(self._progress.step))
        if self._progress.step == 0:
            self._progress.before = self._before()
        with frozen_heap():
            self._make_steps()
        for text in concerns(self._progress.history):
            self._context.progress.warn(text)
        after = self._after()
        # Raises the error of a failed save, which closing the checkpoints would ignore.
        self._checkpoints.wait()
        self._engine.finish()
        metrics = {"loss": self._progress.loss} | self._progress.before | after
        return TrainingResult(self._progress.tokens, self._progress.step, metrics, tuple(self._progress.history))

    # -- before the first step -----------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Load the newest complete checkpoint, chosen by rank 0."""
        checkpoint = agree_on_checkpoint(self._checkpoints.find_newest() if self._world.is_main else None, self._world)
        seed_everything(self._context.seed, self._world.rank)
        if checkpoint is None:
            return
        # One rank of each node downloads; the others wait, and then find the files on the node's disk.
        if self._world.local_rank == 0:
            self._checkpoints.fetch(checkpoint)
        wait_for_all(self._world)
        state = read_checkpoint(self._checkpoints.fetch(checkpoint), self._world.rank)
        self._engine.load_state(state.engine)
        self._progress = state.progression
        # For a rank without a stored state, as after a change of their number: other numbers than from the start.
        seed_everything(self._context.seed + checkpoint.step, self._world.rank)
        if state.random_states:
            set_random_state(state.random_states[0])
        self._metrics.resume(checkpoint.step)
        if self._world.is_main:
            log.info("resuming after step %d of %d", checkpoint.step, self._plan.num_steps)

    def _prove(self, units: Sequence[Unit]) -> None:
        self._objective.prove(self._engine.loss, units, self._engine.device, self._engine.dtype)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _make_steps(self) -> None:
        pin = self._engine.device.type == "cuda"
        prefetcher = Prefetcher(self._plan, self._objective, self._progress.step, self._micro_rows, self._world, pin)
        with contextlib.closing(prefetcher):
            self._metrics.pause()
            self._metrics.between("compute the next step")
            for item in prefetcher:
                # Before the step: a checkpoint that is saved right after the last one contains it too.
                if self._progress.stopped_early:
                    return
                self._make_step(item, prefetcher)

    def _make_step(self, item: StepInput, prefetcher: Prefetcher) -> None:
        self._set_rope(item.step)
        self._prove(item.units)
        if item.num_targets == 0:
            raise UserError(
                f"step {item.step + 1}: no position of the batch has loss; check `loss.roles`, the template and "
                "`sequenceLength`, or raise `batch`"
            )
        learning_rate = self._schedule.learning_rate(item.step)
        loss_part = self._accumulate(item)
        report = self._engine.step(learning_rate)
        # One collective call for both: all ranks see the same loss, and stop after the same step.
        added = self._engine.loss.take_added()
        parts = [loss_part, float(self._context.stop.is_set()), added or 0.0]
        loss, stops, added_by_all = sum_over_ranks(parts, self._world)
        # Before the step is recorded or saved, so that no checkpoint contains a diverged step.
        self._check_finite(item.step, loss, report)
        self._progress.step = item.step + 1
        self._progress.tokens += item.num_tokens
        self._progress.loss = loss
        figures = {"loss": loss, "learningRate": learning_rate, "gradNorm": report.gradient_norm}
        if added is not None:
            figures["routerLoss"] = added_by_all
        self._record(item, figures, prefetcher.waited_seconds)
        self._between_steps(stops > 0)

    def _accumulate(self, item: StepInput) -> float:
        """Run all micro-batches; return this rank's part of the loss."""
        scale = 1.0 / item.num_targets
        alone = self._world.size == 1
        # With several ranks, empty micro-batches are computed too: the forward pass may be a collective call.
        batches = [batch for batch in item.batches if batch.num_targets or not alone]
        parts = [
            self._engine.accumulate(batch, scale, last=index + 1 == len(batches)) for index, batch in enumerate(batches)
        ]
        # Read once for all micro-batches, because reading waits for the GPU.
        return float(torch.stack(parts).double().sum())

    def _check_finite(self, step: int, loss: float, report: StepReport) -> None:
        # With fp16, a gradient that overflows only skips the step and lowers the loss scale (arXiv 1710.03740).
        if math.isfinite(loss) and (math.isfinite(report.gradient_norm) or report.skipped):
            return
        # A save in progress may become the last good checkpoint; if it fails, that must not hide the divergence.
        with contextlib.suppress(Exception):
            self._checkpoints.wait()
        good = self._checkpoints.newest_step
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {report.gradient_norm}"
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is that of step {good}"
        raise Diverged(
            f"{what} at step {step + 1}; {where}. Lower `optimizer.learningRate`, raise `schedule.warmupSteps`, "
            "lower `optimizer.clip`, or check the data of this step"
        )

    def _record(self, item: StepInput, figures: dict[str, float], waited_seconds: float) -> None:
        if not math.isfinite(figures["gradNorm"]):
            # A checkpoint's JSON contains the history, and rejects NaN and infinity.
            del figures["gradNorm"]
        every = max(1, self._plan.num_steps // HISTORY_POINTS)
        if self._progress.step % every == 0 or self._progress.step in (1, self._plan.num_steps):
            self._progress.history.append({"step": self._progress.step, "tokens": self._progress.tokens, **figures})
            self._warn_early()
        length = max(batch.tokens.shape[1] for batch in item.batches)
        padding = 1.0 - item.num_own_tokens / item.num_slots
        self._metrics.step(self._progress.step, figures, item.num_tokens, length, waited_seconds, padding)

    def _warn_early(self) -> None:
        text = exploding(self._progress.history)
        if text is not None:
            self._context.progress.warn(text)

    def _between_steps(self, stop: bool) -> None:
        """Measure, save or stop, as is due after a step."""
        step, last = self._progress.step, self._progress.step == self._plan.num_steps
        every = self._config.held_out.every_steps
        measured = every is not None and step % every == 0 and not last
        # Before saving: the checkpoint then contains the measurement and the state of early stopping, and a resumed run
        # does not measure this step again.
        if measured:
            self._measure_during()
        saved = self._checkpoints.is_due(step) and not last
        if saved or (stop and not last):
            self._save()
        if stop and not last:
            self._finish_saving()
            raise Interrupted(f"stopped after step {step} of {self._plan.num_steps}; a checkpoint is saved")
        if measured or saved:
            self._metrics.pause()

    def _save(self) -> None:
        # Both are collective calls, so every rank makes them although only rank 0 writes.
        engine_state = self._engine.state()
        random_states = gather_random_states(self._world)
        if self._world.is_main:
            # A copy: the next steps change this one while the checkpoint is written.
            progression = Progression.from_json(self._progress.to_json())
            progression.history = list(self._progress.history)
            self._checkpoints.save(TrainingState(progression, engine_state, random_states))

    def _finish_saving(self) -> None:
        """Return on all ranks once the checkpoint is complete: a rank that ended earlier would end the others."""
        if self._world.is_main:
            self._checkpoints.wait()
        wait_for_all(self._world)

    def _set_rope(self, step: int) -> None:
        theta = self._schedule.rope_theta(step)
        if theta is not None and set_rope_theta(self._job.model, theta) and self._world.is_main:
            log.info("step %d: the base of the rotary embedding is now %g", step + 1, theta)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _measurements(self, sets: Sequence[Measurable]) -> Iterator[tuple[Measurable, Mapping[str, float]]]:
        engine = self._engine
        for held_out in sets:
            yield (
                held_out,
                held_out.measure(
                    engine.loss,
                    self._micro_rows,
                    engine.device,
                    self._world,
                    lambda done, total: self._metrics.between("measure", {"batch": done, "batches": total}),
                ),
            )

    def _before(self) -> dict[str, float]:
        if self._plan.num_steps:
            self._set_rope(0)
        return self._write_figures(".before")

    def _after(self) -> dict[str, float]:
        return self._write_figures("", self._job.at_end)

    def _write_figures(self, when: str, others: Sequence[Measurable] = ()) -> dict[str, float]:
        named = [
            (f"heldOut.{held_out.name}{when}", found) for held_out, found in self._measurements(self._job.held_out)
        ]
        named += [(item.name, found) for item, found in self._measurements(others)]
        figures = {f"{name}.{figure}": value for name, found in named for figure, value in found.items()}
        self._write_measured(figures)
        return figures

    def _write_measured(self, figures: Mapping[str, float]) -> None:
        self._metrics.write(self._progress.step, figures)
        if self._world.is_main and figures:
            log.info("measured after step %d: %s", self._progress.step, figures_text(figures))

    def _measure_during(self) -> None:
        found = {held_out.name: figures for held_out, figures in self._measurements(self._job.held_out)}
        figures = {
            f"heldOut.{name}.{figure}": value for name, all_of in found.items() for figure, value in all_of.items()
        }
        self._write_measured(figures)
        losses = {f"heldOut.{name}.loss": all_of["loss"] for name, all_of in found.items()}
        self._progress.history.append({"step": self._progress.step, "tokens": self._progress.tokens, **losses})
        stop = self._config.early_stop
        if stop is None:
            return
        loss = found[stop.set]["loss"]
        if self._progress.best is None or loss < self._progress.best - stop.min_delta:
            self._progress.best, self._progress.without_improvement = loss, 0
            return
        self._progress.without_improvement += 1
        if self._progress.without_improvement >= stop.patience:
            self._progress.stopped_early = True
            log.info("step %d: the loss on `%s` no longer improves; stopping early", self._progress.step, stop.set)
