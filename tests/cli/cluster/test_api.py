"""Which cluster is asked, and what is said when it does not do as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_cli.cluster.api import (
    Changed,
    ClusterChoice,
    ClusterError,
    Forbidden,
    NotConfigured,
    NotInstalled,
    Unreachable,
    Unusable,
    connect,
    error_of,
)
from tests.cli.cluster.makers import NAMESPACE, FakeCluster


def test_the_kubeconfig_says_which_cluster_and_namespace(cluster: FakeCluster) -> None:
    api = connect(ClusterChoice())
    assert (api.server, api.namespace) == (cluster.endpoint, NAMESPACE)
    assert connect(ClusterChoice(context="other")).namespace == "other"
    assert connect(ClusterChoice(context="away")).namespace == "default"
    assert connect(ClusterChoice(context="other", namespace="mine")).namespace == "mine"


def test_several_kubeconfigs_are_read_as_one_and_missing_ones_passed_over(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", f"/nonexistent/kubeconfig:{tmp_path / 'kubeconfig'}")
    assert connect(ClusterChoice()).namespace == NAMESPACE


def test_the_kubeconfig_at_home_counts_where_the_variable_is_not_set(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".kube").mkdir()
    cluster.write_kubeconfig(tmp_path / ".kube" / "config", "home")
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert connect(ClusterChoice()).namespace == "home"


def test_without_a_kubeconfig_outside_of_a_pod_no_cluster_is_configured() -> None:
    with pytest.raises(NotConfigured, match="there is no /nonexistent/kubeconfig, and this is no pod; set KUBECONFIG"):
        connect(ClusterChoice())


def test_an_unknown_context_is_named(cluster: FakeCluster) -> None:
    with pytest.raises(NotConfigured, match="gone"):
        connect(ClusterChoice(context="gone"))


def test_a_cluster_that_does_not_answer_is_named_at_once(cluster: FakeCluster) -> None:
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9 does not answer.*--context"):
        connect(ClusterChoice(context="away")).runs()


@pytest.mark.parametrize(
    ("status", "text", "kind", "said"),
    [
        (401, '{"kind": "Status", "message": "Unauthorized"}', Forbidden, "log in again"),
        (403, '{"kind": "Status", "message": "u cannot list"}', Forbidden, "u cannot list; ask whoever runs https://x"),
        (404, "404 page not found\n", NotInstalled, "https://x knows no TrainingRuns; install the operator"),
        (409, '{"kind": "Status", "message": "conflict with \\"kubectl\\""}', Changed, "kubectl"),
        (422, '{"kind": "Status", "message": "spec.seed: Invalid value"}', Unusable, "spec.seed: Invalid value"),
        (503, "busy", Unreachable, "https://x answers 503: busy; try again"),
        (500, "", Unreachable, "status 500"),
    ],
)
def test_each_refusal_is_told_in_words(status: int, text: str, kind: type[ClusterError], said: str) -> None:
    error = error_of(status, text, "https://x")
    assert type(error) is kind
    assert said in str(error)


def test_requests_say_who_asks_and_nothing_else_holds_the_token(cluster: FakeCluster) -> None:
    cluster.add_run()
    assert connect(ClusterChoice()).run("demo")["metadata"]["name"] == "demo"
    assert cluster.requests == [f"GET /apis/stagecoach.dev/v1alpha1/namespaces/{NAMESPACE}/trainingruns/demo"]
