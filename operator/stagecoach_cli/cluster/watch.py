"""Following a run of a cluster: look, show, until it is as it should be. An API server that is away is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stagecoach_cli.cluster.api import ClusterApi, ClusterError, UnknownObject, Unreachable
from stagecoach_cli.cluster.runs import ClusterRun, cluster_run, snapshot_of, troubles_of
from stagecoach_core.snapshot import View

LOOK_SECONDS = 2.0
NOTICE_SECONDS = 10.0
"""How long the operator may take to notice an edit before that is worth a word."""


def watch(
    api: ClusterApi,
    name: str,
    until: Callable[[ClusterRun], bool],
    view: View,
    pause: Callable[[float], Any] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> ClusterRun:
    """Show a run until it is as `until` says; return it as it is then.

    Raises ClusterError: also where the run is deleted meanwhile, but not where the API server is away for a while.
    """
    begun = clock()
    seen = away = False
    said: list[str] = []
    while True:
        try:
            run = cluster_run(api.run(name))
        except Unreachable as error:
            if not seen:
                raise
            if not away:
                view.say(f"{error}; trying again")
            away = True
        except UnknownObject as error:
            if not seen:
                raise
            raise ClusterError(f"{api.namespace}/{name} has been deleted") from error
        else:
            seen, away = True, False
            view.show(snapshot_of(run, clock()))
            if until(run):
                return run
            patient = not run.is_seen and clock() < begun + NOTICE_SECONDS
            told = [] if patient else troubles_of(run)
            for line in told:
                if line not in said:
                    view.say(line)
            said = told
        pause(LOOK_SECONDS)


def watch_quietly(
    api: ClusterApi, name: str, until: Callable[[ClusterRun], bool], say: Callable[[str], None]
) -> ClusterRun:
    """Wait for a run to be as `until` says; `say` what is out of order meanwhile."""
    return watch(api, name, until, _Teller(say))


class _Teller:
    """A view that only says things."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def show(self, snapshot: object) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """Nothing is open."""
