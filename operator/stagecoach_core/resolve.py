"""From a planned stage to `stage.json`, the resolved stage: everything its trainer needs to know."""

from __future__ import annotations

from collections.abc import Mapping

from stagecoach_api.artifacts import ResolvedInput, ResolvedStage
from stagecoach_core.digest import stage_code
from stagecoach_core.values import Found, Plan, PlannedStage, StageView, Start


def artifacts_of(views: Mapping[str, StageView]) -> dict[str, Found]:
    """Return the artifacts of all finished stages, by name, from `Decision.stages`."""
    return {name: view.artifact for name, view in views.items() if view.artifact is not None}


def resolved_inputs(planned: PlannedStage, artifacts: Mapping[str, Found]) -> dict[str, ResolvedInput]:
    """Return every input by `Reference.key`. `artifacts`: of the stages it reads, by name."""
    inputs: dict[str, ResolvedInput] = {}
    for _, reference in planned.stage.references():
        if reference.stage is None:
            external = planned.externals[reference.key]
            inputs[reference.key] = ResolvedInput(uri=external.uri, digest=external.digest)
        else:
            # Present: a `Start` is only decided once every input of the stage is finished.
            found = artifacts[reference.stage]
            inputs[reference.key] = ResolvedInput(
                uri=found.uri, digest=found.content_digest, stage_digest=found.stage_digest
            )
    return inputs


def resolved_stage(
    plan: Plan,
    start: Start,
    artifacts: Mapping[str, Found],
    storage_uri: str,
    storage_endpoint: str | None = None,
    storage_region: str | None = None,
    run_uid: str = "",
) -> ResolvedStage:
    """Return `stage.json` of the attempt that `start` asks for.

    `artifacts`: of the stages it reads, by name (see `artifacts_of`). `storage_uri`: absolute. `run_uid`: see
    `ResolvedStage.run_uid`.
    """
    planned = plan.stages[start.stage]
    stage = planned.stage
    return ResolvedStage(
        namespace=plan.namespace,
        run=plan.run,
        stage=start.stage,
        kind=stage.kind,
        attempt=start.number,
        run_uid=run_uid,
        digest=start.digest,
        config=stage.config.model_dump(mode="json", by_alias=True),
        inputs=resolved_inputs(planned, artifacts),
        seed=stage.seed or 0,
        # As in the stage digest: an image given by digest replaces the trainer's code.
        code=stage_code(stage, plan.code),
        storage_uri=storage_uri,
        storage_endpoint=storage_endpoint,
        storage_region=storage_region,
        num_nodes=stage.resources.num_nodes,
        ranks_per_node=stage.resources.num_ranks_per_node,
    )
