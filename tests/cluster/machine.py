"""The changes of a node on the machine outside our own folder: recorded before, restored afterwards."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from tests.cluster.layout import Layout
from tests.cluster.processes import succeeds, wait_until

KERNEL = Path("/proc/sys")
MOUNTS = Path("/proc/self/mounts")
FREE_SECONDS = 20
SETTINGS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""Kernel settings written by us, the kubelet or kube-proxy."""
LOG_LINKS = Path("/var/log/containers")
FOLDERS = ("/run/containerd", "/var/lib/kubelet", "/var/lib/cni", str(LOG_LINKS), "/var/log/pods")
"""Folders whose names are fixed in containerd, kubelet and the CNI plugins."""
RECORD = "machine.json"


def record_state(layout: Layout) -> None:
    """Record the machine's settings and folders, unless that was done before."""
    record = layout.state / RECORD
    if record.exists():
        return
    settings = {name: (KERNEL / name).read_text().strip() for name in SETTINGS if (KERNEL / name).exists()}
    folders = [folder for folder in FOLDERS if Path(folder).exists()]
    record.write_text(json.dumps({"settings": settings, "folders": folders}))


def restore(layout: Layout) -> None:
    """Restore the kernel's settings and remove the folders that did not exist before."""
    record = layout.state / RECORD
    if not record.exists():
        return
    before = json.loads(record.read_text())
    for name, value in before["settings"].items():
        if (KERNEL / name).read_text().strip() != value:
            (KERNEL / name).write_text(value)
    for folder in set(FOLDERS) - set(before["folders"]):
        shutil.rmtree(folder, ignore_errors=True)
    record.unlink()


def remove_log_links(layout: Layout) -> None:
    """Remove the kubelet's links to our pods' logs, in a folder that other nodes may also use."""
    for link in LOG_LINKS.glob("*.log"):
        if link.is_symlink() and layout.state in link.readlink().parents:
            link.unlink()


def unmount_all(folder: Path) -> None:
    """Unmount everything below a folder, the last mounted first. Raises ClusterError if something stays mounted."""
    wait_until(
        f"nothing is mounted below {folder} (`fuser -vm` shows which processes use it)",
        partial(unmount, folder),
        FREE_SECONDS,
    )


def unmount(folder: Path) -> bool:
    """Try to unmount everything below a folder; return whether nothing was mounted."""
    mounts = mounts_below(folder, MOUNTS.read_text())
    for mount in mounts:
        succeeds(["umount", mount])  # fails if a shim that ends unmounts it first
    return not mounts


def mounts_below(folder: Path, mounts: str) -> list[str]:
    """Return the mount points below a folder, the last mounted first, given the text of /proc/self/mounts."""
    points = [line.split()[1].replace("\\040", " ") for line in mounts.splitlines()]
    return [point for point in reversed(points) if Path(folder) in Path(point).parents]
