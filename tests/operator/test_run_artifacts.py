"""Artifacts that are deleted, that another run makes, and that are in another storage than the run's."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_api.artifacts import ResolvedStage, writer_key
from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import Storage
from stagecoach_api.status import AttemptStatus, ConditionStatus, ConditionType, StageState, TrainingRunStatus
from stagecoach_api.store import open_store
from stagecoach_api.writers import take
from stagecoach_core.values import Found
from stagecoach_operator.known_artifacts import known_artifacts
from stagecoach_operator.kube import TRAINING_RUNS
from tests.operator.makers import Ends, Operator, World, data_stage, drive

CHAIN = (data_stage("a"), data_stage("b", "a"))
MONTH = 30 * 86400.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def play(world: World, scenario: Callable[[Operator], Awaitable[Any]]) -> None:
    async def scene() -> None:
        operator = Operator(world)
        await scenario(operator)
        operator.die()

    asyncio.run(scene())


def states(world: World, name: str = "demo") -> list[StageState]:
    return [stage.state for stage in world.status(name).stages]


def exists(uri: str) -> bool:
    """Whether the artifact with this URI is where a status names it."""
    return (Path(uri.removeprefix("file://")).parent / "manifest.json").is_file()


# -- deleted -----------------------------------------------------------------------------------------------------------


def test_an_artifact_deleted_since_it_was_found_is_made_again_by_the_next_run(world: World) -> None:
    """A run submitted 30 days after the artifacts were deleted was Complete, and nothing existed."""

    async def scenario(operator: Operator) -> None:
        world.submit(*CHAIN)
        await drive(world, operator)
        world.submit(*CHAIN, name="same")
        await drive(world, operator)
        assert states(world, "same") == [StageState.CACHED] * 2
        shutil.rmtree(world.folder / "store" / "artifacts")
        world.now += MONTH
        world.submit(*CHAIN, name="again")
        await drive(world, operator)

    play(world, scenario)
    assert states(world, "again") == [StageState.SUCCEEDED] * 2
    assert len(world.pods_made) == 4
    assert all(stage.artifact and exists(stage.artifact.uri) for stage in world.status("again").stages)


def test_an_input_deleted_before_a_retry_weeks_later_is_made_again_and_reported(world: World) -> None:
    async def scenario(operator: Operator) -> None:
        world.ends["b"] = [Ends(64, Cause.USER, "wrong data")]
        world.submit(*CHAIN, defaults={"retries": {"user": 0}})
        await drive(world, operator)
        assert states(world) == [StageState.SUCCEEDED, StageState.FAILED]
        shutil.rmtree(world.folder / "store" / "artifacts")
        world.now += MONTH
        world.api.edit(
            TRAINING_RUNS, "team", "demo", metadata={"annotations": {names.ANNOTATION_RETRY: iso(world.now)}}
        )
        await drive(world, operator)

    play(world, scenario)
    assert states(world) == [StageState.SUCCEEDED] * 2
    assert [name.split("-")[2] for name in world.pods_made] == ["a", "b", "a", "b"]
    assert all(stage.artifact and exists(stage.artifact.uri) for stage in world.status().stages)


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# -- another storage ---------------------------------------------------------------------------------------------------


def test_a_status_never_names_an_artifact_in_a_storage_where_it_is_not(world: World) -> None:
    """The status named an artifact in the new storage that was in the old one."""
    (world.folder / "store2").mkdir()
    new = {"uri": f"file://{world.folder}/store2"}

    async def scenario(operator: Operator) -> None:
        world.holds.add("a")
        world.submit(*CHAIN)
        await drive(world, operator, 20)
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"storage": new})
        await drive(world, operator, 20)
        assert world.stage("a").attempt == 1, "the attempt under way continues"
        world.holds.clear()
        await drive(world, operator)

    play(world, scenario)
    named = [stage.artifact for stage in world.status().stages if stage.artifact is not None]
    assert named
    assert all(exists(artifact.uri) for artifact in named)


def test_what_was_made_in_another_storage_or_at_another_endpoint_is_not_known_here() -> None:
    digest, other = "a" * 64, "b" * 64
    record = AttemptStatus(
        number=1,
        digest=digest,
        name="r",
        started=datetime.fromtimestamp(1, UTC),
        ended=datetime.fromtimestamp(2, UTC),
        content_digest=other,
        artifact_uri=f"s3://models/runs/artifacts/{digest}/attempts/x/y/output",
        artifact_endpoint="https://one",
    )

    def known(**storage: str) -> object:
        return known_artifacts(TrainingRunStatus(), [record], Storage(**storage), {}).get(digest)

    assert known(uri="s3://models/runs/", endpoint="https://one") == Found(digest, other, str(record.artifact_uri))
    assert known(uri="s3://models/runs", endpoint="https://two") is None
    assert known(uri="s3://models/runs") is None
    assert known(uri="s3://models", endpoint="https://one") is None


# -- another run -------------------------------------------------------------------------------------------------------


def test_of_two_runs_that_want_the_same_artifact_one_works_and_the_other_waits_for_it(world: World) -> None:
    async def scenario(operator: Operator) -> None:
        world.holds.add("a")
        world.submit(*CHAIN, name="first")
        world.submit(*CHAIN, name="second")
        await drive(world, operator, 30)
        assert len(world.pods_made) == 1
        worker = world.pods_made[0].split("-")[1]
        waiting = world.stage("a", "second" if worker == "first" else "first")
        assert waiting.state is StageState.PENDING
        assert waiting.waiting_for == f"artifact {str(waiting.digest)[:12]}, which is being made by run team/{worker}"
        world.holds.clear()
        await drive(world, operator)

    play(world, scenario)
    for stage in range(2):
        assert {states(world, name)[stage] for name in ("first", "second")} == {StageState.SUCCEEDED, StageState.CACHED}
    assert len(world.pods_made) == 2


def claim(world: World, digest: str) -> Path:
    """Take the right to write as an attempt of a run in another namespace, under another operator."""
    other = ResolvedStage(
        namespace="elsewhere",
        run="twin",
        stage="a",
        kind="data",
        attempt=1,
        run_uid="uid-of-twin",
        digest=digest,
        config={},
        seed=0,
        code="c",
        storage_uri=world.store.uri,
    )
    assert take(world.store, other)[0]
    return world.folder / "store" / writer_key(digest)


def test_a_run_waits_for_another_operators_run_until_that_no_longer_renews_its_claim(world: World) -> None:
    async def scenario(operator: Operator) -> None:
        world.submit(data_stage("a"), suspend=True)
        await drive(world, operator, 5)
        record = claim(world, str(world.stage("a").digest))
        world.now += 60
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"suspend": False})
        await drive(world, operator, 60)
        assert world.pods_made == []
        assert "which is being made by run elsewhere/twin" in world.stage("a").waiting_for
        assert world.condition(ConditionType.COMPLETE).status is not ConditionStatus.TRUE
        os.utime(record, (time.time() - 1000,) * 2)
        await drive(world, operator, 60)

    play(world, scenario)
    assert states(world) == [StageState.SUCCEEDED]
    assert open_store(world.store.uri).exists(f"artifacts/{world.stage('a').digest}/manifest.json")
