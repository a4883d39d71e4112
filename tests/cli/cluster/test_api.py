"""Which cluster is used, and the errors of failed requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_cli.cluster.api import (
    Changed,
    ClusterChoice,
    ClusterError,
    ClusterForbidden,
    ClusterUnreachable,
    NotConfigured,
    NotInstalled,
    Unusable,
    connect,
    error_of,
)
from tests.cli.cluster.makers import NAMESPACE, FakeCluster


def test_the_kubeconfig_sets_cluster_and_namespace(cluster: FakeCluster) -> None:
    api = connect(ClusterChoice())
    assert (api.server, api.namespace) == (cluster.endpoint, NAMESPACE)
    assert connect(ClusterChoice(context="other")).namespace == "other"
    assert connect(ClusterChoice(context="away")).namespace == "default"
    assert connect(ClusterChoice(context="other", namespace="mine")).namespace == "mine"


def test_several_kubeconfigs_are_merged_and_missing_ones_ignored(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", f"/nonexistent/kubeconfig:{tmp_path / 'kubeconfig'}")
    assert connect(ClusterChoice()).namespace == NAMESPACE


def test_the_kubeconfig_in_the_home_directory_is_used_if_the_variable_is_unset(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".kube").mkdir()
    cluster.write_kubeconfig(tmp_path / ".kube" / "config", "home")
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert connect(ClusterChoice()).namespace == "home"


def test_without_a_kubeconfig_outside_of_a_pod_no_cluster_is_configured() -> None:
    with pytest.raises(
        NotConfigured, match="/nonexistent/kubeconfig does not exist, and this process is not in a pod; set KUBECONFIG"
    ):
        connect(ClusterChoice())


def test_an_unknown_context_is_named(cluster: FakeCluster) -> None:
    with pytest.raises(NotConfigured, match="gone"):
        connect(ClusterChoice(context="gone"))


def test_an_unreachable_cluster_is_named_without_retries(cluster: FakeCluster) -> None:
    with pytest.raises(ClusterUnreachable, match=r"http://127\.0\.0\.1:9 does not answer.*--context"):
        connect(ClusterChoice(context="away")).runs()


@pytest.mark.parametrize(
    ("status", "text", "kind", "message"),
    [
        (
            401,
            '{"kind": "Status", "message": "Unauthorized"}',
            ClusterForbidden,
            "does not accept your credentials (Unauthorized); log in",
        ),
        (
            403,
            '{"kind": "Status", "message": "u cannot list"}',
            ClusterForbidden,
            "u cannot list; ask the administrator of https://x",
        ),
        (404, "404 page not found\n", NotInstalled, "https://x has no TrainingRuns; install the operator"),
        (409, '{"kind": "Status", "message": "conflict with \\"kubectl\\""}', Changed, "kubectl"),
        (422, '{"kind": "Status", "message": "spec.seed: Invalid value"}', Unusable, "spec.seed: Invalid value"),
        (503, "busy", ClusterUnreachable, "https://x answered 503: busy; this may be temporary"),
        (500, "", ClusterUnreachable, "status 500"),
    ],
)
def test_each_error_status_has_a_message(status: int, text: str, kind: type[ClusterError], message: str) -> None:
    error = error_of(status, text, "https://x")
    assert type(error) is kind
    assert message in str(error)


def test_a_request_is_authenticated_with_the_kubeconfigs_token(cluster: FakeCluster) -> None:
    cluster.add_run()
    assert connect(ClusterChoice()).run("demo")["metadata"]["name"] == "demo"
    assert cluster.requests == [f"GET /apis/stagecoach.dev/v1alpha1/namespaces/{NAMESPACE}/trainingruns/demo"]
