"""The status of a TrainingRun: conditions with stable reasons, and the state of every stage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from stagecoach_api.base import Model, Name, NonNegativeCount, Uri
from stagecoach_api.outcomes import Cause

Message = Annotated[str, Field(max_length=4096)]
Digest = Annotated[str, Field(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}$")]
Generation = Annotated[int, Field(ge=0, le=2**62)]


# -- enumerations ------------------------------------------------------------------------------------------------------


class StageState(StrEnum):
    """State of a stage."""

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
    """Will not run: it is not selected, or a stage it depends on failed."""


LIVING = frozenset({StageState.RUNNING, StageState.STOPPING})
FINISHED = frozenset({StageState.SUCCEEDED, StageState.CACHED})
ENDED = frozenset({StageState.FAILED, StageState.CANCELLED})


class RunState(StrEnum):
    """State of the run as a whole."""

    PROGRESSING = "Progressing"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class ConditionType(StrEnum):
    """Type of a condition. Conditions are independent of each other: there is no single phase."""

    ACCEPTED = "Accepted"
    """The spec is valid and allowed."""
    PLANNED = "Planned"
    """Every input was found, and the order of the stages is resolved."""
    QUOTA_RESERVED = "QuotaReserved"
    """Quota is reserved for every stage that is ready to run."""
    PROGRESSING = "Progressing"
    """At least one stage is running or will start without user action."""
    SUSPENDED = "Suspended"
    """Nothing runs, because the user suspended the run."""
    COMPLETE = "Complete"
    """Every stage has finished successfully."""
    FAILED = "Failed"
    """A stage failed permanently, or the run was cancelled."""


class ConditionStatus(StrEnum):
    """Status of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Reason(StrEnum):
    """Reason of a condition. The values are part of the API: they keep their names and meanings."""

    # Accepted
    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    IMAGE_NOT_ALLOWED = "ImageNotAllowed"
    NOT_ALLOWED = "NotAllowed"
    STORAGE_NOT_ALLOWED = "StorageNotAllowed"
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
    SECRET_MISSING = "SecretMissing"  # noqa: S105  # the name of a reason, not a secret
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    CANCELLED = "Cancelled"


# -- the status --------------------------------------------------------------------------------------------------------


class Condition(Model):
    """A condition of the run, in the form of Kubernetes' `metav1.Condition`."""

    type: ConditionType
    """Type of the condition."""

    status: ConditionStatus
    """Whether the condition holds."""

    reason: Reason
    """Reason for the condition's last transition, stable across releases."""

    message: Message = ""
    """Details of the transition for people. May be empty."""

    observed_generation: Generation = 0
    """Value of `metadata.generation` that the condition was determined for."""

    last_transition_time: AwareDatetime
    """Time at which `status` last changed."""


class Artifact(Model):
    """The artifact of a finished stage."""

    uri: Uri
    """URI of the folder with its files."""

    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """S3 endpoint of the storage it is in; empty for AWS. If unset: not known."""

    stage_digest: Digest
    """Digest of the work that makes it: configuration, inputs, code and seed."""

    content_digest: Digest
    """Digest of its content: the paths, sizes and checksums of its files."""


class StageProgress(Model):
    """Progress of the stage's newest attempt."""

    activity: Annotated[str, Field(max_length=64)] = ""
    """Current activity, such as `train`."""

    done: NonNegativeCount = 0
    """Amount of work done, in `unit`."""

    total: NonNegativeCount | None = None
    """Total amount of work, in `unit`. If unset: not known."""

    unit: Annotated[str, Field(max_length=32)] = ""
    """Unit of `done` and `total`, such as `tokens`."""

    eta: AwareDatetime | None = None
    """Estimated time of completion. If unset: not known."""


class Restarts(Model):
    """Number of failed attempts by cause, at the stage's current digest. Kept when `attempts` drops old entries."""

    infrastructure: NonNegativeCount = 0
    """Attempts lost to the infrastructure: nodes, pods, killed processes, unreachable storage."""

    hang: NonNegativeCount = 0
    """Attempts stopped because they made no progress."""

    user: NonNegativeCount = 0
    """Attempts ended by an error in the run itself, such as invalid data, or by one that recurred."""

    preemption: NonNegativeCount = 0
    """Attempts that were asked to stop. They do not count against the retry budgets."""


class FailureGroup(Restarts):
    """Number of failed attempts that ended at about the same time."""

    until: AwareDatetime
    """Time at which the last of them ended."""

    last_step: Annotated[int, Field(ge=0, le=10**15)] | None = None
    """Newest complete checkpoint that they left. If unset: not known."""

    repaid: Restarts = Restarts()
    """Number of those that made progress before they failed, so that they are not charged."""


class ForgottenAttempts(Restarts):
    """Number of failed attempts that `attempts` no longer lists. They still count against the retry budgets."""

    digest: Digest
    """Stage digest the attempts worked on."""

    until: AwareDatetime
    """Time at which the last of them ended."""

    groups: Annotated[tuple[FailureGroup, ...], Field(max_length=6)] = ()
    """The same attempts by the time at which they ended, oldest first."""


class Incarnation(Model):
    """One pod with index 0 of an attempt. A queue may stop an attempt's pods and create new ones."""

    pod_uid: Annotated[str, Field(max_length=64)]
    """UID of the pod."""

    pod: Annotated[str, Field(max_length=253)]
    """Name of the pod."""

    node: Annotated[str, Field(max_length=253)] = ""
    """Node the pod was scheduled to. Empty until it is scheduled."""

    started: AwareDatetime | None = None
    """Time at which the pod's container started. If unset: it has not started."""


class WaitStatus(Model):
    """Something that an attempt has been waiting for since it was created, or since it last ran."""

    reason: Annotated[str, Field(max_length=64)]
    """Reason for which it waits, such as `Unschedulable`."""

    since: AwareDatetime
    """Time at which the operator first saw it wait for this."""


class AttemptStatus(Model):
    """Status of one attempt at running a stage."""

    number: Annotated[int, Field(ge=1, le=10**9)]
    """Number of the attempt, counted from 1 over the life of the stage."""

    digest: Digest
    """Stage digest the attempt works on."""

    name: Annotated[str, Field(max_length=63)]
    """Name of the attempt's JobSet."""

    started: AwareDatetime
    """Time at which the attempt was created."""

    running_since: AwareDatetime | None = None
    """Time since which all of its pods run, by the operator's clock. If unset: not all of them have started, or a queue
    has stopped them."""

    ran_seconds: Annotated[float, Field(ge=0, le=1e10)] = 0.0
    """Seconds that it ran before `runningSince`, until a queue stopped its pods."""

    waits: Annotated[tuple[WaitStatus, ...], Field(max_length=8)] = ()
    """What it has been waiting for. Empty while it runs."""

    ended: AwareDatetime | None = None
    """Time at which the attempt ended: its result was reported, or none of its objects was left. If unset: it has not
    ended."""

    stopping: Annotated[str, Field(max_length=512)] = ""
    """Reason the operator stopped the attempt. Empty if it did not."""

    stop_cause: Cause | None = None
    """Cause that the attempt's end is charged to if it was stopped. If unset: it was not stopped."""

    cause: Cause | None = None
    """Cause of an end without an artifact. If unset: the attempt has not ended, or it succeeded."""

    content_digest: Digest | None = None
    """Content digest of the artifact the attempt published. If unset: it published none."""

    artifact_uri: Annotated[str, Field(max_length=1024)] | None = None
    """Folder of that artifact's files, in the storage that the attempt worked in. If unset: it published none."""

    artifact_endpoint: Annotated[str, Field(max_length=512)] | None = None
    """S3 endpoint of that storage; empty for AWS. If unset: it published none."""

    exit_code: Annotated[int, Field(ge=-256, le=256)] | None = None
    """Exit code of the process that ended the attempt; negative for a signal. If unset: not known."""

    pod: Annotated[str, Field(max_length=253)] = ""
    """Pod whose termination determined the attempt's result. Empty if not known."""

    node: Annotated[str, Field(max_length=253)] = ""
    """Node of that pod. Empty if not known."""

    last_step: Annotated[int, Field(ge=0, le=10**15)] | None = None
    """Last optimiser step with a complete checkpoint. If unset: not known, or the stage does not train."""

    fault: Annotated[str, Field(max_length=256)] = ""
    """Type and place of an unexpected error. If the next attempt ends with the same one, without a new
    checkpoint, its cause is `user`. Empty if there is none."""

    message: Annotated[str, Field(max_length=1024)] = ""
    """How the attempt ended. If it left no result, the last lines of its log."""

    warnings: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=8)] = ()
    """Warnings that the stage reported during this attempt, shortened; if some are left out, the last entry is
    their count.
    Kept for a stage's newest attempt only. The stage's log and the `report.json` of its artifact have all of them."""

    last_report: AwareDatetime | None = None
    """Time of a progress report, at most about a minute older than the newest one. If unset: none has arrived."""

    longest_silence_seconds: NonNegativeCount = 0
    """Longest time between two progress reports, in seconds. The silence that counts as a hang adapts to it."""

    incarnations: Annotated[tuple[Incarnation, ...], Field(max_length=4)] = ()
    """Newest pods with index 0, oldest first."""


class StageStatus(Model):
    """Status of one stage."""

    name: Name
    """Name of the stage."""

    state: StageState
    """State of the stage."""

    attempt: NonNegativeCount = 0
    """Number of the newest attempt; 0 before the first."""

    counted_from: NonNegativeCount = 0
    """Number of the first attempt that counts since the user last asked for a retry; earlier ones are not charged."""

    digest: Digest | None = None
    """Stage digest: identifies the work by configuration, inputs, code and seed. If unset: not known until every input
    is finished."""

    artifact: Artifact | None = None
    """Artifact of the stage. If unset: the stage is not finished."""

    cached: bool = False
    """Whether the artifact already existed, so that no attempt was needed."""

    progress: StageProgress | None = None
    """Progress of the newest attempt. If unset: no attempt is running."""

    restarts: Restarts = Restarts()
    """Number of failed attempts by cause."""

    last_cause: Cause | None = None
    """Cause of the most recent failure. If unset: no attempt has failed."""

    waiting_for: Annotated[str, Field(max_length=1024)] = ""
    """What the stage is waiting for. Empty if it is running, has ended or waits for nothing."""

    started: AwareDatetime | None = None
    """Time at which the first attempt started. If unset: none has started, or the artifact already existed."""

    finished: AwareDatetime | None = None
    """Time at which the stage succeeded, failed or was cancelled. If unset: it has not."""

    gpu_seconds: NonNegativeCount = 0
    """GPU time of all attempts: number of GPUs times seconds, rounded down."""

    message: Message = ""
    """Details for people, such as the cause of a failure. May be empty."""

    avoided_nodes: Annotated[tuple[Annotated[str, Field(max_length=300)], ...], Field(max_length=16)] = ()
    """Nodes that the newest attempt avoids because attempts of this or other runs failed there within a day, each with
    the number of failures. One with a single failure is used if no other fits; others are excluded."""

    attempts: Annotated[tuple[AttemptStatus, ...], Field(max_length=8)] = ()
    """Newest attempts, oldest first."""

    forgotten: ForgottenAttempts | None = None
    """Failed attempts that were dropped from `attempts`. If unset: none were dropped."""


class Summary(Model):
    """Values of the columns of `kubectl get`. Made for people; programs should read `conditions` and `stages`."""

    state: RunState
    """State of the run as a whole."""

    stage: Annotated[str, Field(max_length=128)] = ""
    """Number of finished stages, number of stages, and the stage being run, such as `3/7 sft`."""

    progress: Annotated[str, Field(max_length=32)] = ""
    """Progress of that stage, such as `42 %`."""

    eta: AwareDatetime | None = None
    """Estimated time at which that stage completes. If unset: not known."""

    restarts: NonNegativeCount = 0
    """Number of restarts of all stages that count against the retry budgets."""


class TrainingRunStatus(Model):
    """Most recently observed status of the run. Populated by the operator; read-only."""

    observed_generation: Generation = 0
    """Most recent `metadata.generation` observed by the operator; 0 before the first."""

    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
    """Latest observations of the run's state, one of each type."""

    stages: Annotated[tuple[StageStatus, ...], Field(max_length=64)] = ()
    """Status of every stage, in the order of the spec."""

    summary: Summary | None = None
    """Values of the columns of `kubectl get`. If unset: the run has not been processed yet."""

    retry: Annotated[str, Field(max_length=128)] = ""
    """Value of the annotation `stagecoach.dev/retry` that was carried out last, or its SHA-256 if it is long. Empty if
    there was none."""

    installation: Annotated[str, Field(max_length=317)] = ""
    """Installation of the operator that works on the run, as `namespace/Lease`; others leave it alone. Empty before the
    first."""

    plan_digest: Digest | None = None
    """Digest of the resolved plan, made when the run was accepted. If unset: the run has not been accepted."""
