"""Which stages a command is about: `--until` and `--from`."""

from __future__ import annotations

from stagecoach_api.outcomes import Cause
from stagecoach_core.graph import ancestors, nearest_name
from stagecoach_core.values import Attempt, Plan, Stop


class UnknownStage(ValueError):
    """A stage that the run does not have."""


def until(plan: Plan, name: str) -> frozenset[str]:
    """Return the stage and everything it needs: `Observed.selected` for `--until NAME`. Raises UnknownStage."""
    require_stage(plan, name)
    return ancestors([name], {key: stage.upstream for key, stage in plan.stages.items()}) | {name}


def starting_from(plan: Plan, name: str) -> frozenset[str]:
    """Return `Observed.forced` for `--from NAME`: that stage. Those behind it run again only if its content changes.

    Raises UnknownStage.
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


def stop_unselected(attempt: Attempt, selected: frozenset[str] | None) -> Stop | None:
    """Return the order to stop an attempt of a stage that is not to be worked on."""
    if selected is None or attempt.stage in selected:
        return None
    return Stop(attempt.stage, attempt.number, "the stage is not selected", Cause.PREEMPTION)
