"""From a planned stage to `stage.json`: everything its trainer is told."""

from __future__ import annotations

from collections.abc import Mapping

from stagecoach_api.artifacts import ResolvedInput, ResolvedStage
from stagecoach_core.digest import code_identity
from stagecoach_core.values import Found, Plan, PlannedStage, StageView


def artifacts_of(views: Mapping[str, StageView]) -> dict[str, Found]:
    """Return the artifacts of all finished stages, by name, from `Decision.stages`."""
    return {name: view.artifact for name, view in views.items() if view.artifact is not None}


def resolved_inputs(planned: PlannedStage, artifacts: Mapping[str, Found]) -> dict[str, ResolvedInput]:
    """Return where every input lies, by `Reference.key`. `artifacts`: by name, of all stages it reads."""
    inputs: dict[str, ResolvedInput] = {}
    for _, reference in planned.stage.references():
        if reference.stage is None:
            external = planned.externals[reference.key]
            inputs[reference.key] = ResolvedInput(uri=external.uri, digest=external.digest)
        else:
            found = artifacts[reference.stage]
            inputs[reference.key] = ResolvedInput(
                uri=found.uri, digest=found.content_digest, stage_digest=found.stage_digest
            )
    return inputs


def resolved_stage(
    plan: Plan,
    name: str,
    digest: str,
    inputs: Mapping[str, ResolvedInput],
    attempt: int,
    storage_uri: str,
    storage_endpoint: str | None = None,
    storage_region: str | None = None,
) -> ResolvedStage:
    """Return what attempt number `attempt` of a stage is told. `storage_uri` is absolute."""
    stage = plan.stages[name].stage
    return ResolvedStage(
        namespace=plan.namespace,
        run=plan.run,
        stage=name,
        kind=stage.kind,
        attempt=attempt,
        digest=digest,
        config=stage.config.model_dump(mode="json", by_alias=True),
        inputs=dict(inputs),
        seed=stage.seed or 0,
        code=code_identity(stage, plan.code),
        storage_uri=storage_uri,
        storage_endpoint=storage_endpoint,
        storage_region=storage_region,
        num_nodes=stage.resources.num_nodes,
        ranks_per_node=stage.resources.num_ranks_per_node,
    )
