"""kubectl and Helm, with the rights of the cluster's administrator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.processes import Argument, run, succeeds


class Kubectl:
    """kubectl with one kubeconfig."""

    def __init__(self, program: Path, kubeconfig: Path) -> None:
        self._command: list[Argument] = [program, "--kubeconfig", kubeconfig]

    def __call__(self, *arguments: str | Path) -> str:
        """Run kubectl and return its output. Raises ClusterError if it fails."""
        return run([*self._command, *arguments])

    def succeeds(self, *arguments: str | Path) -> bool:
        """Return whether kubectl succeeds with these arguments."""
        return succeeds([*self._command, *arguments])

    def accepts(self, body: Mapping[str, Any]) -> bool:
        """Return whether the API server, webhooks included, would create an object; it is not created."""
        return succeeds([*self._command, "create", "--dry-run=server", "--filename", "-"], given=json.dumps(body))

    def apply(self, objects: Sequence[Mapping[str, Any]]) -> None:
        """Create or update the objects (server-side apply)."""
        manifest = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        apply = ["apply", "--server-side", "--force-conflicts", "--filename", "-"]
        run([*self._command, *apply], given=json.dumps(manifest))


class Helm:
    """Helm with one kubeconfig and separate folders for its files."""

    def __init__(self, program: Path, kubeconfig: Path, home: Path) -> None:
        self._program = program
        self._environment = {
            "KUBECONFIG": str(kubeconfig),
            "HELM_CACHE_HOME": str(home / "cache"),
            "HELM_CONFIG_HOME": str(home / "config"),
            "HELM_DATA_HOME": str(home / "data"),
        }

    def __call__(self, *arguments: str | Path) -> str:
        """Run Helm and return its output. Raises ClusterError if it fails."""
        return run([self._program, *arguments], environment=self._environment)

    def is_deployed(self, release: str, namespace: str) -> bool:
        """Return whether a release is deployed."""
        listed = json.loads(self("list", "--namespace", namespace, "--output", "json"))
        return any(found["name"] == release and found["status"] == "deployed" for found in listed)
