"""Input and output values of the core. A driver fills in `Observed`; `decide` returns a `Decision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Stage
from stagecoach_api.status import RunState as RunState  # noqa: PLC0414  # part of the core's vocabulary, too
from stagecoach_api.status import StageState as StageState  # noqa: PLC0414


class AttemptState(StrEnum):
    """State of an attempt, as observed by the driver."""

    STARTING = "starting"
    """Requested; its processes do not all run yet."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to end; its processes may still be saving a checkpoint."""
    ENDED = "ended"
    """None of its processes is left."""


class WaitKind(StrEnum):
    """What an attempt that does not run yet is waiting for; each has a deadline of its own (`policies.waiting`)."""

    QUOTA = "quota"
    """Quota of its queue."""
    SCHEDULING = "scheduling"
    """A node for each of its pods, or permission to create them."""
    IMAGE = "image"
    """Its image or a Secret, which cannot be had."""
    PODS = "pods"
    """Its containers to start; nothing is known to be wrong."""


@dataclass(frozen=True)
class Wait:
    """What an attempt is waiting for."""

    kind: WaitKind
    since: float
    """When the driver first saw it waiting for this since it last ran, by the driver's clock."""
    reason: str = ""
    """Stable name of the reason, such as `ImageUnavailable`."""
    message: str = ""


@dataclass(frozen=True)
class Attempt:
    """One attempt at running a stage, as the state machine sees it.

    Each driver derives it from a record of its own: the operator from `stagecoach_api.status.AttemptStatus` in the
    run's status, the local driver from `stagecoach_local.workspace.AttemptRecord` in the workspace. What an attempt is
    started from is a `StageAttempt` (`stagecoach_core.manifests`); what it returns is an
    `stagecoach_api.outcomes.AttemptResult`.
    """

    stage: str
    digest: str
    """Stage digest the attempt works on. After a re-plan it may differ from the stage's current digest."""
    number: int
    """1, 2, 3 … over the life of the run's stage."""
    state: AttemptState
    started: float
    """When it was requested, in seconds since the epoch."""
    running_since: float | None = None
    """When its processes started running: by the driver's clock, which `now` is compared with, not by a node's. None if
    they do not run. If ended: when those started that ran at the end."""
    ran_before: float = 0.0
    """Seconds that it ran before `running_since`. A queue may have stopped it in between; that time does not count."""
    ended: float | None = None
    """When its last process ended. None if it has not."""
    cause: Cause | None = None
    """If ended: why it has no result, see `policies.ending.cause_of_end`. If stopping: the cause of the `Stop`. None if
    neither applies, and if it succeeded."""
    message: str = ""
    heartbeat: float | None = None
    """Time of the newest heartbeat. None before the first."""
    listening_since: float = 0.0
    """Since when heartbeats would have arrived, in seconds since the epoch. Silence before does not count."""
    longest_silence: float = 0.0
    """Longest time between two heartbeats so far, in seconds; the limit for a hang adapts to it."""
    fault: str = ""
    """If ended: type and place of an error that may recur (`AttemptResult.fault`). Empty if there is none."""
    last_step: int | None = None
    """If ended: last step with a complete checkpoint, if it reported one."""
    wait: Wait | None = None
    """What it is waiting for. None if it runs, has ended, or the driver does not know."""
    past: bool = False
    """Whether it ended before the user requested this run, or a retry of it. It is then not charged, and an artifact
    it made counts as cached. Its driver knows by order, not by comparing clocks."""

    @property
    def running_seconds(self) -> float:
        """How long an ended attempt ran, in seconds, without the time in which a queue held it."""
        if self.running_since is None or self.ended is None:
            return self.ran_before
        return self.ran_before + max(0.0, self.ended - self.running_since)

    @property
    def is_live(self) -> bool:
        return self.state is not AttemptState.ENDED

    @property
    def is_stopping(self) -> bool:
        return self.state is AttemptState.STOPPING

    @property
    def is_done(self) -> bool:
        """Whether it ended and reported that its artifact is published."""
        return self.state is AttemptState.ENDED and self.cause is None


@dataclass(frozen=True)
class Found:
    """Answer of the store: it has a complete artifact."""

    stage_digest: str
    content_digest: str
    uri: str
    """Absolute URI of the folder with its files."""
    at: float = field(default=0.0, compare=False)
    """When the store was asked, or the attempt that made it ended, in seconds since the epoch. 0 if not known."""


@dataclass(frozen=True)
class Missing:
    """Answer of the store: it has no artifact with the digest."""

    at: float
    """When the store was asked, in seconds since the epoch. An answer that is not newer than the end of an attempt at
    the digest is stale and requested again, so a driver can keep all answers without invalidating them."""


@dataclass(frozen=True)
class Claimed:
    """Answer of the store: it has no artifact with the digest, but an attempt of another run is making it."""

    by: str
    """The other run, such as `run team/other`."""
    run_uid: str
    """UID of the other run."""
    at: float
    """When the store was asked, in seconds since the epoch."""
    look_again_at: float
    """When to ask again, in seconds since the epoch: the other run may have finished, or its claim may have ended."""


@dataclass(frozen=True)
class External:
    """An input from outside the run, as found when the run was planned."""

    uri: str
    """Absolute."""
    digest: str
    """Hash over the paths, sizes and checksums of its objects."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage whose settings are resolved against the run's defaults."""

    stage: Stage
    """The stage with `defaults` merged in and the seed set."""
    upstream: tuple[str, ...]
    """Names of the stages that must finish first, sorted."""
    externals: Mapping[str, External]
    """External inputs by `Reference.key`."""


@dataclass(frozen=True)
class Plan:
    """The validated graph of a run: every input exists, and there is no cycle."""

    namespace: str
    run: str
    stages: Mapping[str, PlannedStage]
    """By name, in topological order (ties in the order of the file)."""
    code: str
    """Identity of the trainer's code."""


@dataclass(frozen=True)
class Capacity:
    """How much the driver can run at the same time. None for no limit (on a cluster the scheduler decides)."""

    slots: int | None = None
    """Number of stages that may run at the same time."""
    ranks: int | None = None
    """Number of ranks that may run at the same time."""


@dataclass(frozen=True)
class Forgotten:
    """Ended attempts without a result that a driver no longer stores individually."""

    counts: Mapping[Cause, int]
    """Number of attempts by the cause they were charged to."""
    until: float
    """When the last of them ended, in seconds since the epoch."""
    last_step: int | None = None
    """Newest complete checkpoint that they left. None if it is not known."""
    repaid: Mapping[Cause, int] = field(default_factory=dict)
    """Number of those of `counts` that their progress has repaid (`policies.retry.is_repaid`)."""


@dataclass(frozen=True)
class Observed:
    """Everything that a decision depends on, observed at one time."""

    attempts: tuple[Attempt, ...] = ()
    """All stored attempts of this run, of every stage, including those that have ended."""
    artifacts: Mapping[str, Found | Missing | Claimed] = field(default_factory=dict)
    """The newest answers of the store, by stage digest. A digest without an answer has not been looked up."""
    forgotten: Mapping[tuple[str, str], tuple[Forgotten, ...]] = field(default_factory=dict)
    """Attempts older than those in `attempts`, by stage and stage digest, in groups, oldest first. They count against
    the budgets, too."""
    suspend: bool = False
    cancel: bool = False
    keep_going: bool = False
    """Whether stages that do not depend on a failed one still run (`onFailure: continue`)."""
    selected: frozenset[str] | None = None
    """Stages that may run (`--until`). None for all."""
    forced: Mapping[str, int] = field(default_factory=dict)
    """Stages whose cached artifact is ignored (`--from`), until an attempt with this number or a later one has
    succeeded. Earlier attempts do not count as failures either. A driver that deletes the old artifact must drop the
    answer about it, too."""
    capacity: Capacity = Capacity()


# -- decisions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookUp:
    """Look up in the store whether the artifact with this digest exists; the answer is a `Found` or a `Missing`."""

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
    """Stop a live attempt. It saves a checkpoint first."""

    stage: str
    number: int
    reason: str
    cause: Cause = Cause.PREEMPTION
    """Cause to charge if the attempt ends without a result. The driver stores it with the attempt."""
    fault: str = ""
    """`Attempt.fault` of an attempt that is stopped for a reason that may recur. The driver stores it, too."""


Action = LookUp | Start | Stop


@dataclass(frozen=True)
class StageView:
    """The state of a stage to report, and what it is waiting for."""

    state: StageState
    digest: str | None = None
    """Stage digest. None while an input is not finished, because it depends on its content."""
    artifact: Found | None = None
    attempt: int = 0
    """Number of the newest attempt; 0 if there is none."""
    restarts: Mapping[Cause, int] = field(default_factory=dict)
    """Number of attempts at this digest that ended without a result since the user's request, by cause."""
    waiting_for: str = ""
    """What a stage that is neither running nor ended is waiting for, as text. Empty if nothing."""
    message: str = ""


@dataclass(frozen=True)
class Decision:
    """What to do now, what to report, and when to decide again if nothing happens."""

    actions: tuple[Action, ...]
    stages: Mapping[str, StageView]
    state: RunState
    message: str = ""
    look_again_at: float | None = None
    """Seconds since the epoch. None if only a change of the observation can change the decision."""
