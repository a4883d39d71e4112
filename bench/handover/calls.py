"""The operator's calls to the API server, read from the server's audit log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
READS = frozenset({"get", "list"})
"""Watches count as neither reads nor writes."""
UNCOUNTED = frozenset({"events", "leases"})
"""Events are posted asynchronously, and the Lease is renewed whether there is work or not."""
COMPLETE = "ResponseComplete"
"""Watches are also logged when they start; that stage has another name."""


@dataclass(frozen=True)
class Call:
    """A call to the API server."""

    at: str
    """When the server received it, in a format that sorts as text."""
    verb: str
    resource: str
    """Plural, followed by the subresource if any, such as `/status`."""
    whole: bool = False
    """Whether it lists all objects of a kind, as the operator does every minute to check that its watches miss
    nothing."""


@dataclass(frozen=True)
class Calls:
    """Numbers of calls over a period."""

    writes: int
    reads: int
    """Without lists of whole kinds."""
    whole_lists: int
    seconds: float


@dataclass(frozen=True)
class AuditLog:
    """The calls of one user."""

    file: Path
    user: str

    def mark(self) -> int:
        """Return the current end of the log, for `since`."""
        return self.file.stat().st_size

    def since(self, mark: int) -> list[Call]:
        """Return the user's calls after a mark in order of arrival, without Events and Leases."""
        with self.file.open("rb") as log:
            log.seek(mark if mark <= self.mark() else 0)  # the server may have rotated the log
            entries = [json.loads(line) for line in log if line.endswith(b"\n") and self.user.encode() in line]
        calls = [_call(item) for item in entries if item["user"]["username"] == self.user and item["stage"] == COMPLETE]
        return sorted((call for call in calls if call.resource not in UNCOUNTED), key=lambda call: call.at)


def _call(entry: dict[str, Any]) -> Call:
    reference = entry.get("objectRef") or {}
    parts = [reference.get("resource", ""), reference.get("subresource", "")]
    whole = entry["verb"] == "list" and "fieldSelector" not in entry["requestURI"]
    return Call(entry["requestReceivedTimestamp"], entry["verb"], "/".join(part for part in parts if part), whole)


def handover_calls(calls: Sequence[Call], begin: float, end: float, num_handovers: int) -> Calls:
    """Count the calls of all hand-overs of a chain: from the end of its first stage's pod to the end of its last one's.

    `begin`, `end`: seconds since the epoch. Raises RuntimeError if the log does not contain every JobSet's creation.
    """
    between = [call for call in calls if _stamp(begin) <= call.at < _stamp(end)]
    made = sum((call.verb, call.resource) == ("create", "jobsets") for call in between)
    if made != num_handovers:
        raise RuntimeError(f"the audit log has {made} new JobSets for {num_handovers} hand-overs")
    return Calls(
        writes=sum(call.verb in WRITES for call in between),
        reads=sum(call.verb in READS and not call.whole for call in between),
        whole_lists=sum(call.whole for call in between),
        seconds=end - begin,
    )


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
