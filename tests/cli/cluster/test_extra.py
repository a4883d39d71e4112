"""The `cluster` extra is enough for a laptop: the commands on a cluster's runs need nothing of the operator's."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import stagecoach_cli.cluster
from stagecoach_cli.cluster.api import ClusterChoice, NotConfigured, connect
from tests.cli.cluster.makers import FakeCluster

pytestmark = pytest.mark.slow

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(stagecoach_cli.cluster.__path__, "stagecoach_cli.cluster.")
)
FORBIDDEN = ("kopf", "aiohttp", "cryptography", "kubernetes.aio", "stagecoach_operator", "stagecoach_trainer")
SCRIPT = """
import importlib, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
from stagecoach_cli.cluster.api import ClusterChoice, connect
connect(ClusterChoice()).runs()
print(*[name for name in sys.argv[2].split(",") if name in sys.modules])
"""


def test_a_request_to_a_cluster_imports_none_of_the_operators_libraries(cluster: FakeCluster, tmp_path: Path) -> None:
    assert "stagecoach_cli.cluster.api" in MODULES
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(MODULES), ",".join(FORBIDDEN)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == []
    assert len(cluster.requests) == 1


def test_a_missing_client_is_reported_with_the_extra_to_install(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(NotConfigured, match=r"kubernetes is not installed; .*'stagecoach\[cluster\]'"):
        connect(ClusterChoice())
