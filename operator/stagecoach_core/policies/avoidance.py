"""Nodes that the next attempt avoids, because earlier attempts failed there.

Most failures of the infrastructure have one node at their root, and a replacement pod often lands on the same one. Of
the unexpected interruptions of Llama 3's training, 78 % were confirmed or suspected hardware faults (arXiv 2407.21783).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stagecoach_api.outcomes import Cause, ExitCode
from stagecoach_api.status import AttemptStatus

WINDOW_SECONDS = 24 * 3600.0
"""A failure counts for this long: the node may have been repaired since."""
EXCLUDED_FAILURES = 2
"""From this number of failures on, a node is not used at all; before, it is used if no other fits."""
MAX_NODES = 16
"""At most this many nodes are avoided, those with most failures: avoiding all of them helps no one."""


@dataclass(frozen=True)
class AvoidedNode:
    """A node that an attempt avoids."""

    name: str
    failures: int
    excluded: bool
    """Whether the node must not be used. Otherwise it is used if no other fits."""


def is_of_node(record: AttemptStatus) -> bool:
    """Return whether an attempt's end may be its node's fault.

    Not an unreachable store, nor memory that the container itself has used up: they are the same on every node.
    """
    if record.cause is not Cause.INFRASTRUCTURE or not record.node or record.ended is None:
        return False
    return record.exit_code != ExitCode.STORAGE and "OOMKilled" not in record.message


def avoided_nodes(failures: Mapping[str, Iterable[float]], now: float, exclude: bool = True) -> tuple[AvoidedNode, ...]:
    """Return the nodes to avoid, those with most failures first.

    `failures`: times of the failures of each node, in all runs, in seconds since the epoch. `exclude`: whether any may
    be excluded; False after no other node was found to fit.
    """
    recent = {name: sum(now - time < WINDOW_SECONDS for time in times) for name, times in failures.items()}
    ranked = sorted(((count, name) for name, count in recent.items() if count), key=lambda item: (-item[0], item[1]))
    return tuple(AvoidedNode(name, count, exclude and count >= EXCLUDED_FAILURES) for count, name in ranked[:MAX_NODES])
