"""Fixtures of the whole suite."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator

# Before any test imports torch: with such small models and several processes, more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from xdist.remote import Producer

from stagecoach_api import code
from tests.s3 import ACCESS_KEY, REGION, SECRET_KEY, S3Server, make_server
from tests.scheduling import Scheduling, longest_first

# The suite starts a hundred interpreters. Without compiled modules, each of them compiles what it imports, for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Each run of the local driver parses the trainer's files, for 0.4 s. What a file's bytes give is always the same.
code.python_content = functools.cache(code.python_content)

# No test depends on the clock, and every run draws the same examples, so that a failure is caused by the change under
# test. `make explore` draws new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    config.option.loadscopereorder = False  # the order is that of `longest_first`
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a process of xdist
        longest_first(items)


def pytest_collection_finish() -> None:
    """Exempt what the imports of all test files have made from garbage collection, which takes a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[None]:
    """Credentials of the test server in the environment, and none of this machine's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            patch.setenv(name, "/nonexistent")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def s3_server(s3_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server on 127.0.0.1 for the session; `tests.s3.make_bucket(server.endpoint, name)` creates a bucket."""
    server = make_server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.stop()
