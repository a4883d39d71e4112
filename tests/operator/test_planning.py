"""Planning a run from its spec, and storing the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.spec import StageSettings, Storage
from stagecoach_api.status import Reason
from stagecoach_operator.kube import TRAINING_RUNS
from stagecoach_operator.permitted import Allowed
from stagecoach_operator.planning import (
    FrozenPlan,
    Rejection,
    check_run,
    from_config_map,
    plan_config_map,
    plan_name,
    spec_digest,
)
from tests.operator.makers import World, data_stage, plan_run

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def planned(world: World, *stages: dict[str, Any], **spec: Any) -> FrozenPlan:
    world.submit(*stages, **spec)
    made = plan_run(world.run(), world.settings)
    assert isinstance(made, FrozenPlan), made
    return made


def rejected(world: World, *stages: dict[str, Any], **spec: Any) -> Rejection:
    world.submit(*stages, **spec)
    made = plan_run(world.run(), world.settings)
    assert isinstance(made, Rejection)
    return made


def test_a_stored_plan_is_read_back_unchanged(world: World) -> None:
    frozen = planned(world, data_stage("a", resources={"nodes": 2, "cpu": "4"}), data_stage("b", "a"), seed=7)
    stored = from_config_map(plan_config_map(world.run(), frozen), world.run())
    assert stored == frozen
    assert stored is not None
    assert stored.digest() == frozen.digest()


def test_another_runs_or_a_damaged_plan_is_not_read(world: World) -> None:
    frozen = planned(world, data_stage("a"))
    body = plan_config_map(world.run(), frozen)
    world.submit(data_stage("a"), name="other")
    assert from_config_map(body, world.run("other")) is None
    assert from_config_map({**body, "data": {"plan.json": "{}"}}, world.run()) is None
    assert from_config_map({**body, "data": {}}, world.run()) is None


def test_suspending_and_cancelling_are_not_edits(world: World) -> None:
    world.submit(data_stage("a"))
    before = spec_digest(world.run())
    world.api.edit_spec("demo", suspend=True, cancel=True)
    assert spec_digest(world.run()) == before
    world.api.edit_spec("demo", seed=1)
    assert spec_digest(world.run()) != before


def test_an_edit_keeps_code_and_image(world: World) -> None:
    before = planned(world, data_stage("a"))
    world.settings = world.settings.model_copy(update={"trainer_code": "code-2", "trainer_image": "trainer:2"})
    world.api.edit_spec("demo", seed=1)
    after = plan_run(world.run(), world.settings, before)
    assert isinstance(after, FrozenPlan)
    assert (after.plan.code, after.image) == ("code-1", "trainer:1")


@pytest.mark.parametrize(
    ("stage", "spec", "storage", "reason", "text"),
    [
        pytest.param(data_stage("a"), {}, Storage(), Reason.INVALID_SPEC, "spec.storage.uri", id="no storage"),
        pytest.param(
            data_stage("a"),
            {"storage": {"uri": "file:///home/me"}},
            Storage(),
            Reason.INVALID_SPEC,
            "cannot access a folder",
            id="a folder of one machine",
        ),
        pytest.param(
            data_stage("a", uri="here.txt"),
            {"storage": {"uri": "s3://bucket"}},
            Storage(),
            Reason.INVALID_SPEC,
            "spec.storage.inputs",
            id="a relative input without a base",
        ),
        pytest.param(
            data_stage("a", uri="s3://in/x"),
            {"storage": {"uri": "s3://bucket", "endpoint": "http://127.0.0.1:9"}},
            Storage(),
            Reason.STORAGE_NOT_ALLOWED,
            "storage.allowed",
            id="a storage that is not the operator's",
        ),
    ],
)
def test_problems_specific_to_a_cluster_are_rejected(
    world: World,
    stage: dict[str, Any],
    spec: dict[str, Any],
    storage: Storage,
    reason: Reason,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    world.settings = world.settings.model_copy(update={"storage": storage})
    rejection = rejected(world, stage, **spec)
    assert rejection.reason is reason
    assert text in rejection.message


def test_a_missing_input_is_reported_with_its_field(world: World) -> None:
    rejection = rejected(world, data_stage("a"), data_stage("b", uri="gone.txt"))
    assert rejection.reason is Reason.INPUT_NOT_FOUND
    assert rejection.retry
    assert "stages.b.data.sources[0].uri: cannot be read" in rejection.message


def test_all_problems_are_reported_at_once(world: World) -> None:
    rejection = rejected(world, data_stage("a", "unknown"), data_stage("b", "nowhere"))
    assert "unknown" in rejection.message
    assert "nowhere" in rejection.message
    assert not rejection.retry


def test_a_queue_in_a_label_is_part_of_the_plan_and_of_what_is_checked(world: World) -> None:
    world.submit(data_stage("a"))
    before = spec_digest(world.run())
    label = {"kueue.x-k8s.io/queue-name": "research", "kueue.x-k8s.io/priority-class": "system-first"}
    world.api.edit(TRAINING_RUNS, "team", "demo", metadata={"labels": {**label, "other": "label"}})
    assert spec_digest(world.run()) != before
    refused = check_run(world.run(), world.settings)
    assert isinstance(refused, Rejection)
    assert "spec.defaults.queue.priorityClass: must be an allowed priority class" in refused.message


def test_a_profile_may_give_what_a_run_may_not_name(world: World) -> None:
    profile = StageSettings.model_validate({"pods": {"serviceAccount": "writer"}})
    closed = {"allowed": Allowed(service_accounts=()), "profiles": {"gpu": profile}}
    world.settings = world.settings.model_copy(update=closed)
    assert planned(world, data_stage("a", profile="gpu")).plan.stages["a"].stage.pods.service_account == "writer"
    world.api.edit_spec("demo", stages=[data_stage("a", profile="cpu")])
    unknown = check_run(world.run(), world.settings)
    assert isinstance(unknown, Rejection)
    assert "there is no profile `cpu`; known profiles: gpu" in unknown.message


def test_the_name_of_the_plan_is_derived_from_the_run(world: World) -> None:
    world.submit(data_stage("a"), name="x" * 63)
    name = plan_name(world.run("x" * 63), "d" * 64)
    assert name != plan_name(world.run("x" * 63), "e" * 64), "an edited plan is another ConfigMap"
    assert len(name) <= 63
    assert name.startswith("p-xxx")
