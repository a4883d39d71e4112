"""Fixtures of the local driver's tests: some drive it through the command line."""

from __future__ import annotations

from tests.cli.conftest import cli, no_cluster

__all__ = ["cli", "no_cluster"]
