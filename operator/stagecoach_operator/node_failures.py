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
    _used: dict[str, float] = field(default_factory=dict)
    """When pods of any attempt were last seen on a node. The operator has no right to list nodes."""

    def _use(self, nodes: Iterable[str], now: float) -> None:
        """Note nodes on which pods of attempts are."""
        for node in nodes:
            if node:
                self._used.pop(node, None)
                self._used[node] = now
        while len(self._used) > MAX_NODES:
            del self._used[next(iter(self._used))]

    def note(
        self, run_uid: str, records: Mapping[AttemptKey, AttemptStatus], now: float, used: Iterable[str] = ()
    ) -> None:
        """Note the failures among a run's attempts; each counts once, however often it is noted.

        `used`: nodes on which pods of the run are.
        """
        self._use(used, now)
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
        """Return the nodes that an attempt started now avoids. None is excluded if no other node is known to be in use:
        in a cluster of one node its attempts could not start."""
        for name in list(self._of_node):
            recent = {key: time for key, time in self._of_node[name].items() if now - time < WINDOW_SECONDS}
            if recent:
                self._of_node[name] = recent
            else:
                del self._of_node[name]
        failures = {name: times.values() for name, times in self._of_node.items()}
        found = avoided_nodes(failures, now, exclude)
        others = self._used.keys() - {node.name for node in found if node.excluded}
        if any(now - self._used[name] < WINDOW_SECONDS for name in others):
            return found
        return avoided_nodes(failures, now, exclude=False)


def as_text(nodes: Iterable[AvoidedNode]) -> str:
    """Return the avoided nodes with their failures, for people."""
    return ", ".join(
        f"{node.name} ({node.failures} failure{'s' * (node.failures > 1)}{', excluded' * node.excluded})"
        for node in nodes
    )
