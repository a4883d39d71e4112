"""Who may connect to the operator."""

from __future__ import annotations

import pytest

from stagecoach_api import names
from tests.charts.makers import NAMESPACE, WITHOUT_CRD, Body, merged, of_kind, pod_specs, render, the

pytestmark = pytest.mark.go


def rules(values: Body | None = None) -> dict[str, list[Body]]:
    """Return the peers that may connect, by port."""
    spec = the(render(merged(WITHOUT_CRD, values or {})), "NetworkPolicy")["spec"]
    return {port["port"]: rule["from"] for rule in spec["ingress"] for port in rule["ports"]}


def test_the_policy_selects_the_operators_pods_and_closes_every_other_port() -> None:
    objects = render(WITHOUT_CRD)
    spec = the(objects, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["podSelector"] == the(objects, "Deployment")["spec"]["selector"]
    ports = {port["name"] for port in pod_specs(objects)["Deployment/stagecoach"]["containers"][0]["ports"]}
    assert set(rules()) <= ports


@pytest.mark.parametrize(
    ("scope", "namespaces"),
    [
        ({}, [NAMESPACE]),
        ({"scope": "namespaces", "namespaces": ["a", "b"]}, ["a", "b"]),
        ({"scope": "cluster"}, None),
    ],
)
def test_only_stage_pods_in_the_namespaces_of_runs_may_report(scope: Body, namespaces: list[str] | None) -> None:
    (peer,) = rules(scope)["progress"]
    assert peer["podSelector"]["matchLabels"] == {names.LABEL_MANAGED_BY: names.MANAGED_BY}
    expected = [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": namespaces}]
    assert peer["namespaceSelector"] == ({} if namespaces is None else {"matchExpressions": expected})


def test_metrics_are_for_the_configured_peers() -> None:
    prometheus = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert rules({"networkPolicy": {"metricsFrom": prometheus}})["metrics"] == prometheus
    assert "metrics" not in rules({"networkPolicy": {"metricsFrom": []}})


def test_the_pod_of_helm_test_may_read_the_probes() -> None:
    objects = render(WITHOUT_CRD)
    (peer,) = rules()["probes"]
    (pod,) = [body for body in of_kind(objects, "Pod") if body["metadata"]["name"].endswith("-test")]
    assert peer["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_policies_can_be_left_out() -> None:
    assert of_kind(render(merged(WITHOUT_CRD, {"networkPolicy": {"enabled": False}})), "NetworkPolicy") == []
