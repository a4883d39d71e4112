"""`TrainingRun`: the resource that users write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from stagecoach_api.base import Model, Name, ShortText, Uri
from stagecoach_api.constraints import Constraint, at_most_one, exactly_one
from stagecoach_api.fields import FieldPath
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.pods import KEY_PATTERN, Cpus, LabelKey, LabelValue, Memory, Pods, Quantity, keys_match
from stagecoach_api.references import Reference
from stagecoach_api.stage_kind import StageConfig, StageKind


class SecretReference(Model):
    """A reference to a Secret in the run's namespace."""

    secret_name: Name
    """Name of the Secret. Its keys `accessKeyId` and `secretAccessKey` are mounted as files and never set as
    environment variables."""


class Storage(Model):
    """Where artifacts are stored and where relative inputs are found."""

    uri: Uri | None = None
    """Folder of all artifacts: `s3://bucket/prefix` or `file:///folder`. If unset: `.stagecoach/store` in the working
    directory on a laptop, the operator's default on a cluster."""

    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """S3 endpoint URL. If unset: the one in the SDK's configuration, or AWS's own."""

    region: Annotated[str, Field(max_length=64)] | None = None
    """S3 region. If unset: the one in the SDK's configuration."""

    credentials: SecretReference | None = None
    """Credentials on a cluster. A laptop always uses the SDK's credential chain. If unset: the service account's
    identity."""

    inputs: Uri | None = None
    """Folder against which relative `uri` values are resolved. Required on a cluster if a relative `uri` is used. If
    unset: the run file's folder on a laptop."""


ExtendedResources = Annotated[
    dict[str, Quantity],
    Field(max_length=8),
    keys_match(
        r"ephemeral-storage|hugepages-[0-9]+[KMG]i|(?!nvidia\.com/gpu$)(?!([^/]*\.)?kubernetes\.io/)[^/]+/[^/]+",
        "each key must be a resource that has no field of its own",
        "write `domain/name`; GPUs, CPUs and memory are `gpusPerNode`, `cpu` and `memory`",
    ),
    keys_match(KEY_PATTERN, "each key must be the name of a resource", "write `domain/name`"),
]
"""Quantities by the names of resources."""


class Resources(Model):
    """Pods, GPUs, CPUs and memory of a stage. May be set in `defaults` and in a stage; fields that a stage leaves unset
    are taken from `defaults`."""

    nodes: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Number of pods, each on a node of its own. If unset: 1."""

    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of each pod, with one rank per GPU. If unset: 0, which means one CPU rank per pod."""

    gpu_product: Annotated[LabelValue, Field(min_length=1)] | None = None
    """Value of the node label `nvidia.com/gpu.product`. If unset: any."""

    ranks_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    """Ranks of each pod without GPUs. If unset: 1."""

    cpu: Cpus | None = None
    """CPUs of each pod, such as `4` or `500m`, which its ranks share as threads. If unset: no request and one thread
    per rank; all cores on a laptop."""

    memory: Memory | None = None
    """Memory of each pod, such as `64Gi`. If unset: no request."""

    shared_memory: Memory | None = None
    """Size of `/dev/shm`, which counts as memory. If unset: 64Mi."""

    extended: ExtendedResources | None = None
    """Other resources of each pod by name, such as `rdma/hca: "1"`. If unset: none."""

    @property
    def num_ranks_per_node(self) -> int:
        return self.gpus_per_node or self.ranks_per_node or 1

    @property
    def num_nodes(self) -> int:
        return self.nodes or 1


class Queue(Model):
    """The Kueue queue of a stage."""

    constraints = (
        Constraint(
            at_most_one("required_topology", "preferred_topology"),
            "`requiredTopology` and `preferredTopology` exclude each other",
            "give at most one",
        ),
    )

    name: Name
    """Name of the LocalQueue."""

    priority_class: Name | None = None
    """Name of the WorkloadPriorityClass, which determines the order of admission and preemption. If unset: the priority
    of the pods."""

    required_topology: LabelKey | None = None
    """Node label, such as a rack's, of which all pods of the stage must have the same value. If unset: no
    requirement."""

    preferred_topology: LabelKey | None = None
    """Node label of which all pods of the stage should have the same value if possible. If unset: no preference."""


class Retries(Model):
    """Number of times a failed stage is retried within `windowDays`, by cause. Interruptions such as preemption are not
    counted. An end that recurs without a new checkpoint in between becomes an error of the run itself: an error at the
    same place the second time, a missing image or too little memory the third time."""

    infrastructure: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Retries after lost nodes or pods, killed processes and storage failures. If unset: 20."""

    hang: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Retries after too long a time without progress. If unset: 5."""

    user: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Retries after errors in the run itself, which would happen again. If unset: 0."""

    window_days: Annotated[int, Field(ge=1, le=3650)] | None = None
    """Days for which a failure counts. One of an attempt that ran for ten minutes and left a new checkpoint does not
    count at all. Without a new checkpoint, at most ten times as many are retried, of whatever age. If unset: 7."""


class Deadlines(Model):
    """Longest time that an attempt may wait before it runs. Then it ends, and its reason becomes the stage's."""

    quota_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Longest wait for the queue's quota, in seconds; the stage then fails. If unset: 604800, which is 7 days."""

    scheduling_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Longest wait for nodes that fit, in seconds; the stage then fails. If unset: 86400, which is a day."""

    image_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Longest wait for an image or a Secret that cannot be had, in seconds. Tried three times. If unset: 300."""

    start_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Longest wait for the containers to start, in seconds, and longest silence of a running attempt before its first
    report, which counts as a hang. If unset: 1800."""


class StageSettings(Model):
    """Settings that a stage inherits from `defaults` and may override. None of them changes the stage's result."""

    profile: Name | None = None
    """Profile of the installation, whose settings apply where neither stage nor `defaults` set a field. Ignored on a
    laptop. If unset: none."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Trainer image. Must be named by digest (`name@sha256:…`) unless it is the operator's own. If unset: the
    operator's image."""

    resources: Resources = Resources()
    """Pods, GPUs, CPUs and memory."""

    queue: Queue | None = None
    """Kueue queue of the stage; quota is held only while the stage runs. If unset: the queue in the run's label
    `kueue.x-k8s.io/queue-name`, or else none."""

    retries: Retries = Retries()
    """Retries of a failed stage, by cause."""

    deadlines: Deadlines = Deadlines()
    """How long an attempt may wait before it runs."""

    pods: Pods = Pods()
    """Placement and environment of the pods on a cluster."""

    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Longest time that an attempt runs, in seconds; time in a queue does not count. If unset: no limit."""


class NamedStage(StageSettings):
    """A stage without its kind. Not part of the API."""

    name: Name
    """Name of the stage, unique in the run."""

    after: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    """Stages that must finish first although their artifacts are not read."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """Seed of all random numbers of the stage. If unset: the run's."""


def _member(kind: StageKind) -> tuple[Any, Any]:
    """Return the annotation and the field in which a stage of this kind has its configuration."""
    description = f"{kind.summary} If unset: the stage is of another kind."
    return kind.config | None, Field(default=None, description=description)


if TYPE_CHECKING:
    _StageOfAnyKind = NamedStage  # the members are looked up by name only
else:
    _StageOfAnyKind = create_model(
        "_StageOfAnyKind", __base__=NamedStage, **{kind.module: _member(kind) for kind in STAGE_KINDS.values()}
    )


class Stage(_StageOfAnyKind):
    """One step of the pipeline: a name, exactly one kind, and settings that override `defaults`."""

    constraints = (exactly_one(*(kind.module for kind in STAGE_KINDS.values())),)

    @property
    def kind(self) -> str:
        return next(name for name, kind in STAGE_KINDS.items() if getattr(self, kind.module) is not None)

    @property
    def config(self) -> StageConfig:
        """Return the member of this stage's kind."""
        config: StageConfig = getattr(self, STAGE_KINDS[self.kind].module)
        return config

    def references(self) -> Iterator[tuple[FieldPath, Reference]]:
        """Yield every input of the stage with its path below the stage, such as `("sft", "data", 0)`."""
        yield from _references(self.config, (self.kind,))

    def upstream(self) -> frozenset[str]:
        """Return the names of the stages that must finish before this one."""
        inputs = {reference.stage for _, reference in self.references() if reference.stage is not None}
        return frozenset(inputs | set(self.after))


def _references(value: object, path: FieldPath) -> Iterator[tuple[FieldPath, Reference]]:
    if isinstance(value, Reference):
        yield path, value
    elif isinstance(value, Model):
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            if name == value.input_file and item is not None:
                item = Reference(uri=item)
            yield from _references(item, (*path, field.alias or name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _references(item, (*path, index))


class RunSpec(Model):
    """Desired stages of a run, their storage and the settings they inherit."""

    storage: Storage = Storage()
    """Where artifacts are stored."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of all random numbers. Each stage derives its own random streams from it."""

    managed_by: Annotated[str, Field(max_length=63)] | None = None
    """Controller that works on the run on a cluster, such as `kueue.x-k8s.io/multikueue`. The operator leaves the runs
    of other controllers alone. If unset: `stagecoach.dev/operator`, this operator."""

    suspend: bool = False
    """Stop at the next checkpoint and release all resources. Setting it back to false resumes from that checkpoint."""

    cancel: bool = False
    """Stop everything that runs and start nothing more; finished stages and saved checkpoints are kept. Takes
    precedence over `suspend`. Setting it back to false resumes the run from its checkpoints."""

    on_failure: Literal["stop", "continue"] = "stop"
    """What happens to the other stages once one has failed: with `stop` none of them starts; with `continue` those that
    do not depend on it still run. Either way the run fails in the end."""

    defaults: StageSettings = StageSettings()
    """Settings that stages inherit."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=64)]
    """The stages of the pipeline. Their order does not matter: dependencies follow from inputs and `after`."""


class Metadata(Model):
    """The part of Kubernetes' object metadata used outside a cluster."""

    name: Name
    """Name of the run."""

    namespace: Name = "default"
    """Namespace of the run."""

    labels: dict[ShortText, ShortText] = Field(default_factory=dict)
    """Labels of the run."""

    annotations: dict[ShortText, Annotated[str, Field(max_length=65536)]] = Field(default_factory=dict)
    """Annotations of the run."""


class TrainingRun(Model):
    """TrainingRun is a training pipeline: stages that read data, train, measure and release a model."""

    api_version: Literal["stagecoach.dev/v1alpha1"] = "stagecoach.dev/v1alpha1"
    """Version of the API: always `stagecoach.dev/v1alpha1`."""

    kind: Literal["TrainingRun"] = "TrainingRun"
    """Kind of the resource: always `TrainingRun`."""

    metadata: Metadata
    """Object metadata."""

    spec: RunSpec
    """Desired stages of the run."""
