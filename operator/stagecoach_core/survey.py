"""What is known of every stage: its digest, its artifact, its attempts. The facts that `decide` rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from stagecoach_api.outcomes import Cause
from stagecoach_core.digest import input_digests, stage_digest
from stagecoach_core.graph import ancestors
from stagecoach_core.policies.retry import Verdict, ended_at, judge, without_result
from stagecoach_core.values import Attempt, Found, Missing, Observed, Plan, PlannedStage


@dataclass(frozen=True)
class StageFacts:
    """One stage as it is."""

    name: str
    planned: PlannedStage
    selected: bool
    """It may be worked on."""
    needed: bool
    """It is selected, or a selected one depends on it."""
    digest: str | None
    """None: the content of an input is not known yet."""
    artifact: Found | None
    """Its finished work, everything before it finished too. None: not finished."""
    made_here: bool
    """The artifact comes from an attempt of this run, since the user asked for it."""
    ask_store: bool
    """Only the store can say whether the work is done."""
    unsettled: bool
    """`ask_store`, or that of a stage before it: what is not known may turn out to be finished."""
    upstream: tuple[str, ...]
    """Unfinished stages it needs."""
    attempts: tuple[Attempt, ...]
    """All of this stage, oldest first, at whatever digest."""
    verdict: Verdict
    """What its failed attempts mean."""

    @property
    def living(self) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.lives)

    @property
    def newest(self) -> int:
        """Number of the newest attempt; 0: none."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def finished(self) -> bool:
        return self.artifact is not None

    @property
    def failed(self) -> bool:
        """A budget is spent, and nothing of it lives."""
        return self.selected and not self.finished and not self.living and self.verdict.exhausted is not None

    @property
    def workable(self) -> bool:
        """An attempt could be made, were there no back-off and room enough."""
        known = self.digest is not None and not self.ask_store and not self.upstream
        return self.selected and known and not self.finished and not self.living and self.verdict.exhausted is None


def survey(plan: Plan, observed: Observed) -> dict[str, StageFacts]:
    """Return the facts of every stage, by name, in topological order."""
    selected = frozenset(plan.stages) if observed.selected is None else observed.selected & plan.stages.keys()
    needed = selected | ancestors(selected, {name: planned.upstream for name, planned in plan.stages.items()})
    facts: dict[str, StageFacts] = {}
    for name, planned in plan.stages.items():
        facts[name] = _facts_of(name, planned, plan.code, observed, facts, name in needed)
    return facts


def _facts_of(
    name: str, planned: PlannedStage, code: str, observed: Observed, before: Mapping[str, StageFacts], needed: bool
) -> StageFacts:
    finished = {key: facts.artifact for key, facts in before.items() if facts.artifact is not None}
    inputs = input_digests(planned, finished)
    digest = None if inputs is None else stage_digest(planned, inputs, code)
    own = sorted((item for item in observed.attempts if item.stage == name), key=lambda item: item.number)
    attempts = tuple(own)
    upstream = tuple(key for key in planned.upstream if key not in finished)
    artifact, ask_store = _artifact(name, digest, attempts, observed)
    forced = name in observed.forced
    counted = tuple(item for item in attempts if not forced or item.started >= observed.forced_since)
    return StageFacts(
        name=name,
        planned=planned,
        selected=observed.selected is None or name in observed.selected,
        needed=needed,
        digest=digest,
        artifact=None if upstream else artifact,
        made_here=any(item.digest == digest and (item.lives or ended_at(item) >= observed.since) for item in counted),
        ask_store=ask_store,
        unsettled=ask_store or any(before[key].unsettled for key in upstream),
        upstream=upstream,
        attempts=attempts,
        verdict=_verdict(planned, digest, artifact, ask_store, counted, observed),
    )


def _artifact(
    name: str, digest: str | None, attempts: tuple[Attempt, ...], observed: Observed
) -> tuple[Found | None, bool]:
    """Return the stage's artifact, and whether the store must be asked for it."""
    if digest is None or (name in observed.forced and not _redone(digest, attempts, observed.forced_since)):
        return None, False
    answer = observed.artifacts.get(digest)
    if isinstance(answer, Found):
        return answer, False
    lives = any(item.lives and item.digest == digest for item in observed.attempts)
    return None, answer is None or (not lives and _is_stale(answer, digest, observed.attempts))


def _redone(digest: str, attempts: tuple[Attempt, ...], forced_since: float) -> bool:
    return any(item.is_done and item.digest == digest and item.started >= forced_since for item in attempts)


def _is_stale(answer: Missing, digest: str, attempts: tuple[Attempt, ...]) -> bool:
    """Tell whether an attempt has ended since the store was asked: even one that was killed may have published, and one
    of another stage if that does the same work."""
    return any(not item.lives and item.digest == digest and ended_at(item) >= answer.at for item in attempts)


def _verdict(
    planned: PlannedStage,
    digest: str | None,
    artifact: Found | None,
    ask_store: bool,
    attempts: tuple[Attempt, ...],
    observed: Observed,
) -> Verdict:
    if digest is None:
        return Verdict()
    ended = without_result(attempts, digest, observed.since)
    older = _forgotten(planned.stage.name, digest, observed)
    if artifact is not None or ask_store:
        # What it means is not open any more, or not yet: only the count is shown.
        counts = Counter(item.cause for item in ended if item.cause is not None)
        return Verdict(restarts=dict(counts + Counter(older)))
    return judge(ended, planned.stage.retries, older)


def _forgotten(name: str, digest: str, observed: Observed) -> Mapping[Cause, int]:
    """Return how many attempts count that the driver no longer remembers one by one."""
    older = observed.forgotten.get((name, digest))
    if older is None or older.until < observed.since or name in observed.forced:
        return {}
    return older.counts
