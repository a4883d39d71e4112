"""What Helm has installed, asked whether it works."""

from __future__ import annotations

import pytest

from tests.e2e_cluster.world import RELEASE, SYSTEM, World

pytestmark = pytest.mark.cluster


def test_the_release_passes_its_own_test(world: World) -> None:
    told = world.helm("test", RELEASE, f"--namespace={SYSTEM}", "--timeout=2m")
    assert "Succeeded" in told


def test_one_replica_works_and_the_other_is_ready_to(world: World) -> None:
    lease = world.get("lease", RELEASE, SYSTEM)
    labels = {"app.kubernetes.io/instance": RELEASE, "app.kubernetes.io/component": "operator"}
    pods = world.list("pods", SYSTEM, labels)
    assert lease["spec"]["holderIdentity"] in {pod["metadata"]["name"] for pod in pods}
    ready = [
        condition["status"] for pod in pods for condition in pod["status"]["conditions"] if condition["type"] == "Ready"
    ]
    assert ready == ["True", "True"]
