"""What a run may name, and what it never may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.base import Model
from stagecoach_api.fields import walk_models
from stagecoach_api.pods import Pods
from stagecoach_api.reading.validation import validate
from stagecoach_api.rewards import EndpointCredentials
from stagecoach_api.spec import Queue, Resources, SecretReference, TrainingRun
from stagecoach_operator.permitted import (
    CHECKED,
    EVERY_TAINT,
    HARMLESS,
    Allowed,
    OwnNames,
    names_in,
    permission_problems,
)

HOME = "stagecoach-system"
OWN = OwnNames(
    namespace=HOME,
    service_account="stagecoach",
    secrets=("stagecoach-progress",),
    credentials="s3",
    endpoint="https://s3.example.com",
    pod_service_account="trainer",
    pull_secrets=("registry",),
    image="ours@sha256:" + "1" * 64,
)
CLOSED = Allowed(service_accounts=(), secrets=(), priority_classes=(), tolerations=(), node_selectors=(), images=())
IMAGE = "example.com/own@sha256:" + "0" * 64


def run_with(
    defaults: Mapping[str, Any], namespace: str = HOME, storage: Mapping[str, Any] | None = None
) -> TrainingRun:
    """Return a run of one stage with these defaults."""
    stage = {"name": "a", "data": {"sources": [{"uri": "x.txt"}]}}
    return validate(
        {
            "apiVersion": "stagecoach.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": "demo", "namespace": namespace},
            "spec": {"storage": dict(storage or {}), "defaults": dict(defaults), "stages": [stage]},
        }
    )


def volume(secret: str) -> dict[str, Any]:
    return {"volumes": [{"name": "v", "mountPath": "/mnt/v", "secretName": secret}]}


# -- an installation without lists -------------------------------------------------------------------------------------

TAKEN: dict[str, dict[str, Any]] = {
    "the operator's service account": {"pods": {"serviceAccount": "stagecoach"}},
    "the operator's TLS key": {"pods": volume("stagecoach-progress")},
    "the operator's credentials as a volume": {"pods": volume("s3")},
    "the registry's password as a volume": {"pods": volume("registry")},
    "the operator's TLS key to pull an image": {"pods": {"imagePullSecrets": ["stagecoach-progress"]}},
    "system-node-critical": {"pods": {"priorityClass": "system-node-critical"}},
    "system-cluster-critical of a queue": {"queue": {"name": "q", "priorityClass": "system-cluster-critical"}},
    "every taint": {"pods": {"tolerations": [{"operator": "Exists"}]}},
    "every taint of one effect": {"pods": {"tolerations": [{"operator": "Exists", "effect": "NoExecute"}]}},
    "the control plane": {
        "pods": {"tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]}
    },
    "cordoned nodes": {"pods": {"tolerations": [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]}},
    "the control plane by its label": {"pods": {"nodeSelector": {"node-role.kubernetes.io/control-plane": ""}}},
}


@pytest.mark.parametrize("defaults", TAKEN.values(), ids=TAKEN)
def test_what_is_the_operators_or_the_clusters_is_never_given_to_a_run(defaults: dict[str, Any]) -> None:
    """An account that may only create TrainingRuns must not get more from them than from RBAC."""
    (problem,) = permission_problems(run_with(defaults), Allowed(), OWN)
    assert problem.path.startswith("spec.defaults.")
    assert "must" in problem.rule


GIVEN: dict[str, dict[str, Any]] = {
    "an ordinary service account": {"pods": {"serviceAccount": "reader"}},
    "an ordinary Secret": {"pods": volume("judge-key")},
    "the default pull Secret": {"pods": {"imagePullSecrets": ["registry"]}},
    "an ordinary priority class": {"pods": {"priorityClass": "high"}},
    "the taint of GPU nodes": {"pods": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}},
    "a pool of nodes": {"pods": {"nodeSelector": {"pool": "training"}}},
    "an image": {"image": IMAGE},
}


@pytest.mark.parametrize("defaults", GIVEN.values(), ids=GIVEN)
def test_without_lists_a_run_may_name_what_is_not_the_operators(defaults: dict[str, Any]) -> None:
    assert permission_problems(run_with(defaults), Allowed(), OWN) == []


@pytest.mark.parametrize("defaults", [value for key, value in GIVEN.items() if "default" not in key])
def test_empty_lists_allow_nothing_but_the_operators_defaults(defaults: dict[str, Any]) -> None:
    (problem,) = permission_problems(run_with(defaults), CLOSED, OWN)
    assert "only what the operator sets itself" in problem.rule
    named = {"image": OWN.image, "pods": {"serviceAccount": "trainer", "imagePullSecrets": ["registry"]}}
    assert permission_problems(run_with(named), CLOSED, OWN) == []


def test_the_names_of_the_operator_mean_nothing_in_another_namespace() -> None:
    defaults = {"pods": {"serviceAccount": "stagecoach", **volume("stagecoach-progress")}}
    assert permission_problems(run_with(defaults, "team"), Allowed(), OWN) == []


@pytest.mark.parametrize("namespace", [HOME, "team"])
@pytest.mark.parametrize(
    ("storage", "count"),
    [
        ({"endpoint": "https://s3.example.com", "credentials": {"secretName": "s3"}}, 0),
        ({"endpoint": "https://elsewhere.example.com", "credentials": {"secretName": "s3"}}, 1),
        ({"credentials": {"secretName": "s3"}}, 1),
        ({"endpoint": "https://elsewhere.example.com", "credentials": {"secretName": "own"}}, 0),
    ],
)
def test_the_operators_credentials_go_to_its_own_endpoint_only(
    storage: dict[str, Any], count: int, namespace: str
) -> None:
    problems = permission_problems(run_with({}, namespace, storage), Allowed(), OWN)
    assert [problem.path for problem in problems] == ["spec.storage.credentials.secretName"] * count


# -- lists -------------------------------------------------------------------------------------------------------------


def test_what_is_reserved_can_be_allowed_by_name() -> None:
    allowed = Allowed(
        priority_classes=("*", "system-node-critical"), tolerations=("*", EVERY_TAINT), node_selectors=("node-role.*",)
    )
    pods = {"priorityClass": "system-node-critical", "tolerations": [{"operator": "Exists"}]}
    assert permission_problems(run_with({"pods": pods}), allowed, OWN) == []
    other = {"pods": {"nodeSelector": {"node-role.kubernetes.io/control-plane": ""}}}
    # `node-role.*` does not begin like the whole reserved part: what it meant is not clear.
    assert len(permission_problems(run_with(other), allowed, OWN)) == 1


@pytest.mark.parametrize(
    ("pattern", "value", "is_allowed"),
    [("pool=train-*", "train-a", True), ("pool=train-*", "web", False), ("pool", "web", True), ("p*", "web", True)],
)
def test_a_pattern_may_name_a_value_as_well(pattern: str, value: str, is_allowed: bool) -> None:
    selector = run_with({"pods": {"nodeSelector": {"pool": value}}})
    toleration = run_with({"pods": {"tolerations": [{"key": "pool", "value": value}]}})
    allowed = Allowed(node_selectors=(pattern,), tolerations=(pattern,))
    for run in (selector, toleration):
        assert (permission_problems(run, allowed, OWN) == []) is is_allowed


def test_problems_name_field_value_and_what_is_allowed() -> None:
    body = {"name": "a", "data": {"sources": [{"uri": "x.txt"}]}, "pods": {"serviceAccount": "admin"}}
    run = run_with({}).model_dump(mode="json", exclude_none=True)
    run["spec"]["stages"] = [body]
    (problem,) = permission_problems(validate(run), Allowed(service_accounts=("train-*",)), OWN)
    assert str(problem) == (
        'stages.a.pods.serviceAccount: must be an allowed service account (train-*) (got "admin"); '
        "use one of them, or ask the operator's administrator to allow it"
    )


WORDS = st.sampled_from(["alpha", "beta", "gamma"])
LISTS = st.lists(WORDS, max_size=2, unique=True).map(tuple)


@given(
    account=WORDS, secret=WORDS, priority=WORDS, taint=WORDS, label=WORDS,
    lists=st.tuples(LISTS, LISTS, LISTS, LISTS, LISTS),
)  # fmt: skip
def test_exactly_what_is_not_listed_is_refused(
    account: str, secret: str, priority: str, taint: str, label: str, lists: tuple[tuple[str, ...], ...]
) -> None:
    pods = {
        "serviceAccount": account,
        **volume(secret),
        "priorityClass": priority,
        "tolerations": [{"key": taint, "operator": "Exists"}],
        "nodeSelector": {label: "x"},
    }
    fields = ("service_accounts", "secrets", "priority_classes", "tolerations", "node_selectors")
    allowed = Allowed(**dict(zip(fields, lists, strict=True)))
    named = dict(zip(fields, (account, secret, priority, taint, label), strict=True))
    expected = sum(name not in getattr(allowed, field) for field, name in named.items())
    assert len(permission_problems(run_with({"pods": pods}), allowed, OWN)) == expected


# -- no field is forgotten ---------------------------------------------------------------------------------------------


def test_every_field_of_pods_queues_and_credentials_is_checked_or_harmless() -> None:
    models = list(walk_models(Pods, Queue, Resources, SecretReference, EndpointCredentials))
    fields = {
        (model, name)
        for model in models
        for name in vars(model).get("__annotations__", {})
        if name in model.model_fields
    }
    assert fields - CHECKED.keys() == HARMLESS.keys(), "a new field: add it to CHECKED, or to HARMLESS with the reason"
    assert all(HARMLESS.values())
    assert CHECKED.keys().isdisjoint(HARMLESS)


def test_every_field_that_names_a_secret_an_account_or_an_image_is_checked() -> None:
    words = ("secret_name", "pull_secrets", "service_account", "priority_class", "image", "runtime_class")
    found = {
        (owner, name)
        for model in walk_models(TrainingRun.model_fields["spec"].annotation or Model)
        for name in model.model_fields
        for owner in model.__mro__
        if name in vars(owner).get("__annotations__", {}) and name.endswith(words)
    }
    assert found == {key for key in CHECKED if key[1].endswith(words)}


def test_every_checked_field_is_found_in_a_run() -> None:
    pods = {
        "serviceAccount": "a", "imagePullSecrets": ["b"], "priorityClass": "c", "nodeSelector": {"d": "e"},
        "tolerations": [{"key": "f", "value": "g"}], **volume("h"),
    }  # fmt: skip
    defaults = {"pods": pods, "queue": {"name": "q", "priorityClass": "i"}, "image": IMAGE}
    run = run_with(defaults, storage={"credentials": {"secretName": "j"}})
    assert {str(naming) for naming in names_in(run)} == {"a", "b", "c", "d=e", "f=g", "h", "i", "j", IMAGE}
