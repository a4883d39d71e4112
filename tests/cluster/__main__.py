"""The test cluster: `python -m tests.cluster --help`, or `make cluster` and `make cluster-down`.

It builds Kubernetes and its companions from pinned Go modules and runs them on this machine: etcd, API server,
controllers and scheduler, containerd, kubelet and kube-proxy, CoreDNS, JobSet, Kueue, KWOK, and an S3 server. It is for
tests; to test on another cluster (kind, a cloud provider's), set KUBECONFIG instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from tests.cluster import addons, cgroups, kwok, machine, network, packages, s3
from tests.cluster.build import Builder
from tests.cluster.control_plane import ControlPlane
from tests.cluster.layout import FIRST_PORT, Kind, Layout, find_layout
from tests.cluster.node import Node
from tests.cluster.processes import Processes
from tests.cluster.report import ClusterError, timed
from tests.cluster.versions import read_versions

API_PROGRAMS = (("etcd", ("etcd",)), ("kubernetes", ("kube-apiserver", "kubectl")))
CONTROL_PLANE_PROGRAMS = (
    *API_PROGRAMS,
    ("kubernetes", ("kube-controller-manager", "kube-scheduler")),
    ("helm", ("helm",)),
    ("jobset", ()),  # for its chart
    ("kueue", ()),
)
NODE_PROGRAMS = (
    *CONTROL_PLANE_PROGRAMS,
    ("jobset", ("manager",)),
    ("kueue", ("manager",)),
    ("versitygw", ("versitygw",)),
    ("kubernetes", ("kubelet", "kube-proxy")),
    ("coredns", ("coredns",)),
    ("kwok", ("kwok",)),
)
PROGRAMS = {Kind.API: API_PROGRAMS, Kind.CONTROL_PLANE: CONTROL_PLANE_PROGRAMS, Kind.NODE: NODE_PROGRAMS}
KIND_FLAGS = (
    ("--no-node", Kind.CONTROL_PLANE, "only a control plane: no root, no pods, no S3"),
    ("--api-only", Kind.API, "only etcd and API server: no controllers either"),
)
STATE_FILE = "cluster.json"


class Cluster:
    """A cluster on this machine, started and removed as a whole."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._versions = read_versions()
        self._builder = Builder(self._versions, layout.cache)
        self._processes = Processes(layout.processes)

    def up(self) -> None:
        """Start everything that is not running. Raises ClusterError if a cluster of another kind or version exists."""
        if self.layout.with_node:
            packages.require_root()
            packages.ensure(self._versions, "node")
        self.layout.make()
        self._check_same()
        self.build()
        if self.layout.with_node:
            machine.record_state(self.layout)
            network.set_up(self.layout)
        control_plane = ControlPlane(self.layout, self._builder, self._processes)
        control_plane.start_api()
        if self.layout.kind is Kind.API:
            return
        control_plane.start_controllers()
        installed = addons.Addons(self.layout, self._versions, self._builder, control_plane)
        if self.layout.kind is Kind.CONTROL_PLANE:
            installed.define_resources()
        else:
            self._start_node(control_plane, installed)

    def _start_node(self, control_plane: ControlPlane, installed: addons.Addons) -> None:
        node = self._node(control_plane)
        node.start()
        installed.install(node)
        self.start_s3()
        kwok.start(self.layout, self._builder, self._processes, control_plane)
        installed.wait()

    def build(self) -> None:
        """Build the missing programs of this kind of cluster."""
        self._builder.ensure(PROGRAMS[self.layout.kind])

    def down(self) -> None:
        """Stop every recorded process and remove everything except the built programs."""
        with timed("processes", "stopped"):
            for name in self._processes.names:
                self._processes.stop(name)
        if self.layout.with_node:
            with timed("containers, mounts and network", "removed"):
                self._remove_node()
        shutil.rmtree(self.layout.state)

    def provide_builders(self) -> None:
        """Install the packages that building images needs."""
        packages.ensure(self._versions, "images")

    def load(self, archives: list[Path]) -> None:
        """Load the images of some archives into the node."""
        node = self._node(ControlPlane(self.layout, self._builder, self._processes))
        for archive in archives:
            with timed(archive.name, "loaded"):
                node.load_archive(archive)

    def add_gpu_nodes(self, count: int, product: str) -> None:
        """Add simulated nodes with eight GPUs each."""
        kubectl = ControlPlane(self.layout, self._builder, self._processes).kubectl
        kubectl.apply([kwok.gpu_node(f"{product.lower()}-{index}", product) for index in range(count)])

    def stop_s3(self) -> None:
        """Stop the S3 server, for tests of an outage."""
        self._processes.stop(s3.PROCESS, grace_seconds=0.0)

    def start_s3(self) -> None:
        """Start the S3 server with the objects it has stored before, if any."""
        s3.start(self.layout, self._builder, self._processes)

    def describe(self) -> list[str]:
        """Return shell lines that set the variables by which kubectl, Helm and tests find the cluster."""
        kubectl, helm = self._builder.program("kubernetes", "kubectl"), self._builder.program("helm", "helm")
        lines = [f"export PATH={kubectl.parent}:{helm.parent}:$PATH"]
        if self.layout.with_node:
            lines.append(f"export STAGECOACH_TEST_S3_ENDPOINT={self.layout.s3_endpoint}")
            lines.append(f"export STAGECOACH_TEST_S3_CREDENTIALS={self.layout.s3_credentials}")
        return [*lines, f"export KUBECONFIG={self.layout.kubeconfig}"]

    def _node(self, control_plane: ControlPlane) -> Node:
        return Node(self.layout, self._builder, self._processes, control_plane)

    def _check_same(self) -> None:
        """Record kind and versions of this cluster, or compare them with the record of an existing one."""
        layout = self.layout
        wanted = {"kind": layout.kind, "first_port": layout.first_port, "versions": self._versions.labels}
        file = layout.state / STATE_FILE
        if not file.exists():
            file.write_text(json.dumps(wanted))
        elif json.loads(file.read_text()) != wanted:
            raise ClusterError(
                f"{layout.state} contains a cluster of another kind or other versions: run `make cluster-down` first"
            )

    def _remove_node(self) -> None:
        sockets = self._node(ControlPlane(self.layout, self._builder, self._processes)).shim_sockets()
        cgroups.end_all()
        machine.unmount_all(self.layout.state)
        network.tear_down()
        machine.remove_log_links(self.layout)
        for socket in sockets:
            socket.unlink(missing_ok=True)
        machine.restore(self.layout)


def find_cluster(state: Path | None) -> Cluster | None:
    """Return the cluster that was started, or None."""
    layout = find_layout(Kind.API, state=state)
    file = layout.state / STATE_FILE
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return Cluster(find_layout(Kind(found["kind"]), state=state, first_port=found["first_port"]))


def existing_cluster(state: Path | None) -> Cluster:
    """Return the cluster that was started. Raises ClusterError if there is none."""
    cluster = find_cluster(state)
    if cluster is None:
        raise ClusterError("there is no cluster: run `make cluster` first")
    return cluster


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="cluster", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--state", type=Path, help="folder of the cluster (default: /var/tmp/stagecoach-cluster)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {"up": "start the cluster", "build": "only build its programs"}.items():
        command = commands.add_parser(name, help=text)
        without = command.add_mutually_exclusive_group()
        for flag, kind, meaning in KIND_FLAGS:
            without.add_argument(flag, dest="kind", action="store_const", const=kind, default=Kind.NODE, help=meaning)
        command.add_argument("--first-port", type=int, default=FIRST_PORT, help="first of its ports")
    commands.add_parser("down", help="stop it and remove everything except the built programs")
    commands.add_parser("env", help="print the variables by which kubectl, Helm and tests find it")
    load = commands.add_parser("load", help="load image archives from `docker save` or buildah into the node")
    load.add_argument("archives", type=Path, nargs="+")
    nodes = commands.add_parser("gpu-nodes", help="add simulated nodes with eight GPUs")
    nodes.add_argument("count", type=int)
    nodes.add_argument("--product", default="NVIDIA-A100-SXM4-80GB")
    return parser.parse_args(arguments)


def execute(arguments: argparse.Namespace) -> None:
    """Execute the parsed command."""
    state = arguments.state
    if arguments.command in ("up", "build"):
        layout = find_layout(arguments.kind, state=state, first_port=arguments.first_port)
        cluster = Cluster(layout)
        if arguments.command == "build":
            cluster.build()
            return
        with timed("the cluster", "ready"):
            cluster.up()
        print("\n".join(cluster.describe()))
    elif arguments.command == "down":
        found = find_cluster(state)
        if found is None:
            print("  there is no cluster")
        else:
            found.down()
    elif arguments.command == "env":
        print("\n".join(existing_cluster(state).describe()))
    elif arguments.command == "load":
        existing_cluster(state).load(arguments.archives)
    else:
        existing_cluster(state).add_gpu_nodes(arguments.count, arguments.product)


def main(arguments: list[str]) -> int:
    """Run the command; return the process's exit code."""
    try:
        execute(parse(arguments))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
