"""Which of the test processes runs which files, and in which order."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

LONGEST = ("tests/e2e/", "tests/trainer/launcher/", "tests/trainer/ppo/", "tests/trainer/", "tests/local/")
"""Folders with files that take long. They are first, so that no process runs one of them when the others are done."""


class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """The tests of a file run in one process, those of all files that need two ranks too: it starts the ranks once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "ranks" if _needs_ranks(self.config.rootpath / file) else file


@functools.cache
def _needs_ranks(file: Path) -> bool:
    return "report_of_two_ranks" in file.read_text(encoding="utf-8")


def longest_first(items: list[pytest.Item]) -> None:
    """Move the tests of the folders `LONGEST` to the front; the order is otherwise as it was."""
    items.sort(key=lambda item: _place(item.nodeid))


def _place(nodeid: str) -> int:
    return next((place for place, folder in enumerate(LONGEST) if nodeid.startswith(folder)), len(LONGEST))
