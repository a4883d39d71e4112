"""The values that go in and out of the core. A driver fills `Observed`; `decide` answers with a `Decision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Stage
from stagecoach_api.status import RunState as RunState  # noqa: PLC0414  # values of the core, too
from stagecoach_api.status import StageState as StageState  # noqa: PLC0414


class AttemptState(StrEnum):
    """Where an attempt is, as the driver sees it."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True)
class Attempt:
    """One try at a stage's work."""

    stage: str
    digest: str
    """Stage digest the attempt works on; a re-plan leaves attempts of an older digest behind."""
    number: int
    """1, 2, 3 … over the life of the run's stage."""
    state: AttemptState
    started: float
    """When it was asked for, in seconds since the epoch."""
    running_since: float | None = None
    """When its processes began to run. None: they have not, or it is not known apart from `started`."""
    ended: float | None = None
    """When its last process ended. None: it has not."""
    cause: Cause | None = None
    """Why it ended without a result, or, while it is stopping, the cause `Stop` gave. None: neither, or it is done.
    `policies.ending.cause_of_end` tells it."""
    message: str = ""
    heartbeat: float | None = None
    """Time of the newest sign of life. None: none yet."""
    longest_silence: float = 0.0
    """Longest time between two signs of life so far, in seconds; the limit for a hang adapts to it."""

    @property
    def lives(self) -> bool:
        return self.state is not AttemptState.ENDED

    @property
    def is_stopping(self) -> bool:
        return self.state is AttemptState.STOPPING

    @property
    def is_done(self) -> bool:
        """It ended, and says that its artifact is published."""
        return self.state is AttemptState.ENDED and self.cause is None


@dataclass(frozen=True)
class Found:
    """A complete artifact in the store."""

    stage_digest: str
    content_digest: str
    uri: str
    """Its output folder, absolute."""


@dataclass(frozen=True)
class Missing:
    """The store has no artifact of a digest."""

    at: float
    """When the store said so, in seconds since the epoch. An answer that is not newer than the end of an
    attempt at the digest is asked for again, so that a driver may simply keep every answer."""


@dataclass(frozen=True)
class External:
    """An input from outside the run, as it was found when the run was planned."""

    uri: str
    """Absolute."""
    digest: str
    """Hash over the paths, sizes and checksums of its objects."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its settings resolved against the run's defaults."""

    stage: Stage
    """Stage with `defaults` merged in, seed filled."""
    upstream: tuple[str, ...]
    """Names of stages that must be finished first, sorted."""
    externals: Mapping[str, External]
    """External inputs by `Reference.key`."""


@dataclass(frozen=True)
class Plan:
    """A run's graph, checked: every input exists, there is no cycle."""

    namespace: str
    run: str
    stages: Mapping[str, PlannedStage]
    """By name, in topological order (ties in the order of the file)."""
    code: str
    """Identity of the trainer's code."""


@dataclass(frozen=True)
class Capacity:
    """What the driver can run at once. None: no limit (a cluster's scheduler decides)."""

    slots: int | None = None
    """Stages that may run side by side."""
    ranks: int | None = None
    """Ranks that may run side by side."""


@dataclass(frozen=True)
class Forgotten:
    """Ended attempts without a result that a driver no longer remembers one by one."""

    counts: Mapping[Cause, int]
    """How many, by what they were charged to."""
    until: float
    """When the last of them ended, in seconds since the epoch."""


@dataclass(frozen=True)
class Observed:
    """Everything a decision rests on, seen at one moment."""

    attempts: tuple[Attempt, ...] = ()
    """All attempts of this run that are remembered, of every stage, ended ones included."""
    artifacts: Mapping[str, Found | Missing] = field(default_factory=dict)
    """The store's newest answers, by stage digest. A digest that is not here was not looked up."""
    forgotten: Mapping[tuple[str, str], Forgotten] = field(default_factory=dict)
    """Older attempts than those in `attempts`, by stage and stage digest; they count against the budgets, too."""
    since: float = 0.0
    """When the user asked for this run (or for one more try). Failures of attempts that ended before are not charged;
    what attempts that ended before have made counts as cached."""
    suspend: bool = False
    cancel: bool = False
    selected: frozenset[str] | None = None
    """Stages that may be worked on (`--until`). None: all."""
    forced: frozenset[str] = frozenset()
    """Stages whose artifact is not taken from the cache (`--from`), until an attempt started at or after
    `forced_since` has finished them. A driver that removes the old artifact forgets the answer about it too."""
    forced_since: float = 0.0
    capacity: Capacity = Capacity()


# -- what to do --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookUp:
    """Ask the store whether the artifact of this digest exists."""

    stage: str
    digest: str


@dataclass(frozen=True)
class Start:
    """Start an attempt."""

    stage: str
    digest: str
    number: int


@dataclass(frozen=True)
class Stop:
    """End a living attempt; it saves a checkpoint first."""

    stage: str
    number: int
    reason: str
    cause: Cause = Cause.PREEMPTION
    """What the attempt's end is charged to if it ends without a result; the driver remembers it."""


Action = LookUp | Start | Stop


@dataclass(frozen=True)
class StageView:
    """A stage's state, and for a waiting one the thing it waits for."""

    state: StageState
    digest: str | None = None
    """Stage digest. None: an input is not finished, so it is not known yet."""
    artifact: Found | None = None
    attempt: int = 0
    """Number of the newest attempt; 0: none."""
    restarts: Mapping[Cause, int] = field(default_factory=dict)
    """Attempts at this digest that ended without a result since `Observed.since`, by cause."""
    waiting_for: str = ""
    """What a stage that is neither running nor ended waits for, in words. Empty: nothing."""
    message: str = ""


@dataclass(frozen=True)
class Decision:
    """What to do now, what to say, and when to look again if nothing happens."""

    actions: tuple[Action, ...]
    stages: Mapping[str, StageView]
    state: RunState
    message: str = ""
    look_again_at: float | None = None
    """Seconds since the epoch. None: only when something changes."""
