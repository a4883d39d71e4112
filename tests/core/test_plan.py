"""Planning: settings merged field by field, inputs pinned, all problems at once."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.spec import Queue, StageSettings, TrainingRun
from stagecoach_core.plan import PlanError, external_uris, make_plan, with_profiles
from stagecoach_core.values import External
from tests.core.makers import data_stage, plan_for, plan_of, run_of


def test_unset_settings_of_a_stage_come_from_the_defaults() -> None:
    defaults = {
        "image": "trainer@sha256:1",
        "resources": {"nodes": 2, "gpusPerNode": 8, "memory": "10Gi"},
        "retries": {"hang": 1},
        "queue": {"name": "research"},
        "timeoutSeconds": 60,
    }
    own = data_stage("corpus", resources={"nodes": 1, "gpusPerNode": 0}, retries={"user": 2}, timeoutSeconds=5)
    plan = plan_for(own, data_stage("other"), defaults=defaults, seed=7)
    corpus, other = plan.stages["corpus"].stage, plan.stages["other"].stage
    assert (corpus.resources.nodes, corpus.resources.gpus_per_node, corpus.resources.memory) == (1, 0, "10Gi")
    assert (corpus.retries.infrastructure, corpus.retries.hang, corpus.retries.user) == (20, 1, 2)
    assert (corpus.timeout_seconds, other.timeout_seconds) == (5, 60)
    assert other.resources.gpus_per_node == 8
    assert other.queue is not None
    assert other.image == "trainer@sha256:1"


def test_pod_settings_come_from_the_defaults_field_by_field() -> None:
    pods = {"serviceAccount": "trainer", "nodeSelector": {"pool": "a", "zone": "b"}, "imagePullSecrets": ["registry"]}
    own = data_stage("corpus", pods={"nodeSelector": {"pool": "c"}, "imagePullSecrets": []})
    found = plan_for(own, defaults={"pods": pods}).stages["corpus"].stage.pods
    assert (found.service_account, found.node_selector, found.image_pull_secrets) == ("trainer", {"pool": "c"}, ())


def test_a_stage_without_a_seed_takes_the_runs_and_zero_is_a_seed() -> None:
    plan = plan_for(data_stage("a"), data_stage("b", seed=0), seed=7)
    assert [planned.stage.seed for planned in plan.stages.values()] == [7, 0]


def test_budgets_have_defaults() -> None:
    retries = plan_for(data_stage("a")).stages["a"].stage.retries
    assert (retries.infrastructure, retries.hang, retries.user) == (20, 5, 0)


def test_stages_are_in_topological_order_with_their_upstream() -> None:
    plan = plan_for(data_stage("late", "early"), data_stage("early"), data_stage("last", "early", after=["late"]))
    assert list(plan.stages) == ["early", "late", "last"]
    assert plan.stages["last"].upstream == ("early", "late")


def test_a_driver_gets_every_uri_a_stage_reads_including_files_in_plain_fields() -> None:
    added = {"base": {"uri": "llama"}, "add": {"charactersFrom": "characters.txt"}}
    score = {"model": {"uri": "llama"}, "lmEval": [{"uri": "task.yaml"}, {"task": "ceval"}]}
    run = run_of(data_stage("corpus"), {"name": "words", "tokenizer": added}, {"name": "score", "evaluate": score})
    assert external_uris(run) == {f"uri:{uri}": uri for uri in ("corpus.jsonl", "llama", "characters.txt", "task.yaml")}


def test_a_planned_stage_has_its_own_externals_only() -> None:
    plan = plan_of(run_of(data_stage("a"), data_stage("b")))
    assert list(plan.stages["a"].externals) == ["uri:a.jsonl"]
    assert plan.stages["a"].externals["uri:a.jsonl"].uri == "file:///inputs/a.jsonl"


def test_all_problems_are_reported_at_once() -> None:
    run = run_of(data_stage("corpus"), data_stage("corpus"), data_stage("b", "corpsu"))
    with pytest.raises(PlanError) as caught:
        make_plan(run, {}, "code")
    first, second, third, fourth = caught.value.problems
    assert first == "spec.stages: the name `corpus` occurs 2 times; rename all but one"
    assert second.startswith("stages.corpus.data.sources[0]: corpus.jsonl was not found")
    assert third == second
    assert fourth == "stage `b` needs stage `corpsu`, which does not exist; did you mean `corpus`?"


def test_a_cycle_is_rejected_and_named() -> None:
    run = run_of(data_stage("a", "b"), data_stage("b", "a"))
    with pytest.raises(PlanError, match="form a cycle: a → b → a"):
        make_plan(run, {"unused": External("file:///x", "1")}, "code")


def labelled(labels: dict[str, str], **spec: Any) -> TrainingRun:
    run = run_of(data_stage("a"), **spec)
    return run.model_copy(update={"metadata": run.metadata.model_copy(update={"labels": labels})})


def test_kueues_labels_on_a_run_are_its_queue() -> None:
    """A run with the label of Kueue's other jobs must not use GPUs outside of its quota."""
    labels = {"kueue.x-k8s.io/queue-name": "research", "kueue.x-k8s.io/priority-class": "high"}
    queue = plan_of(labelled(labels)).stages["a"].stage.queue
    assert queue == Queue(name="research", priority_class="high")


def test_a_queue_in_the_spec_takes_precedence_over_the_label() -> None:
    run = labelled({"kueue.x-k8s.io/queue-name": "research"}, defaults={"queue": {"name": "own"}})
    assert plan_of(run).stages["a"].stage.queue == Queue(name="own")


def test_a_label_that_names_no_queue_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"queue-name: Team_A` names no queue; set `spec.defaults.queue`"):
        plan_of(labelled({"kueue.x-k8s.io/queue-name": "Team_A"}))


H100 = StageSettings.model_validate(
    {
        "queue": {"name": "research"},
        "resources": {"sharedMemory": "64Gi", "extended": {"rdma/hca": "8"}, "memory": "1000Gi"},
        "pods": {"fabric": [{"name": "NCCL_IB_HCA", "value": "mlx5"}], "priorityClass": "high"},
    }
)


def test_a_profile_gives_what_stage_and_defaults_leave_unset() -> None:
    stage = data_stage("a", resources={"memory": "8Gi"})
    defaults = {"profile": "h100", "pods": {"priorityClass": "low"}}
    run = with_profiles(
        run_of(stage, data_stage("b", profile="cpu"), defaults=defaults), {"h100": H100, "cpu": StageSettings()}
    )
    stages = plan_of(run).stages
    resources = stages["a"].stage.resources
    assert (resources.memory, resources.shared_memory, resources.extended) == ("8Gi", "64Gi", {"rdma/hca": "8"})
    assert stages["a"].stage.queue == Queue(name="research")
    assert (stages["a"].stage.pods.priority_class, stages["a"].stage.pods.fabric) == ("low", H100.pods.fabric)
    assert (stages["b"].stage.queue, stages["b"].stage.resources.shared_memory) == (None, None)


def test_all_unknown_profiles_are_reported_with_the_known_ones() -> None:
    run = run_of(data_stage("a", profile="h200"), data_stage("b"), defaults={"profile": "gone"})
    with pytest.raises(PlanError) as error:
        with_profiles(run, {"h100": H100, "cpu": StageSettings()})
    assert error.value.problems == (
        "stages.a.profile: there is no profile `h200`; known profiles: cpu, h100",
        "stages.b.profile: there is no profile `gone`; known profiles: cpu, h100",
    )
