"""Releases on a real API server: install, upgrade, rollback, uninstall, and what remains.

No pods run here, so hooks are disabled; the uninstall hook is called directly, as its pod would call it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from stagecoach_api.names import FINALIZER
from stagecoach_api.spec import TrainingRun
from tests import ROOT
from tests.charts.makers import CHART, ESTABLISHED, RELEASE, api_cluster, helm
from tests.cluster.__main__ import Cluster

pytestmark = pytest.mark.go

FIRST_PORT = 29443
NAMESPACE = "training"
OWN = f"app.kubernetes.io/instance={RELEASE}"
RUN = ROOT / "examples" / "chinese-alpaca-tiny.yaml"
DEFINITION = "trainingruns.stagecoach.dev"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"


class Api:
    """kubectl and Helm for one API server."""

    def __init__(self, kubectl: Path, kubeconfig: Path) -> None:
        self._kubectl = kubectl
        # kubectl must not cache the discovery of a CRD that is installed or deleted meanwhile.
        self.environment = os.environ | {"KUBECONFIG": str(kubeconfig), "KUBECACHEDIR": "/nonexistent"}

    def kubectl(self, *arguments: str, fails: bool = False) -> str:
        return self._run([str(self._kubectl), *arguments], fails)

    def helm(self, *arguments: str, fails: bool = False) -> str:
        return self._run([helm(), *arguments, "--namespace", NAMESPACE], fails)

    def install(self, *settings: str) -> None:
        """Install the chart, and wait until runs can be created."""
        self.helm("install", RELEASE, str(CHART), "--no-hooks", *settings)
        self.kubectl("wait", "crd", DEFINITION, ESTABLISHED, "--timeout=110s")

    def value(self, kind: str, name: str, path: str) -> str:
        return self.kubectl("get", kind, name, "--namespace", NAMESPACE, "--output", f"jsonpath={{{path}}}")

    def remaining(self) -> list[str]:
        """Return the names of all objects that belong to the release, in every namespace."""
        kinds = self.kubectl("api-resources", "--verbs=list", "--output=name").split()
        return self.kubectl(
            "get", ",".join(kinds), "--all-namespaces", f"--selector={OWN}", "--output=name", "--ignore-not-found"
        ).split()

    def _run(self, command: list[str], fails: bool) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode != 0) is fails, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if fails else "")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with api_cluster(tmp_path_factory.mktemp("api"), FIRST_PORT) as cluster:
        yield cluster


@pytest.fixture
def api(cluster: Cluster) -> Iterator[Api]:
    """An API server with an empty namespace and without the CRD."""
    found = Api(cluster._builder.program("kubernetes", "kubectl"), cluster.layout.kubeconfig)
    found.kubectl("create", "namespace", NAMESPACE)
    yield found
    found.kubectl("delete", "crd", DEFINITION, "--ignore-not-found", "--timeout=60s")
    names = [line.split()[0] for line in found.helm("list", "--short").splitlines()]
    for name in names:
        found.helm("uninstall", name, "--no-hooks")
    # Without controllers a namespace is never removed: finalize it here.
    found.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    body = json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}, "spec": {}})
    subprocess.run(
        [found._kubectl, "replace", "--raw", f"/api/v1/namespaces/{NAMESPACE}/finalize", "-f", "-"],
        input=body,
        text=True,
        env=found.environment,
        check=True,
        capture_output=True,
    )


DESCRIPTION = " ".join((TrainingRun.__doc__ or "").split())
"""The CRD's description of the resource."""


def description(api: Api) -> str:
    return api.value("crd", DEFINITION, ".spec.versions[0].schema.openAPIV3Schema.description")


def json_file(folder: Path, body: Mapping[str, object]) -> str:
    file = folder / "object.json"
    file.write_text(json.dumps(body))
    return str(file)


def changed_chart(folder: Path) -> Path:
    """Return a copy of the chart with a changed CRD."""
    copy = Path(shutil.copytree(CHART, folder / "chart"))
    file = copy / "files" / "trainingruns.yaml"
    text = file.read_text()
    assert DESCRIPTION in text
    file.write_text(text.replace(DESCRIPTION, "A newer description.", 1))
    return copy


def hook(api: Api, *arguments: str) -> None:
    """Run a hook as its pod would."""
    command = [sys.executable, "-m", "stagecoach_operator.chart_hooks", *arguments]
    subprocess.run(command, env=api.environment | {"POD_NAMESPACE": NAMESPACE}, check=True, timeout=120)


def test_an_upgrade_updates_the_crd_and_keeps_the_certificate(api: Api, tmp_path: Path) -> None:
    api.install()
    make = ("certificate", f"--secret={RELEASE}-progress", "--host=stagecoach.training.svc", f"--instance={RELEASE}")
    hook(api, *make)
    certificate = api.value("secret", f"{RELEASE}-progress", ".data.tls\\.crt")
    hook(api, *make)
    api.helm("upgrade", RELEASE, str(changed_chart(tmp_path)), "--no-hooks", "--set", "scope=cluster")
    assert description(api) == "A newer description."
    assert certificate
    assert api.value("secret", f"{RELEASE}-progress", ".data.tls\\.crt") == certificate
    assert f"clusterrole.rbac.authorization.k8s.io/{NAMESPACE}-{RELEASE}" in api.remaining()
    api.helm("rollback", RELEASE, "1", "--no-hooks")
    assert description(api) == DESCRIPTION
    assert f"clusterrole.rbac.authorization.k8s.io/{NAMESPACE}-{RELEASE}" not in api.remaining()
    api.kubectl("delete", "secret", f"{RELEASE}-progress", "--namespace", NAMESPACE)


def test_an_uninstall_leaves_only_the_crd_and_the_runs(api: Api) -> None:
    api.install()
    api.kubectl("apply", "--namespace", NAMESPACE, "--filename", str(RUN))
    api.helm("uninstall", RELEASE, "--no-hooks")
    assert api.remaining() == [f"customresourcedefinition.apiextensions.k8s.io/{DEFINITION}"]
    assert "chinese-alpaca-tiny" in api.kubectl("get", "trainingruns", "--namespace", NAMESPACE)
    api.install()  # adopts what the first release left


def test_a_kept_crd_does_not_block_a_release_of_another_name(api: Api, tmp_path: Path) -> None:
    api.install()
    api.kubectl("apply", "--namespace", NAMESPACE, "--filename", str(RUN))
    api.helm("uninstall", RELEASE, "--no-hooks")
    api.helm("install", "other", str(CHART), "--no-hooks")
    assert RUN.stem in api.kubectl("get", "trainingruns", "--namespace", NAMESPACE)
    # With another schema an operator would not see the fields that it knows: Helm stops, and shows what to do.
    newer = changed_chart(tmp_path)
    refused = api.helm("upgrade", "other", str(newer), "--no-hooks", fails=True)
    assert f"belongs to the release {NAMESPACE}/{RELEASE} and has another schema" in refused
    rendered = api.helm("template", "other", str(newer), "--show-only", "templates/crd.yaml")
    (tmp_path / "crd.yaml").write_text(rendered)
    api.kubectl("apply", "--server-side", "--force-conflicts", "--filename", str(tmp_path / "crd.yaml"))
    api.helm("upgrade", "other", str(newer), "--no-hooks")
    assert description(api) == "A newer description."


def test_a_release_for_the_whole_cluster_is_refused_next_to_another(api: Api) -> None:
    api.install()
    refused = api.helm("install", "wide", str(CHART), "--no-hooks", "--set", "scope=cluster", fails=True)
    assert f"scope: cluster overlaps with the release {NAMESPACE}/{RELEASE}" in refused
    api.helm("upgrade", RELEASE, str(CHART), "--no-hooks", "--set", "scope=cluster")


def test_with_keep_disabled_nothing_is_left(api: Api) -> None:
    api.install("--set", "crds.keep=false")
    api.kubectl("apply", "--namespace", NAMESPACE, "--filename", str(RUN))
    api.helm("uninstall", RELEASE, "--no-hooks")
    api.kubectl("wait", "crd", DEFINITION, "--for=delete", "--timeout=60s")
    assert api.remaining() == []


def test_the_uninstall_hook_removes_the_finalizer_and_the_lease(api: Api, tmp_path: Path) -> None:
    api.install()
    api.kubectl("apply", "--namespace", NAMESPACE, "--filename", str(RUN))
    patch = json.dumps({"metadata": {"finalizers": [FINALIZER, "example.com/other"]}})
    api.kubectl("patch", "trainingrun", RUN.stem, "--namespace", NAMESPACE, "--type=merge", "--patch", patch)
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": RELEASE}, "spec": {}}
    api.kubectl("create", "--namespace", NAMESPACE, "--filename", json_file(tmp_path, lease))
    selector = f"--selector={OWN},app.kubernetes.io/component=operator"
    where = (f"--deployment={RELEASE}", selector, f"--lease={RELEASE}", f"--runs-namespace={NAMESPACE}")
    hook(api, "uninstall", *where)
    assert api.kubectl("get", "leases", "--namespace", NAMESPACE, "--output=name") == ""
    assert api.value("trainingrun", RUN.stem, ".metadata.finalizers") == '["example.com/other"]'
    assert api.value("deployment", RELEASE, ".spec.replicas") == "0"
    unheld = json.dumps({"metadata": {"finalizers": []}})
    api.kubectl("patch", "trainingrun", RUN.stem, "--namespace", NAMESPACE, "--type=merge", "--patch", unheld)


@pytest.mark.parametrize(
    ("what", "allowed"),
    [
        ("list trainingruns.stagecoach.dev", True),
        ("patch trainingruns.stagecoach.dev --subresource=status", True),
        ("create configmaps", True),
        ("patch configmaps", False),
        ("update configmaps", False),
        ("delete configmaps", False),
        (f"update leases/{RELEASE}", True),
        ("update leases/another", False),
        ("get secrets", False),
        ("create pods", False),
        ("delete trainingruns.stagecoach.dev", False),
        ("list nodes", False),
        ("list trainingruns.stagecoach.dev --namespace=default", False),
    ],
)
def test_the_operator_has_only_its_permissions(api: Api, what: str, allowed: bool) -> None:
    api.install()
    namespace = [] if "--namespace" in what else [f"--namespace={NAMESPACE}"]
    api.kubectl("auth", "can-i", *what.split(), *namespace, f"--as={ACCOUNT}", fails=not allowed)


def test_runs_and_operator_may_be_in_separate_namespaces(api: Api) -> None:
    """A tenant's runs are then in a namespace without the operator's Secrets and service account."""
    api.install("--set", "scope=namespaces", "--set", "namespaces={default}")
    for namespace, verb, allowed in (
        ("default", "list trainingruns.stagecoach.dev", True),
        ("default", "create configmaps", True),
        ("default", "delete configmaps", False),
        (NAMESPACE, "list trainingruns.stagecoach.dev", False),
        ("kube-system", "get configmaps", False),
    ):
        api.kubectl("auth", "can-i", *verb.split(), f"--namespace={namespace}", f"--as={ACCOUNT}", fails=not allowed)


def test_pods_are_admitted_to_a_restricted_namespace(api: Api) -> None:
    api.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    manifest = api.helm("template", RELEASE, str(CHART), "--show-only", "templates/hooks/test.yaml")
    manifest = manifest.replace(f"serviceAccountName: {RELEASE}", "serviceAccountName: default")
    done = subprocess.run(
        [api._kubectl, "apply", "--dry-run=server", "--validate=strict", "--filename", "-"],
        input=manifest,
        text=True,
        env=api.environment,
        capture_output=True,
        check=False,
    )
    assert "violates PodSecurity" not in done.stderr
    shown = api.helm("install", RELEASE, str(CHART), "--no-hooks")
    assert "would violate PodSecurity" not in shown
