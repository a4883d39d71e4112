"""The command line against a real API server with the chart's CRD: what is applied, patched and rejected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.charts.makers import CHART, ESTABLISHED, api_cluster
from tests.cluster.__main__ import Cluster

pytestmark = pytest.mark.go

FIRST_PORT = 29643
EXAMPLE = ROOT / "examples" / "chinese-alpaca-tiny.yaml"
RUN = EXAMPLE.stem
STORAGE = ("--set", "storage.inputs=s3://inputs", "--storage", "s3://models/tiny")

Stagecoach = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with api_cluster(tmp_path_factory.mktemp("api"), FIRST_PORT) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def kubectl(cluster: Cluster) -> Callable[..., str]:
    program = cluster._builder.program("kubernetes", "kubectl")

    def run(*arguments: str) -> str:
        command = [str(program), "--kubeconfig", str(cluster.layout.kubeconfig), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    return run


@pytest.fixture
def stagecoach(cluster: Cluster, tmp_path: Path) -> Stagecoach:
    """Run the command line in an empty folder; returns its exit code and output."""
    environment = os.environ | {"KUBECONFIG": str(cluster.layout.kubeconfig)}

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "stagecoach_cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_missing_crd_is_reported(stagecoach: Stagecoach) -> None:
    for arguments in (("submit", str(EXAMPLE)), ("status",), ("suspend", RUN), ("logs", RUN)):
        code, output = stagecoach(*arguments)
        assert (code, "has no TrainingRuns; install the operator" in output) == (1, True), output


@pytest.fixture
def served(kubectl: Callable[..., str], stagecoach: Stagecoach) -> Iterator[Callable[[], dict[str, Any]]]:
    """Install the CRD; return a function that reads the run from the API server."""
    kubectl("apply", "--server-side", "--filename", str(CHART / "files" / "trainingruns.yaml"))
    kubectl("wait", "crd", "trainingruns.stagecoach.dev", ESTABLISHED, "--timeout=110s")
    yield lambda: json.loads(kubectl("get", "trainingrun", RUN, "--output=json"))
    kubectl("delete", "trainingruns", "--all", "--wait=false")


def test_a_run_is_applied_changed_suspended_cancelled_and_resumed(
    served: Callable[[], dict[str, Any]], stagecoach: Stagecoach
) -> None:
    assert stagecoach("submit", str(EXAMPLE), *STORAGE) == (0, f"trainingrun.stagecoach.dev/{RUN} created\n")
    assert stagecoach("submit", str(EXAMPLE), *STORAGE)[1] == f"trainingrun.stagecoach.dev/{RUN} configured\n"
    assert served()["metadata"]["generation"] == 1  # an identical spec is not an edit
    assert stagecoach("suspend", RUN)[0] == 0
    assert served()["spec"]["suspend"] is True
    assert stagecoach("submit", str(EXAMPLE), *STORAGE, "--set", "seed=7")[0] == 0
    assert (served()["spec"]["seed"], served()["spec"]["suspend"]) == (7, True)
    assert stagecoach("cancel", f"default/{RUN}")[0] == 0
    assert stagecoach("resume", RUN)[0] == 0
    assert (served()["spec"]["suspend"], served()["spec"]["cancel"]) == (False, False)
    code, output = stagecoach("status", RUN)
    assert (code, "no operator has seen the run yet" in output) == (0, True)
    assert output.splitlines()[0] == f"default/{RUN}: progressing  s3://models/tiny"
    assert f"default/{RUN}" in stagecoach("status")[1]


def test_conflicts_with_other_managers_need_force(served: Callable[[], dict[str, Any]], stagecoach: Stagecoach) -> None:
    assert stagecoach("submit", str(EXAMPLE), *STORAGE)[0] == 0
    assert stagecoach("suspend", RUN)[0] == 0
    against = ("submit", str(EXAMPLE), *STORAGE, "--set", "suspend=false")
    code, output = stagecoach(*against)
    assert (code, ".spec.suspend" in output, "--force-conflicts" in output) == (1, True, True), output
    assert stagecoach(*against, "--force-conflicts")[0] == 0
    assert served()["spec"]["suspend"] is False


def test_errors_of_the_api_server_are_reported(
    served: Callable[[], dict[str, Any]], stagecoach: Stagecoach, kubectl: Callable[..., str]
) -> None:
    code, output = stagecoach("submit", str(EXAMPLE), *STORAGE, "-n", "gone")
    assert (code, 'namespaces "gone" not found' in output) == (2, True), output
    code, output = stagecoach("status", "gone")
    assert (code, "no run `gone` in namespace `default`; known runs: none" in output) == (2, True), output


def test_unknown_fields_are_rejected_before_a_request(stagecoach: Stagecoach, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(EXAMPLE.read_text().replace("spec:", "spec:\n  sede: 1", 1))
    code, output = stagecoach("submit", "run.yaml")
    assert (code, "sede" in output) == (2, True)
