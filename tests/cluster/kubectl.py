"""kubectl and Helm, as the cluster's administrator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.processes import Word, run, succeeds


class Kubectl:
    """kubectl with one kubeconfig."""

    def __init__(self, program: Path, kubeconfig: Path) -> None:
        self._command: list[Word] = [program, "--kubeconfig", kubeconfig]

    def __call__(self, *arguments: str | Path) -> str:
        """Run kubectl and return what it printed. Raises ClusterError when it fails."""
        return run([*self._command, *arguments])

    def succeeds(self, *arguments: str | Path) -> bool:
        """Say whether kubectl does with these arguments."""
        return succeeds([*self._command, *arguments])

    def accepts(self, wanted: Mapping[str, Any]) -> bool:
        """Say whether the API server, webhooks included, would create an object. It is not created."""
        return succeeds([*self._command, "create", "--dry-run=server", "--filename", "-"], given=json.dumps(wanted))

    def apply(self, objects: Sequence[Mapping[str, Any]]) -> None:
        """Create the objects or make them equal to what is given."""
        manifest = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        apply = ["apply", "--server-side", "--force-conflicts", "--filename", "-"]
        run([*self._command, *apply], given=json.dumps(manifest))


class Helm:
    """Helm with one kubeconfig and folders of its own."""

    def __init__(self, program: Path, kubeconfig: Path, home: Path) -> None:
        self._program = program
        self._environment = {
            "KUBECONFIG": str(kubeconfig),
            "HELM_CACHE_HOME": str(home / "cache"),
            "HELM_CONFIG_HOME": str(home / "config"),
            "HELM_DATA_HOME": str(home / "data"),
        }

    def __call__(self, *arguments: str | Path) -> str:
        """Run Helm and return what it printed. Raises ClusterError when it fails."""
        return run([self._program, *arguments], environment=self._environment)

    def is_deployed(self, release: str, namespace: str) -> bool:
        """Say whether a release is installed and complete."""
        listed = json.loads(self("list", "--namespace", namespace, "--output", "json"))
        return any(found["name"] == release and found["status"] == "deployed" for found in listed)
