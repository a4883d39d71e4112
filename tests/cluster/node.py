"""The machine as a node: containerd, kubelet, kube-proxy, and CoreDNS for names in the cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import cgroups, images, network
from tests.cluster.build import Builder
from tests.cluster.control_plane import ControlPlane, node_user
from tests.cluster.layout import BRIDGE, CGROUP, DOMAIN, LOOPBACK, NODE_NAME, POD_NETWORK, SERVICE_NETWORK, Layout
from tests.cluster.processes import Processes, responds, run, succeeds
from tests.cluster.report import timed

PAUSE_SOURCE = Path(__file__).with_name("pause.go")
PAUSE_VERSION = "v1"
PAUSE_IMAGE = f"stagecoach.dev/cluster/pause:{PAUSE_VERSION}"
CNI_PROGRAMS = Path("/usr/lib/cni")
"""Debian's folder of the CNI plugins."""
CTR_NAMESPACE = "k8s.io"
READY_SECONDS = 120
MOST_PODS = 200
UPSTREAM_DNS = "/etc/resolv.conf"


class Node:
    """The processes that make this machine the cluster's only real node."""

    def __init__(self, layout: Layout, builder: Builder, processes: Processes, control_plane: ControlPlane) -> None:
        self._layout = layout
        self._builder = builder
        self._processes = processes
        self._control_plane = control_plane

    def start(self) -> None:
        """Start all processes and wait until the node is Ready."""
        with timed("containerd", "ready"):
            cgroups.make()
            self._start_containerd()
            pause = self._builder.build_source("pause", PAUSE_SOURCE, PAUSE_VERSION)
            self.load_program(PAUSE_IMAGE, pause, "/pause")
        with timed("coredns", "ready"):
            self._start_coredns()
        with timed("kube-proxy", "started"):
            self._processes.start("kube-proxy", self._proxy_command())
        with timed("kubelet", "node Ready"):
            self._processes.start("kubelet", self._kubelet_command())
            self._processes.wait_for("kubelet", self._is_ready, READY_SECONDS)

    def load_program(self, image: str, program: Path, path: str) -> None:
        """Load an image that contains one static program into the node, unless it is there."""
        if image in self._ctr("images", "list", "--quiet").split():
            return
        archive = self._layout.state / "image.tar"
        images.write_program_image(archive, image, program, entrypoint=[path], path=path)
        self.load_archive(archive)
        archive.unlink()

    def load_archive(self, archive: Path) -> None:
        """Load the images of an archive from `docker save` or `buildah push docker-archive:` into the node."""
        self._ctr("images", "import", str(archive))

    def shim_sockets(self) -> list[Path]:
        """Return the sockets of the pods' shims, which are outside containerd's own folder."""
        tasks = self._layout.state / "containerd" / "state" / "io.containerd.runtime.v2.task" / CTR_NAMESPACE
        return [Path(file.read_text().removeprefix("unix://")) for file in tasks.glob("*/address")]

    def _ctr(self, *arguments: str) -> str:
        return run(["ctr", "--address", self._layout.containerd_socket, "--namespace", CTR_NAMESPACE, *arguments])

    # -- containerd ----------------------------------------------------------------------------------------------------

    def _start_containerd(self) -> None:
        folder = self._layout.state / "containerd"
        (folder / "cni").mkdir(parents=True, exist_ok=True)
        (folder / "cni" / "10-stagecoach.conflist").write_text(json.dumps(cni_network(folder, network.smallest_mtu())))
        configuration = folder / "config.toml"
        configuration.write_text(containerd_configuration(folder, self._layout.containerd_socket))
        self._processes.start("containerd", ["containerd", "--config", configuration])
        self._processes.wait_for("containerd", self._responds, READY_SECONDS)

    def _responds(self) -> bool:
        return succeeds(["ctr", "--address", self._layout.containerd_socket, "--timeout", "2s", "version"])

    # -- kubelet -------------------------------------------------------------------------------------------------------

    def _kubelet_command(self) -> list[str | Path]:
        user, groups = node_user()
        configuration = self._layout.state / "kubelet.yaml"
        configuration.write_text(yaml.safe_dump(self._kubelet_configuration()))
        command: list[str | Path] = [self._builder.program("kubernetes", "kubelet")]
        command += [f"--kubeconfig={self._control_plane.client('kubelet', user, groups)}"]
        command += [f"--config={configuration}", f"--hostname-override={NODE_NAME}"]
        command += [f"--node-ip={self._layout.address}", f"--root-dir={self._layout.state / 'kubelet'}"]
        command += [f"--cert-dir={self._layout.state / 'kubelet' / 'pki'}"]
        return command

    def _kubelet_configuration(self) -> dict[str, Any]:
        layout = self._layout
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "port": layout.port("kubelet"),
            "healthzPort": layout.port("kubelet-health"),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._control_plane.authority.pair.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{CGROUP}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "oomScoreAdj": 0,  # lowering it requires CAP_SYS_RESOURCE
            "clusterDNS": [layout.address],
            "clusterDomain": DOMAIN,
            "maxPods": MOST_PODS,
            # JobSet and Kueue write their webhooks' certificates into Secrets that their own pods mount. They respond
            # only after the kubelet has synced those pods again, by default after a minute or more.
            "syncFrequency": "5s",
            "podLogsDir": str(layout.state / "pod-logs"),
            # The disk of a build machine is often nearly full, which must not evict pods.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }

    def _is_ready(self) -> bool:
        ready = "--for=condition=Ready"
        return self._control_plane.kubectl.succeeds("wait", ready, f"node/{NODE_NAME}", "--timeout=1s")

    # -- services and names --------------------------------------------------------------------------------------------

    def _proxy_command(self) -> list[str | Path]:
        kubeconfig = self._control_plane.client("kube-proxy", "system:kube-proxy")
        configuration = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "mode": "iptables",
            "clusterCIDR": str(POD_NETWORK),
            "hostnameOverride": NODE_NAME,
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "healthzBindAddress": f"{LOOPBACK}:{self._layout.port('kube-proxy-health')}",
            "metricsBindAddress": f"{LOOPBACK}:{self._layout.port('kube-proxy-metrics')}",
            "nodePortAddresses": ["primary"],
            "iptables": {"localhostNodePorts": False},
        }
        file = self._layout.state / "kube-proxy.yaml"
        file.write_text(yaml.safe_dump(configuration))
        return [self._builder.program("kubernetes", "kube-proxy"), f"--config={file}"]

    def _start_coredns(self) -> None:
        user = "stagecoach:coredns"
        kubeconfig = self._control_plane.client("coredns", user)
        self._control_plane.kubectl.apply(coredns_rights(user))
        corefile = self._layout.state / "Corefile"
        corefile.write_text(corefile_text(self._layout, kubeconfig))
        command: list[str | Path] = [self._builder.program("coredns", "coredns"), "-conf", corefile]
        self._processes.start("coredns", command)
        health = f"http://{LOOPBACK}:{self._layout.port('coredns-health')}/health"
        self._processes.wait_for("coredns", lambda: responds(health), READY_SECONDS)


def containerd_configuration(folder: Path, socket: Path) -> str:
    """Return containerd's configuration; it writes only below `folder`."""
    return f"""version = 2
root = "{folder}/root"
state = "{folder}/state"

[grpc]
address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Without CAP_SYS_RESOURCE a container cannot get a lower score than containerd itself.
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
max_concurrent_downloads = 1

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PROGRAMS}"
conf_dir = "{folder}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{folder}/runc"
ShimCgroup = "/{CGROUP}/{cgroups.SHIMS}"
"""


def cni_network(folder: Path, mtu: int) -> dict[str, Any]:
    """Return the pods' network: our bridge, addresses of the node's range, host ports."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "mtu": mtu,
        "ipam": {
            "type": "host-local",
            "dataDir": str(folder / "addresses"),
            "ranges": [[{"subnet": str(POD_NETWORK)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": network.CNI_NETWORK, "plugins": [bridge, ports]}


def corefile_text(layout: Layout, kubeconfig: Path) -> str:
    """Return CoreDNS's configuration, without a cache: workers of a gang resolve names that were only just created."""
    reverse = f"{POD_NETWORK} {SERVICE_NETWORK}"
    return f"""{DOMAIN}:53 {reverse} {{
    bind {layout.address}
    errors
    health {LOOPBACK}:{layout.port("coredns-health")}
    kubernetes {DOMAIN} {reverse} {{
        kubeconfig {kubeconfig}
        ttl 0
    }}
}}
.:53 {{
    bind {layout.address}
    errors
    forward . {UPSTREAM_DNS}
}}
"""


def coredns_rights(user: str) -> list[dict[str, Any]]:
    """Return role and binding by which CoreDNS watches services and pods."""
    name = "stagecoach-cluster-coredns"
    group = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    role = {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules}
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }
    return [role, binding]
