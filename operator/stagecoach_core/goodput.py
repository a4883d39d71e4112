"""What the time of an attempt was spent on: every second from its creation to its end, in exactly one category.

Goodput is the share of the time in which pods hold their GPUs that was training and was not lost again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from stagecoach_api.progress import RESUME, STEPS, TRAIN


class Spent(StrEnum):
    """What time is spent on."""

    TRAINING = "training"
    """The work of the stage. For stages that do not train, such as `data`: their processing."""
    QUEUE = "queue"
    """Waiting for quota or for nodes; no GPU is held."""
    IMAGE = "image"
    """Pods are scheduled, but not all of their containers have started."""
    FETCH = "fetch"
    """Downloading inputs."""
    RESTORE = "restore"
    """Reading a checkpoint."""
    COMPILE = "compile"
    """Importing libraries, building and loading the model, compiling."""
    SAVE = "save"
    """Writing and uploading results while training waits."""
    EVALUATE = "evaluate"
    """Measuring on held-out data."""
    HUNG = "hung"
    """Silence that was ended as a hang."""
    LOST = "lost"
    """Training after the last complete checkpoint of an attempt that ended without a result."""
    IDLE = "idle"
    """Holding GPUs without any of the above, such as pods that have not ended after the result."""


HOLDING = frozenset(Spent) - {Spent.QUEUE}
"""Categories in which pods hold their GPUs."""

OF_ACTIVITY = {
    "start": Spent.COMPILE,
    "load libraries": Spent.COMPILE,
    "prepare": Spent.COMPILE,
    "build model": Spent.COMPILE,
    "load model": Spent.COMPILE,
    "fetch": Spent.FETCH,
    RESUME: Spent.RESTORE,
    "save": Spent.SAVE,
    "save model": Spent.SAVE,
    "save adapter": Spent.SAVE,
    "publish": Spent.SAVE,
}

MAX_MARKS = 64


def spent_on(activity: str, unit: str) -> Spent:
    """Return the category of an activity that a stage reports.

    Whatever a training loop does at a step other than making steps is measuring. Everything else that has no category
    of its own is the stage's work.
    """
    if activity in OF_ACTIVITY:
        return OF_ACTIVITY[activity]
    return Spent.EVALUATE if unit == STEPS and activity != TRAIN else Spent.TRAINING


@dataclass(frozen=True)
class Mark:
    """A step, and the seconds of training that had been spent when it was reached."""

    step: float
    seconds: float


@dataclass(frozen=True)
class Ledger:
    """The time of one attempt by category, up to `until`; since then it has been spent on `current`."""

    until: float
    """Seconds since the epoch."""
    current: Spent = Spent.QUEUE
    seconds: Mapping[Spent, float] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()
    """In the order of their steps; at most `MAX_MARKS`."""

    def at(self, now: float, closing: Spent | None = None) -> Ledger:
        """Return the ledger up to `now`. `closing`: what the time since `until` was spent on, if not on `current`.

        A clock that went back changes nothing.
        """
        if now <= self.until:
            return self
        what = closing or self.current
        return replace(self, until=now, seconds=_added(self.seconds, what, now - self.until))

    def enter(self, now: float, what: Spent) -> Ledger:
        """Return the ledger of an attempt that begins to spend its time on `what`."""
        return replace(self.at(now), current=what)

    def reach(self, now: float, step: float) -> Ledger:
        """Return the ledger of an attempt that has made `step` steps."""
        ledger = self.at(now)
        # After a rollback, the steps after it are made again.
        kept = [mark for mark in ledger.marks if mark.step < step]
        marks = [*kept, Mark(step, ledger.seconds.get(Spent.TRAINING, 0.0))]
        return replace(ledger, marks=tuple(_thinned(marks)))

    def end(self, now: float, saved_step: float | None, hung: bool = False) -> Ledger:
        """Return the ledger of an attempt that ended without a result at `now`.

        `saved_step`: step of its newest complete checkpoint, None if there is none. `hung`: it was stopped because it
        hung. Training after the checkpoint is lost.
        """
        ledger = self.at(now, Spent.HUNG if hung else None)
        trained = ledger.seconds.get(Spent.TRAINING, 0.0)
        lost = max(0.0, trained - ledger._seconds_until(saved_step))
        kept = {**ledger.seconds, Spent.TRAINING: trained - lost}
        return replace(ledger, current=Spent.IDLE, seconds=_added(kept, Spent.LOST, lost))

    def _seconds_until(self, step: float | None) -> float:
        """Return the seconds of training that had been spent when a step was reached; between marks, in proportion."""
        if step is None:
            return 0.0
        before = max((mark for mark in self.marks if mark.step <= step), key=lambda mark: mark.step, default=None)
        after = min((mark for mark in self.marks if mark.step > step), key=lambda mark: mark.step, default=None)
        if before is None:
            return 0.0
        if after is None:
            return before.seconds
        share = (step - before.step) / (after.step - before.step)
        return before.seconds + share * (after.seconds - before.seconds)


def goodput(ledgers: Iterable[Ledger]) -> float | None:
    """Return the share of the time with GPUs that was training and not lost. None if no GPU was held."""
    trained = held = 0.0
    for ledger in ledgers:
        trained += ledger.seconds.get(Spent.TRAINING, 0.0)
        held += sum(ledger.seconds.get(what, 0.0) for what in HOLDING)
    return trained / held if held else None


def _added(seconds: Mapping[Spent, float], what: Spent, more: float) -> dict[Spent, float]:
    return {**seconds, what: seconds.get(what, 0.0) + more} if more else dict(seconds)


def _thinned(marks: list[Mark]) -> list[Mark]:
    """Return the marks, without every second one if there are too many; the first and the last are kept."""
    return marks if len(marks) <= MAX_MARKS else [*marks[:-1:2], marks[-1]]
