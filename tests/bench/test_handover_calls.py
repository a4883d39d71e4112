"""What counts as a call of a hand-over, in an audit log whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.handover.calls import AuditLog, Call, Calls, handover_calls

USER = "system:serviceaccount:team:stagecoach"
BEGIN = (("patch", "configmaps"), ("patch", "trainingruns"))
START = (("create", "configmaps"), ("create", "jobsets"), ("patch", "trainingruns/status"))
END = (("patch", "trainingruns/status"), ("patch", "trainingruns"))


def calls(*each: tuple[str, str]) -> list[Call]:
    return [Call(f"2026-01-01T00:00:{place:02}.000000Z", *what) for place, what in enumerate(each)]


def entry(second: int, verb: str, resource: str, **more: Any) -> str:
    known = {
        "stage": "ResponseComplete",
        "verb": verb,
        "user": {"username": USER},
        "objectRef": {"resource": resource},
        "requestReceivedTimestamp": f"2026-01-01T00:00:{second:02}.000000Z",
    }
    return json.dumps(known | more) + "\n"


def test_what_a_run_begins_and_ends_with_belongs_to_no_hand_over() -> None:
    assert handover_calls(calls(*BEGIN, *START, *START, *START, *END), 3) == Calls(writes=6, reads=0)


def test_every_call_between_two_starts_counts_but_watches() -> None:
    between = (("get", "configmaps"), ("patch", "trainingruns/status"), ("watch", "pods"), ("list", "pods"))
    assert handover_calls(calls(*START, *between, *START), 2) == Calls(writes=4, reads=2)


def test_a_log_that_lacks_a_jobset_is_not_counted() -> None:
    with pytest.raises(RuntimeError, match="2 new JobSets; the chain has 3 stages"):
        handover_calls(calls(*START, *START), 3)


def test_the_log_is_read_from_a_mark_on_for_one_user_in_the_order_of_arrival(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log", USER)
    log.file.write_text(entry(1, "create", "jobsets"))
    mark = log.mark()
    status = {"resource": "trainingruns", "subresource": "status"}
    lines = [
        entry(4, "patch", "", objectRef=status),
        entry(3, "create", "jobsets"),
        entry(3, "create", "jobsets", user={"username": "somebody"}),
        entry(5, "create", "events"),
        entry(6, "update", "leases"),
        entry(7, "watch", "pods", stage="ResponseStarted"),
    ]
    with log.file.open("a") as file:
        file.writelines(lines)
    assert [(call.verb, call.resource) for call in log.since(mark)] == [
        ("create", "jobsets"),
        ("patch", "trainingruns/status"),
    ]
