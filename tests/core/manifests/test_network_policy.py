"""Who may connect to the pods of an attempt, by the rules of Kubernetes' documentation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stagecoach_core.manifests.network_policy import network_policy
from stagecoach_core.manifests.pod import pod_template
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from tests.core.makers import data_stage
from tests.core.manifests.makers import make_attempt, unknown_fields

GANG = make_attempt(number=2, resources={"nodes": 2})


def labels_of_pods(attempt: StageAttempt) -> dict[str, str]:
    labels: dict[str, str] = pod_template(attempt, ManifestSettings())["metadata"]["labels"]
    return labels


def may_connect(source: Mapping[str, str], namespace: str) -> bool:
    """Return whether a pod with these labels may connect to a pod of `GANG`. The policy is the only one."""
    policy = network_policy(GANG)
    spec, own = policy["spec"], policy["metadata"]["namespace"]
    assert spec["podSelector"]["matchLabels"].items() <= labels_of_pods(GANG).items(), "it selects the gang"
    assert spec["policyTypes"] == ["Ingress"]
    peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
    return any(
        set(peer) == {"podSelector"}
        and namespace == own
        and peer["podSelector"]["matchLabels"].items() <= source.items()
        for peer in peers
    )


OTHERS = {
    "another attempt": make_attempt(number=1),
    "another stage": make_attempt(number=2, stage=data_stage("corpus")),
    "another run of the same name": make_attempt(number=2, uid="0" * 36),
}


def test_pods_of_an_attempt_connect_to_each_other_on_all_ports() -> None:
    assert may_connect(labels_of_pods(GANG), "default")
    assert all("ports" not in rule for rule in network_policy(GANG)["spec"]["ingress"])


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_no_other_pod_connects_to_the_rendezvous(other: StageAttempt) -> None:
    assert not may_connect(labels_of_pods(other), "default")


def test_no_pod_of_another_namespace_connects_to_the_rendezvous_whatever_its_labels() -> None:
    """The rendezvous store takes reads and writes from any client, without a credential."""
    assert not may_connect(labels_of_pods(GANG), "other")


def test_the_policy_has_only_fields_of_the_api() -> None:
    assert list(unknown_fields(network_policy(GANG), "V1NetworkPolicy")) == []
