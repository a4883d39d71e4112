"""Debian packages that a node and the building of images need: installed where that is possible, else named."""

from __future__ import annotations

import os
import shutil

from tests.cluster.processes import run
from tests.cluster.report import ClusterError, say, timed
from tests.cluster.versions import Versions


def ensure(versions: Versions, need: str) -> None:
    """Install what is missing of what `need`, node or images, asks for.

    Raises ClusterError with the command to run where we cannot (no root, no apt-get).
    """
    missing = [package for package, file in versions.debian[need].items() if not file.exists()]
    if not missing:
        say(f"packages for {need}", "installed")
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ClusterError(
            f"{need}: {', '.join(missing)} must be installed: run `sudo {' '.join(install)}` (Debian, Ubuntu), or "
            "bring up a control plane alone with `--no-node`"
        )
    with timed(f"{len(missing)} packages for {need}", "installed"):
        run(["apt-get", "update", "--quiet"])
        run(install, environment={"DEBIAN_FRONTEND": "noninteractive"})


def require_root() -> None:
    """Raise ClusterError unless we may mount, bridge and start containers."""
    if os.geteuid() != 0:
        raise ClusterError("a node needs root: run as root, or bring up a control plane alone with `--no-node`")
