"""How an attempt ended, told from its pods: which of them explains it, and what it said. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from stagecoach_api.outcomes import CAUSE_OF_EXIT, AttemptResult, Cause, ExitCode, cause_of_exit
from stagecoach_operator.watched import ContainerEnd, JobSetView, PodView

SETTLE_SECONDS = 2.0
"""How long after a first failure the other pods' words are waited for: one rank's end brings the others down, and the
first pod that is seen to fail need not be the one that knows why."""

PREEMPTING = frozenset({"PreemptionByScheduler", "EvictionByEvictionAPI"})
"""Disruptions that somebody asked for: a more important pod, a drained node. All others count as infrastructure."""

OOM_KILLED = "OOMKilled"
MESSAGE_CHARACTERS = 1000
DIGEST_LENGTH = 64


@dataclass(frozen=True)
class Word:
    """What ended an attempt."""

    cause: Cause | None
    """None: it is done."""
    message: str
    exit_code: int | None = None
    content_digest: str | None = None
    last_step: int | None = None
    pod: str = ""
    node: str = ""
    at: float = 0.0
    """When that pod ended, in seconds since the epoch by its node's clock; 0: unknown."""

    def result(self) -> AttemptResult:
        """Return it as the launcher would have written it."""
        code = self.exit_code if self.exit_code is not None else int(self.cause is not None)
        return AttemptResult(exit_code=code, cause=self.cause, content_digest=self.content_digest)


@dataclass(frozen=True)
class Verdict:
    """What the pods say of the attempt's end."""

    word: Word | None = None
    """None: it has not ended, or it is too early to say why."""
    look_again_at: float | None = None
    """When it is no longer too early, in seconds since the epoch. None: nothing is pending."""


def verdict_of(pods: Sequence[PodView], jobset: JobSetView, now: float) -> Verdict:
    """Say whether and how an attempt has ended. `pods`: all that are known of it."""
    done = next((word_of(pod) for pod in pods if pod.index == 0 and pod.has_ended and not _failed(pod)), None)
    if done is not None and done.cause is None:
        return Verdict(done)
    if jobset.suspended and not jobset.failed:
        return Verdict()  # its queue has taken it back: whatever its pods died of, new ones will go on
    failed = [pod for pod in pods if pod.has_ended and _failed(pod)]
    if failed:
        return _failure(failed, pods, jobset, now)
    if jobset.completed:
        return Verdict(Word(cause=None, message="its JobSet is complete, and its pods are gone"))
    if jobset.failed:
        settled = jobset.failed_at + SETTLE_SECONDS
        word = Word(cause=Cause.INFRASTRUCTURE, message=f"{jobset.failed}; its pods left no word")
        return Verdict(word) if now >= settled else Verdict(look_again_at=settled)
    return Verdict()


def _failed(pod: PodView) -> bool:
    return pod.phase == "Failed" or (pod.end is not None and pod.end.exit_code != 0)


def _failure(failed: Sequence[PodView], pods: Sequence[PodView], jobset: JobSetView, now: float) -> Verdict:
    words = [word_of(pod) for pod in failed]
    best = min(words, key=lambda word: (_explains(word), word.at))
    if jobset.meta.deleting:  # why is known to whoever deletes it, and its pods are gone in a moment
        return Verdict(replace(best, last_step=newest_step(word.last_step for word in words)))
    complete = len({pod.index for pod in pods if pod.has_ended}) >= jobset.num_pods
    deleted = all(pod.meta.deleting for pod in failed)  # perhaps by a queue that is just taking the attempt back
    if _explains(best) == 0 or jobset.failed or (complete and not deleted):
        return Verdict(best)
    settled = min(min(word.at for word in words) or now, now) + SETTLE_SECONDS
    return Verdict(best) if now >= settled else Verdict(look_again_at=settled)


def newest_step(steps: Iterable[int | None]) -> int | None:
    """Return the newest of the steps that are known. None: none is."""
    return max((step for step in steps if step is not None), default=None)


def _explains(word: Word) -> int:
    """Return how much a pod's word explains: 0 names the reason, 1 is a sudden death, 2 may follow from another's."""
    if word.exit_code in CAUSE_OF_EXIT and word.exit_code != ExitCode.INTERRUPTED:
        return 0
    if OOM_KILLED in word.message or (word.exit_code is not None and word.exit_code < 0):
        return 1
    return 1 if word.cause is Cause.PREEMPTION else 2


# -- one pod -----------------------------------------------------------------------------------------------------------


def word_of(pod: PodView) -> Word:
    """Return what an ended pod says, or what is known of its end where it says nothing."""
    end = pod.end
    result = None if end is None else end.result()
    own = _as_told(pod, end, result) if end is not None and result is not None else _untold(pod, end)
    if pod.disruption in PREEMPTING and own.cause not in (None, Cause.USER):
        said = f"preempted ({pod.disruption}): {pod.disruption_message}"
        return Word(
            Cause.PREEMPTION,
            said[:MESSAGE_CHARACTERS],
            own.exit_code,
            last_step=own.last_step,
            pod=own.pod,
            node=own.node,
            at=own.at,
        )
    return own


def _as_told(pod: PodView, end: ContainerEnd, result: AttemptResult) -> Word:
    message = result.message
    if end.reason == OOM_KILLED:
        message = f"{OOM_KILLED}: the container ran out of memory; {message}"
    return Word(
        cause=result.cause,
        message=message[:MESSAGE_CHARACTERS],
        exit_code=max(-256, min(256, result.exit_code)),
        content_digest=result.content_digest if _is_digest(result.content_digest) else None,
        last_step=result.last_step if result.last_step is not None and result.last_step >= 0 else None,
        pod=pod.meta.name,
        node=pod.node,
        at=end.finished,
    )


def _is_digest(text: str | None) -> bool:
    """Tell whether a result, which a custom image may write as it likes, names a digest."""
    return text is not None and len(text) == DIGEST_LENGTH and set(text) <= set("0123456789abcdef")


def _untold(pod: PodView, end: ContainerEnd | None) -> Word:
    """Return the word of a pod whose launcher was killed, never began, or left nothing."""
    name, node = pod.meta.name, pod.node
    if end is None:
        about = ": ".join(part for part in (pod.reason, pod.message) if part) or f"the pod is {pod.phase}"
        cause = None if pod.phase == "Succeeded" else Cause.INFRASTRUCTURE
        return Word(cause=cause, message=about[:MESSAGE_CHARACTERS], pod=name, node=node)
    code = end.exit_code if end.exit_code <= 128 else 128 - end.exit_code
    if end.reason == OOM_KILLED:
        remedy = "raise `resources.memory`, or ask for less of it"
        said = f"{OOM_KILLED}: the container needed more memory than its limit; {remedy}"
        return Word(Cause.INFRASTRUCTURE, said, exit_code=code, at=end.finished, pod=name, node=node)
    cause = None if code == 0 else cause_of_exit(code)
    about = f"ended with exit code {code} and left no result"
    if pod.reason:
        about = f"{pod.reason}: {pod.message or about}"
    lines = f"\n{end.message[-MESSAGE_CHARACTERS // 2 :]}" if end.message else ""
    return Word(cause, (about + lines)[:MESSAGE_CHARACTERS], exit_code=code, at=end.finished, pod=name, node=node)
