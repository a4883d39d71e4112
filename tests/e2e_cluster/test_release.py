"""The Helm release works."""

from __future__ import annotations

import pytest

from tests.e2e_cluster.world import RELEASE, SYSTEM, World

pytestmark = pytest.mark.cluster


def test_the_release_passes_its_own_test(world: World) -> None:
    output = world.helm("test", RELEASE, f"--namespace={SYSTEM}", "--timeout=2m")
    assert "Succeeded" in output


def test_one_replica_is_the_leader_and_both_are_ready(world: World) -> None:
    lease = world.get("lease", RELEASE, SYSTEM)
    labels = {"app.kubernetes.io/instance": RELEASE, "app.kubernetes.io/component": "operator"}
    pods = world.list("pods", SYSTEM, labels)
    assert lease["spec"]["holderIdentity"] in {pod["metadata"]["name"] for pod in pods}
    ready = [
        condition["status"] for pod in pods for condition in pod["status"]["conditions"] if condition["type"] == "Ready"
    ]
    assert ready == ["True", "True"]
