"""The environment of the bench: a cluster, a namespace, simulated nodes, a folder in S3, and the operator.

The operator is a process on this machine, run from this checkout, with the service account and the rights that the
chart gives it, so that its calls can be identified in the audit log.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import config

from bench.measuring import ROOT
from stagecoach_api import names
from stagecoach_api.store import Store, open_store
from tests.cluster.__main__ import Cluster, find_cluster
from tests.cluster.kubectl import Helm, Kubectl
from tests.cluster.kwok import gpu_node
from tests.cluster.layout import Kind, find_layout
from tests.cluster.s3 import BUCKET, REGION

CHART = ROOT / "charts" / "stagecoach"
RELEASE = "stagecoach"
DEFINITION = f"trainingruns.{names.API_GROUP}"
RIGHTS = ("operator/serviceaccount", "rbac/runs", "rbac/lease")
NUM_NODES = 2
IMAGE = f"pretended/runs-2s@sha256:{'0' * 64}"
"""Image of the stages' pods: KWOK ends them after two seconds (tests/cluster/pretended-pods.yaml). The Job controller
syncs a Job at most once a second: shorter pods would make the chain that waits for it look faster."""
INPUT = "text.txt"
PORTS = ("probePort", "metricsPort", "progressPort")
START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOG_CHARACTERS = 3000
ENV_ENDPOINT = "STAGECOACH_TEST_S3_ENDPOINT"
ENV_CREDENTIALS = "STAGECOACH_TEST_S3_CREDENTIALS"
"""A file in the format of AWS's shared credentials."""
PLAIN_ENVIRONMENT = ("PATH", "HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True)
class BenchCluster:
    """A cluster that is ready for chains."""

    kubectl: Kubectl
    api: Any
    """`ApiClient` of the official client, with the administrator's rights."""
    namespace: str
    product: str
    """GPU product of the simulated nodes, which only the bench's pods request."""
    storage: str
    """URI of the bench's folder in S3."""
    endpoint: str
    user: str
    """User name of the operator at the API server."""
    audit_log: Path | None
    """The API server's audit log; None if it is not on this machine."""

    def run_storage(self, run: str) -> dict[str, Any]:
        """Return a run's `spec.storage`: a separate folder, so that no stage is found finished."""
        inputs = f"{self.storage}/inputs"
        return {"uri": f"{self.storage}/{run}", "inputs": inputs, "endpoint": self.endpoint, "region": REGION}


def prepare(stack: ExitStack) -> BenchCluster:
    """Create everything the bench needs; `stack` removes it again in reverse order."""
    set_cluster_environment()
    kubeconfig = Path(os.environ["KUBECONFIG"])
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    kubectl = Kubectl(program("kubectl"), kubeconfig)
    helm = Helm(program("helm"), kubeconfig, folder)
    namespace = f"stagecoach-bench-{secrets.token_hex(3)}"
    product = f"Pretended-{namespace}"
    refuse_other_operators(kubectl)
    define_runs(kubectl, helm, stack)
    kubectl("create", "namespace", namespace)
    stack.callback(kubectl, "delete", "namespace", namespace, "--timeout=120s")
    kubectl.apply(rendered(helm, namespace, RIGHTS))
    add_nodes(kubectl, namespace, product, stack)
    storage = f"s3://{BUCKET}/{namespace}"
    endpoint = make_storage(storage, stack)
    start_operator(kubectl, folder, namespace, stack)
    stack.callback(remove_runs, kubectl, namespace)
    audit_log = kubeconfig.with_name("audit.log")
    return BenchCluster(
        kubectl=kubectl,
        api=config.new_client_from_config(str(kubeconfig)),
        namespace=namespace,
        product=product,
        storage=storage,
        endpoint=endpoint,
        user=f"system:serviceaccount:{namespace}:{RELEASE}",
        audit_log=audit_log if audit_log.exists() else None,
    )


# -- the cluster -------------------------------------------------------------------------------------------------------


def set_cluster_environment() -> None:
    """Set the environment variables of KUBECONFIG's cluster if it is set, else start the test cluster and set its."""
    if "KUBECONFIG" not in os.environ:
        cluster = find_cluster(None)
        if cluster is None:
            cluster = Cluster(find_layout(Kind.NODE))
            cluster.up()
        for line in cluster.describe():
            name, _, value = line.removeprefix("export ").partition("=")
            os.environ[name] = value.replace("$PATH", os.environ["PATH"])
    missing = [name for name in (ENV_ENDPOINT, ENV_CREDENTIALS) if name not in os.environ]
    if missing:
        raise RuntimeError(f"the operator needs an S3 server with a bucket `{BUCKET}`: set {' and '.join(missing)}")
    os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.environ[ENV_CREDENTIALS]


def program(name: str) -> Path:
    """Return the path of a program. Raises RuntimeError if it is not in PATH."""
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not in PATH; `python -m tests.cluster env` prints the test cluster's PATH")
    return Path(found)


def refuse_other_operators(kubectl: Kubectl) -> None:
    """Raise RuntimeError if a cluster-wide operator is installed: two operators would work on the same runs."""
    found = kubectl("get", "clusterroles", f"--selector=app.kubernetes.io/name={RELEASE}", "--output=name").split()
    if found:
        raise RuntimeError(f"an operator for all namespaces is installed ({found[0]}); uninstall it first")


def rendered(helm: Helm, namespace: str, templates: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the objects of some of the chart's templates."""
    shown = [part for template in templates for part in ("--show-only", f"templates/{template}.yaml")]
    text = helm("template", RELEASE, CHART, "--namespace", namespace, *shown)
    return [body for body in yaml.safe_load_all(text) if body]


def define_runs(kubectl: Kubectl, helm: Helm, stack: ExitStack) -> None:
    """Install the CRD of TrainingRun if there is none; a CRD that was installed here is removed after the last run."""
    if kubectl.succeeds("get", "crd", DEFINITION):
        return
    kubectl.apply(rendered(helm, "default", ("crd",)))
    stack.callback(undefine_runs, kubectl)
    kubectl("wait", "crd", DEFINITION, "--for=condition=Established", "--timeout=60s")


def undefine_runs(kubectl: Kubectl) -> None:
    if not kubectl("get", DEFINITION, "--all-namespaces", "--output=name").strip():
        kubectl("delete", "crd", DEFINITION, "--timeout=60s")


def add_nodes(kubectl: Kubectl, namespace: str, product: str, stack: ExitStack) -> None:
    """Add simulated nodes for the bench's pods alone. Raises ClusterError if KWOK does not make them ready."""
    nodes = [f"{namespace}-{index}" for index in range(NUM_NODES)]
    kubectl.apply([gpu_node(name, product) for name in nodes])
    for name in nodes:
        stack.callback(kubectl, "delete", "node", name)
    kubectl("wait", "--for=condition=Ready", "--timeout=60s", *(f"node/{name}" for name in nodes))


def make_storage(uri: str, stack: ExitStack) -> str:
    """Upload the chain's input to S3; return the server's endpoint."""
    endpoint = os.environ[ENV_ENDPOINT]
    store = open_store(uri, endpoint, REGION)
    store.write(f"inputs/{INPUT}", b"text\n")
    stack.callback(empty, store)
    return endpoint


def empty(store: Store) -> None:
    for entry in list(store.list()):
        store.delete(entry.key)


def remove_runs(kubectl: Kubectl, namespace: str) -> None:
    """Delete the runs while the operator is running; remove its finalizer from any that remain."""
    where = f"--namespace={namespace}"
    if kubectl.succeeds("delete", DEFINITION, "--all", where, "--timeout=60s"):
        return
    for run in kubectl("get", DEFINITION, where, "--output=name").split():
        kubectl("patch", run, where, "--type=merge", '--patch={"metadata":{"finalizers":null}}')


# -- the operator ------------------------------------------------------------------------------------------------------


def start_operator(kubectl: Kubectl, folder: Path, namespace: str, stack: ExitStack) -> None:
    """Start the operator for one namespace and wait until it is the leader."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    # The Lease has the name that the chart's Role allows.
    settings = {"namespaces": [namespace], "leaseName": RELEASE, "trainerImage": IMAGE, **ports}
    file, kubeconfig, log = folder / "settings.yaml", folder / "kubeconfig", folder / "operator.log"
    file.write_text(json.dumps(settings))
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(json.dumps(account_config(kubectl, namespace)))
    environment = {name: os.environ[name] for name in PLAIN_ENVIRONMENT if name in os.environ}
    environment |= {
        "KUBECONFIG": str(kubeconfig),
        "AWS_SHARED_CREDENTIALS_FILE": os.environ[ENV_CREDENTIALS],
        "POD_NAME": "bench",
        "POD_NAMESPACE": namespace,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "stagecoach_operator", "--settings", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    stack.callback(stop, process)
    stack.push(lambda kind, *_: None if kind is None else print(log.read_text()[-LOG_CHARACTERS:], file=sys.stderr))
    wait_for_leader(process, f"http://127.0.0.1:{ports['metricsPort']}/metrics")


def account_config(kubectl: Kubectl, namespace: str) -> dict[str, Any]:
    """Return a kubeconfig for the operator's service account."""
    view = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "--output=json"))
    token = kubectl("create", "token", RELEASE, f"--namespace={namespace}", "--duration=4h").strip()
    cluster = view["clusters"][0]["cluster"]
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": cluster}],
        "users": [{"name": "operator", "user": {"token": token}}],
        "contexts": [{"name": "operator", "context": {"cluster": "cluster", "user": "operator"}}],
        "current-context": "operator",
    }


def free_ports(count: int) -> list[int]:
    """Return unused ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def wait_for_leader(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the operator holds its Lease. Raises RuntimeError if it ends or on timeout."""
    deadline = time.monotonic() + START_SECONDS
    while "stagecoach_leader 1" not in fetched(url):
        if process.poll() is not None:
            raise RuntimeError(f"the operator exited with code {process.returncode}; the end of its log is above")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the operator was not leader after {START_SECONDS:.0f} s; the end of its log is above")
        time.sleep(0.2)


def fetched(url: str) -> str:
    """Return the content of a URL of this machine, empty while no server answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - an address of ours
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
