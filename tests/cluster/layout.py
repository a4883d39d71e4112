"""Folders, addresses and ports of a cluster, defined here for all other modules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network
from pathlib import Path

ENV_STATE = "STAGECOACH_CLUSTER_STATE"
ENV_CACHE = "STAGECOACH_CLUSTER_CACHE"
DEFAULT_STATE = Path("/var/tmp/stagecoach-cluster")  # noqa: S108 - made with mode 0700, see `Layout.make`
"""Short, because paths of Unix sockets may have at most 107 characters."""
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagecoach" / "cluster"
"""Shared by all checkouts: programs are in folders named after their versions."""
FIRST_PORT = 26443

POD_NETWORK = IPv4Network("10.213.0.0/24")
SERVICE_NETWORK = IPv4Network("10.214.0.0/20")
LOOPBACK = "127.0.0.1"
NODE_NAME = "stagecoach-node"
BRIDGE = "stagecoach0"
CGROUP = "stagecoach-cluster"
DOMAIN = "cluster.local"


class Kind(StrEnum):
    """How much of a cluster is started."""

    API = "api"
    """etcd and API server: objects are stored and validated, but no controller acts on them. Needs no root."""
    CONTROL_PLANE = "control-plane"
    """Also controllers and scheduler, and the resource definitions of JobSet and Kueue. Needs no root."""
    NODE = "node"
    """Everything: real pods and services, JobSet, Kueue, KWOK, S3. Needs root."""


@dataclass(frozen=True)
class Layout:
    """Kind, folders and ports of a cluster."""

    state: Path
    """Everything that `down` removes."""
    cache: Path
    """Built programs, which `down` keeps."""
    kind: Kind
    first_port: int = FIRST_PORT

    @property
    def with_node(self) -> bool:
        """Whether this machine is a node: only then are its network and kernel settings changed."""
        return self.kind is Kind.NODE

    @property
    def address(self) -> str:
        """Address at which pods reach processes on the machine: the bridge's, or the loopback without a node."""
        return str(POD_NETWORK[1]) if self.with_node else LOOPBACK

    @property
    def service_address(self) -> str:
        """The API server's service address: the first of the service network, as in Kubernetes."""
        return str(SERVICE_NETWORK[1])

    def port(self, name: str) -> int:
        """Return the port of one of `PORTS`."""
        return self.first_port + PORTS.index(name)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for KUBECONFIG."""
        return self.state / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.state / "pki"

    @property
    def processes(self) -> Path:
        """The record and the log of each process."""
        return self.state / "processes"

    @property
    def containerd_socket(self) -> Path:
        """containerd's API socket."""
        return self.state / "containerd" / "containerd.sock"

    @property
    def s3_credentials(self) -> Path:
        """Keys of the S3 server, in the format of AWS's shared credentials file."""
        return self.state / "s3" / "credentials"

    @property
    def s3_endpoint(self) -> str:
        """URL of the S3 server, for pods and for processes on the machine."""
        return f"http://{self.address}:{self.port('s3')}"

    def make(self) -> None:
        """Create the state's folder, readable only by its owner because it contains keys."""
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)


PORTS = (
    "apiserver",
    "etcd",
    "etcd-peer",
    "controller-manager",
    "scheduler",
    "kubelet",
    "kubelet-health",
    "kube-proxy-health",
    "kube-proxy-metrics",
    "coredns-health",
    "s3",
    "kwok",
)


def find_layout(kind: Kind, *, state: Path | None = None, first_port: int = FIRST_PORT) -> Layout:
    """Return the layout selected by arguments and environment variables."""
    return Layout(
        state=state or Path(os.environ.get(ENV_STATE, DEFAULT_STATE)),
        cache=Path(os.environ.get(ENV_CACHE, DEFAULT_CACHE)),
        kind=kind,
        first_port=first_port,
    )
