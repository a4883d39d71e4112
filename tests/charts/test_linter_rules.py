"""The rules of checkov and kube-linter for what the chart contains, over the rendered chart.

Neither tool is a dependency. Rules that do not hold are in `EXCEPTIONS`; the chart's README gives the reasons.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.charts.makers import CHART, NAMESPACE, WITHOUT_CRD, Body, of_kind, pod_specs, render, the

pytestmark = pytest.mark.go

Check = Callable[[Body], bool]


def every_container(check: Check) -> Check:
    return lambda pod: all(check(container) for container in pod["containers"])


def of_long_running(check: Check) -> Check:
    """Limit a rule to pods that serve: hooks end by themselves."""
    return lambda pod: pod.get("restartPolicy") == "Never" or every_container(check)(pod)


PODS: dict[str, Check] = {
    "CKV_K8S_8 liveness-probe": of_long_running(lambda item: "livenessProbe" in item),
    "CKV_K8S_9 readiness-probe": of_long_running(lambda item: "readinessProbe" in item),
    "CKV_K8S_10 cpu-requests": every_container(lambda item: "cpu" in item["resources"]["requests"]),
    "CKV_K8S_11 unset-cpu-requirements": every_container(lambda item: "cpu" in item["resources"].get("limits", {})),
    "CKV_K8S_12 memory-requests": every_container(lambda item: "memory" in item["resources"]["requests"]),
    "CKV_K8S_13 unset-memory-requirements": every_container(lambda item: "memory" in item["resources"]["limits"]),
    "CKV_K8S_14 latest-tag": every_container(
        lambda item: item["image"].rpartition(":")[2] not in ("", "latest") and ":" in item["image"]
    ),
    "CKV_K8S_15 image-pull-policy-always": every_container(lambda item: item["imagePullPolicy"] == "Always"),
    "CKV_K8S_16 privileged-container": every_container(lambda item: not item["securityContext"].get("privileged")),
    "CKV_K8S_17 host-pid": lambda pod: not pod.get("hostPID"),
    "CKV_K8S_18 host-ipc": lambda pod: not pod.get("hostIPC"),
    "CKV_K8S_19 host-network": lambda pod: not pod.get("hostNetwork"),
    "CKV_K8S_20 privilege-escalation-container": every_container(
        lambda item: item["securityContext"]["allowPrivilegeEscalation"] is False
    ),
    "CKV_K8S_22 no-read-only-root-fs": every_container(lambda item: item["securityContext"]["readOnlyRootFilesystem"]),
    "CKV_K8S_23 run-as-non-root": lambda pod: pod["securityContext"]["runAsNonRoot"] is True,
    "CKV_K8S_25 CKV_K8S_28 CKV_K8S_37 drop-net-raw-capability": every_container(
        lambda item: item["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    ),
    "CKV_K8S_26 host ports": every_container(lambda item: "hostPort" not in str(item.get("ports"))),
    "CKV_K8S_27 docker-sock sensitive-host-mounts": lambda pod: "hostPath" not in str(pod.get("volumes")),
    "CKV_K8S_29 CKV_K8S_30 security contexts": every_container(lambda item: bool(item["securityContext"])),
    "CKV_K8S_31 seccomp": lambda pod: pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"},
    "CKV_K8S_33 dashboard, CKV_K8S_34 tiller": every_container(lambda item: "tiller" not in item["image"]),
    "CKV_K8S_35 env-var-secret": every_container(lambda item: "secretKeyRef" not in str(item.get("env"))),
    "CKV_K8S_38 service account token": lambda pod: pod["automountServiceAccountToken"] is False,
    "CKV_K8S_40 high UID": lambda pod: pod["securityContext"]["runAsUser"] >= 10_000,
    "CKV_K8S_43 image digest": every_container(lambda item: "@sha256:" in item["image"]),
    "default-service-account": lambda pod: pod.get("serviceAccountName", "default") != "default",
    "writable-host-mount, run-as-group": lambda pod: pod["securityContext"]["runAsGroup"] >= 10_000,
}
"""Rules about a pod."""

EXCEPTIONS = {
    "CKV_K8S_11 unset-cpu-requirements": "throttl",
    "CKV_K8S_15 image-pull-policy-always": "pullPolicy",
    "CKV_K8S_38 service account token": "API server",
    "CKV_K8S_43 image digest": "operatorDigest",
}
"""Rules that do not hold by default, with a word of the reason in the chart's README."""


@pytest.fixture(scope="module")
def objects() -> list[Body]:
    return render(WITHOUT_CRD)


@pytest.mark.parametrize("rule", sorted(PODS.keys() - EXCEPTIONS.keys()))
def test_every_pod_obeys(rule: str, objects: list[Body]) -> None:
    assert [name for name, pod in pod_specs(objects).items() if not PODS[rule](pod)] == []


@pytest.mark.parametrize("rule", sorted(EXCEPTIONS))
def test_an_exception_is_needed_and_justified_in_the_readme(rule: str, objects: list[Body]) -> None:
    assert any(not PODS[rule](pod) for pod in pod_specs(objects).values()), "it holds now: remove the exception"
    text = (CHART / "README.md").read_text().split("## Linters\n")[1].split("\n## ")[0]
    (line,) = [line for line in text.splitlines() if line.startswith(f"- `{rule}`")]
    assert EXCEPTIONS[rule] in line


def test_nothing_is_in_the_default_namespace_and_every_object_is_labelled(objects: list[Body]) -> None:
    """CKV_K8S_21, required-label."""
    assert {body["metadata"].get("namespace") for body in objects} == {NAMESPACE}
    assert all(body["metadata"]["labels"]["app.kubernetes.io/name"] == "stagecoach" for body in objects)


def test_no_role_has_wildcards_or_gives_rights_on_rights(objects: list[Body]) -> None:
    """CKV_K8S_49, CKV_K8S_155 to 158, cluster-admin-role-binding, access-to-create-pods, wildcard-in-rules."""
    for values in (WITHOUT_CRD, {"scope": "cluster", **WITHOUT_CRD}):
        for role in of_kind(render(values), "Role", "ClusterRole"):
            for rule in role["rules"]:
                assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
                assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
                assert not (
                    {"pods", "pods/exec", "rolebindings", "clusterrolebindings"} & set(rule["resources"])
                    and {"create", "patch", "update"} & set(rule["verbs"])
                )


def test_replicas_are_spread_and_survive_an_eviction(objects: list[Body]) -> None:
    """no-anti-affinity, minimum-three-replicas (two with a Lease), pdb-max-unavailable, no-rolling-update-strategy."""
    spec = the(objects, "Deployment")["spec"]
    assert spec["replicas"] == 2
    assert spec["template"]["spec"]["topologySpreadConstraints"]
    assert the(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert spec.get("strategy", {"type": "RollingUpdate"})["type"] == "RollingUpdate"


def test_services_and_policies_select_existing_pods(objects: list[Body]) -> None:
    """dangling-service, dangling-networkpolicy, non-isolated-pod, exposed-services."""
    labels = the(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert the(objects, "Service")["spec"]["selector"].items() <= labels.items()
    assert the(objects, "Service")["spec"].get("type", "ClusterIP") == "ClusterIP"
    policy = the(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= labels.items()
