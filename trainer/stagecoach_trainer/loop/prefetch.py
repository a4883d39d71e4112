"""Preparation of the next steps' batches in a thread while the current step is computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagecoach_trainer.batches.rows import StepPlan, Unit
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.engine.objective import MicroBatch, Objective
from stagecoach_trainer.runtime.context import World

DEPTH = 2
"""Number of steps prepared ahead."""

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class StepInput:
    """This rank's input of one optimiser step."""

    step: int
    units: Sequence[Unit]
    """The global batch."""
    batches: tuple[MicroBatch, ...]
    num_targets: int
    """Positions with loss in the global batch."""
    num_tokens: int
    """Tokens of the global batch, without padding."""
    num_slots: int
    """Positions that this rank computes, padding included."""
    num_own_tokens: int
    """Tokens that this rank computes, without padding."""


def prepare(
    plan: StepPlan, objective: Objective, step: int, micro_batch_rows: int, world: World, pin: bool
) -> StepInput:
    """Return this rank's part of a step as tensors; `pin`: in page-locked memory."""
    units = plan.rows(step)
    own = shard_batch(units, micro_batch_rows, world.rank, world.size)
    batches = tuple(objective.collate(rows) for rows in own.micro_batches)
    return StepInput(
        step=step,
        units=units,
        batches=tuple(batch.pinned() for batch in batches) if pin else batches,
        num_targets=own.num_targets,
        num_tokens=own.num_tokens,
        num_slots=sum(batch.tokens.numel() for batch in batches),
        num_own_tokens=sum(row.num_tokens for rows in own.micro_batches for row in rows),
    )


class Prefetcher:
    """Iterates over the inputs of all steps from `start`; the iteration raises errors of the thread."""

    def __init__(
        self, plan: StepPlan, objective: Objective, start: int, micro_batch_rows: int, world: World, pin: bool
    ) -> None:
        self.waited_seconds = 0.0
        """Time the loop has spent waiting for data."""
        self._queue: queue.Queue[StepInput | BaseException | None] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        arguments = (plan, objective, start, micro_batch_rows, world, pin)
        self._thread = threading.Thread(target=self._produce, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepInput]:
        while True:
            began = time.perf_counter()
            item = self._queue.get()
            self.waited_seconds += time.perf_counter() - began
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()

    def _produce(
        self, plan: StepPlan, objective: Objective, start: int, micro_batch_rows: int, world: World, pin: bool
    ) -> None:
        try:
            for step in range(start, plan.num_steps):
                if not self._put(prepare(plan, objective, step, micro_batch_rows, world, pin)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepInput | BaseException | None) -> bool:
        """Queue an item; return False if the loop has closed the prefetcher instead."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
