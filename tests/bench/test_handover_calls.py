"""Counting the calls of hand-overs, in audit logs with known counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.handover.calls import AuditLog, Call, Calls, handover_calls

USER = "system:serviceaccount:team:stagecoach"
MIDNIGHT = 1_767_225_600.0
"""2026-01-01T00:00:00Z."""
START = (("create", "configmaps"), ("create", "jobsets"), ("patch", "trainingruns/status"))


def calls(*each: tuple[str, str], whole: bool = False) -> list[Call]:
    """Return one call per second, starting at midnight."""
    return [Call(f"2026-01-01T00:00:{place:02}.000000Z", *what, whole) for place, what in enumerate(each)]


def entry(second: int, verb: str, resource: str, **more: Any) -> str:
    known = {
        "stage": "ResponseComplete",
        "verb": verb,
        "user": {"username": USER},
        "objectRef": {"resource": resource},
        "requestURI": f"/api/v1/{resource}?limit=500",
        "requestReceivedTimestamp": f"2026-01-01T00:00:{second:02}.000000Z",
    }
    return json.dumps(known | more) + "\n"


def test_calls_before_the_first_end_and_after_the_last_are_not_counted() -> None:
    log = calls(*START, *START, *START, ("patch", "trainingruns"))
    assert handover_calls(log, MIDNIGHT + 2.5, MIDNIGHT + 8.5, 2) == Calls(6, 0, 0, 6.0)


def test_every_call_in_between_is_counted_except_watches_and_lists_of_whole_kinds() -> None:
    between = (("get", "configmaps"), ("patch", "trainingruns/status"), ("watch", "pods"), ("list", "pods"))
    log = [*calls(*START, *between), *calls(("list", "pods"), ("list", "jobsets"), whole=True)]
    assert handover_calls(log, MIDNIGHT, MIDNIGHT + 60, 1) == Calls(4, 2, 2, 60.0)


def test_a_log_that_lacks_a_jobset_is_rejected() -> None:
    with pytest.raises(RuntimeError, match="the audit log has 2 new JobSets for 3 hand-overs"):
        handover_calls(calls(*START, *START), MIDNIGHT, MIDNIGHT + 60, 3)


def test_the_log_is_read_after_a_mark_for_one_user_in_order_of_arrival(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log", USER)
    log.file.write_text(entry(1, "create", "jobsets"))
    mark = log.mark()
    status = {"resource": "trainingruns", "subresource": "status"}
    lines = [
        entry(4, "patch", "", objectRef=status),
        entry(3, "create", "jobsets"),
        entry(3, "create", "jobsets", user={"username": "another"}),
        entry(5, "create", "events"),
        entry(6, "update", "leases"),
        entry(7, "watch", "pods", stage="ResponseStarted"),
        entry(8, "list", "pods"),
        entry(9, "list", "pods", requestURI="/api/v1/pods?fieldSelector=x"),
    ]
    with log.file.open("a") as file:
        file.writelines(lines)
    assert [(call.verb, call.resource, call.whole) for call in log.since(mark)] == [
        ("create", "jobsets", False),
        ("patch", "trainingruns/status", False),
        ("list", "pods", True),
        ("list", "pods", False),
    ]
