"""From a spec to a plan, and a plan that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.spec import Storage
from stagecoach_api.status import Reason
from stagecoach_operator.planning import (
    Refusal,
    Snapshot,
    from_config_map,
    plan_config_map,
    plan_name,
    plan_run,
    spec_digest,
)
from tests.operator.makers import World, data_stage


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def planned(world: World, *stages: dict[str, Any], **spec: Any) -> Snapshot:
    world.submit(*stages, **spec)
    made = plan_run(world.run(), world.settings)
    assert isinstance(made, Snapshot), made
    return made


def refused(world: World, *stages: dict[str, Any], **spec: Any) -> Refusal:
    world.submit(*stages, **spec)
    made = plan_run(world.run(), world.settings)
    assert isinstance(made, Refusal)
    return made


def test_a_plan_survives_being_kept(world: World) -> None:
    snapshot = planned(world, data_stage("a", resources={"nodes": 2, "cpu": "4"}), data_stage("b", "a"), seed=7)
    kept = from_config_map(plan_config_map(world.run(), snapshot), world.run())
    assert kept == snapshot
    assert kept is not None
    assert kept.digest() == snapshot.digest()


def test_a_plan_of_another_run_or_a_damaged_one_is_none(world: World) -> None:
    snapshot = planned(world, data_stage("a"))
    body = plan_config_map(world.run(), snapshot)
    world.submit(data_stage("a"), name="other")
    assert from_config_map(body, world.run("other")) is None
    assert from_config_map({**body, "data": {"plan.json": "{}"}}, world.run()) is None
    assert from_config_map({**body, "data": {}}, world.run()) is None


def test_to_suspend_or_cancel_is_no_edit_and_anything_else_is(world: World) -> None:
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
    assert isinstance(after, Snapshot)
    assert (after.plan.code, after.image) == ("code-1", "trainer:1")


@pytest.mark.parametrize(
    ("stage", "spec", "storage", "reason", "says"),
    [
        pytest.param(data_stage("a"), {}, Storage(), Reason.INVALID_SPEC, "spec.storage.uri", id="no storage anywhere"),
        pytest.param(
            data_stage("a"),
            {"storage": {"uri": "file:///home/me"}},
            Storage(),
            Reason.INVALID_SPEC,
            "do not see a folder",
            id="a folder of one machine",
        ),
        pytest.param(
            data_stage("a", uri="here.txt"),
            {"storage": {"uri": "s3://bucket"}},
            Storage(),
            Reason.INVALID_SPEC,
            "spec.storage.inputs",
            id="a relative input without anything to be relative to",
        ),
        pytest.param(
            data_stage("a", uri="s3://in/x"),
            {"storage": {"uri": "s3://bucket", "endpoint": "http://127.0.0.1:9"}},
            Storage(),
            Reason.STORAGE_UNREACHABLE,
            "s3://bucket",
            id="a storage that does not answer",
        ),
    ],
)
def test_what_only_a_cluster_minds_is_refused(
    world: World,
    stage: dict[str, Any],
    spec: dict[str, Any],
    storage: Storage,
    reason: Reason,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    world.settings = world.settings.model_copy(update={"storage": storage})
    refusal = refused(world, stage, **spec)
    assert refusal.reason is reason
    assert says in refusal.message


def test_an_input_that_is_missing_is_named_by_its_field(world: World) -> None:
    refusal = refused(world, data_stage("a"), data_stage("b", uri="gone.txt"))
    assert refusal.reason is Reason.INPUT_NOT_FOUND
    assert refusal.retry
    assert "spec.stages[1].data.sources[0].uri: cannot be read" in refusal.message


def test_every_problem_is_told_at_once(world: World) -> None:
    refusal = refused(world, data_stage("a", "nobody"), data_stage("b", "nowhere"))
    assert "nobody" in refusal.message
    assert "nowhere" in refusal.message
    assert not refusal.retry


def test_the_plans_name_is_the_runs_own(world: World) -> None:
    world.submit(data_stage("a"), name="x" * 63)
    name = plan_name(world.run("x" * 63))
    assert len(name) <= 63
    assert name.startswith("p-xxx")
