"""The training loop: restore, prove packing, measure, step by step, measure, hand back the weights."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from stagecoach_api.training import Offload
from stagecoach_trainer import garbage
from stagecoach_trainer.context import StageContext, World
from stagecoach_trainer.errors import Diverged, Interrupted, UserError
from stagecoach_trainer.train.attention import short_attention
from stagecoach_trainer.train.canary import check_packing
from stagecoach_trainer.train.causal import causal_model, set_rope_theta
from stagecoach_trainer.train.checkpoint import CheckpointBook, read_checkpoint
from stagecoach_trainer.train.engine import Engine, StepReport
from stagecoach_trainer.train.fast_llama import fast_llama
from stagecoach_trainer.train.job import HeldOutSet, TrainingJob, TrainingResult
from stagecoach_trainer.train.measure import Measured, measure_with
from stagecoach_trainer.train.metrics import Meter, StepFlops
from stagecoach_trainer.train.plain import PlainEngine
from stagecoach_trainer.train.prefetch import Prefetcher, StepInput
from stagecoach_trainer.train.state import (
    Progression,
    TrainingState,
    gather_random_states,
    seed_everything,
    set_random_state,
)

log = logging.getLogger(__name__)

HISTORY_POINTS = 200
SMALLEST_LOSS_SCALE = 1.0
__all__ = ["HeldOutSet", "TrainingJob", "TrainingResult", "train"]


def train(job: TrainingJob, context: StageContext) -> TrainingResult:
    """Train, going on from the newest complete checkpoint if there is one.

    Afterwards `job.model` holds the final weights in fp32 on the CPU (on rank 0). Raises Interrupted after a
    checkpoint when `context.stop` is set, Diverged when the loss is no number, UserError for batches without any loss
    and for packing that leaks.
    """
    prepare_model(job)
    device = training_device(context.world)
    engine = build_engine(job, context.world, device)
    book = CheckpointBook(context, job.config.checkpoints, job.steps.num_steps)
    logs = context.work / "logs" if context.world.is_main else None
    flops = StepFlops(job.model, device, context.world.size)
    meter = Meter(logs, context.progress, job.steps.num_steps, flops)
    fast = short_attention(job.model, device), fast_llama(engine.loss, device, engine.dtype)
    with meter, contextlib.closing(book), fast[0], fast[1]:
        return Loop(job, context, engine, book, meter).run()


def prepare_model(job: TrainingJob) -> None:
    """Set what training needs of the model itself."""
    causal = causal_model(job.model)
    if job.config.gradient_checkpointing:
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for module in causal.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = job.config.attention_dropout
    job.model.train()


def training_device(world: World) -> torch.device:
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def build_engine(job: TrainingJob, world: World, device: torch.device) -> Engine:
    """Return the plain engine where nothing is sharded, else DeepSpeed's."""
    sharding = job.config.sharding
    offloads = Offload.CPU in (sharding.offload_optimizer, sharding.offload_parameters)
    if offloads or (world.size > 1 and sharding.zero > 0):
        from stagecoach_trainer.train.sharded import ShardedEngine

        return ShardedEngine(job.model, job.config, world, device)
    return PlainEngine(job.model, job.config, world, device)


class Loop:
    """One run of a training stage. The methods are its steps, in order."""

    def __init__(
        self, job: TrainingJob, context: StageContext, engine: Engine, book: CheckpointBook, meter: Meter
    ) -> None:
        self._job = job
        self._config = job.config
        self._plan = job.steps
        self._context = context
        self._world = context.world
        self._engine = engine
        self._book = book
        self._meter = meter
        self._at = Progression()
        self._micro_rows = job.config.batch.micro_batch_rows or 1

    def run(self) -> TrainingResult:
        """Train to the end."""
        self._restore()
        self._prove_packing()
        if self._at.step == 0:
            self._at.before = self._before()
        gc.collect()
        garbage.take_up()
        try:
            self._make_steps()
        finally:
            gc.unfreeze()
        after = self._after()
        self._book.wait()
        self._engine.finish()
        metrics = {"loss": self._at.loss} | self._at.before | after
        return TrainingResult(self._at.tokens, self._at.step, metrics, tuple(self._at.history))

    # -- before the first step -----------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Take up the newest complete checkpoint; rank 0 decides which."""
        step = self._agree(self._book.find_newest() if self._world.is_main else None)
        seed_everything(self._context.seed, self._world.rank)
        if step is None:
            return
        if self._world.local_rank == 0:
            self._book.bring(step)
        self._barrier()
        state = read_checkpoint(self._book.bring(step), self._world.rank)
        self._engine.load_state(state.engine)
        self._at = state.progression
        seed_everything(self._context.seed + step, self._world.rank)
        if state.random_states:
            set_random_state(state.random_states[0])
        if self._world.is_main:
            log.info("going on after step %d of %d", step, self._plan.num_steps)

    def _agree(self, step: int | None) -> int | None:
        """Return rank 0's value on every rank."""
        if self._world.size == 1:
            return step
        value = torch.tensor([-1 if step is None else step])
        dist.broadcast(value, src=0)
        return None if int(value) < 0 else int(value)

    def _barrier(self) -> None:
        if self._world.size > 1:
            dist.all_reduce(torch.zeros(1))

    def _prove_packing(self) -> None:
        if self._at.step < self._plan.num_steps:
            rows = self._plan.rows(self._at.step)
            check_packing(self._engine.loss, rows, self._engine.device, self._engine.dtype)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _make_steps(self) -> None:
        pin = self._engine.device.type == "cuda"
        prefetcher = Prefetcher(self._plan, self._at.step, self._micro_rows, self._world, pin)
        with contextlib.closing(prefetcher):
            self._meter.pause()
            for item in prefetcher:
                self._make_step(item, prefetcher)
                if self._at.stopped_early:
                    return

    def _make_step(self, item: StepInput, prefetcher: Prefetcher) -> None:
        self._set_rope(item.step)
        if item.num_targets == 0:
            raise UserError(
                f"step {item.step + 1}: no token of the whole batch carries loss; check `loss.roles`, the template and "
                "`sequenceLength`, or raise `batch`"
            )
        learning_rate = self._plan.learning_rate(item.step)
        loss_part = self._accumulate(item)
        report = self._engine.step(learning_rate)
        loss, stop = self._sum_over_ranks(loss_part, self._context.stop.is_set())
        self._refuse_nonsense(item.step, loss, report)
        self._at.step = item.step + 1
        self._at.tokens += item.num_tokens
        self._at.loss = loss
        self._record(item, loss, learning_rate, report, prefetcher.waited_seconds)
        self._between_steps(stop)

    def _accumulate(self, item: StepInput) -> float:
        """Compute all micro-batches; return this rank's part of the loss."""
        scale = 1.0 / item.num_targets
        alone = self._world.size == 1
        batches = [batch for batch in item.batches if len(batch.targets) or not alone]
        parts = [
            self._engine.accumulate(batch, scale, last=index + 1 == len(batches)) for index, batch in enumerate(batches)
        ]
        return float(torch.stack(parts).double().sum())

    def _sum_over_ranks(self, loss: float, stop: bool) -> tuple[float, bool]:
        """Return the whole loss, and whether any rank was asked to stop."""
        if self._world.size == 1:
            return loss, stop
        sums = torch.tensor([loss, float(stop)], dtype=torch.float64)
        dist.all_reduce(sums)
        return float(sums[0]), bool(sums[1])

    def _refuse_nonsense(self, step: int, loss: float, report: StepReport) -> None:
        if math.isfinite(loss) and (math.isfinite(report.gradient_norm) or report.skipped):
            return
        with contextlib.suppress(Exception):
            self._book.wait()
        good = self._book.newest_step
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {report.gradient_norm}"
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is that of step {good}"
        raise Diverged(
            f"{what} at step {step + 1}; {where}. Lower `optimizer.learningRate`, lengthen `schedule.warmupSteps`, "
            "lower `optimizer.clip`, or look at the data of this step"
        )

    def _record(
        self, item: StepInput, loss: float, learning_rate: float, report: StepReport, waited_seconds: float
    ) -> None:
        figures = {"loss": loss, "learningRate": learning_rate, "gradNorm": report.gradient_norm}
        if not math.isfinite(report.gradient_norm):
            del figures["gradNorm"]
        every = max(1, self._plan.num_steps // HISTORY_POINTS)
        if self._at.step % every == 0 or self._at.step in (1, self._plan.num_steps):
            self._at.history.append({"step": self._at.step, "tokens": self._at.tokens, **figures})
        length = max(batch.tokens.shape[1] for batch in item.batches)
        padding = 1.0 - item.num_own_tokens / item.num_slots
        self._meter.step(self._at.step, figures, item.num_tokens, length, waited_seconds, padding)

    def _between_steps(self, stop: bool) -> None:
        """Measure, save, stop: whatever is due after a step."""
        step, last = self._at.step, self._at.step == self._plan.num_steps
        every = self._config.held_out.every_steps
        measured = every is not None and step % every == 0 and not last
        if measured:
            self._measure_during()
        saved = self._book.is_due(step) and not last
        if saved or (stop and not last):
            self._save()
        if stop and not last:
            self._finish_saving()
            raise Interrupted(f"stopped after step {step} of {self._plan.num_steps}; a checkpoint is saved")
        if measured or saved:
            self._meter.pause()

    def _save(self) -> None:
        engine_state = self._engine.state()
        random_states = gather_random_states(self._world)
        if self._world.is_main:
            progression = Progression.from_json(self._at.to_json())
            progression.history = list(self._at.history)
            self._book.save(TrainingState(progression, engine_state, random_states))

    def _finish_saving(self) -> None:
        """Return when the checkpoint is complete, on all ranks at the same time: the first to leave takes the others
        along."""
        if self._world.is_main:
            self._book.wait()
        self._barrier()

    def _set_rope(self, step: int) -> None:
        theta = self._plan.rope_theta(step)
        if theta is not None and set_rope_theta(self._job.model, theta) and self._world.is_main:
            log.info("step %d: the base of the rotary embedding is %g", step + 1, theta)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _measurements(self) -> Iterator[tuple[HeldOutSet, Measured]]:
        progress = self._context.progress
        for held_out in self._job.held_out:
            yield (
                held_out,
                measure_with(
                    self._engine.loss,
                    held_out.rows,
                    self._micro_rows,
                    self._engine.device,
                    self._world,
                    lambda done, total: progress.report("measure", done, total, "batches"),
                ),
            )

    def _before(self) -> dict[str, float]:
        if self._plan.num_steps:
            self._set_rope(0)
        figures = {}
        for held_out, found in self._measurements():
            name = f"heldOut.{held_out.name}.before"
            figures[f"{name}.loss"] = found.loss
            figures[f"{name}.bitsPerCharacter"] = found.bits_per_character(held_out.characters)
        self._meter.write(0, figures)
        return figures

    def _after(self) -> dict[str, float]:
        figures = {}
        for held_out, found in self._measurements():
            name = f"heldOut.{held_out.name}"
            figures[f"{name}.loss"] = found.loss
            figures[f"{name}.bitsPerCharacter"] = found.bits_per_character(held_out.characters)
            if math.isfinite(found.perplexity):  # a manifest holds numbers that JSON has a word for
                figures[f"{name}.perplexity"] = found.perplexity
        self._meter.write(self._at.step, figures)
        return figures

    def _measure_during(self) -> None:
        found = {held_out.name: measured.loss for held_out, measured in self._measurements()}
        figures = {f"heldOut.{name}.loss": loss for name, loss in found.items()}
        self._meter.write(self._at.step, figures)
        self._at.history.append({"step": self._at.step, "tokens": self._at.tokens, **figures})
        stop = self._config.early_stop
        if stop is None:
            return
        loss = found[stop.set]
        if self._at.best is None or loss < self._at.best - stop.min_delta:
            self._at.best, self._at.without_improvement = loss, 0
            return
        self._at.without_improvement += 1
        if self._at.without_improvement >= stop.patience:
            self._at.stopped_early = True
            log.info("step %d: the loss on `%s` no longer falls; training ends", self._at.step, stop.set)
