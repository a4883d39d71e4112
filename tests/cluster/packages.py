"""Debian packages for a node and for building images: installed if possible, else named in an error."""

from __future__ import annotations

import os
import shutil

from tests.cluster.processes import run
from tests.cluster.report import ClusterError, print_line, timed
from tests.cluster.versions import Versions


def ensure(versions: Versions, need: str) -> None:
    """Install the missing packages for `need`: `node` or `images`.

    Raises ClusterError with the command to run if it cannot (no root, no apt-get).
    """
    missing = [package for package, file in versions.debian[need].items() if not file.exists()]
    if not missing:
        print_line(f"packages for {need}", "installed")
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(
            f"{need}: {', '.join(missing)} must be installed: run `sudo {' '.join(install)}` (Debian, Ubuntu), or "
            "start only a control plane with `--no-node`"
        )
    with timed(f"{len(missing)} packages for {need}", "installed"):
        run(["apt-get", "update", "--quiet"])
        run(install, environment={"DEBIAN_FRONTEND": "noninteractive"})


def require_root() -> None:
    """Raise ClusterError unless this process is root, as mounts, bridges and containers require."""
    if os.geteuid() != 0:
        raise ClusterError("a node needs root: run as root, or start only a control plane with `--no-node`")
