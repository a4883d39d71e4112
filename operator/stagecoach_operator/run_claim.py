"""Which installation works on a run: two that see the same runs would each stop the other's attempts.

The first that writes a run's status puts its name there, under the precondition of the resource version, and before it
starts an attempt. Another one leaves the run alone, whether or not the first still exists: only a user knows that, and
hands the run over by an annotation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stagecoach_api import names
from stagecoach_operator.events import EventReason, RunEvent
from stagecoach_operator.object_views import RunView

log = logging.getLogger(__name__)


def objection_to(run: RunView, installation: str) -> str:
    """Return why an installation must leave a run alone. Empty if it may work on it."""
    if run.unreadable:
        return (
            f"the status was written by another version of the operator ({run.unreadable}), so this one leaves the run "
            "alone; install that version again, or one that is newer"
        )
    manager = run.spec.get("managedBy")
    if manager not in (None, "", names.MANAGER):
        return f"`spec.managedBy` is `{manager}`, so the operator leaves the run alone"
    owner = run.annotations.get(names.ANNOTATION_INSTALLATION) or run.status.installation
    if owner and owner != installation:
        return (
            f"the operator `{owner}` (namespace/Lease) works on the run, so `{installation}` leaves it alone; to hand "
            f"it over, annotate the run with `{names.ANNOTATION_INSTALLATION}={installation}`"
        )
    return ""


@dataclass
class LeftAlone:
    """Reports once for each run that it is not worked on."""

    record_events: Callable[[RunView, Sequence[RunEvent]], None]
    _reasons: dict[str, str] = field(default_factory=dict)
    """By the run's UID."""

    def report(self, run: RunView, why: str) -> None:
        if self._reasons.get(run.meta.uid) != why:
            self._reasons[run.meta.uid] = why
            log.warning("%s/%s: %s", *run.key, why)
            self.record_events(run, [RunEvent(EventReason.BLOCKED, why, warning=True)])

    def forget(self, run_uid: str) -> None:
        self._reasons.pop(run_uid, None)
