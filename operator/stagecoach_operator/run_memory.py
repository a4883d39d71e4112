"""What the operator remembers of a run between two reconciliations, and the pauses that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from stagecoach_api.status import AttemptStatus
from stagecoach_operator.attempt_client import Blocker
from stagecoach_operator.confirmation import Confirmed
from stagecoach_operator.lost_nodes import REMOVAL_SECONDS
from stagecoach_operator.object_views import PodView, RunView
from stagecoach_operator.planning import RETRY_SECONDS, FrozenPlan, Rejection
from stagecoach_operator.requests import AttemptKey

MERGE_SECONDS = 1.0
"""How long small changes, such as pods that start, are collected to be written together."""
FLUSH_SECONDS = 10.0
"""How often the status is written if only progress has changed."""
DIAGNOSE_SECONDS = 10.0
"""How often the events of a stuck pod are read."""
LOOKUP_SECONDS = 1.0
"""How long a status update waits for lookups in the store: most take less, which saves a write."""
PODS_SECONDS = 2.0
"""How long a status update waits for the pods of new attempts: most start in less, which saves a write. An end that is
not yet in the status is not lost meanwhile: it is in S3 and in the pods."""
BLOCKER_RETRY_SECONDS = 15.0
"""How soon a request that the cluster refused is repeated."""


@dataclass
class RunMemory:
    """State of a run between two reconciliations. All of it can be rebuilt from the cluster and S3.

    Times are in seconds since the epoch, by the operator's clock; 0 means never.
    """

    first_seen: float
    """When this operator first reconciled the run."""

    # The plan.
    plan: FrozenPlan | None = None
    """The plan that was accepted last. None if there is none, or it has not been read yet."""
    rejection: Rejection | None = None
    """Why the current spec is not accepted. None if it is accepted."""
    rejected_at: float = 0.0

    # Its attempts.
    records: dict[AttemptKey, AttemptStatus] | None = None
    """None if the status has not been read yet."""
    confirming: set[str] = field(default_factory=set)
    """Digests of artifacts that were found once and asked about again before a stage read them."""
    lost: frozenset[str] = frozenset()
    """Those of them that no longer exist."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Newest warning event of stuck pods, and of JobSets without pods, by UID."""
    diagnosed_at: float = 0.0
    """When the warnings were last read."""
    confirmed: Confirmed = field(default_factory=Confirmed)
    """What reads of JobSets that seemed to be gone have shown."""
    removed_at: dict[str, float] = field(default_factory=dict)
    """When the removal of pods on lost nodes was last requested, by UID."""
    avoided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Nodes that the newest attempt of each stage avoids, as text. Without an entry the status has them."""
    deleted_at: dict[str, float] = field(default_factory=dict)
    """When objects were first seen to be deleted, by UID."""
    settling: dict[AttemptKey, float] = field(default_factory=dict)
    """When a failed pod of an attempt was first seen, while the reports of its other pods are awaited."""
    blocker: Blocker | None = None
    """Why the last attempt could not be created. None if it was."""
    blocked_at: float = 0.0

    # Its status updates.
    saved_at: float = 0.0
    """When the status was last written."""
    lookups_since: float | None = None
    """Since when lookups in the store are pending. None if none are."""
    created_at: float = 0.0
    """When attempts were last created."""

    # -- the plan ------------------------------------------------------------------------------------------------------

    def is_still_rejected(self, run: RunView, now: float) -> bool:
        """Return whether the current spec has been rejected, and it is too early to validate it again."""
        if self.rejection is None or self.rejection.generation != run.generation:
            return False
        retry_at = self.retry_rejected_at()
        return retry_at is None or now < retry_at

    def retry_rejected_at(self) -> float | None:
        """Return when to validate the spec again. None if it was accepted, or only an edit can correct it."""
        if self.rejection is None or not self.rejection.retry:
            return None
        return max(self.rejected_at + RETRY_SECONDS, self.rejection.not_before)

    # -- attempts ------------------------------------------------------------------------------------------------------

    def block(self, blocker: Blocker, now: float) -> None:
        self.blocker, self.blocked_at = blocker, now

    def unblocked_at(self) -> float | None:
        """Return when to try again to create attempts. None if nothing prevents it."""
        return None if self.blocker is None else self.blocked_at + BLOCKER_RETRY_SECONDS

    def due_for_removal(self, pods: Iterable[PodView], now: float) -> list[PodView]:
        """Return the pods on lost nodes whose removal has not been requested lately; note that it is now."""
        due = [pod for pod in pods if now >= self.removed_at.get(pod.meta.uid, 0.0) + REMOVAL_SECONDS]
        self.removed_at |= {pod.meta.uid: now for pod in due}
        return due

    def may_diagnose(self, now: float) -> bool:
        return now >= self.diagnosed_at + DIAGNOSE_SECONDS

    # -- status updates ------------------------------------------------------------------------------------------------

    def defer_for_lookups(self, pending: bool, now: float) -> float | None:
        """Return the time until which the status update waits for pending lookups; None to write it now."""
        if not pending:
            self.lookups_since = None
            return None
        if self.lookups_since is None:
            self.lookups_since = now
        until = self.lookups_since + LOOKUP_SECONDS
        return until if now < until else None

    def defer_for_pods(self, now: float) -> float | None:
        """Return the time until which the status update waits for new pods to start; None to write it now."""
        until = self.created_at + PODS_SECONDS
        return until if now < until else None
