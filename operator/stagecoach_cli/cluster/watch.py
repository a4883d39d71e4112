"""Watching a run of a cluster until it meets a condition. Outages of the API server are tolerated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stagecoach_cli.cluster.api import ClusterApi, ClusterError, ClusterUnreachable, UnknownObject
from stagecoach_cli.cluster.runs import ClusterRun, cluster_run, snapshot_of, warnings_of
from stagecoach_core.snapshot import View

POLL_SECONDS = 2.0
NOTICE_SECONDS = 10.0
"""Time the operator has to observe an edit before warnings are shown."""


def watch(
    api: ClusterApi,
    name: str,
    until: Callable[[ClusterRun], bool],
    view: View,
    pause: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> ClusterRun:
    """Show a run until `until` holds for it; return the run as it is then.

    Raises ClusterError, also if the run is deleted meanwhile. If the API server becomes unreachable after the first
    answer, the watch continues.
    """
    started = clock()
    found = unreachable = False
    shown: list[str] = []
    while True:
        try:
            run = cluster_run(api.run(name))
        except ClusterUnreachable as error:
            if not found:
                raise
            if not unreachable:
                view.notify(f"{error}; retrying")
            unreachable = True
        except UnknownObject as error:
            if not found:
                raise
            raise ClusterError(f"{api.namespace}/{name} has been deleted") from error
        else:
            found, unreachable = True, False
            view.show(snapshot_of(run, clock()))
            if until(run):
                return run
            is_early = not run.is_observed and clock() < started + NOTICE_SECONDS
            warnings = [] if is_early else warnings_of(run)
            for line in warnings:
                if line not in shown:
                    view.notify(line)
            shown = warnings
        pause(POLL_SECONDS)


def wait_quietly(
    api: ClusterApi, name: str, until: Callable[[ClusterRun], bool], notify: Callable[[str], None]
) -> ClusterRun:
    """Wait until `until` holds for a run; return it. Only warnings are shown, by `notify`."""
    return watch(api, name, until, _WarningsView(notify))


class _WarningsView:
    """A view of messages only."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.notify = notify

    def show(self, snapshot: object) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
