"""Fixtures of the end-to-end suite: one installation for the session, a namespace for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e_cluster.world import World, the_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A real cluster with JobSet, Kueue and S3, and Stagecoach installed by Helm."""
    with the_world() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.s3.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def namespace(world: World, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace named after the module, deleted with its content afterwards."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", "-")
    with world.namespace(f"e2e-{name}") as made:
        yield made
