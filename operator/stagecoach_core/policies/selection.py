"""Stages that a command selects: `--until` and `--from`."""

from __future__ import annotations

from stagecoach_core.graph import ancestors, nearest_name
from stagecoach_core.values import Plan


class UnknownStage(ValueError):
    """The run has no stage of this name."""


def until(plan: Plan, name: str) -> frozenset[str]:
    """Return the stage and everything it needs: `Observed.selected` for `--until NAME`. Raises UnknownStage."""
    require_stage(plan, name)
    return ancestors([name], {key: stage.upstream for key, stage in plan.stages.items()}) | {name}


def starting_from(plan: Plan, name: str) -> frozenset[str]:
    """Return `Observed.forced` for `--from NAME`: that stage alone.

    The stages after it run again only if the content of its artifact changes. Raises UnknownStage.
    """
    require_stage(plan, name)
    return frozenset({name})


def require_stage(plan: Plan, name: str) -> None:
    """Raise UnknownStage, with the nearest name, unless the run has this stage."""
    if name in plan.stages:
        return
    nearest = nearest_name(name, plan.stages)
    hint = f"did you mean `{nearest}`?" if nearest else f"it has {', '.join(f'`{item}`' for item in plan.stages)}"
    raise UnknownStage(f"run `{plan.run}` has no stage `{name}`; {hint}")
