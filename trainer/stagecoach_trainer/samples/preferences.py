"""Encode preference records as token groups: the answers to one prompt with their marks.

Prompt and answer are encoded as `ConversationEncoder` encodes the last turn of a conversation: the prompt's ids are
those that `apply_chat_template` gives with the generation prompt, and the answer's ids end with the end token.
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
from stagecoach_trainer.data.notes import warn_of_notes
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Answer, Record, Turn
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import LastAnswerEncoder
from stagecoach_trainer.samples.datasets import RENDERING, source_key, tokenizer_digest
from stagecoach_trainer.samples.groups import DISLIKED, LIKED, GroupShard, pairs_of
from stagecoach_trainer.samples.token_cache import TokenShardWriter, token_shard

LAYOUT = 1
"""Version of the layout of groups in shards; increase it when the layout changes."""

BATCH_RECORDS = 64


class Grouping(StrEnum):
    """Answers that form a group."""

    PROMPTS = "prompts"
    """All answers to a prompt (reward models)."""

    PAIRS = "pairs"
    """A better and a worse answer (DPO)."""

    ANSWERS = "answers"
    """One answer, good or bad; of ranked answers, the best are good (KTO)."""


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
        tokenizer: A tokenizer with the chat template.
        system: System prompt that replaces that of every conversation. If it is None, each keeps its own, if any.
        domain, number: Numbers of the domain and the data set, assigned to the groups.

    Raises UserError naming a record that has no answers, whose judgements `grouping` cannot use, or that cannot be
    rendered.
    """
    key = {
        "kind": "groups",
        "layout": LAYOUT,
        **source_key(context, source),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": tokenizer.chat_template,
        "rendering": RENDERING,
        "sequenceLength": sequence_length,
        "grouping": grouping.value,
        "system": system,
    }

    def build(writer: TokenShardWriter) -> Mapping[str, int]:
        encoder = GroupEncoder(tokenizer, sequence_length, grouping, system)
        for ids in encoder.encode(read_records(context, source, encoder.counts)):
            writer.add(ids)
        return encoder.counts

    shard = token_shard(context, key, f"tokenise {source.label}", build)
    warn_of_notes(context.progress.warn, shard.counts, source.label)
    return GroupShard(shard, domain, number)


@dataclass(frozen=True)
class _EncodedAnswer:
    """An encoded answer with its mark."""

    ids: Ids
    """The answer's ids, without the prompt, including the end token."""

    mark: int


class GroupEncoder:
    """Encodes preference records one by one, with the counts that `GroupShard.counts` lists."""

    def __init__(self, tokenizer: Any, sequence_length: int, grouping: Grouping, system: str | None = None) -> None:
        self._encoder = LastAnswerEncoder(tokenizer)
        self._capacity = sequence_length
        self._grouping = grouping
        self._system = None if system is None else Turn(Role.SYSTEM, system)
        self.counts: Counter[str] = Counter(groups=0, answers=0, tokens=0)

    def encode(self, records: Iterable[Record]) -> Iterator[Ids]:
        """Yield the groups of `records` in the layout of shards. Raises UserError as `group_shard` does."""
        remaining = iter(records)
        while batch := list(islice(remaining, BATCH_RECORDS)):
            kept = [self._prepared(record) for record in batch]
            conversations = [self._answered(record, answer) for record in kept for answer in record.answers]
            samples = list(self._encoder.encode(conversations))
            if spelled := self._encoder.counts["spelledTokens"]:
                self.counts["spelledTokens"] = spelled
            # The encoder skips samples without loss; then answers could not be assigned to their records.
            if len(samples) != len(conversations):
                raise UserError(f"{batch[0].where}: the chat template renders a prompt, or an answer, as nothing")
            encoded = iter(samples)
            for record in kept:
                yield from self._groups([(next(encoded), _mark(answer)) for answer in record.answers])

    # -- records -------------------------------------------------------------------------------------------------------

    def _prepared(self, record: Record) -> Record:
        """Return the record with the configured system prompt and without blank answers, best answer first."""
        if not record.answers:
            raise UserError(
                f"{record.where}: {'a text' if record.is_text else 'a conversation'} where preferences are expected; "
                "give records with `chosen` and `rejected`, `completion_a` and `completion_b`, or ranked `answers`, or "
                "train on it in an `sft` or `pretrain` stage"
            )
        if self._grouping is not Grouping.ANSWERS and any(answer.rank is None for answer in record.answers):
            raise UserError(
                f"{record.where}: an answer judged as good or bad, where answers to compare are expected; train on "
                "`labels` in a `dpo` stage with `loss: {kto: {}}`"
            )
        ranked = sorted(record.answers, key=lambda answer: answer.rank or 0)
        answers = tuple(answer for answer in ranked if not answer.is_blank)
        self.counts["records"] += 1
        self.counts["answersRead"] += len(record.answers)
        self.counts["emptyAnswers"] += len(record.answers) - len(answers)
        return replace(record, messages=self._with_system(record.messages), answers=answers)

    def _with_system(self, messages: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self._system is None:
            return messages
        has_own = bool(messages) and messages[0].role is Role.SYSTEM
        return (self._system, *(messages[1:] if has_own else messages))

    def _answered(self, record: Record, answer: Answer) -> Record:
        return replace(record, messages=(*record.messages, answer.turn), answers=())

    # -- groups --------------------------------------------------------------------------------------------------------

    def _groups(self, encoded: Sequence[tuple[Any, int]]) -> Iterator[Ids]:
        """Yield the groups of one record. `encoded`: its answers as samples with their marks, best first."""
        kept: list[_EncodedAnswer] = []
        prompt = np.empty(0, np.int32)
        for sample, mark in encoded:
            if len(sample.ids) > self._capacity:
                self.counts["tooLong"] += 1
                continue
            num_prompt = int(np.argmax(sample.trained))  # the first token with loss begins the answer
            prompt, ids = sample.ids[:num_prompt], sample.ids[num_prompt:]
            if any(np.array_equal(ids, other.ids) for other in kept):
                self.counts["sameAnswers"] += 1
            else:
                kept.append(_EncodedAnswer(ids, mark))
        for group in self._grouped(kept):
            self.counts["groups"] += 1
            self.counts["tokens"] += sum(len(prompt) + len(answer.ids) for answer in group)
            yield _flat(prompt, group)

    def _grouped(self, answers: list[_EncodedAnswer]) -> list[list[_EncodedAnswer]]:
        """Return the answers in groups; none if they cannot be compared."""
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


def _flat(prompt: Ids, answers: Sequence[_EncodedAnswer]) -> Ids:
    header = [len(answers), len(prompt), *(value for answer in answers for value in (len(answer.ids), answer.mark))]
    return np.concatenate([np.array(header, np.int32), prompt, *(answer.ids for answer in answers)])
