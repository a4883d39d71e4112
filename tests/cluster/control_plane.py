"""etcd, API server, controller manager and scheduler as processes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.cluster.build import Builder
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import DOMAIN, LOOPBACK, NODE_NAME, POD_NETWORK, SERVICE_NETWORK, Layout
from tests.cluster.pki import Authority, Pair, make_service_account_key, write_kubeconfig
from tests.cluster.processes import Processes
from tests.cluster.report import timed

READY_SECONDS = 120
GRACE_SECONDS = 30
ADMINISTRATORS = "system:masters"
QUERIES_PER_SECOND = 400
"""Rate limit of the controllers' calls; with the default of 20, a stage of 1,000 pods would take a minute."""
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "userGroups": ["system:nodes"]},
        {"level": "None", "users": ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler"]},
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata"},
    ],
}
"""Logs all calls except those of the cluster's own parts: the benches count the operator's calls in `audit.log`."""
AUDIT_LOG_MEGABYTES = 200


class ControlPlane:
    """The four processes of a control plane."""

    def __init__(self, layout: Layout, builder: Builder, processes: Processes) -> None:
        self._layout = layout
        self._builder = builder
        self._processes = processes
        self.authority = Authority(layout.pki, "ca")
        self._front_proxy = Authority(layout.pki, "front-proxy-ca")

    @property
    def server(self) -> str:
        """URL of the API server on this machine."""
        return f"https://{LOOPBACK}:{self._layout.port('apiserver')}"

    @property
    def kubectl(self) -> Kubectl:
        """kubectl with the administrator's rights."""
        return Kubectl(self._builder.program("kubernetes", "kubectl"), self._layout.kubeconfig)

    @property
    def audit_log(self) -> Path:
        """JSON lines: one for each call that `AUDIT_POLICY` includes."""
        return self._layout.state / "audit.log"

    def client(self, name: str, user: str, groups: Sequence[str] = ()) -> Path:
        """Return the kubeconfig of a user, creating it if missing."""
        file = self._layout.state / "kubeconfigs" / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            certificate = self.authority.issue(f"{name}-client", user, groups=groups)
            write_kubeconfig(file, self.server, self.authority.pair.certificate, certificate)
        return file

    def start_api(self) -> None:
        """Start etcd and the API server and wait until it is ready; write the administrator's kubeconfig."""
        with timed("etcd", "ready"):
            self._start_etcd()
        if not self._layout.kubeconfig.exists():
            administrator = self.authority.issue("administrator", "administrator", groups=[ADMINISTRATORS])
            write_kubeconfig(self._layout.kubeconfig, self.server, self.authority.pair.certificate, administrator)
        with timed("kube-apiserver", "ready"):
            self._processes.start("kube-apiserver", self._api_command())
            self._processes.wait_for(
                "kube-apiserver", lambda: self.kubectl.succeeds("get", "--raw=/readyz"), READY_SECONDS
            )

    def start_controllers(self) -> None:
        """Start controller manager and scheduler and wait until a namespace has its service account."""
        with timed("kube-controller-manager", "ready"):
            self._processes.start("kube-controller-manager", self._controller_manager_command())
            ready = ("get", "serviceaccount", "default", "--namespace=default")
            self._processes.wait_for("kube-controller-manager", lambda: self.kubectl.succeeds(*ready), READY_SECONDS)
        with timed("kube-scheduler", "started"):
            self._processes.start("kube-scheduler", self._scheduler_command())

    def _start_etcd(self) -> None:
        own, peer = self._url("etcd"), self._url("etcd-peer")
        command: list[str | Path] = [self._builder.program("etcd", "etcd"), "--name=stagecoach", "--log-level=warn"]
        command += [f"--data-dir={self._layout.state / 'etcd'}", f"--initial-cluster=stagecoach={peer}"]
        command += [f"--listen-client-urls={own}", f"--advertise-client-urls={own}"]
        command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        command += ["--unsafe-no-fsync"]  # its data need not survive a crash of the machine
        self._processes.start("etcd", command)

    def _url(self, port: str) -> str:
        return f"http://{LOOPBACK}:{self._layout.port(port)}"

    def _api_command(self) -> list[str | Path]:
        layout, kubelet = (
            self._layout,
            self.authority.issue("apiserver-kubelet", "kube-apiserver", groups=[ADMINISTRATORS]),
        )
        flags: dict[str, object] = {
            "etcd-servers": self._url("etcd"),
            "bind-address": "0.0.0.0" if layout.with_node else LOOPBACK,  # noqa: S104 - pods reach it through the bridge
            "advertise-address": layout.address if layout.with_node else None,
            "secure-port": layout.port("apiserver"),
            "client-ca-file": self.authority.pair.certificate,
            "service-cluster-ip-range": SERVICE_NETWORK,
            "authorization-mode": "Node,RBAC",
            "enable-admission-plugins": "NodeRestriction",
            "allow-privileged": "true",
            "profiling": "false",
            "kubelet-client-certificate": kubelet.certificate,
            "kubelet-client-key": kubelet.key,
            "kubelet-preferred-address-types": "InternalIP",  # the node's name does not resolve
            "endpoint-reconciler-type": None if layout.with_node else "none",  # a loopback address is no endpoint
        }
        flags |= self._serving_flags() | self._token_flags() | self._aggregation_flags() | self._audit_flags()
        return [self._builder.program("kubernetes", "kube-apiserver"), *_flags(flags)]

    def _serving_flags(self) -> dict[str, object]:
        hosts = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{DOMAIN}"]
        hosts += ["localhost", LOOPBACK, self._layout.address, self._layout.service_address]
        pair = self.authority.issue("apiserver", "kube-apiserver", hosts=hosts)
        return {"tls-cert-file": pair.certificate, "tls-private-key-file": pair.key}

    def _token_flags(self) -> dict[str, object]:
        key = make_service_account_key(self._layout.pki)
        return {
            "service-account-issuer": f"https://kubernetes.default.svc.{DOMAIN}",
            "service-account-key-file": key,
            "service-account-signing-key-file": key,
        }

    def _aggregation_flags(self) -> dict[str, object]:
        """Return the flags without which an aggregated API responds with 403, so that no namespace can be deleted."""
        proxy: Pair = self._front_proxy.issue("front-proxy", "front-proxy")
        return {
            "requestheader-client-ca-file": self._front_proxy.pair.certificate,
            "requestheader-allowed-names": "front-proxy",
            "requestheader-username-headers": "X-Remote-User",
            "requestheader-group-headers": "X-Remote-Group",
            "requestheader-extra-headers-prefix": "X-Remote-Extra-",
            "proxy-client-cert-file": proxy.certificate,
            "proxy-client-key-file": proxy.key,
        }

    def _audit_flags(self) -> dict[str, object]:
        policy = self._layout.state / "audit-policy.yaml"
        policy.write_text(yaml.safe_dump(AUDIT_POLICY))
        return {
            "audit-policy-file": policy,
            "audit-log-path": self.audit_log,
            "audit-log-maxsize": AUDIT_LOG_MEGABYTES,
            "audit-log-maxbackup": 1,
        }

    def _controller_manager_command(self) -> list[str | Path]:
        kubeconfig = self.client("kube-controller-manager", "system:kube-controller-manager")
        flags: dict[str, object] = {
            "kubeconfig": kubeconfig,
            "bind-address": LOOPBACK,
            "secure-port": self._layout.port("controller-manager"),
            "leader-elect": "false",
            "use-service-account-credentials": "true",
            "service-account-private-key-file": make_service_account_key(self._layout.pki),
            "root-ca-file": self.authority.pair.certificate,
            "cluster-signing-cert-file": self.authority.pair.certificate,
            "cluster-signing-key-file": self.authority.pair.key,
            "cluster-cidr": POD_NETWORK,
            "allocate-node-cidrs": "false",
            "profiling": "false",
            "kube-api-qps": QUERIES_PER_SECOND,
            "kube-api-burst": 2 * QUERIES_PER_SECOND,
        }
        return [self._builder.program("kubernetes", "kube-controller-manager"), *_flags(flags)]

    def _scheduler_command(self) -> list[str | Path]:
        kubeconfig = self.client("kube-scheduler", "system:kube-scheduler")
        configuration = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "leaderElection": {"leaderElect": False},
            "clientConnection": {
                "kubeconfig": str(kubeconfig),
                "qps": QUERIES_PER_SECOND,
                "burst": 2 * QUERIES_PER_SECOND,
            },
        }
        file = self._layout.state / "scheduler.yaml"
        file.write_text(yaml.safe_dump(configuration))
        flags: dict[str, object] = {
            "config": file,
            "bind-address": LOOPBACK,
            "secure-port": self._layout.port("scheduler"),
        }
        return [self._builder.program("kubernetes", "kube-scheduler"), *_flags(flags)]


def node_user() -> tuple[str, list[str]]:
    """Return the node's user and groups at the API server."""
    return f"system:node:{NODE_NAME}", ["system:nodes"]


def _flags(values: dict[str, object]) -> list[str]:
    """Return command-line flags, without those whose value is None."""
    return [f"--{name}={value}" for name, value in values.items() if value is not None]
