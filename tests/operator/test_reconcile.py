"""Whole runs through the reconciler, with an API server in memory and pods that the test controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api import names
from stagecoach_api.artifacts import Manifest, Pointer, pointer_key
from stagecoach_api.status import ConditionStatus, ConditionType, Reason, RunState, StageState
from stagecoach_api.store import AccessDenied, Store, StoreEntry, Unreachable
from stagecoach_api.stores.lookup import find_manifest
from stagecoach_operator import artifact_lookup as lookup
from stagecoach_operator import planning
from stagecoach_operator.kube import JOBSETS, NETWORK_POLICIES, PODS, TRAINING_RUNS, WORKLOADS, Body, Resource
from stagecoach_operator.permitted import Allowed
from stagecoach_operator.progress_reports import ProgressReport
from tests.operator.makers import Ends, Operator, World, data_stage, drive

CHAIN = (data_stage("a"), data_stage("b", "a"), data_stage("c", "b"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.input("a.txt")
    return made


def play(world: World, seconds: float = 3600.0) -> Operator:
    """Run an operator until nothing more happens."""

    async def scenario() -> Operator:
        operator = Operator(world)
        await drive(world, operator, seconds)
        operator.die()
        return operator

    return asyncio.run(scenario())


def states(world: World, name: str = "demo") -> list[StageState]:
    return [stage.state for stage in world.status(name).stages]


def test_three_stages_run_in_order(world: World) -> None:
    world.submit(*CHAIN)
    play(world)
    assert states(world) == [StageState.SUCCEEDED] * 3
    assert world.condition(ConditionType.COMPLETE).reason is Reason.ALL_STAGES_FINISHED
    summary = world.status().summary
    assert summary is not None
    assert (summary.state, summary.stage) == (RunState.COMPLETE, "3/3")
    assert len(world.pods_made) == 3
    assert world.run().finalizers == ()
    stage_file = world.stage_file_of(world.jobsets()[1])
    assert stage_file["inputs"]["stage:a"]["digest"] == world.stage("a").artifact.content_digest  # type: ignore[union-attr]


def test_finished_stages_have_pointers_in_the_store(world: World) -> None:
    world.submit(*CHAIN)
    play(world)
    pointer = Pointer.model_validate_json(world.store.read(pointer_key("team", "demo", "b")))
    artifact = world.stage("b").artifact
    assert artifact is not None
    assert (pointer.stage_digest, pointer.uri, pointer.kind) == (artifact.stage_digest, artifact.uri, "data")


def test_a_transition_takes_three_writes_and_no_reads(world: World) -> None:
    world.holds |= {"a", "b"}
    world.submit(*CHAIN)

    async def scenario() -> None:
        operator = Operator(world)
        for stage in ("a", "b"):
            await drive(world, operator, 30)
            world.holds.remove(stage)
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    at = [index for index, what in enumerate(world.api.writes) if what.startswith("create jobsets")]
    between = world.api.writes[at[1] + 1 : at[2] + 1]
    assert [what.split(" ")[:2] for what in between] == [
        ["patch", "trainingruns/status"],
        ["create", "configmaps"],
        ["create", "jobsets"],
    ]
    assert world.api.reads == []


def test_an_attempt_gets_a_network_policy_at_the_cost_of_one_write_before_its_pods(world: World) -> None:
    world.settings = world.settings.model_copy(update={"network_policies": True})
    world.submit(data_stage("a"))
    play(world)
    assert states(world) == [StageState.SUCCEEDED]
    made = [what.split(" ")[1] for what in world.api.writes if what.startswith("create ") and "events" not in what]
    assert sorted(made[1:3]) == ["configmaps", "networkpolicies"]
    assert made[3] == "jobsets"
    (policy,) = world.api.all_of(NETWORK_POLICIES)
    assert policy["metadata"]["ownerReferences"][0]["uid"] == world.run().meta.uid


def test_pods_that_start_slowly_do_not_delay_the_status(world: World) -> None:
    world.waits["b"] = {"reason": "ContainerCreating"}
    world.submit(*CHAIN)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 6)
        assert states(world) == [StageState.SUCCEEDED, StageState.PENDING, StageState.PENDING]
        assert world.stage("b").waiting_for == "0 of 1 pods run"
        world.waits.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.SUCCEEDED] * 3


def test_a_second_run_of_the_same_work_creates_no_pods(world: World) -> None:
    world.submit(*CHAIN)
    play(world)
    world.pods_made.clear()
    world.submit(*CHAIN, name="again")
    play(world)
    assert states(world, "again") == [StageState.CACHED] * 3
    assert world.pods_made == []


def test_an_earlier_lookup_does_not_hide_a_finished_artifact(world: World) -> None:
    async def scenario() -> None:
        operator = Operator(world)
        world.submit(*CHAIN)
        await drive(world, operator)
        world.pods_made.clear()
        world.submit(*CHAIN, name="again")
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world, "again") == [StageState.CACHED] * 3
    assert world.pods_made == []


def test_a_user_error_is_not_retried(world: World) -> None:
    world.ends["b"] = [Ends(64, "user", "data.sources[0]: no such field")]
    world.submit(*CHAIN)
    play(world)
    assert states(world) == [StageState.SUCCEEDED, StageState.FAILED, StageState.SKIPPED]
    failed = world.condition(ConditionType.FAILED)
    assert (failed.status, failed.reason) == (ConditionStatus.TRUE, Reason.USER_ERROR)
    for part in ("no such field", "pod r-demo-b", "node node-0", "exit code 64"):
        assert part in failed.message
    assert world.pods_made.count(world.stage("b").attempts[-1].name) == 1
    assert world.run().finalizers == ()
    assert all("-b-" not in name for name in world.jobsets()), "a failed attempt leaves no pods"


@pytest.mark.parametrize(("failures", "state"), [(2, StageState.SUCCEEDED), (3, StageState.FAILED)])
def test_infrastructure_failures_are_retried_within_the_budget(world: World, failures: int, state: StageState) -> None:
    world.ends["a"] = [Ends(-9, "infrastructure", "killed")] * failures
    world.submit(data_stage("a", retries={"infrastructure": 2}))
    play(world)
    stage = world.stage("a")
    assert stage.state is state
    assert stage.restarts.infrastructure == failures
    assert stage.attempt == 3
    assert world.two_at_once == []


def test_preemption_is_never_charged(world: World) -> None:
    world.ends["a"] = [Ends(75, "preemption", "checkpoint saved", disruption="PreemptionByScheduler")] * 4
    world.submit(data_stage("a", retries={"infrastructure": 0}))
    play(world)
    stage = world.stage("a")
    assert stage.state is StageState.SUCCEEDED
    assert (stage.restarts.preemption, stage.restarts.infrastructure) == (4, 0)
    assert world.status().summary.restarts == 0  # type: ignore[union-attr]


def test_the_history_is_bounded_and_the_budget_is_not(world: World) -> None:
    world.ends["a"] = [Ends(-9, "infrastructure", "killed")] * 15
    world.submit(data_stage("a", retries={"infrastructure": 12}))
    play(world, 24 * 3600.0)
    stage = world.stage("a")
    assert (stage.state, stage.restarts.infrastructure, stage.attempt) == (StageState.FAILED, 13, 13)
    assert [record.number for record in stage.attempts] == list(range(6, 14))
    assert stage.forgotten is not None
    assert stage.forgotten.infrastructure == 5


def test_out_of_memory_is_reported_with_a_remedy(world: World) -> None:
    world.ends["a"] = [Ends(137, None, raw="Killed\n", reason="OOMKilled")]
    world.submit(data_stage("a", retries={"infrastructure": 0}))
    play(world)
    message = world.condition(ConditionType.FAILED).message
    assert "OOMKilled" in message
    assert "resources.memory" in message


def test_suspending_ends_the_attempt_and_resuming_starts_the_next(world: World) -> None:
    world.holds.add("a")
    world.submit(*CHAIN)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        assert states(world) == [StageState.RUNNING, StageState.PENDING, StageState.PENDING]
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"suspend": True})
        await drive(world, operator, 30)
        assert world.jobsets() == []
        assert world.condition(ConditionType.SUSPENDED).reason is Reason.SUSPENDED_BY_USER
        assert world.status().summary.state is RunState.SUSPENDED  # type: ignore[union-attr]
        assert world.run().finalizers == ()
        world.holds.clear()
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"suspend": False})
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.SUCCEEDED] * 3
    stage = world.stage("a")
    assert (stage.attempt, stage.restarts.preemption, stage.restarts.infrastructure) == (2, 1, 0)
    assert world.two_at_once == []


def test_cancelling_ends_attempts_and_can_be_reverted(world: World) -> None:
    world.holds.add("b")
    world.submit(*CHAIN)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 60)
        assert states(world) == [StageState.SUCCEEDED, StageState.RUNNING, StageState.PENDING]
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"cancel": True, "suspend": True})
        await drive(world, operator, 60)
        assert states(world) == [StageState.SUCCEEDED, StageState.CANCELLED, StageState.CANCELLED]
        assert [name for name in world.jobsets() if "-a-" not in name] == []
        assert world.run().finalizers == ()
        statuses = {item.type: (item.status.value, item.reason) for item in world.status().conditions}
        assert statuses[ConditionType.FAILED] == ("True", Reason.CANCELLED)
        assert statuses[ConditionType.PROGRESSING] == ("False", Reason.NOTHING_TO_DO)
        assert statuses[ConditionType.COMPLETE] == ("False", Reason.STAGES_UNFINISHED)
        assert world.status().summary.state is RunState.CANCELLED  # type: ignore[union-attr]
        made = list(world.pods_made)
        world.holds.clear()
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"cancel": False})
        await drive(world, operator, 60)
        assert world.status().summary.state is RunState.SUSPENDED  # type: ignore[union-attr]
        assert world.pods_made == made
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"suspend": False})
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.SUCCEEDED] * 3
    assert world.condition(ConditionType.FAILED).status.value == "False"
    stage = world.stage("b")
    assert (stage.attempt, stage.restarts.preemption, stage.restarts.infrastructure) == (2, 1, 0)
    assert world.two_at_once == []


def test_a_run_submitted_as_cancelled_starts_nothing(world: World) -> None:
    world.submit(*CHAIN, cancel=True)
    play(world)
    assert states(world) == [StageState.CANCELLED] * 3
    assert world.pods_made == []


def test_cancelling_a_failed_run_leaves_it_failed(world: World) -> None:
    world.ends["a"] = [Ends(64, "user", "bad data")]
    world.submit(*CHAIN)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator)
        world.api.edit(TRAINING_RUNS, "team", "demo", spec={"cancel": True})
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert world.condition(ConditionType.FAILED).reason is Reason.USER_ERROR
    assert world.status().observed_generation == 2


def test_deleting_a_run_leaves_nothing_and_a_new_one_waits_for_its_pods(world: World) -> None:
    world.holds.add("b")
    world.submit(*CHAIN)

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        world.api.remove(TRAINING_RUNS, "team", "demo")
        assert world.api.all_of(TRAINING_RUNS) == [], "no finalizer holds the run"
        world.submit(*CHAIN)
        await operator.settle()
        assert [pod["metadata"]["labels"][names.LABEL_STAGE] for pod in world.api.all_of(PODS)] == ["b"]
        assert "of a deleted run, still does the same work" in world.condition(ConditionType.PROGRESSING).message
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.CACHED, StageState.SUCCEEDED, StageState.SUCCEEDED]
    assert world.two_at_once == []
    world.api.remove(TRAINING_RUNS, "team", "demo")
    play(world)
    assert not [key for key in world.api.objects if key[0] != "events"]


def test_an_edit_runs_only_what_it_changes(world: World) -> None:
    world.submit(*CHAIN)
    play(world)
    world.pods_made.clear()
    edited = data_stage("b", "a")
    edited["data"]["steps"] = [{"length": {"minCharacters": 3}}]
    world.api.edit(TRAINING_RUNS, "team", "demo", spec={"stages": [CHAIN[0], edited, CHAIN[2]]})
    play(world)
    assert sorted(name[:8] for name in world.pods_made) == ["r-demo-b", "r-demo-c"]
    assert states(world) == [StageState.SUCCEEDED] * 3
    assert world.status().observed_generation == 2


def test_a_rejected_edit_leaves_the_run_unchanged(world: World) -> None:
    world.holds.add("a")
    world.submit(*CHAIN)
    play(world, 30)
    wrong = [CHAIN[0], data_stage("b", "unknown"), CHAIN[2]]
    world.api.edit(TRAINING_RUNS, "team", "demo", spec={"stages": wrong})
    play(world, 30)
    accepted = world.condition(ConditionType.ACCEPTED)
    assert (accepted.status, accepted.reason) == (ConditionStatus.FALSE, Reason.INVALID_SPEC)
    assert "unknown" in accepted.message
    assert states(world)[0] is StageState.RUNNING
    world.holds.clear()
    play(world)  # another operator, which has only what is stored
    assert states(world) == [StageState.SUCCEEDED] * 3
    assert len(world.pods_made) == 3
    assert world.condition(ConditionType.ACCEPTED).status is ConditionStatus.FALSE

    world.api.edit(TRAINING_RUNS, "team", "demo", spec={"stages": CHAIN})
    play(world)
    assert world.condition(ConditionType.ACCEPTED).status is ConditionStatus.TRUE
    assert len(world.pods_made) == 3


def test_an_operator_upgrade_does_not_repeat_stages(world: World) -> None:
    world.holds.add("c")
    world.submit(*CHAIN)
    play(world, 30)
    world.settings = world.settings.model_copy(update={"trainer_code": "code-2", "trainer_image": "trainer:2"})
    world.holds.clear()
    play(world)
    assert states(world) == [StageState.SUCCEEDED] * 3
    assert len(world.pods_made) == 3
    images = {
        job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["image"]
        for job in world.api.all_of(JOBSETS)
    }
    assert images == {"trainer:1"}


def test_several_nodes_are_one_gang_with_one_cause(world: World) -> None:
    world.ends["a"] = [Ends(66, "user", "the loss is NaN")]
    world.submit(data_stage("a", resources={"nodes": 3}))
    play(world)
    assert len(world.pods_made) == 3
    assert world.condition(ConditionType.FAILED).reason is Reason.DIVERGED


@pytest.mark.parametrize(
    ("waiting", "reason"),
    [
        ({"reason": "ImagePullBackOff", "message": "Back-off pulling image"}, Reason.IMAGE_UNAVAILABLE),
        ({"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}, Reason.SECRET_MISSING),
    ],
)
def test_a_blocked_pod_is_reported_and_ends_the_attempt(world: World, waiting: dict[str, str], reason: Reason) -> None:
    world.waits["a"] = waiting
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 10)
        progressing = world.condition(ConditionType.PROGRESSING)
        assert progressing.reason is reason
        assert waiting["message"] in progressing.message
        await drive(world, operator, 400)
        assert world.stage("a").restarts.infrastructure == 1
        world.waits.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert stage.state is StageState.SUCCEEDED
    assert (stage.restarts.user, stage.restarts.infrastructure) == (0, 1)
    assert stage.attempts[0].fault == f"waiting: {reason}"


def test_an_image_that_does_not_exist_fails_the_run_after_three_attempts(world: World) -> None:
    """It was tried 31 times in three hours, and never Failed."""
    world.waits["a"] = {"reason": "ImagePullBackOff", "message": "Back-off pulling image: not found"}
    world.submit(*CHAIN)
    play(world)
    stage = world.stage("a")
    assert (stage.state, stage.attempt) == (StageState.FAILED, 3)
    failed = world.condition(ConditionType.FAILED)
    assert (failed.status, failed.reason) == (ConditionStatus.TRUE, Reason.IMAGE_UNAVAILABLE)
    assert "attempts 1, 2 and 3 ended in the same way" in failed.message
    assert "not found" in failed.message


def test_independent_stages_go_on_when_one_fails(world: World) -> None:
    world.ends["bad"] = [Ends(64, "user", "no such field")]
    world.input("b.txt", "other\n")
    good = data_stage("good", uri="b.txt")
    world.submit(data_stage("bad"), data_stage("needs-bad", "bad"), good, data_stage("c", "good"), onFailure="continue")
    play(world)
    assert {stage.name: stage.state.value for stage in world.status().stages} == {
        "bad": "Failed",
        "needs-bad": "Skipped",
        "good": "Succeeded",
        "c": "Succeeded",
    }
    failed = world.condition(ConditionType.FAILED)
    assert (failed.status, failed.reason) == (ConditionStatus.TRUE, Reason.USER_ERROR)
    assert failed.message.startswith("stage `bad`: no such field")
    assert failed.message.endswith("not run: `needs-bad`")


def test_restarts_count_attempts_that_followed_a_failure(world: World) -> None:
    """A run that failed at its first attempt was shown as restarted once."""
    world.ends["a"] = [Ends(-9, "infrastructure", "killed"), Ends(64, "user", "no such field")]
    world.submit(data_stage("a"))
    play(world)
    assert world.status().summary.restarts == 1  # type: ignore[union-attr]


def test_a_missing_jobset_crd_is_reported_until_it_is_installed(world: World) -> None:
    world.api.unserved.add(JOBSETS.plural)
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 20)
        progressing = world.condition(ConditionType.PROGRESSING)
        assert (progressing.status, progressing.reason) == (ConditionStatus.FALSE, Reason.JOBSET_NOT_INSTALLED)
        world.api.unserved.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.SUCCEEDED]


def test_invalid_runs_are_rejected_with_all_problems(world: World) -> None:
    world.submit(data_stage("a", "c"), data_stage("c", "a"), data_stage("d", "unknown"))
    play(world)
    accepted = world.condition(ConditionType.ACCEPTED)
    assert (accepted.status, accepted.reason) == (ConditionStatus.FALSE, Reason.INVALID_SPEC)
    assert "unknown" in accepted.message
    assert "in a cycle: a -> c -> a" in accepted.message
    assert [key[0] for key in world.api.objects] == [TRAINING_RUNS.plural]


def test_an_input_that_appears_later_is_found(world: World) -> None:
    world.submit(data_stage("a", uri="late.txt"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 10)
        assert world.condition(ConditionType.ACCEPTED).reason is Reason.INPUT_NOT_FOUND
        world.input("late.txt")
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.SUCCEEDED]


def test_a_disallowed_image_is_rejected(world: World) -> None:
    world.settings = world.settings.model_copy(update={"allowed": Allowed(images=("good/*",))})
    world.submit(data_stage("a", image=f"bad/image@sha256:{'0' * 64}"))
    play(world)
    accepted = world.condition(ConditionType.ACCEPTED)
    assert accepted.reason is Reason.IMAGE_NOT_ALLOWED
    assert "good/*" in accepted.message
    assert world.api.all_of(PODS) == []


def test_a_run_that_names_the_operators_account_is_rejected_and_gets_no_pod(world: World) -> None:
    world.settings = world.settings.model_copy(update={"own_service_account": "op", "pod_namespace": "team"})
    world.submit(data_stage("a", pods={"serviceAccount": "op", "priorityClass": "system-node-critical"}))
    play(world)
    accepted = world.condition(ConditionType.ACCEPTED)
    assert accepted.reason is Reason.NOT_ALLOWED
    assert "stages.a.pods.serviceAccount: must not be the operator's own" in accepted.message
    assert "stages.a.pods.priorityClass: must be an allowed priority class" in accepted.message
    assert world.api.all_of(PODS) == []


def test_a_jobset_deleted_by_a_user_is_charged_to_infrastructure(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 30)
        world.api.remove(JOBSETS, "team", world.jobsets()[0])
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.attempt) == (StageState.SUCCEEDED, 2)


def test_each_event_is_posted_once(world: World) -> None:
    world.ends["b"] = [Ends(-9, "infrastructure", "killed")]
    world.submit(*CHAIN)
    operator = play(world)
    reasons = [str(event.reason) for event in operator.events]
    assert reasons.count("StageStarted") == 4
    assert reasons.count("StageSucceeded") == 3
    assert reasons.count("AttemptFailed") == 1
    assert reasons.count("Accepted") == reasons.count("Complete") == 1


# -- queues ------------------------------------------------------------------------------------------------------------

WAITS = "couldn't assign flavors to pod set w: insufficient unused quota for cpu in flavor default, 2 more needed"


class Kueue:
    """Suspends every queued JobSet until the test admits it, and again when the test preempts it."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.api.watchers.append(self.receive)

    def receive(self, resource: Resource, kind: str, body: Body) -> None:
        if resource == JOBSETS and kind == "ADDED" and names.LABEL_QUEUE in body["metadata"]["labels"]:
            name, uid = body["metadata"]["name"], body["metadata"]["uid"]
            owner = {"kind": "JobSet", "uid": uid, "controller": True}
            metadata = {"name": f"jobset-{name}", "namespace": "team", "ownerReferences": [owner]}
            self.world.api.add(
                WORKLOADS, {"kind": "Workload", "metadata": metadata, "status": self.status("False", WAITS)}
            )
            self.world.api.edit(JOBSETS, "team", name, spec={"suspend": True})

    def status(self, reserved: str, message: str, *more: dict[str, str]) -> dict[str, Any]:
        first = {"type": "QuotaReserved", "status": reserved, "reason": "Pending", "message": message}
        return {"conditions": [first, *more]}

    def admit(self, name: str) -> None:
        self.world.api.edit(WORKLOADS, "team", f"jobset-{name}", status=self.status("True", "Quota reserved"))
        self.world.api.edit(JOBSETS, "team", name, spec={"suspend": False})

    def preempt(self, name: str) -> None:
        evicted = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted by another"}
        self.world.api.edit(
            WORKLOADS, "team", f"jobset-{name}", status=self.status("False", "Preempted by another", evicted)
        )
        self.world.api.edit(JOBSETS, "team", name, spec={"suspend": True})
        for pod in self.world.api.all_of(PODS):
            pod["metadata"]["finalizers"] = ["kubelet"]
            self.world.api.remove(PODS, "team", pod["metadata"]["name"])


def test_waiting_in_a_queue_and_preemption_do_not_end_an_attempt(world: World) -> None:
    kueue = Kueue(world)
    world.holds.add("a")
    world.submit(data_stage("a", queue={"name": "research"}))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 20)
        (name,) = world.jobsets()
        reserved = world.condition(ConditionType.QUOTA_RESERVED)
        assert (reserved.status, reserved.reason) == (ConditionStatus.FALSE, Reason.WAITING_FOR_QUOTA)
        assert WAITS in reserved.message
        assert world.stage("a").waiting_for == WAITS
        kueue.admit(name)
        await drive(world, operator, 20)
        assert world.condition(ConditionType.QUOTA_RESERVED).reason is Reason.ADMITTED
        assert states(world) == [StageState.RUNNING]
        kueue.preempt(name)
        await drive(world, operator, 20)
        assert world.condition(ConditionType.QUOTA_RESERVED).reason is Reason.PREEMPTED
        world.holds.clear()
        kueue.admit(name)
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.attempt, stage.restarts.infrastructure) == (StageState.SUCCEEDED, 1, 0)
    assert len(stage.attempts[0].incarnations) == 2
    assert world.two_at_once == []


# -- storage the operator may not read ---------------------------------------------------------------------------------


class Unreadable:
    """A store that only stages may access."""

    uri = "s3://closed"

    def list(self, prefix: str = "") -> Iterator[StoreEntry]:
        raise AccessDenied(prefix, "access denied")

    def read(self, key: str) -> bytes:
        raise AccessDenied(key, "access denied")

    def write(self, key: str, data: bytes) -> None:
        raise AccessDenied(key, "access denied")


def test_without_read_access_the_pods_look_up_artifacts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "open_storage", lambda storage: Unreadable())
    monkeypatch.setattr(lookup, "open_storage", lambda storage: Unreadable())
    world.submit(*CHAIN)
    play(world)
    assert states(world) == [StageState.SUCCEEDED] * 3
    assert len(world.pods_made) == 3


def test_an_unreachable_store_blocks_the_run_and_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = [True]

    def read(store: Store, digest: str) -> Manifest | None:
        if unreachable[0]:
            raise Unreachable(digest, "cannot be reached (connection refused)")
        return find_manifest(store, digest)

    monkeypatch.setattr(lookup, "find_manifest", read)
    world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 40)
        progressing = world.condition(ConditionType.PROGRESSING)
        assert (progressing.status, progressing.reason) == (ConditionStatus.FALSE, Reason.STORAGE_UNREACHABLE)
        assert "connection refused" in progressing.message
        assert world.pods_made == []
        unreachable[0] = False
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    assert states(world) == [StageState.SUCCEEDED]


# -- attempts that take too long ---------------------------------------------------------------------------------------


def test_a_silent_attempt_is_restarted_and_charged_as_a_hang(world: World) -> None:
    world.holds.add("a")
    uid = world.submit(data_stage("a"))

    async def scenario() -> None:
        operator = Operator(world)
        await drive(world, operator, 20)
        pod_uid = world.api.all_of(PODS)[0]["metadata"]["uid"]
        operator.reconciler.reports.record(
            (uid, "a", 1), ProgressReport(pod_uid=pod_uid, time=world.now, activity="train")
        )
        operator.enqueue(uid)
        await drive(world, operator, 500)
        assert world.stage("a").attempt == 1, "silence up to ten minutes is not a hang"
        await drive(world, operator, 700)
        assert world.stage("a").attempt == 2
        world.holds.clear()
        await drive(world, operator)
        operator.die()

    asyncio.run(scenario())
    stage = world.stage("a")
    assert (stage.state, stage.restarts.hang, stage.restarts.infrastructure) == (StageState.SUCCEEDED, 1, 0)
    assert "no heartbeat" in stage.attempts[0].message


def test_an_attempt_that_never_reports_is_not_a_hang(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a"))
    play(world, 24 * 3600.0)
    assert world.stage("a").attempt == 1


def test_an_attempt_that_exceeds_its_timeout_fails(world: World) -> None:
    world.holds.add("a")
    world.submit(data_stage("a", timeoutSeconds=60))
    play(world)
    failed = world.condition(ConditionType.FAILED)
    assert (failed.status, failed.reason) == (ConditionStatus.TRUE, Reason.TIMED_OUT)
    assert "timeoutSeconds" in failed.message


@pytest.mark.parametrize(
    ("change", "left_alone"),
    [
        pytest.param(("conditions", 0, "reason", "SomethingNew"), False, id="a reason of a newer version"),
        pytest.param(("stages", 0, "state", "Paused"), False, id="a state of a newer version"),
        pytest.param(("stages", 0, "attempts", 0, "stopCause", "quota"), False, id="a cause of an attempt that ended"),
        pytest.param(("stages", 1, "attempts", 0, "stopCause", "quota"), True, id="a cause of a living attempt"),
        pytest.param(("stages", 0, "artifact", "stageDigest", "sha512:0"), True, id="a digest of a newer version"),
        pytest.param(("stages", 0, "humidity", 3), False, id="a field of a newer version"),
        pytest.param(("weather", "rain"), False, id="a field of the status itself"),
    ],
)
def test_a_status_of_a_newer_version_is_not_taken_for_an_empty_one(
    world: World, change: tuple[Any, ...], left_alone: bool
) -> None:
    """After a rollback of the operator, the living attempt was stopped and finished stages ran again."""
    world.holds.add("b")
    world.submit(*CHAIN)
    play(world, 60.0)
    made = list(world.pods_made)
    body = world.api.objects[TRAINING_RUNS.plural, "team", "demo"]
    *path, name, value = change
    holder = body["status"] = json.loads(json.dumps(body["status"]))
    for step in path:
        holder = holder[step]
    holder[name] = value
    before = json.dumps(body["status"])
    operator = play(world, 60.0)
    assert world.pods_made == made
    refused = [event for event in operator.events if "another version of the operator" in event.message]
    assert bool(refused) is left_alone
    if left_alone:
        assert json.dumps(world.api.objects[TRAINING_RUNS.plural, "team", "demo"]["status"]) == before
