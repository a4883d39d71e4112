"""`TrainingRun`: the resource people write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from stagecoach_api.base import Model, Name, ShortText, Uri
from stagecoach_api.constraints import Constraint, at_most_one, exactly_one
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.pods import LabelKey, Pods, Quantity
from stagecoach_api.references import Reference
from stagecoach_api.stage_kind import StageConfig, StageKind


class SecretReference(Model):
    """A Secret in the run's namespace."""

    secret_name: Name
    """Name of the Secret; its keys `accessKeyId` and `secretAccessKey` are mounted as files, never put in env."""


class Storage(Model):
    """Where artifacts lie, and where relative inputs are found."""

    uri: Uri | None = None
    """Folder of all artifacts: `s3://bucket/prefix` or `file:///folder`. If unset: `.stagecoach/store` below the
    working directory on a laptop, the operator's default on a cluster."""

    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """S3 endpoint URL. If unset: AWS's own, or the one in the SDK's configuration."""

    region: Annotated[str, Field(max_length=64)] | None = None
    """S3 region. If unset: the SDK's configuration."""

    credentials: SecretReference | None = None
    """Credentials on a cluster. If unset: the service account's identity; on a laptop always the SDK's own chain."""

    inputs: Uri | None = None
    """Folder against which relative `uri` values are resolved. If unset: the run file's folder on a laptop; needed on a
    cluster when a relative `uri` is used."""


class Resources(Model):
    """The gang of pods a stage runs as. In `defaults` or a stage; a field that is None takes the default's value."""

    nodes: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Pods of the stage, one per node. If unset: 1."""

    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of each pod, and so ranks. If unset: 0, which is one CPU rank per pod."""

    gpu_product: Annotated[str, Field(max_length=63)] | None = None
    """Value of the node label `nvidia.com/gpu.product`. If unset: any."""

    ranks_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    """Ranks of each pod where it has no GPU. If unset: 1."""

    cpu: Quantity | None = None
    """CPUs of each pod; its ranks share them as threads. If unset: no request and one thread a rank; on a laptop all
    cores."""

    memory: Quantity | None = None
    """Memory of each pod. If unset: no request."""

    shared_memory: Quantity | None = None
    """Size of `/dev/shm`, which counts as memory. If unset: 64Mi."""

    extended: Annotated[dict[str, Quantity], Field(max_length=8)] | None = None
    """Other resources of each pod, by name, such as `rdma/hca: "1"`. If unset: none."""

    @property
    def num_ranks_per_node(self) -> int:
        return self.gpus_per_node or self.ranks_per_node or 1

    @property
    def num_nodes(self) -> int:
        return self.nodes or 1


class Queue(Model):
    """A Kueue queue."""

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
    """WorkloadPriorityClass: who goes first, and who is preempted. If unset: the pods' own priority."""

    required_topology: LabelKey | None = None
    """Node label within one value of which all pods of the stage must be, such as a rack's. If unset: anywhere."""

    preferred_topology: LabelKey | None = None
    """Node label within one value of which all pods should be, if there is room. If unset: anywhere."""


class Retries(Model):
    """How often a failed attempt is made again, by cause. Being asked to stop (preemption) is never charged."""

    infrastructure: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Lost nodes and pods, killed processes, storage that did not answer. If unset: 20."""

    hang: Annotated[int, Field(ge=0, le=1000)] | None = None
    """No progress for too long. If unset: 5."""

    user: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Errors in the run itself, which would happen again. If unset: 0."""


class StageSettings(Model):
    """What a stage inherits from `defaults` and may override: none of it changes what the stage computes."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Trainer image; by digest (`name@sha256:…`) where it is not the operator's own. If unset: the operator's."""

    resources: Resources = Resources()
    """The gang of pods. Default: every field's own."""

    queue: Queue | None = None
    """Kueue queue the stage waits in; quota is held only while the stage runs. If unset: it runs unqueued."""

    retries: Retries = Retries()
    """Retry budgets by cause. Default: every field's own."""

    pods: Pods = Pods()
    """Placement and surroundings of the pods on a cluster. Default: every field's own."""

    timeout_seconds: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Longest time one attempt may take. If unset: no limit."""


class NamedStage(StageSettings):
    """A stage without its kind. Not part of the API."""

    name: Name
    """Unique name in the run."""

    after: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    """Stages that must be finished first though nothing of theirs is read. Default: none."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """Seed of everything random in the stage. If unset: the run's."""


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
    """One step of the pipeline: a name, exactly one kind, and what it overrides."""

    constraints = (exactly_one(*(kind.module for kind in STAGE_KINDS.values())),)

    @property
    def kind(self) -> str:
        return next(name for name, kind in STAGE_KINDS.items() if getattr(self, kind.module) is not None)

    @property
    def config(self) -> StageConfig:
        """The member of this stage's kind."""
        config: StageConfig = getattr(self, STAGE_KINDS[self.kind].module)
        return config

    def references(self) -> Iterator[tuple[str, Reference]]:
        """Yield every input of the stage with its field path, such as `sft.data[0]`."""
        yield from _references(self.config, self.kind)

    def upstream(self) -> frozenset[str]:
        """Names of the stages that must be finished before this one."""
        inputs = {reference.stage for _, reference in self.references() if reference.stage is not None}
        return frozenset(inputs | set(self.after))


def _references(value: object, path: str) -> Iterator[tuple[str, Reference]]:
    if isinstance(value, Reference):
        yield path, value
    elif isinstance(value, Model):
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            if name == value.input_file and item is not None:
                item = Reference(uri=item)
            yield from _references(item, f"{path}.{field.alias or name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _references(item, f"{path}[{index}]")


class RunSpec(Model):
    """What is to be trained, where it is kept, and what every stage inherits."""

    storage: Storage = Storage()
    """Where artifacts lie. Default: every field's own."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random; each stage draws its own streams from it. Default: 0."""

    suspend: bool = False
    """Stop at the next checkpoint and give up all resources; false goes on from there. Default: false."""

    cancel: bool = False
    """End everything that runs and start nothing more; finished stages and saved checkpoints stay. It goes before
    `suspend`; false takes it back, and the run goes on from its checkpoints. Default: false."""

    defaults: StageSettings = StageSettings()
    """What stages inherit. Default: nothing is set."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=64)]
    """The pipeline. Order does not matter: edges come from inputs and `after`."""


class Metadata(Model):
    """The part of Kubernetes' object metadata that a laptop needs."""

    name: Name
    """Name of the run."""

    namespace: Name = "default"
    """Namespace. Default: default."""

    labels: dict[ShortText, ShortText] = Field(default_factory=dict)
    """Free labels. Default: none."""

    annotations: dict[ShortText, Annotated[str, Field(max_length=65536)]] = Field(default_factory=dict)
    """Free annotations. Default: none."""


class TrainingRun(Model):
    """A whole training pipeline."""

    api_version: Literal["stagecoach.dev/v1alpha1"] = "stagecoach.dev/v1alpha1"
    """Always `stagecoach.dev/v1alpha1`. Default: that."""

    kind: Literal["TrainingRun"] = "TrainingRun"
    """Always `TrainingRun`. Default: that."""

    metadata: Metadata
    """Name and namespace."""

    spec: RunSpec
    """What is to be trained."""
