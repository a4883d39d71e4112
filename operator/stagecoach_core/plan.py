"""From a run to a plan: validate the graph, merge every stage's settings with the defaults, pin external inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from stagecoach_api import names
from stagecoach_api.fields import format_path
from stagecoach_api.pods import Pods
from stagecoach_api.spec import Deadlines, Queue, Resources, Retries, Stage, StageSettings, TrainingRun
from stagecoach_core.graph import GraphError, topological_order
from stagecoach_core.policies.retry import DEFAULT_BUDGETS
from stagecoach_core.policies.waiting import DEFAULT_DEADLINES
from stagecoach_core.values import External, Plan, PlannedStage

SettingsT = TypeVar("SettingsT", Resources, Retries, Deadlines, Pods)


class PlanError(ValueError):
    """The run cannot be planned. `problems` has one sentence for each problem."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def external_uris(run: TrainingRun) -> dict[str, str]:
    """Return the external inputs that a driver must look up before planning: URIs as given, by `Reference.key`."""
    return {
        reference.key: reference.uri
        for stage in run.spec.stages
        for _, reference in stage.references()
        if reference.uri is not None
    }


def make_plan(run: TrainingRun, externals: Mapping[str, External], code: str) -> Plan:
    """Validate the graph and resolve every stage.

    `externals`: what was found at each URI, by `Reference.key` (see `external_uris`). `code`: identity of the trainer's
    code. Raises PlanError with all problems: cycles, inputs that name no stage, duplicate names, URIs that are not in
    `externals`.
    """
    run = with_queue_of_label(run)
    problems = [*_duplicate_names(run), *_unknown_externals(run, externals)]
    stages = {stage.name: stage for stage in run.spec.stages}
    order: tuple[str, ...] = ()
    try:
        order = topological_order({name: stage.upstream() for name, stage in stages.items()})
    except GraphError as error:
        problems.extend(error.problems)
    if problems:
        raise PlanError(tuple(problems))
    planned = {name: _planned(stages[name], run, externals) for name in order}
    return Plan(namespace=run.metadata.namespace, run=run.metadata.name, stages=planned, code=code)


def with_queue_of_label(run: TrainingRun) -> TrainingRun:
    """Return the run with Kueue's labels of the run itself as the queue of stages that set none.

    Kueue's users write `kueue.x-k8s.io/queue-name` on a job; ignored, the run would use GPUs outside of any quota.
    Raises PlanError for a label that names no queue.
    """
    labels, defaults = run.metadata.labels, run.spec.defaults
    if names.LABEL_QUEUE not in labels or defaults.queue is not None:
        return run
    try:
        queue = Queue(name=labels[names.LABEL_QUEUE], priority_class=labels.get(names.LABEL_QUEUE_PRIORITY))
    except ValidationError:
        named = f"metadata.labels: `{names.LABEL_QUEUE}: {labels[names.LABEL_QUEUE]}`"
        raise PlanError((f"{named} names no queue; set `spec.defaults.queue`, or correct the label",)) from None
    spec = run.spec.model_copy(update={"defaults": defaults.model_copy(update={"queue": queue})})
    return run.model_copy(update={"spec": spec})


def resolve_settings(stage: Stage, defaults: StageSettings, seed: int) -> Stage:
    """Return the stage with unset settings taken from `defaults`, field by field, and with the seed set."""
    stage = _inherited(stage, defaults)
    return stage.model_copy(
        update={
            "retries": _merged(stage.retries, DEFAULT_BUDGETS),
            "deadlines": _merged(stage.deadlines, DEFAULT_DEADLINES),
            "seed": stage.seed if stage.seed is not None else seed,
        }
    )


def with_profiles(run: TrainingRun, profiles: Mapping[str, StageSettings]) -> TrainingRun:
    """Return the run with what its stages and `defaults` leave unset taken from the profiles they name.

    Raises PlanError with all profiles that do not exist.
    """
    defaults = run.spec.defaults
    named = {stage.name: stage.profile or defaults.profile for stage in run.spec.stages}
    known = ", ".join(sorted(profiles)) or "none"
    unknown = tuple(
        f"stages.{stage}.profile: there is no profile `{profile}`; known profiles: {known}"
        for stage, profile in named.items()
        if profile is not None and profile not in profiles
    )
    if unknown:
        raise PlanError(unknown)
    stages = tuple(
        stage if profile is None else _inherited(_inherited(stage, defaults), profiles[profile])
        for stage, profile in zip(run.spec.stages, named.values(), strict=True)
    )
    return run.model_copy(update={"spec": run.spec.model_copy(update={"stages": stages})})


def _inherited(stage: Stage, given: StageSettings) -> Stage:
    """Return the stage with unset settings taken from `given`, field by field."""
    return stage.model_copy(
        update={
            "image": stage.image if stage.image is not None else given.image,
            "resources": _merged(stage.resources, given.resources),
            "queue": stage.queue if stage.queue is not None else given.queue,
            "retries": _merged(stage.retries, given.retries),
            "deadlines": _merged(stage.deadlines, given.deadlines),
            "pods": _merged(stage.pods, given.pods),
            "timeout_seconds": stage.timeout_seconds if stage.timeout_seconds is not None else given.timeout_seconds,
        }
    )


def _merged(own: SettingsT, defaults: SettingsT) -> SettingsT:
    fields = type(own).model_fields
    # An unset field is None; a value equal to some default, such as 0, is set.
    missing = {name: getattr(defaults, name) for name in fields if getattr(own, name) is None}
    return own.model_copy(update=missing)


def _planned(stage: Stage, run: TrainingRun, externals: Mapping[str, External]) -> PlannedStage:
    keys = {reference.key for _, reference in stage.references() if reference.uri is not None}
    return PlannedStage(
        stage=resolve_settings(stage, run.spec.defaults, run.spec.seed),
        upstream=tuple(sorted(stage.upstream())),
        externals={key: externals[key] for key in sorted(keys)},
    )


def _duplicate_names(run: TrainingRun) -> list[str]:
    names = [stage.name for stage in run.spec.stages]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    return [
        f"spec.stages: the name `{name}` occurs {names.count(name)} times; rename all but one" for name in duplicates
    ]


def _unknown_externals(run: TrainingRun, externals: Mapping[str, External]) -> list[str]:
    return [
        f"{format_path(('stages', stage.name, *path))}: {reference.uri} was not found; check that it is readable"
        for stage in run.spec.stages
        for path, reference in stage.references()
        if reference.uri is not None and reference.key not in externals
    ]
