"""JobSet and Kueue, installed by their own Helm charts; without a node, only their resource definitions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from tests.cluster.build import Builder
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Helm
from tests.cluster.layout import Layout
from tests.cluster.node import Node
from tests.cluster.processes import wait_until
from tests.cluster.report import timed
from tests.cluster.versions import Versions

READY_SECONDS = 300
WEBHOOK_SECONDS = 180
SMALL = {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}}
"""A controller's requests: the charts' half a CPU each would leave little of a small machine for training."""


@dataclass(frozen=True)
class Addon:
    """A controller installed by a chart."""

    part: str
    namespace: str
    deployment: str
    image: str

    def values(self, version: str) -> dict[str, Any]:
        """Return the chart's values: an image that is on the node, and small requests."""
        image = {"repository": self.image, "tag": version, "pullPolicy": "Never"}
        if self.part == "jobset":
            return {"image": image, "controller": {"resources": SMALL}}
        return {"controllerManager": {"manager": {"image": image, "resources": SMALL}}}


ADDONS = (
    Addon("jobset", "jobset-system", "jobset-controller", "stagecoach.dev/cluster/jobset"),
    Addon("kueue", "kueue-system", "kueue-controller-manager", "stagecoach.dev/cluster/kueue"),
)
PROBES: dict[str, dict[str, Any]] = {
    "jobset": {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "probe", "namespace": "default"},
        "spec": {"replicatedJobs": []},
    },
    "kueue": {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "ResourceFlavor",
        "metadata": {"name": "probe"},
    },
}
"""An object of each addon that passes its webhooks; it is created as a dry run only."""


class Addons:
    """The controllers that are installed before anything of ours."""

    def __init__(self, layout: Layout, versions: Versions, builder: Builder, control_plane: ControlPlane) -> None:
        self._versions = versions
        self._builder = builder
        self._kubectl = control_plane.kubectl
        self._home = layout.state / "helm"
        self._helm = Helm(builder.program("helm", "helm"), layout.kubeconfig, self._home)

    def install(self, node: Node) -> None:
        """Install all controllers without waiting for their pods."""
        for addon in ADDONS:
            part = self._versions.parts[addon.part]
            with timed(f"{part.name} {part.version}", "installed"):
                manager = self._builder.program(part.name, "manager")
                node.load_program(f"{addon.image}:{part.version}", manager, "/manager")
                self._install(addon, part.version)

    def wait(self) -> None:
        """Wait until every controller is available and its webhooks respond."""
        for addon in ADDONS:
            with timed(addon.part, "ready"):
                ready = partial(self._is_available, addon)
                wait_until(f"deployment {addon.deployment} is available", ready, READY_SECONDS)
                wait_until(f"{addon.part}'s webhooks respond", partial(self._responds, addon), WEBHOOK_SECONDS)

    def define_resources(self) -> None:
        """Install only the resource definitions, without their conversion webhooks, which nothing serves."""
        for addon in ADDONS:
            with timed(addon.part, "defined"):
                self._kubectl.apply(list(self._definitions(addon)))

    def _install(self, addon: Addon, version: str) -> None:
        if self._helm.is_deployed(addon.part, addon.namespace):
            return
        values = self._home / f"{addon.part}.json"
        values.parent.mkdir(exist_ok=True)
        values.write_text(json.dumps(addon.values(version)))
        chart = self._builder.folder(addon.part, "chart")
        release = ("upgrade", "--install", addon.part, chart, "--values", values)
        self._helm(*release, "--namespace", addon.namespace, "--create-namespace")

    def _is_available(self, addon: Addon) -> bool:
        where = (f"deployment/{addon.deployment}", f"--namespace={addon.namespace}")
        return self._kubectl.succeeds("wait", "--for=condition=Available", *where, "--timeout=2s")

    def _responds(self, addon: Addon) -> bool:
        return self._kubectl.accepts(PROBES[addon.part])

    def _definitions(self, addon: Addon) -> Iterator[dict[str, Any]]:
        chart = self._builder.folder(addon.part, "chart")
        rendered = self._helm("template", addon.part, chart, "--namespace", addon.namespace, "--include-crds")
        for found in yaml.safe_load_all(rendered):
            if found and found["kind"] == "CustomResourceDefinition":
                found["spec"].pop("conversion", None)
                yield found
