"""Preference records as token groups: the answers to one prompt, and which of them is the better one.

Prompt and answer are encoded as `ConversationEncoder` encodes the last turn of a conversation: the prompt's ids are
those that `apply_chat_template` gives with the generation prompt, the answer's end with the end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np

from stagecoach_api.conversation import Role
from stagecoach_api.references import RecordSource
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Answer, Record, Turn
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import last_answer_encoder
from stagecoach_trainer.samples.datasets import source_key, tokenizer_digest
from stagecoach_trainer.samples.groups import DISLIKED, LIKED, GroupShard, pairs_of
from stagecoach_trainer.samples.token_cache import TokenShardWriter, token_shard

LAYOUT = 1
"""Raised when the layout of a group in a shard changes."""

BATCH_RECORDS = 64


class Grouping(StrEnum):
    """What a group is made of."""

    PROMPTS = "prompts"
    """All answers to a prompt (reward models)."""

    PAIRS = "pairs"
    """A better and a worse answer (DPO)."""

    ANSWERS = "answers"
    """One answer, liked or not; of ranked ones the best is liked (KTO)."""


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

    def build(writer: TokenShardWriter) -> Mapping[str, int]:
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
        self._encoder = last_answer_encoder(tokenizer)
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
