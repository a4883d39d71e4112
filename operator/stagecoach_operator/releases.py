"""When an attempt that cannot start gives back what it holds, uncharged. Pure.

Without a queue each pod is scheduled alone. If some find no room, the others hold their GPUs while they wait for
the rendezvous, and two such gangs can wait for each other for ever. A node that is avoided may be the only one left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagecoach_operator.object_views import JobSetView, PodView

PARTIAL_SECONDS = 300.0
"""How long the pods that found room wait for the others. The back-off between attempts grows up to the same time."""
EXCLUSION_SECONDS = 60.0
"""How long the pods of an attempt that excludes nodes wait for another one."""
NO_OTHER_NODE = "no node fits but those that are avoided, so the next attempt may use them"


@dataclass(frozen=True)
class Release:
    """Why and when an attempt gives back what it holds."""

    at: float
    reason: str


def release_of(jobset: JobSetView, pods: Sequence[PodView], has_run: bool, since: float) -> Release | None:
    """Return when an attempt is ended if its pods stay as they are. None if it may wait.

    `has_run`: whether all its pods have run. A pod that is missing afterwards may only be invisible. `since`: when it
    was first seen to wait for what it waits for, in seconds since the epoch.
    """
    if jobset.suspended or not pods or any(pod.meta.deleting for pod in pods):
        return None
    homeless = [pod for pod in pods if pod.unschedulable and not pod.node]
    if homeless and jobset.excludes_nodes:
        return Release(since + EXCLUSION_SECONDS, NO_OTHER_NODE)
    placed = [pod for pod in pods if pod.node and not pod.has_ended]
    missing = jobset.num_pods - len({pod.index for pod in pods})
    if not placed or not (homeless or (missing > 0 and not has_run)):
        return None
    waiting = f"{len(homeless)} find no node" if homeless else f"{missing} do not exist"
    text = f"{len(placed)} of {jobset.num_pods} pods have a node, and {waiting}"
    return Release(since + PARTIAL_SECONDS, f"{text} after {PARTIAL_SECONDS:.0f} s: they are released and tried again")
