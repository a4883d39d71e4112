"""What a run's user has asked for beyond its spec: another try, by an annotation. Pure.

A request is carried out once for each value of the annotation. The value is remembered in the status, together with
the first attempt of each stage that counts from then on: numbers, since the clocks of a user's machine, of the API
server and of two operators differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from stagecoach_api import names
from stagecoach_api.status import AttemptStatus, TrainingRunStatus

TOKEN_CHARACTERS = 128

AttemptKey = tuple[str, int]
"""Stage and number."""


@dataclass(frozen=True)
class Request:
    """The last request for a retry, and the attempts that count since."""

    token: str = ""
    """Value of the annotation. Empty if there was none."""
    counted_from: Mapping[str, int] = field(default_factory=dict)
    """Number of the first attempt that counts, by stage."""
    is_new: bool = False
    """Whether the status does not mention it yet."""

    def is_past(self, stage: str, record: AttemptStatus) -> bool:
        """Return whether an attempt had ended when the request was made."""
        return record.ended is not None and record.number < self.counted_from.get(stage, 0)


NO_REQUEST = Request()


def request_of(
    annotations: Mapping[str, str], status: TrainingRunStatus, records: Mapping[AttemptKey, AttemptStatus]
) -> Request:
    """Return the request that is in force. `records`: every known attempt."""
    token = token_of(annotations.get(names.ANNOTATION_RETRY, ""))
    before = {stage.name: stage.counted_from for stage in status.stages}
    if not token or token == status.retry:
        return Request(status.retry, before)
    stages = {stage for stage, _ in records}
    first = {stage: _first_after(record for (name, _), record in records.items() if name == stage) for stage in stages}
    return Request(token, before | first, is_new=True)


def _first_after(records: Iterable[AttemptStatus]) -> int:
    """Return the number of the first attempt that has not ended, or of the next one."""
    known = list(records)
    living = [record.number for record in known if record.ended is None]
    return min(living, default=max(record.number for record in known) + 1)


def token_of(value: str) -> str:
    """Return what is stored of an annotation's value."""
    value = value.strip()
    return value if len(value) <= TOKEN_CHARACTERS else f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
