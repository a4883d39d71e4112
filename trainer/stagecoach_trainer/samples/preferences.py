"""Preference records as token groups: the answers to one prompt, and which of them is the better one.

Prompt and answer are encoded as `ConversationEncoder` encodes the last turn of a conversation: the prompt's ids are
those that `apply_chat_template` gives with the generation prompt, the answer's end with the end token.

A group is one sample of a token shard, int32: [K, N, then for each answer its length and its mark, the prompt's N ids,
the ids of the answers one after the other]. A mark is a rank (from 1), `LIKED` or `DISLIKED`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from stagecoach_api.conversation import Loss, Role, TooLong, Turns
from stagecoach_api.references import RecordSource
from stagecoach_api.training import Training
from stagecoach_trainer.batches.mixing import Int64
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.formats import Answer, Turn
from stagecoach_trainer.data.records import Fetches, Record, read_records
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import Conversation, ConversationEncoder, conversation_of
from stagecoach_trainer.samples.datasets import source_key, tokenizer_digest
from stagecoach_trainer.samples.plan import MixedPlan, PhaseSettings, Planner, Units, UnitsKey, phase_settings
from stagecoach_trainer.samples.token_cache import ShardWriter, TokenShard, token_shard
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import GENERATED, Message, Renderer

LIKED, DISLIKED = -1, -2
"""Marks of answers that are judged one by one."""

LAYOUT = 1
"""Raised when the layout of a group in a shard changes."""

BATCH_RECORDS = 64
NO_LIMIT = 1 << 62

LAST_ANSWER = Loss(roles=(Role.ASSISTANT,), turns=Turns.LAST)

GROUP_LOSSES = ("tooLong", "emptyAnswers", "sameAnswers", "fewAnswers")
"""Counts of answers that are not trained on. With `answers` they make `answersRead`.

`tooLong`: prompt and answer do not fit the sequence; `emptyAnswers`: blank; `sameAnswers`: the same as a better answer
to the prompt; `fewAnswers`: left without an answer of another rank to be compared with."""


class Grouping(StrEnum):
    """What a group is made of."""

    PROMPTS = "prompts"
    """All answers to a prompt (reward models)."""

    PAIRS = "pairs"
    """A better and a worse answer (DPO)."""

    ANSWERS = "answers"
    """One answer, liked or not; of ranked ones the best is liked (KTO)."""


class Counting(StrEnum):
    """What a loss is averaged over."""

    PAIRS = "pairs"
    GROUPS = "groups"
    ANSWERS = "answers"


# -- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one answer to it."""

    ids: Ids
    """Token ids [T]: the prompt as served, the answer, the end token."""

    num_prompt: int
    """Tokens of the prompt."""


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, never cut apart (a `Unit`). K answers, P pairs."""

    sequences: tuple[TokenSequence, ...]
    """K of them, the best first where they are ranked."""

    better: Int64
    """Place of each pair's better answer in `sequences` [P]; answers of equal rank make no pair."""

    worse: Int64
    """Place of each pair's other answer [P]."""

    liked: npt.NDArray[np.bool_] | None
    """Whether an answer is a good one [K]. None: they are ranked."""

    domain: int
    """Number of the set's domain, as the caller counts them."""

    place: tuple[int, int]
    """Number of the data set and of the group in it: what names the group in this stage."""

    counting: Counting

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def num_targets(self) -> int:
        """What the group adds to the divisor of the loss."""
        match self.counting:
            case Counting.PAIRS:
                return len(self.better)
            case Counting.ANSWERS:
                return len(self.sequences)
            case Counting.GROUPS:
                return 1


def pairs_of(ranks: Sequence[int]) -> tuple[Int64, Int64]:
    """Return the places of the better and of the worse answer of every pair of different ranks [P], [P]."""
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
        """What became of the records: `records`, `groups`, `answersRead`, `answers` (kept), `pairs`, `ties` (pairs of
        equal rank, left out), `tokens`, and `GROUP_LOSSES`."""
        return self.shard.counts

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the model: every answer with the prompt in front of it."""
        return self.counts["tokens"]

    def __len__(self) -> int:
        return len(self.shard)

    def group(self, index: int, counting: Counting) -> Group:
        """Return the group number `index`."""
        values = self.shard.tokens[self.shard.offsets[index] : self.shard.offsets[index + 1]]
        num_answers, num_prompt = int(values[0]), int(values[1])
        lengths, marks = values[2 : 2 + 2 * num_answers].reshape(num_answers, 2).T.tolist()
        start = 2 + 2 * num_answers
        prompt = values[start : start + num_prompt]
        ends = start + num_prompt + np.cumsum(lengths)
        sequences = tuple(
            TokenSequence(np.concatenate([prompt, values[end - length : end]]), num_prompt)
            for end, length in zip(ends.tolist(), lengths, strict=True)
        )
        place = (self.number, index)
        if min(marks) < 0:
            nothing = np.empty(0, np.int64)
            liked = np.array(marks) == LIKED
            return Group(sequences, nothing, nothing, liked, self.domain, place, counting)
        return Group(sequences, *pairs_of(marks), None, self.domain, place, counting)

    def groups(self, counting: Counting) -> Iterator[Group]:
        """Yield all groups, in the order of the records."""
        return (self.group(index, counting) for index in range(len(self)))


def group_shard(
    context: StageContext,
    source: RecordSource,
    tokenizer: Any,
    sequence_length: int,
    grouping: Grouping,
    system: str | None = None,
    domain: int = 0,
    number: int = 0,
) -> GroupShard:
    """Return the preferences of a set as groups whose sequences have at most `sequence_length` tokens.

    Args:
        tokenizer: It carries the chat template.
        system: System prompt in front of every conversation, in place of its own. None: its own, if any.
        domain, number: Of the data set, handed on to the groups.

    Raises UserError naming a record that has no answers, has them judged in another way than `grouping` can use, or
    cannot be rendered.
    """
    key = {
        "kind": "groups",
        "layout": LAYOUT,
        **source_key(context, source),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": tokenizer.chat_template,
        "sequenceLength": sequence_length,
        "grouping": grouping.value,
        "system": system,
    }

    def build(writer: ShardWriter) -> Mapping[str, int]:
        encoder = GroupEncoder(tokenizer, sequence_length, grouping, system)
        for ids in encoder.encode(read_records(context, source)):
            writer.add(ids)
        return encoder.counts

    return GroupShard(token_shard(context, key, f"tokenise {source.label}", build), domain, number)


@dataclass(frozen=True)
class _Judged:
    """One encoded answer."""

    ids: Ids
    """The answer's own ids, its end included."""

    mark: int


class GroupEncoder:
    """Encodes preference records one after the other and counts what becomes of them, as `GroupShard.counts` says."""

    def __init__(self, tokenizer: Any, sequence_length: int, grouping: Grouping, system: str | None = None) -> None:
        self._encoder = ConversationEncoder(
            Encoder(tokenizer), Renderer(tokenizer), LAST_ANSWER, TooLong.FAIL, NO_LIMIT
        )
        self._capacity = sequence_length
        self._grouping = grouping
        self._system = None if system is None else Turn(Role.SYSTEM, system)
        self.counts: Counter[str] = Counter(groups=0, answers=0, tokens=0)

    def encode(self, records: Iterable[Record]) -> Iterator[Ids]:
        """Yield the groups of `records` as the shard holds them. Raises UserError as `group_shard` does."""
        remaining = iter(records)
        while batch := list(islice(remaining, BATCH_RECORDS)):
            kept = [self._take(record) for record in batch]
            asked = [self._said(record, answer) for record in kept for answer in record.answers]
            samples = list(self._encoder.encode(asked))
            if len(samples) != len(asked):
                raise UserError(f"{batch[0].where}: the chat template renders a prompt, or an answer, as nothing")
            encoded = iter(samples)
            for record in kept:
                yield from self._groups([(next(encoded), _mark(answer)) for answer in record.answers])

    # -- records -------------------------------------------------------------------------------------------------------

    def _take(self, record: Record) -> Record:
        """Return the record with the system prompt it is judged under, and without blank answers."""
        if not record.answers:
            raise UserError(
                f"{record.where}: {'a text' if record.is_text else 'a conversation'} where preferences are expected; "
                "give records with `chosen` and `rejected`, `completion_a` and `completion_b`, or ranked `answers`, or "
                "train on it in an `sft` or `pretrain` stage"
            )
        if self._grouping is not Grouping.ANSWERS and any(answer.rank is None for answer in record.answers):
            raise UserError(
                f"{record.where}: an answer that is liked or not, where answers to compare are expected; train on "
                "`labels` in a `dpo` stage with `loss: {kto: {}}`"
            )
        ranked = sorted(record.answers, key=lambda answer: answer.rank or 0)
        answers = tuple(answer for answer in ranked if answer.content.strip())
        self.counts["records"] += 1
        self.counts["answersRead"] += len(record.answers)
        self.counts["emptyAnswers"] += len(record.answers) - len(answers)
        return replace(record, messages=self._judged_under(record.messages), answers=answers)

    def _judged_under(self, messages: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self._system is None:
            return messages
        has_own = bool(messages) and messages[0].role is Role.SYSTEM
        return (self._system, *(messages[1:] if has_own else messages))

    def _said(self, record: Record, answer: Answer) -> Record:
        return replace(record, messages=(*record.messages, Turn(Role.ASSISTANT, answer.content)), answers=())

    # -- groups --------------------------------------------------------------------------------------------------------

    def _groups(self, encoded: Sequence[tuple[Any, int]]) -> Iterator[Ids]:
        """Yield the groups of one record. `encoded`: its answers as samples, with their marks, the best first."""
        kept: list[_Judged] = []
        prompt = np.empty(0, np.int32)
        for sample, mark in encoded:
            if len(sample.ids) > self._capacity:
                self.counts["tooLong"] += 1
                continue
            num_prompt = int(np.argmax(sample.trained))
            prompt, ids = sample.ids[:num_prompt], sample.ids[num_prompt:]
            if any(np.array_equal(ids, other.ids) for other in kept):
                self.counts["sameAnswers"] += 1
            else:
                kept.append(_Judged(ids, mark))
        for group in self._parted(kept):
            self.counts["groups"] += 1
            self.counts["tokens"] += sum(len(prompt) + len(answer.ids) for answer in group)
            yield _flat(prompt, group)

    def _parted(self, answers: list[_Judged]) -> list[list[_Judged]]:
        """Return the answers in groups; nothing where they cannot be compared."""
        if any(answer.mark < 0 for answer in answers):
            self.counts["answers"] += len(answers)
            return [[answer] for answer in answers]
        better, worse = pairs_of([answer.mark for answer in answers])
        self.counts["ties"] += len(answers) * (len(answers) - 1) // 2 - len(better)
        if not len(better):
            self.counts["fewAnswers"] += len(answers)
            return []
        self.counts["answers"] += len(answers)
        self.counts["pairs"] += len(better)
        match self._grouping:
            case Grouping.PROMPTS:
                return [answers]
            case Grouping.PAIRS:
                return [[answers[first], answers[second]] for first, second in zip(better, worse, strict=True)]
            case Grouping.ANSWERS:
                best = min(answer.mark for answer in answers)
                return [[replace(answer, mark=LIKED if answer.mark == best else DISLIKED)] for answer in answers]


def _mark(answer: Answer) -> int:
    if answer.rank is not None:
        return answer.rank
    return LIKED if answer.liked else DISLIKED


def _flat(prompt: Ids, answers: Sequence[_Judged]) -> Ids:
    header = [len(answers), len(prompt), *(value for answer in answers for value in (len(answer.ids), answer.mark))]
    return np.concatenate([np.array(header, np.int32), prompt, *(answer.ids for answer in answers)])


def check_group_losses(counts: Mapping[str, Mapping[str, int]], largest_share: float) -> None:
    """Raise UserError where more answers than `maxDroppedShare` are not trained on, or none is. `counts`: by set."""
    lost = sum(found.get(name, 0) for found in counts.values() for name in GROUP_LOSSES)
    kept = sum(found.get("answers", 0) for found in counts.values())
    reasons = "; ".join(f"{name}: {describe_groups(found)}" for name, found in counts.items())
    if kept == 0:
        raise UserError(f"data: no preference to learn from is left ({reasons})")
    share = lost / (kept + lost)
    if share > largest_share:
        raise UserError(
            f"data: {share:.1%} of the answers cannot be trained on, more than `maxDroppedShare` {largest_share:.1%} "
            f"({reasons}); raise `sequenceLength`, mend the data, or allow more"
        )


def measured_groups(shard: GroupShard, counting: Counting, max_tokens: int, name: str) -> list[Group]:
    """Return the groups of a held-out set from the first on, `max_tokens` in all, one at least.

    Raises UserError where there is none.
    """
    groups: list[Group] = []
    left = max_tokens
    for group in shard.groups(counting):
        if groups and group.num_tokens > left:
            break
        groups.append(group)
        left -= group.num_tokens
    if not groups:
        raise UserError(f"heldOut.sets: {name} holds no preference to measure ({describe_groups(shard.counts)})")
    return groups


def describe_groups(counts: Mapping[str, int]) -> str:
    """Return the counts of a set of preferences, for people."""
    names = ("records", "groups", "answersRead", "answers", *GROUP_LOSSES, "pairs", "ties")
    return ", ".join(f"{name} {counts[name]}" for name in names if counts.get(name))


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupUnits:
    """The groups of several sets, as one (`Units`)."""

    shards: tuple[GroupShard, ...]
    counting: Counting

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    def rows(self, numbers: Int64) -> list[Group]:
        """Return the groups of these numbers."""
        ends = np.cumsum([len(shard) for shard in self.shards])
        sets = np.searchsorted(ends, numbers, side="right").tolist()
        return [
            self.shards[index].group(int(number) - int(ends[index]) + len(self.shards[index]), self.counting)
            for index, number in zip(sets, numbers.tolist(), strict=True)
        ]


class GroupPlanner(Planner):
    """Plans steps of groups: `batch.samples` of them, or as many as make `batch.tokens` on average."""

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

    A budget or batch of samples counts groups, and the tokens are those of all answers with their prompts.
    Raises UserError for weights on some sets only, and for a set with weight and without groups.
    """
    settings = phase_settings(config, list(shards))
    planner = GroupPlanner(shards, counting, seed)
    return planner.plan(settings, config.schedule, config.optimizer.learning_rate)


# -- prompts alone -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Something for a policy to answer."""

    ids: Ids
    """Token ids [T], with the generation prompt: what a served model is given."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    where: str
    domain: str | None = None
    """What it is about, for reward models. None: of no domain."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a set."""

    prompts: tuple[Prompt, ...]
    counts: Mapping[str, int]
    """`records`, `prompts`, and what was left out: `tooLong`, `empty`."""


def prompt_records(context: Fetches, source: RecordSource) -> Iterator[Record]:
    """Yield conversations and preference records without their answers: turns of the model at the end are left out.

    Raises UserError for a text, which asks nothing.
    """
    for record in read_records(context, source):
        if record.is_text:
            raise UserError(
                f"{record.where}: a text where prompts are expected; give conversations or preferences, whose answers "
                "are left out"
            )
        turns = record.messages
        while turns and turns[-1].role in GENERATED:
            turns = turns[:-1]
        yield replace(record, messages=turns, answers=())


def read_prompts(
    context: Fetches, source: RecordSource, tokenizer: Any, max_tokens: int, domain: str | None = None
) -> PromptSet:
    """Return the prompts of a set that have at most `max_tokens` tokens. The tokenizer carries the chat template;
    `domain` is handed on to the prompts.

    Counts `empty` (nothing is asked) and `tooLong`. Raises UserError for a record that cannot be rendered.
    """
    counts = Counter(records=0, prompts=0, tooLong=0, empty=0)
    encoder, renderer = Encoder(tokenizer), Renderer(tokenizer)
    prompts: list[Prompt] = []
    remaining = prompt_records(context, source)
    while batch := list(islice(remaining, BATCH_RECORDS)):
        asked = [conversation_of(record) for record in batch if _asks(record)]
        counts.update(records=len(batch), empty=len(batch) - len(asked))
        texts = [_rendered(renderer, conversation) for conversation in asked]
        for conversation, ids in zip(asked, encoder.prompts(texts), strict=True):
            if len(ids) > max_tokens:
                counts["tooLong"] += 1
            else:
                prompts.append(Prompt(ids, conversation.messages, conversation.tools, conversation.where, domain))
    counts["prompts"] = len(prompts)
    return PromptSet(tuple(prompts), counts)


def _asks(record: Record) -> bool:
    return any((turn.content + turn.input).strip() for turn in record.messages if turn.role is not Role.SYSTEM)


def _rendered(renderer: Renderer, conversation: Conversation) -> str:
    try:
        return renderer.render(conversation.messages, conversation.tools, add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"{conversation.where}: {error}") from error
