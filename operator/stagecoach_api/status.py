"""What a run's status says: conditions with stable reasons, and the state of every stage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from stagecoach_api.base import Model, Name, NonNegativeCount, Uri
from stagecoach_api.outcomes import Cause

Message = Annotated[str, Field(max_length=4096)]
Digest = Annotated[str, Field(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}$")]
Generation = Annotated[int, Field(ge=0, le=2**62)]


# -- words -------------------------------------------------------------------------------------------------------------


class StageState(StrEnum):
    """What people are told of a stage."""

    PENDING = "Pending"
    RUNNING = "Running"
    STOPPING = "Stopping"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    CACHED = "Cached"
    FAILED = "Failed"
    CANCELLED = "Cancelled"
    SKIPPED = "Skipped"
    """Not worked on: not selected, or something before it failed."""


LIVING = frozenset({StageState.RUNNING, StageState.STOPPING})
FINISHED = frozenset({StageState.SUCCEEDED, StageState.CACHED})
ENDED = frozenset({StageState.FAILED, StageState.CANCELLED})


class RunState(StrEnum):
    """Where the run as a whole is."""

    PROGRESSING = "Progressing"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class ConditionType(StrEnum):
    """What a condition speaks of. Each stands by itself: there is no one phase."""

    ACCEPTED = "Accepted"
    """The run is valid."""
    PLANNED = "Planned"
    """Every input was found, and the order of the stages is known."""
    QUOTA_RESERVED = "QuotaReserved"
    """Every stage that could run has its quota."""
    PROGRESSING = "Progressing"
    """Some stage is worked on, or will be without anybody's doing."""
    SUSPENDED = "Suspended"
    """Nothing runs because somebody asked for it."""
    COMPLETE = "Complete"
    """Every stage is finished."""
    FAILED = "Failed"
    """A stage failed for good, or the run is cancelled."""


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Reason(StrEnum):
    """Why a condition is as it is. Programs may rely on these words: none is renamed or given another meaning."""

    # Accepted
    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    IMAGE_NOT_ALLOWED = "ImageNotAllowed"
    # Planned
    GRAPH_RESOLVED = "GraphResolved"
    RE_PLANNING = "RePlanning"
    INPUT_NOT_FOUND = "InputNotFound"
    STORAGE_UNREACHABLE = "StorageUnreachable"
    # QuotaReserved
    NO_QUEUE = "NoQueue"
    ADMITTED = "Admitted"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    PREEMPTED = "Preempted"
    # Progressing
    STAGES_RUNNING = "StagesRunning"
    WAITING_FOR_PODS = "WaitingForPods"
    UNSCHEDULABLE = "Unschedulable"
    JOBSET_NOT_INSTALLED = "JobSetNotInstalled"
    CREATION_REFUSED = "CreationRefused"
    RETRYING = "Retrying"
    NOTHING_TO_DO = "NothingToDo"
    # Suspended
    SUSPENDED_BY_USER = "SuspendedByUser"
    STOPPING_STAGES = "StoppingStages"
    NOT_SUSPENDED = "NotSuspended"
    # Complete
    ALL_STAGES_FINISHED = "AllStagesFinished"
    STAGES_UNFINISHED = "StagesUnfinished"
    # Failed
    NO_FAILURE = "NoFailure"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    USER_ERROR = "UserError"
    GATE_MISSED = "GateMissed"
    DIVERGED = "Diverged"
    TIMED_OUT = "TimedOut"
    SECRET_MISSING = "SecretMissing"  # noqa: S105  # a word, no secret
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    CANCELLED = "Cancelled"


# -- the status --------------------------------------------------------------------------------------------------------


class Condition(Model):
    """One statement about the run, as Kubernetes has them."""

    type: ConditionType
    """What it speaks of."""

    status: ConditionStatus
    """Whether it holds."""

    reason: Reason
    """Why, in one word that programs may rely on."""

    message: Message = ""
    """Why, in words for people. Default: empty."""

    observed_generation: Generation = 0
    """Generation of the spec it was made for. Default: 0."""

    last_transition_time: AwareDatetime
    """When `status` last changed."""


class Artifact(Model):
    """What a finished stage made."""

    uri: Uri
    """Folder of the output."""

    stage_digest: Digest
    """Digest of the work: configuration, inputs, code, seed."""

    content_digest: Digest
    """Digest of the bytes."""


class StageProgress(Model):
    """How far the newest attempt is."""

    activity: Annotated[str, Field(max_length=64)] = ""
    """What is being done, such as `train`. Default: empty."""

    done: NonNegativeCount = 0
    """How much of it, in `unit`. Default: 0."""

    total: NonNegativeCount | None = None
    """How much there is. None: unknown."""

    unit: Annotated[str, Field(max_length=32)] = ""
    """Unit of `done` and `total`, such as `tokens`. Default: empty."""

    eta: AwareDatetime | None = None
    """When it will probably be done. None: unknown."""


class Restarts(Model):
    """Failed attempts of a stage by cause, of its present digest. They are never forgotten, whatever is cleaned up."""

    infrastructure: NonNegativeCount = 0
    """Lost nodes and pods, killed processes, storage that did not answer. Default: 0."""

    hang: NonNegativeCount = 0
    """No progress for too long. Default: 0."""

    user: NonNegativeCount = 0
    """Errors in the run itself. Default: 0."""

    preemption: NonNegativeCount = 0
    """Asked to stop; never charged. Default: 0."""


class ForgottenAttempts(Restarts):
    """Attempts that are no longer in `attempts`: their number still counts against the retry budgets."""

    digest: Digest
    """Stage digest they worked on."""

    until: AwareDatetime
    """When the last of them ended."""


class Incarnation(Model):
    """One pod 0 of an attempt: a queue may stop an attempt's pods and start new ones."""

    pod_uid: Annotated[str, Field(max_length=64)]
    """UID of the pod."""

    pod: Annotated[str, Field(max_length=253)]
    """Name of the pod."""

    node: Annotated[str, Field(max_length=253)] = ""
    """Node it ran on. Default: empty, none yet."""

    started: AwareDatetime | None = None
    """When its container started. None: it has not."""


class AttemptStatus(Model):
    """One attempt at a stage's work."""

    number: Annotated[int, Field(ge=1, le=10**9)]
    """1 for the stage's first."""

    digest: Digest
    """Stage digest it works on."""

    name: Annotated[str, Field(max_length=63)]
    """Name of its JobSet and of its ConfigMap."""

    started: AwareDatetime
    """When it was asked for."""

    running_since: AwareDatetime | None = None
    """When all its pods had begun to run. None: they have not."""

    ended: AwareDatetime | None = None
    """When nothing of it was left, or its result was there. None: it lives."""

    stopping: Annotated[str, Field(max_length=512)] = ""
    """Why it is being ended, or was. Default: empty, nobody ended it."""

    stop_cause: Cause | None = None
    """What its end is charged to if it was asked to stop. None: it was not."""

    cause: Cause | None = None
    """Why it ended without a result. None: it did not, or is done."""

    content_digest: Digest | None = None
    """Digest of the bytes it published. None: nothing."""

    exit_code: Annotated[int, Field(ge=-256, le=256)] | None = None
    """Exit code of the process that ended it; negative for a signal. None: unknown."""

    pod: Annotated[str, Field(max_length=253)] = ""
    """Pod whose end explains the attempt's. Default: empty, unknown."""

    node: Annotated[str, Field(max_length=253)] = ""
    """Node of that pod. Default: empty, unknown."""

    last_step: Annotated[int, Field(ge=0, le=10**15)] | None = None
    """Last optimiser step whose checkpoint is complete. None: unknown, or the stage does not train."""

    message: Annotated[str, Field(max_length=1024)] = ""
    """How it ended, with the last lines of its log where it left no word. Default: empty."""

    incarnations: Annotated[tuple[Incarnation, ...], Field(max_length=4)] = ()
    """The newest of its pods 0, oldest first. Default: none yet."""


class StageStatus(Model):
    """One stage."""

    name: Name
    """Name of the stage."""

    state: StageState
    """Where it is."""

    attempt: NonNegativeCount = 0
    """Number of the newest attempt, 1 for the first. Default: 0, there was none."""

    digest: Digest | None = None
    """Stage digest. None: an input is not finished, so it is not known yet."""

    artifact: Artifact | None = None
    """What it made. None: it is not finished."""

    cached: bool = False
    """The artifact was found, not made. Default: false."""

    progress: StageProgress | None = None
    """How far the newest attempt is. None: none runs."""

    restarts: Restarts = Restarts()
    """Failed attempts by cause. Default: none."""

    last_cause: Cause | None = None
    """Why the newest ended attempt failed. None: none has."""

    waiting_for: Annotated[str, Field(max_length=1024)] = ""
    """What a stage that is neither running nor ended waits for. Default: empty, nothing."""

    started: AwareDatetime | None = None
    """When its first attempt started. None: it has not, or its artifact was found."""

    finished: AwareDatetime | None = None
    """When it succeeded, failed or was cancelled. None: it has not."""

    gpu_seconds: NonNegativeCount = 0
    """GPUs times seconds over all attempts, rounded down. Default: 0."""

    message: Message = ""
    """What people should know, such as the cause of a failure. Default: empty."""

    attempts: Annotated[tuple[AttemptStatus, ...], Field(max_length=8)] = ()
    """The newest attempts, oldest first. Default: there was none."""

    forgotten: ForgottenAttempts | None = None
    """Failed attempts that `attempts` has no more room for. None: there are none."""


class Summary(Model):
    """What `kubectl get` shows. Made for people; programs read conditions and stages."""

    state: RunState
    """Where the run as a whole is."""

    stage: Annotated[str, Field(max_length=128)] = ""
    """Finished stages of all, and the one worked on, such as `3/7 sft`. Default: empty."""

    progress: Annotated[str, Field(max_length=32)] = ""
    """How far that stage is, such as `42 %`. Default: empty."""

    eta: AwareDatetime | None = None
    """When that stage will probably be done. None: unknown."""

    restarts: NonNegativeCount = 0
    """Charged restarts of all stages. Default: 0."""


class TrainingRunStatus(Model):
    """The status of a run. Only the operator writes it."""

    observed_generation: Generation = 0
    """Generation of the spec this status was made for. Default: 0, none yet."""

    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
    """Statements about the run, one of each type. Default: none yet."""

    stages: Annotated[tuple[StageStatus, ...], Field(max_length=64)] = ()
    """The stages, in the order of the spec. Default: none yet."""

    summary: Summary | None = None
    """What `kubectl get` shows. None: nothing yet."""

    plan_digest: Digest | None = None
    """Digest of the resolved plan that was made when the run was accepted. None: not accepted yet."""
