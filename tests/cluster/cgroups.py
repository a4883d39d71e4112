"""The control groups of all containers and their shims, by which they are found and ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster.layout import CGROUP
from tests.cluster.processes import wait_until

INHERITED = ("cpuset.cpus", "cpuset.mems")
"""Files that are empty in a new version-1 group; no process can run in it until they are set."""
SHIMS = "shims"
"""Our group for containerd's shims, next to the kubelet's for pods."""
EMPTY_SECONDS = 20


def make() -> None:
    """Create our groups in every hierarchy: kubelet and shims do not start without theirs."""
    for group in (folder for root in groups() for folder in (root, root / SHIMS)):
        group.mkdir(exist_ok=True)
        for name in INHERITED:
            file = group / name
            if file.exists() and not file.read_text().strip():
                file.write_text((group.parent / name).read_text())


def groups() -> list[Path]:
    """Return our group in each hierarchy of this machine, of version 1 or 2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(fields[1]) / CGROUP for fields in mounts if fields[2] in ("cgroup", "cgroup2")]


def end_all() -> None:
    """Kill every process in our groups and remove the groups. Raises ClusterError if a process does not end."""
    ours = groups()
    wait_until(f"all processes in control groups {CGROUP} have ended", lambda: not kill_members(ours), EMPTY_SECONDS)
    for group in ours:
        for folder in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        if group.exists():
            group.rmdir()


def kill_members(groups_to_empty: list[Path]) -> list[int]:
    """Kill the processes that are in the groups now; return their pids."""
    pids = list(members(groups_to_empty))
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def members(groups_to_search: list[Path]) -> Iterator[int]:
    """Yield the pids of all running processes in the groups and their subgroups."""
    seen: set[int] = set()
    for group in groups_to_search:
        for file in group.rglob("cgroup.procs"):
            seen.update(int(pid) for pid in file.read_text().split())
    yield from (pid for pid in seen if psutil.pid_exists(pid))
