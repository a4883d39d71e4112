"""The facts about every stage that a decision depends on: its digest, its artifact, its attempts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from stagecoach_core.digest import input_digests, stage_digest
from stagecoach_core.graph import ancestors
from stagecoach_core.policies.retry import RetryDecision, decide_retry, ended_at, without_result
from stagecoach_core.values import Attempt, Claimed, Forgotten, Found, Missing, Observed, Plan, PlannedStage


@dataclass(frozen=True)
class StageFacts:
    """The facts about one stage."""

    name: str
    planned: PlannedStage
    selected: bool
    """Whether it may run."""
    needed: bool
    """Whether it is selected, or a selected stage depends on it."""
    digest: str | None
    """None while the content of an input is not known."""
    artifact: Found | None
    """Its artifact, if it and all stages before it are finished; else None."""
    made_by_run: bool
    """Whether an attempt of this run made the artifact, since the user requested the run."""
    needs_look_up: bool
    """Whether the store must be asked whether the stage is finished."""
    claim: Claimed | None
    """The other run that is making its artifact, as far as known."""
    undetermined: bool
    """Whether `needs_look_up` holds for it or for a stage before it, so that it may turn out to be finished."""
    upstream: tuple[str, ...]
    """The unfinished stages it depends on."""
    attempts: tuple[Attempt, ...]
    """All attempts of the stage, at any digest, oldest first."""
    retry: RetryDecision
    """What follows from its failed attempts."""

    @property
    def live_attempts(self) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.is_live)

    @property
    def newest(self) -> int:
        """Number of the newest attempt; 0 if there is none."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def finished(self) -> bool:
        return self.artifact is not None

    @property
    def failed(self) -> bool:
        """Whether a retry budget is used up and no attempt is live."""
        return self.selected and not self.finished and not self.live_attempts and self.retry.exhausted is not None

    @property
    def startable(self) -> bool:
        """Whether an attempt could start, given capacity and the end of a back-off."""
        known = self.digest is not None and not self.needs_look_up and self.claim is None and not self.upstream
        return self.selected and known and not self.finished and not self.live_attempts and self.retry.exhausted is None


def stage_facts(plan: Plan, observed: Observed, now: float) -> dict[str, StageFacts]:
    """Return the facts of every stage, by name, in topological order. `now`: seconds since the epoch."""
    selected = frozenset(plan.stages) if observed.selected is None else observed.selected & plan.stages.keys()
    needed = selected | ancestors(selected, {name: planned.upstream for name, planned in plan.stages.items()})
    facts: dict[str, StageFacts] = {}
    # In topological order: the facts of a stage depend on those of the stages before it.
    for name, planned in plan.stages.items():
        facts[name] = _facts_of(name, planned, plan.code, observed, now, facts, name in needed)
    return facts


def _facts_of(
    name: str,
    planned: PlannedStage,
    code: str,
    observed: Observed,
    now: float,
    before: Mapping[str, StageFacts],
    needed: bool,
) -> StageFacts:
    finished = {key: facts.artifact for key, facts in before.items() if facts.artifact is not None}
    inputs = input_digests(planned, finished)
    digest = None if inputs is None else stage_digest(planned, inputs, code)
    attempts = tuple(sorted((item for item in observed.attempts if item.stage == name), key=lambda item: item.number))
    upstream = tuple(key for key in planned.upstream if key not in finished)
    artifact, needs_look_up = _artifact(name, digest, attempts, observed, now)
    # With `--from`, attempts from before the command neither count as failures nor as work of this run.
    counted = tuple(item for item in attempts if item.number >= observed.forced.get(name, 0))
    return StageFacts(
        name=name,
        planned=planned,
        selected=observed.selected is None or name in observed.selected,
        needed=needed,
        digest=digest,
        # A stage is not finished before those it comes after (`after`), although its digest does not depend on them.
        artifact=None if upstream else artifact,
        made_by_run=any(item.digest == digest and not item.past for item in counted),
        needs_look_up=needs_look_up,
        claim=None if name in observed.forced else _claim(digest, observed),
        undetermined=needs_look_up or any(before[key].undetermined for key in upstream),
        upstream=upstream,
        attempts=attempts,
        retry=_retry(planned, digest, artifact, needs_look_up, counted, observed),
    )


def _artifact(
    name: str, digest: str | None, attempts: tuple[Attempt, ...], observed: Observed, now: float
) -> tuple[Found | None, bool]:
    """Return the stage's artifact, and whether it must be looked up in the store."""
    if digest is None or (name in observed.forced and not _redone(digest, attempts, observed.forced[name])):
        return None, False
    # An artifact that was found stays found: artifacts are immutable, so the answer needs no time.
    answer = observed.artifacts.get(digest)
    if isinstance(answer, Found):
        return answer, False
    if isinstance(answer, Claimed) and now >= answer.look_again_at:
        return None, True
    in_progress = any(item.is_live and item.digest == digest for item in observed.attempts)
    return None, answer is None or (not in_progress and _is_stale(answer, digest, observed.attempts))


def _claim(digest: str | None, observed: Observed) -> Claimed | None:
    """Return the other run that is making a digest, unless an attempt of this run is at work on it as well."""
    answer = None if digest is None else observed.artifacts.get(digest)
    own = any(item.is_live and item.digest == digest for item in observed.attempts)
    return answer if isinstance(answer, Claimed) and not own else None


def _redone(digest: str, attempts: tuple[Attempt, ...], first: int) -> bool:
    return any(item.is_done and item.digest == digest and item.number >= first for item in attempts)


def _is_stale(answer: Missing | Claimed, digest: str, attempts: tuple[Attempt, ...]) -> bool:
    """Return whether an attempt at the digest has ended since the store was asked.

    Even an attempt that was killed may have published its artifact. Attempts of all stages count, because another stage
    may have the same digest.
    """
    return any(not item.is_live and item.digest == digest and ended_at(item) >= answer.at for item in attempts)


def _retry(
    planned: PlannedStage,
    digest: str | None,
    artifact: Found | None,
    needs_look_up: bool,
    attempts: tuple[Attempt, ...],
    observed: Observed,
) -> RetryDecision:
    if digest is None:
        return RetryDecision()
    ended = without_result(attempts, digest)
    older = _forgotten(planned.stage.name, digest, observed)
    if artifact is not None or needs_look_up:
        # Finished, or not yet known to be unfinished: there is nothing to decide, only the counts are reported.
        counts = Counter(item.cause for item in ended if item.cause is not None and not item.past)
        for group in older:
            counts.update(group.counts)
        return RetryDecision(restarts=dict(+counts))
    return decide_retry(ended, planned.stage.retries, older)


def _forgotten(name: str, digest: str, observed: Observed) -> tuple[Forgotten, ...]:
    """Return the attempts that count although the driver no longer stores them individually."""
    return () if name in observed.forced else observed.forgotten.get((name, digest), ())
