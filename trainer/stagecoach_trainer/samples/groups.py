"""Groups of answers to one prompt: read from token shards, selected for measuring, planned as optimiser steps.

A group is one sample of a token shard, int32: [K, N, then length and mark of each of the K answers, the prompt's N ids,
the concatenated ids of the answers]. A mark is a rank (from 1), `LIKED` or `DISLIKED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from stagecoach_api.training import Training
from stagecoach_trainer.batches.mixing import Int64
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.plan import MixedPlan, PhaseSettings, Planner, Units, UnitsKey, phase_settings
from stagecoach_trainer.samples.token_cache import TokenShard

LIKED, DISLIKED = -1, -2
"""Marks of answers that are judged one by one. They are negative, ranks are positive."""

LOST_ANSWERS = ("tooLong", "emptyAnswers", "sameAnswers", "fewAnswers")
"""Names of the counts of answers that are not trained on; together with `answers` they add up to `answersRead`.

`tooLong`: prompt and answer do not fit the sequence; `emptyAnswers`: blank; `sameAnswers`: equal to a better answer to
the prompt; `fewAnswers`: no answer of another rank is left to compare with."""


class Counting(StrEnum):
    """Units that a loss is averaged over."""

    PAIRS = "pairs"
    GROUPS = "groups"
    ANSWERS = "answers"


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with one answer."""

    ids: Ids
    """Token ids [T]: the prompt as served, the answer, the end token."""

    num_prompt: int
    """Tokens of the prompt."""


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, which stay in one batch (a `Unit`). K answers, P pairs."""

    sequences: tuple[TokenSequence, ...]
    """K sequences, best first if they are ranked."""

    better: Int64
    """Index of each pair's better answer in `sequences` [P]; answers of equal rank form no pair."""

    worse: Int64
    """Index of each pair's other answer [P]."""

    liked: npt.NDArray[np.bool_] | None
    """Whether each answer is a good one [K]. None if they are ranked."""

    domain: int
    """Number of the set's domain, assigned by the caller."""

    place: tuple[int, int]
    """Numbers of the data set and of the group in it; they identify the group within the stage."""

    counting: Counting

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def num_targets(self) -> int:
        """The group's contribution to the divisor of the loss."""
        match self.counting:
            case Counting.PAIRS:
                return len(self.better)
            case Counting.ANSWERS:
                return len(self.sequences)
            case Counting.GROUPS:
                return 1


def pairs_of(ranks: Sequence[int]) -> tuple[Int64, Int64]:
    """Return the indices of the better and the worse answer of every pair of different ranks: [P], [P]."""
    # Rank 1 is best, so the pair (i, j) has i better than j if i's rank is lower.
    marks = np.asarray(ranks)
    better, worse = np.nonzero(marks[:, None] < marks[None, :])
    return better.astype(np.int64), worse.astype(np.int64)


@dataclass(frozen=True)
class GroupShard:
    """The groups of one data set."""

    shard: TokenShard
    domain: int = 0
    number: int = 0
    """Number of the data set."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Counts of the encoding: `records`, `groups`, `answersRead`, `answers` (kept), `pairs`, `ties` (pairs of equal
        rank, left out), `tokens`, and those of `LOST_ANSWERS`."""
        return self.shard.counts

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the model: every answer together with its prompt."""
        return self.counts["tokens"]

    def __len__(self) -> int:
        return len(self.shard)

    def group(self, index: int, counting: Counting) -> Group:
        """Return the group with the number `index`."""
        values = self.shard.tokens[self.shard.offsets[index] : self.shard.offsets[index + 1]]
        num_answers, num_prompt = int(values[0]), int(values[1])
        lengths, marks = values[2 : 2 + 2 * num_answers].reshape(num_answers, 2).T.tolist()
        # The prompt is stored once and repeated for each answer, since every answer is a sequence of its own.
        start = 2 + 2 * num_answers
        prompt = values[start : start + num_prompt]
        ends = start + num_prompt + np.cumsum(lengths)
        sequences = tuple(
            TokenSequence(np.concatenate([prompt, values[end - length : end]]), num_prompt)
            for end, length in zip(ends.tolist(), lengths, strict=True)
        )
        place = (self.number, index)
        if min(marks) < 0:  # judged one by one; `GroupEncoder` never mixes such marks with ranks
            nothing = np.empty(0, np.int64)
            liked = np.array(marks) == LIKED
            return Group(sequences, nothing, nothing, liked, self.domain, place, counting)
        return Group(sequences, *pairs_of(marks), None, self.domain, place, counting)

    def groups(self, counting: Counting) -> Iterator[Group]:
        """Yield all groups, in the order of the records."""
        return (self.group(index, counting) for index in range(len(self)))


def check_lost_answers(
    counts: Mapping[str, Mapping[str, int]], largest_share: float, where: str = "data", use: str = "trained on"
) -> None:
    """Raise UserError if no answer is used, or more than `largest_share` are not.

    `counts`: by set; `where`: path of the sets' field; `use`: what the answers are for.
    """
    lost = sum(map(lost_answers, counts.values()))
    kept = sum(each.get("answers", 0) for each in counts.values())
    reasons = "; ".join(f"{name}: {describe_groups(each)}" for name, each in counts.items())
    if kept == 0:
        raise UserError(f"{where}: no preference to learn from is left ({reasons})")
    share = lost / (kept + lost)
    if share > largest_share:
        raise UserError(
            f"{where}: {share:.1%} of the answers cannot be {use}, more than `maxDroppedShare` {largest_share:.1%} "
            f"({reasons}); raise `sequenceLength`, fix the data, or allow more"
        )


def lost_answers(counts: Mapping[str, int]) -> int:
    """Return the number of answers that are not used."""
    return sum(counts.get(name, 0) for name in LOST_ANSWERS)


def check_left_out(name: str, counts: Mapping[str, int], largest_share: float, warn: Callable[[str], None]) -> None:
    """Call `warn` if a held-out set leaves answers out. Raises UserError if they are more than `largest_share`."""
    check_lost_answers({name: counts}, largest_share, "heldOut.sets", "measured")
    lost = lost_answers(counts)
    if lost:
        warn(
            f"heldOut {name}: {lost:,} of {counts['answersRead']:,} answers are left out ({describe_groups(counts)}), "
            "and the figures are those of the others"
        )


def measured_groups(shard: GroupShard, counting: Counting, max_tokens: int, name: str) -> list[Group]:
    """Return the first groups of a held-out set, up to `max_tokens` in all but at least one.

    Raises UserError if the set has none.
    """
    groups: list[Group] = []
    left = max_tokens
    for group in shard.groups(counting):
        if groups and group.num_tokens > left:
            break
        groups.append(group)
        left -= group.num_tokens
    if not groups:
        raise UserError(f"heldOut.sets: {name} has no preference to measure ({describe_groups(shard.counts)})")
    return groups


def describe_groups(counts: Mapping[str, int]) -> str:
    """Return the counts of a set of preferences, for a message."""
    names = ("records", "groups", "answersRead", "answers", *LOST_ANSWERS, "pairs", "ties")
    return ", ".join(f"{name} {counts[name]}" for name in names if counts.get(name))


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupUnits:
    """The groups of several sets, numbered consecutively (`Units`)."""

    shards: tuple[GroupShard, ...]
    counting: Counting

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    def rows(self, numbers: Int64) -> list[Group]:
        """Return the groups with the given numbers."""
        # `ends[i]` is the first number after set i, so the search finds the set of each number.
        ends = np.cumsum([len(shard) for shard in self.shards])
        sets = np.searchsorted(ends, numbers, side="right").tolist()
        return [
            self.shards[index].group(int(number) - int(ends[index]) + len(self.shards[index]), self.counting)
            for index, number in zip(sets, numbers.tolist(), strict=True)
        ]


class GroupPlanner(Planner):
    """Plans steps of groups: `batch.samples` per step, or as many as have `batch.tokens` on average."""

    def __init__(self, shards: Mapping[str, GroupShard], counting: Counting, seed: int) -> None:
        super().__init__({name: found.shard for name, found in shards.items()}, seed, packing=False)
        self._groups = tuple(shards.values())
        self._counting = counting

    def _make_units(self, key: UnitsKey) -> Units:
        units = GroupUnits(tuple(self._groups[index] for index in key.sets), self._counting)
        if not len(units):
            raise self._nothing_in(key)
        return units

    def _per_step(self, settings: PhaseSettings, mean_tokens: float) -> int:
        if settings.batch.tokens is not None:
            return max(1, round(settings.batch.tokens / mean_tokens))
        return settings.batch.samples or 1


def plan_groups(shards: Mapping[str, GroupShard], config: Training, counting: Counting, seed: int) -> MixedPlan:
    """Return the plan of a stage that trains on groups; `shards` by label, in the order of `config.data`.

    A budget or batch of samples counts groups; tokens are those of all answers with their prompts.
    Raises UserError if only some sets have weights, or a set with a weight has no groups.
    """
    settings = phase_settings(config, list(shards))
    planner = GroupPlanner(shards, counting, seed)
    return planner.plan(settings)
