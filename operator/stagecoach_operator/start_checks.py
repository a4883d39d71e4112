"""Checks before an attempt is created: no other run makes its artifact, and what it reads still exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from stagecoach_core.values import Claimed, Found, Missing, Start
from stagecoach_operator.artifact_lookup import ArtifactLookups
from stagecoach_operator.known_artifacts import Answer, known_artifacts, lost_artifacts, unconfirmed, valid_answers
from stagecoach_operator.object_views import RunView
from stagecoach_operator.planning import FrozenPlan
from stagecoach_operator.run_memory import RunMemory

MISSING_SECONDS = 10.0
"""How old the answer that an artifact does not exist may be when an attempt starts that makes it."""
STARTING_SECONDS = 5.0
"""How long a start counts before its objects are created."""
LOOK_SECONDS = 3.0
"""How soon the store is asked again meanwhile."""
RESERVED_SECONDS = 120.0
"""How long a start counts as work on an artifact before its trainer has taken the right to write in the store."""


@dataclass(frozen=True)
class Starting:
    """An attempt that is about to be created."""

    run: RunView
    frozen: FrozenPlan
    action: Start
    artifacts: Mapping[str, Found]
    """Of the finished stages, by name."""
    now: float


@dataclass(frozen=True)
class StartChecks:
    """The checks of one operator."""

    lookups: ArtifactLookups
    memories: Mapping[str, RunMemory]
    enqueue: Callable[[str], None]

    def hold_up(self, starting: Starting, memory: RunMemory) -> bool:
        """Return whether the attempt must not be created yet. The run is reconciled again when it may be."""
        return self._is_made_elsewhere(starting) or self._must_wait(starting, memory)

    def _is_made_elsewhere(self, starting: Starting) -> bool:
        """Return whether another run of this operator has just started an attempt at the same artifact.

        Its trainer takes the right to write in the store, but until then its pods have to start.
        """
        state, digest = self.lookups.of(starting.frozen.storage), starting.action.digest
        uid, now = starting.run.meta.uid, starting.now
        claim = state.reservations.get(digest)
        other = None if claim is None or claim.run_uid == uid else self.memories.get(claim.run_uid)
        if claim is not None and other is not None and now < claim.at + RESERVED_SECONDS:
            records = (other.records or {}).values()
            is_at_work = any(item.ended is None and item.digest == digest for item in records)
            if is_at_work or now < claim.at + STARTING_SECONDS:
                state.by_digest[digest] = replace(claim, at=now, look_again_at=now + LOOK_SECONDS)
                self.enqueue(uid)
                return True
        title = f"run {starting.run.meta.namespace}/{starting.run.meta.name}"
        state.reservations[digest] = Claimed(title, uid, now, now)
        return False

    def _must_wait(self, starting: Starting, memory: RunMemory) -> bool:
        """Return whether the start has to wait for the store to confirm what is known about the artifacts concerned."""
        state, uid = self.lookups.of(starting.frozen.storage), starting.run.meta.uid
        if state.unreadable:
            return False
        action, now = starting.action, starting.now
        old = unconfirmed(starting.frozen, action.stage, starting.artifacts, state.by_digest, now)
        memory.confirming |= set(old)
        # Meanwhile, as during a suspension, another run may have made the artifact, or begun to.
        answer = state.by_digest.get(action.digest)
        if isinstance(answer, Missing) and now - answer.at > MISSING_SECONDS:
            old = [*old, action.digest]
        asked = [self.lookups.ask(starting.frozen.storage, digest, lambda: self.enqueue(uid)) for digest in old]
        # While the store does not answer, the stage starts: its trainer reads the manifests as well.
        return bool(old) and all(moment is None for moment in asked)

    def artifacts(self, run: RunView, frozen: FrozenPlan, memory: RunMemory) -> tuple[dict[str, Answer], list[str]]:
        """Return what is known about a run's artifacts, and a sentence about each that is newly found to be deleted."""
        state = self.lookups.of(frozen.storage)
        answers = valid_answers(state.by_digest, memory.first_seen, run.meta.uid)
        records = (memory.records or {}).values()
        before, lost = memory.lost, lost_artifacts(memory.confirming, answers, records)
        memory.lost = frozenset() if state.unreadable else lost
        known = known_artifacts(run.status, records, frozen.storage, answers, memory.lost, not state.unreadable)
        return known, [
            f"artifact {digest[:12]} was deleted from {frozen.storage_uri}; the stage that makes it runs again"
            for digest in sorted(memory.lost - before)
        ]
