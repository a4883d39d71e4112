"""From a run to a plan: the graph checked, every stage's settings merged with the defaults, inputs pinned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from stagecoach_api.pods import Pods
from stagecoach_api.spec import Resources, Retries, Stage, StageSettings, TrainingRun
from stagecoach_core.graph import GraphError, topological_order
from stagecoach_core.policies.retry import DEFAULT_BUDGETS
from stagecoach_core.values import External, Plan, PlannedStage

Settings = TypeVar("Settings", Resources, Retries, Pods)


class PlanError(ValueError):
    """The run cannot be planned; `problems` holds one sentence for every fault."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def external_keys(run: TrainingRun) -> dict[str, str]:
    """Return what a driver must look at before it can plan: URIs as the run writes them, by `Reference.key`."""
    return {
        reference.key: reference.uri
        for stage in run.spec.stages
        for _, reference in stage.references()
        if reference.uri is not None
    }


def make_plan(run: TrainingRun, externals: Mapping[str, External], code: str) -> Plan:
    """Check the graph and resolve every stage.

    `externals` holds what was found at each URI, by `Reference.key` (see `external_keys`); `code` is the identity of
    the trainer's code. Raises PlanError with all problems: cycles, inputs that name no stage, names given twice,
    URIs nobody looked at.
    """
    problems = [*_repeated_names(run), *_unknown_externals(run, externals)]
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


def resolve_settings(stage: Stage, defaults: StageSettings, seed: int) -> Stage:
    """Return the stage with every setting it leaves open taken from `defaults`, field by field, and the seed filled."""
    return stage.model_copy(
        update={
            "image": stage.image if stage.image is not None else defaults.image,
            "resources": _merged(stage.resources, defaults.resources),
            "queue": stage.queue if stage.queue is not None else defaults.queue,
            "retries": _merged(_merged(stage.retries, defaults.retries), DEFAULT_BUDGETS),
            "pods": _merged(stage.pods, defaults.pods),
            "timeout_seconds": stage.timeout_seconds if stage.timeout_seconds is not None else defaults.timeout_seconds,
            "seed": stage.seed if stage.seed is not None else seed,
        }
    )


def _merged(own: Settings, defaults: Settings) -> Settings:
    fields = type(own).model_fields
    missing = {name: getattr(defaults, name) for name in fields if getattr(own, name) is None}
    return own.model_copy(update=missing)


def _planned(stage: Stage, run: TrainingRun, externals: Mapping[str, External]) -> PlannedStage:
    keys = {reference.key for _, reference in stage.references() if reference.uri is not None}
    return PlannedStage(
        stage=resolve_settings(stage, run.spec.defaults, run.spec.seed),
        upstream=tuple(sorted(stage.upstream())),
        externals={key: externals[key] for key in sorted(keys)},
    )


def _repeated_names(run: TrainingRun) -> list[str]:
    names = [stage.name for stage in run.spec.stages]
    repeated = sorted({name for name in names if names.count(name) > 1})
    return [
        f"spec.stages: the name `{name}` is given {names.count(name)} times; rename all but one" for name in repeated
    ]


def _unknown_externals(run: TrainingRun, externals: Mapping[str, External]) -> list[str]:
    return [
        f"spec.stages[{stage.name}].{path}: nothing is known of {reference.uri}; check that it exists and can be read"
        for stage in run.spec.stages
        for path, reference in stage.references()
        if reference.uri is not None and reference.key not in externals
    ]
