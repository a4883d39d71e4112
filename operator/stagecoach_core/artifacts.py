"""A stage's artifact: the outcome of looking it up in the store, and the pointer through which a run names it."""

from __future__ import annotations

from stagecoach_api.artifacts import Manifest, Pointer, uri_below
from stagecoach_api.writer_record import WriterLease
from stagecoach_core.values import Claimed, Found, Missing, Plan, StageState, StageView

CLAIM_LOOK_SECONDS = 10.0
"""Longest time between two looks at an artifact that another run makes."""


def look_up_result(
    digest: str, manifest: Manifest | None, storage_uri: str, asked_at: float, lease: WriterLease | None = None
) -> Found | Missing | Claimed:
    """Return the answer to `LookUp` for `Observed.artifacts`.

    `manifest`: the stored manifest of the stage digest, None if there is none. `asked_at`: when the store was asked, in
    seconds since the epoch. It is the time before the request, because an artifact may be published during it. `lease`:
    the right to write to the artifact, None if no attempt has taken it.
    """
    if manifest is None and lease is not None and lease.is_alive:
        look_again_at = asked_at + min(lease.remaining, CLAIM_LOOK_SECONDS)
        return Claimed(lease.record.title, lease.record.run_uid, asked_at, look_again_at)
    if manifest is None:
        return Missing(at=asked_at)
    return Found(digest, manifest.content_digest, uri_below(storage_uri, manifest.folder), at=asked_at)


def pointer_to(found: Found, plan: Plan, name: str, view: StageView, now: float) -> Pointer:
    """Return the pointer of stage `name` to its artifact. `now`: seconds since the epoch."""
    return Pointer(
        stage=name,
        kind=plan.stages[name].stage.kind,
        stage_digest=found.stage_digest,
        content_digest=found.content_digest,
        uri=found.uri,
        cached=view.state is StageState.CACHED,
        recorded=now,
    )


def without_own(answer: Found | Missing | Claimed, run_uid: str) -> Found | Missing | Claimed:
    """Return an answer as it holds for a run: what its own attempts claim is free for its next attempt."""
    return Missing(answer.at) if isinstance(answer, Claimed) and answer.run_uid == run_uid else answer
