"""Failures by node, of all runs. In memory: after a restart they are read from the records of the runs again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from stagecoach_api.status import AttemptStatus
from stagecoach_core.policies.avoidance import WINDOW_SECONDS, AvoidedNode, avoided_nodes, is_of_node
from stagecoach_operator.requests import AttemptKey

MAX_NODES = 1000
"""Of this many nodes failures are remembered; those that failed last."""


@dataclass
class NodeFailures:
    """When which attempts failed on which nodes."""

    _of_node: dict[str, dict[tuple[str, AttemptKey], float]] = field(default_factory=dict)

    def note(self, run_uid: str, records: Mapping[AttemptKey, AttemptStatus], now: float) -> None:
        """Note the failures among a run's attempts; each counts once, however often it is noted."""
        for key, record in records.items():
            if not is_of_node(record) or record.ended is None or now - record.ended.timestamp() >= WINDOW_SECONDS:
                continue
            of_node = self._of_node.setdefault(record.node, {})
            if (run_uid, key) not in of_node:
                of_node[run_uid, key] = record.ended.timestamp()
                self._of_node[record.node] = self._of_node.pop(record.node)
        while len(self._of_node) > MAX_NODES:
            del self._of_node[next(iter(self._of_node))]

    def avoided(self, now: float, exclude: bool) -> tuple[AvoidedNode, ...]:
        """Return the nodes that an attempt started now avoids."""
        for name in list(self._of_node):
            recent = {key: time for key, time in self._of_node[name].items() if now - time < WINDOW_SECONDS}
            if recent:
                self._of_node[name] = recent
            else:
                del self._of_node[name]
        return avoided_nodes({name: failures.values() for name, failures in self._of_node.items()}, now, exclude)


def as_text(nodes: Iterable[AvoidedNode]) -> str:
    """Return the avoided nodes with their failures, for people."""
    return ", ".join(
        f"{node.name} ({node.failures} failure{'s' * (node.failures > 1)}{', excluded' * node.excluded})"
        for node in nodes
    )
