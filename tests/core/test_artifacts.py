"""What a look-up in the store found, and the pointer through which a run names an artifact."""

from __future__ import annotations

import pytest

from stagecoach_api.artifacts import Manifest
from stagecoach_core.artifacts import look_up_result, pointer_to
from stagecoach_core.values import Found, Missing, StageState, StageView
from tests.core.makers import data_stage, found, plan_for


def test_a_manifest_means_that_the_artifact_is_found() -> None:
    manifest = Manifest(
        stage_digest="d1", content_digest="c1", kind="data", objects=(), config={}, code="1", seed=0, created=5.0
    )
    assert look_up_result("d1", manifest, "s3://models/x/", 7.0) == Found(
        "d1", "c1", "s3://models/x/artifacts/d1/output"
    )


def test_an_artifact_is_missing_as_of_the_time_of_the_request() -> None:
    assert look_up_result("d1", None, "s3://models/x", 7.0) == Missing(at=7.0)


@pytest.mark.parametrize(("state", "cached"), [(StageState.CACHED, True), (StageState.SUCCEEDED, False)])
def test_a_pointer_names_the_artifact_and_whether_it_was_cached(state: StageState, cached: bool) -> None:
    artifact = found("d1", "c1")
    pointer = pointer_to(artifact, plan_for(data_stage("corpus")), "corpus", StageView(state, artifact=artifact), 9.0)
    assert (pointer.stage, pointer.kind, pointer.cached, pointer.recorded) == ("corpus", "data", cached, 9.0)
    assert (pointer.stage_digest, pointer.content_digest, pointer.uri) == ("d1", "c1", artifact.uri)
