"""The operator's calls to the API server, from the server's own audit log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    whole: bool = False
    """It lists all objects of a kind. The operator does so once a minute, whatever goes on: to see whether its watches
    hear."""


@dataclass(frozen=True)
class Calls:
    """How many of each, over some time."""

    writes: int
    reads: int
    """Those of whole kinds apart."""
    whole_lists: int
    seconds: float


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
        calls = [_call(item) for item in entries if item["user"]["username"] == self.user and item["stage"] == COMPLETE]
        return sorted((call for call in calls if call.resource not in APART), key=lambda call: call.at)


def _call(entry: dict[str, Any]) -> Call:
    reference = entry.get("objectRef") or {}
    parts = [reference.get("resource", ""), reference.get("subresource", "")]
    whole = entry["verb"] == "list" and "fieldSelector" not in entry["requestURI"]
    return Call(entry["requestReceivedTimestamp"], entry["verb"], "/".join(part for part in parts if part), whole)


def handover_calls(calls: Sequence[Call], begin: float, end: float, num_handovers: int) -> Calls:
    """Return the calls of all hand-overs of a chain: from the end of its first stage's pod to that of its last one's.

    `begin`, `end`: seconds since the epoch. Raises RuntimeError where the log lacks JobSets.
    """
    between = [call for call in calls if _stamp(begin) <= call.at < _stamp(end)]
    made = sum((call.verb, call.resource) == ("create", "jobsets") for call in between)
    if made != num_handovers:
        raise RuntimeError(f"the audit log tells of {made} new JobSets for {num_handovers} hand-overs")
    return Calls(
        writes=sum(call.verb in WRITES for call in between),
        reads=sum(call.verb in READS and not call.whole for call in between),
        whole_lists=sum(call.whole for call in between),
        seconds=end - begin,
    )


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
