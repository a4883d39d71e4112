"""The operator's calls to the API server, from the server's own audit log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
READS = frozenset({"get", "list"})
"""Watches are neither."""
APART = frozenset({"events", "leases"})
"""Events are posted beside the work, and a Lease is renewed whether there is work or not."""
COMPLETE = "ResponseComplete"
"""A watch is logged when it begins, too."""


@dataclass(frozen=True)
class Call:
    """One call."""

    at: str
    """When the server received it; such times sort as text."""
    verb: str
    resource: str
    """Plural, with `/status` where that was written."""


@dataclass(frozen=True)
class Calls:
    """How many of each."""

    writes: int
    reads: int


@dataclass(frozen=True)
class AuditLog:
    """The calls of one user."""

    file: Path
    user: str

    def mark(self) -> int:
        """Return the end of the log, to be given to `since`."""
        return self.file.stat().st_size

    def since(self, mark: int) -> list[Call]:
        """Return the user's calls after a mark, in the order in which they came. Events and Leases are left out."""
        with self.file.open("rb") as log:
            log.seek(mark if mark <= self.mark() else 0)  # a full log is put aside, and a new one begun
            entries = [json.loads(line) for line in log if line.endswith(b"\n") and self.user.encode() in line]
        calls = [
            Call(entry["requestReceivedTimestamp"], entry["verb"], _resource(entry))
            for entry in entries
            if entry["user"]["username"] == self.user and entry["stage"] == COMPLETE
        ]
        return sorted((call for call in calls if call.resource not in APART), key=lambda call: call.at)


def _resource(entry: dict[str, dict[str, str]]) -> str:
    reference = entry.get("objectRef") or {}
    parts = [reference.get("resource", ""), reference.get("subresource", "")]
    return "/".join(part for part in parts if part)


def handover_calls(calls: list[Call], num_stages: int) -> Calls:
    """Return the calls of all hand-overs of a chain: what follows the first stage's start, up to the last one's.

    A start is told when the status is written after the JobSet. Raises RuntimeError where JobSets are missing.
    """
    starts = [place for place, call in enumerate(calls) if (call.verb, call.resource) == ("create", "jobsets")]
    if len(starts) != num_stages:
        raise RuntimeError(f"the audit log tells of {len(starts)} new JobSets; the chain has {num_stages} stages")
    begin, end = (_told_after(calls, place) for place in (starts[0], starts[-1]))
    between = calls[begin + 1 : end + 1]
    return Calls(sum(call.verb in WRITES for call in between), sum(call.verb in READS for call in between))


def _told_after(calls: list[Call], start: int) -> int:
    return next(
        place for place, call in enumerate(calls) if place > start and call.resource.endswith("trainingruns/status")
    )
