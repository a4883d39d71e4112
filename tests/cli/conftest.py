"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stagecoach_api.store import Store, open_store
from stagecoach_cli.main import call
from tests.cli.cluster.makers import FakeCluster
from tests.cli.makers import Cli
from tests.s3 import S3Server, make_bucket

BUCKET = "cli"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the clusters of this machine from tests."""
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.fixture
def cli(capfdbinary: pytest.CaptureFixture[bytes]) -> Cli:
    """Call the command line in this process; return the exit code and the output."""

    def run(*arguments: str) -> tuple[int, str]:
        capfdbinary.readouterr()
        code = call(arguments)
        written = capfdbinary.readouterr()
        return code, (written.out + written.err).decode()

    return run


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A fake API server that KUBECONFIG points to; the working directory is an empty folder."""
    made = FakeCluster()
    made.start()
    monkeypatch.setenv("KUBECONFIG", str(made.write_kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.chdir(tmp_path)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def s3_endpoint(s3_server: S3Server) -> str:
    make_bucket(s3_server.endpoint, BUCKET)
    return s3_server.endpoint


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of either kind."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(f"s3://{BUCKET}/{tmp_path.name}", request.getfixturevalue("s3_endpoint"))
