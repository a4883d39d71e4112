"""Rendering the chart with Helm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests import ROOT
from tests.cluster.__main__ import Cluster
from tests.cluster.build import Builder
from tests.cluster.layout import DEFAULT_CACHE, ENV_CACHE, Kind, find_layout
from tests.cluster.versions import read_versions

CHART = ROOT / "charts" / "stagecoach"
RELEASE = "stagecoach"
NAMESPACE = "training"
WITHOUT_CRD = {"crds": {"install": False}}
"""Rendering and comparing is ten times faster without the CRD."""

Body = dict[str, Any]


@contextmanager
def api_cluster(state: Path, first_port: int) -> Iterator[Cluster]:
    """Start etcd and an API server; stop and remove them afterwards."""
    cluster = Cluster(find_layout(Kind.API, state=state, first_port=first_port))
    cluster.up()
    yield cluster
    cluster.down()


@cache
def helm() -> str:
    """Return the Helm pinned for the test cluster, else the one in PATH, else build the pinned one with Go."""
    builder = Builder(read_versions(), Path(os.environ.get(ENV_CACHE, DEFAULT_CACHE)))
    pinned = builder.program("helm", "helm")
    installed = shutil.which("helm")
    if not pinned.exists() and installed is not None:
        return installed
    builder.ensure([("helm", ["helm"])])
    return str(pinned)


def run_helm(*arguments: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm with values on its standard input."""
    return subprocess.run(
        [helm(), *arguments, "--values", "-"],
        input=json.dumps(dict(values or {})),
        capture_output=True,
        text=True,
        check=False,
    )


def rendered_text(values: Mapping[str, Any] | None = None, *, release: str = RELEASE) -> str:
    """Return the output of `helm template` with the given values."""
    done = run_helm("template", release, str(CHART), "--namespace", NAMESPACE, values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(values: Mapping[str, Any] | None = None, *, release: str = RELEASE) -> list[Body]:
    """Return the rendered objects, hooks included."""
    return [body for body in yaml.safe_load_all(rendered_text(values, release=release)) if body]


def of_kind(objects: Sequence[Body], *kinds: str) -> list[Body]:
    return [body for body in objects if body["kind"] in kinds]


def the(objects: Sequence[Body], kind: str, suffix: str = "") -> Body:
    """Return the only object of a kind whose name has a suffix."""
    (found,) = [body for body in of_kind(objects, kind) if body["metadata"]["name"].endswith(suffix)]
    return found


def pod_specs(objects: Sequence[Body]) -> dict[str, Body]:
    """Return the pod specs of all objects with pods, by kind and name."""
    specs = {}
    for body in objects:
        spec = body if body["kind"] == "Pod" else body.get("spec", {}).get("template")
        if spec is not None:
            specs[f"{body['kind']}/{body['metadata']['name']}"] = spec["spec"]
    return specs


def nested(path: str, value: object) -> Body:
    """Return values with only the one at a dotted path set."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Body:
    """Return the deep merge of two sets of values."""
    result = dict(one)
    for name, value in other.items():
        result[name] = merged(result[name], value) if isinstance(result.get(name), Mapping) else value
    return result


ESTABLISHED = '--for=jsonpath={.status.conditions[?(@.type=="Established")].status}=True'
"""Option of `kubectl wait`. `--for=condition=Established` fails at once while a new CRD has no list of conditions."""
