"""`stage.json`, the resolved stage of an attempt."""

from __future__ import annotations

from stagecoach_api.artifacts import ResolvedInput
from stagecoach_api.kinds.sft import SftStage
from stagecoach_core.resolve import artifacts_of, resolved_inputs, resolved_stage
from stagecoach_core.values import StageState, StageView, Start
from tests.core.makers import data_stage, found, plan_for, sft_stage


def test_inputs_from_stages_and_from_outside_are_resolved_by_key() -> None:
    plan = plan_for(data_stage("corpus"), sft_stage(data=[{"stage": "corpus"}]))
    inputs = resolved_inputs(plan.stages["sft"], {"corpus": found("d1", "c1")})
    assert inputs == {
        "uri:base": ResolvedInput(uri="file:///inputs/base", digest="content of base"),
        "stage:corpus": ResolvedInput(uri="file:///store/artifacts/d1/output", digest="c1", stage_digest="d1"),
    }


def test_artifacts_come_from_the_finished_stages_of_a_decision() -> None:
    views = {"a": StageView(StageState.CACHED, artifact=found("d1")), "b": StageView(StageState.RUNNING)}
    assert artifacts_of(views) == {"a": found("d1")}


def test_a_resolved_stage_holds_the_configuration_with_every_default() -> None:
    stage = {**sft_stage(), "resources": {"nodes": 2, "gpusPerNode": 8}, "image": "trainer@sha256:1"}
    plan = plan_for(stage, seed=3)
    resolved = resolved_stage(plan, Start("sft", "d1", 4), {}, "s3://models/x", "http://s3")
    assert (resolved.namespace, resolved.run, resolved.stage, resolved.kind) == ("default", "demo", "sft", "sft")
    assert (resolved.attempt, resolved.digest, resolved.seed, resolved.code) == (4, "d1", 3, "sha256:1")
    assert (resolved.num_nodes, resolved.ranks_per_node) == (2, 8)
    assert (resolved.storage_uri, resolved.storage_endpoint) == ("s3://models/x", "http://s3")
    assert resolved.config["packing"] is True
    assert SftStage.model_validate(resolved.config) == plan.stages["sft"].stage.config
    assert resolved.inputs == resolved_inputs(plan.stages["sft"], {})
