"""Ranked answers as samples for `sft`: chains of hindsight, or the best answer alone.

A chain (arXiv 2302.02676) is one sequence: the prompt as served, then, from the worst answer to the best, a feedback
text and the answer. The answers and the end of the best one carry loss, the prompt and the feedback never do:

    prompt | bad feedback ⏎ | worst answer | ⏎ bad feedback ⏎ | … | ⏎ good feedback ⏎ | best answer end
           |  no loss       |  loss        |  no loss         |   |  no loss          | loss

At inference, the good feedback directly follows the prompt, which it does in no chain of several answers. So each chain
is accompanied by its last link as a separate sample, the prompt, the good feedback and the best answer: the ids before
that answer are the served ones. (The paper's authors, too, train on both chains and single answers.)
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stagecoach_api.conversation import Loss, Role, TooLong
from stagecoach_api.kinds.sft import Feedback, Hindsight, HindsightMode
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.records import Answer, Record, Turn
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import (
    LAST_ANSWER,
    Conversation,
    ConversationEncoder,
    Sample,
    conversation_of,
    without_marks,
)
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import Message, Renderer, message_of

PROBE = "\u2042"
"""Placeholder for an answer, rendered to find the template's text around it; occurs in no template."""

SAME_ANSWERS = "sameAnswers"

COUNTS = (
    "chains", "chainedAnswers", "bestAnswers", "shortenedChains",
    "tiedAnswers", "emptyAnswers", "repeatedAnswers", SAME_ANSWERS,
)  # fmt: skip
"""Names of the counts that `HindsightEncoder` adds to those of `ConversationEncoder`."""


# -- ranking -----------------------------------------------------------------------------------------------------------


def distinct_answers(record: Record, counts: Counter[str]) -> list[tuple[int, Answer]]:
    """Return the ranks and answers of a preference record, best first, without empty ones (`emptyAnswers`) and
    without repetitions of a better one (`repeatedAnswers`).

    Raises UserError for answers without a rank.
    """
    kept: list[tuple[int, Answer]] = []
    # `sorted` is stable, so that answers of equal rank keep the record's order.
    for answer in sorted(record.answers, key=lambda answer: answer.rank or 0):
        if answer.rank is None:
            raise UserError(
                f"{record.where}: an answer judged as good or bad, where ranked ones are expected; `hindsight` takes "
                "`pairs`, `comparison` and `ranked` records; a `dpo` stage trains on `labels` (`loss: kto`)"
            )
        if answer.is_blank:
            counts["emptyAnswers"] += 1
        elif any(answer.turn == other.turn for _, other in kept):
            counts["repeatedAnswers"] += 1
        else:
            kept.append((answer.rank, answer))
    return kept


def answers_to_chain(record: Record, counts: Counter[str]) -> tuple[str, ...]:
    """Return the answers of a preference record from worst to best, of equal ranks the first one (`tiedAnswers`).

    Empty if fewer than two are left, so that none is better than another (`sameAnswers`).
    Raises UserError for an answer with reasoning or calls, which have no place after the feedback.
    """
    kept: dict[int, str] = {}
    for rank, answer in distinct_answers(record, counts):
        if answer.reasoning or answer.calls:
            raise UserError(
                f"{record.where}: an answer has {'tool calls' if answer.calls else 'reasoning'}, for which a chain of "
                "hindsight has no place; set `hindsight.mode: best`, or train on the record in a `dpo` stage"
            )
        if rank in kept:
            counts["tiedAnswers"] += 1
        else:
            kept[rank] = answer.content
    if len(kept) < 2:
        counts[SAME_ANSWERS] += 1
        return ()
    return tuple(reversed(kept.values()))


def best_answer(record: Record, counts: Counter[str]) -> Record | None:
    """Return the conversation of a preference record's prompt and best answer, of several best ones the first.

    None if fewer than two answers differ, so that nothing was compared (`sameAnswers`).
    """
    kept = distinct_answers(record, counts)
    if len(kept) < 2:
        counts[SAME_ANSWERS] += 1
        return None
    counts["bestAnswers"] += 1
    return replace(record, messages=(*record.messages, kept[0][1].turn), answers=())


def choose_feedback(feedback: Sequence[Feedback], seed: int, record: Record) -> Feedback:
    """Return a random member of `feedback`: a pure function of the seed and the record's content, so that its position
    and its file's name do not matter."""
    content = [
        [[turn.role.value, turn.content, turn.input, *_more_of(turn)] for turn in record.messages],
        record.tools,
        [[answer.rank, answer.content] for answer in record.answers],
    ]
    digest = hashlib.sha256(json.dumps([seed, content], ensure_ascii=False).encode()).digest()
    # 64 bits, so that the remainder's bias is negligible.
    return feedback[int.from_bytes(digest[:8]) % len(feedback)]


def _more_of(turn: Turn) -> list[Any]:
    """Return a turn's reasoning and calls; nothing if it has none, so that plain turns keep their digest."""
    calls = [[call.name, call.arguments] for call in turn.calls]
    return [turn.reasoning, calls] if turn.reasoning or calls else []


def check_feedback(feedback: Sequence[Feedback]) -> None:
    """Raise UserError for feedback texts that do not distinguish good from bad answers."""
    for index, pair in enumerate(feedback):
        good, bad = pair.good.strip(), pair.bad.strip()
        if not good or not bad or good == bad:
            raise UserError(
                f"hindsight.feedback[{index}]: `good` {pair.good!r} and `bad` {pair.bad!r} must be different texts, "
                "neither of them empty"
            )


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerFrame:
    """Text around an answer in a rendered conversation."""

    prompt: str
    """The conversation so far with the generation prompt, and the template's text before an answer."""

    after: str
    """The template's text between an answer and the end token."""

    end: str
    """The end token."""


def answer_frame(renderer: Renderer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> AnswerFrame:
    """Return the text around an answer to `messages`. Raises UserError if the template does not render the answer."""
    # Only the template determines the text around an answer, so a placeholder is rendered and located.
    answered = [*without_marks(messages), message_of(Role.ASSISTANT, PROBE)]
    [turn] = renderer.trained_turns(answered, LAST_ANSWER, tools)
    before, probe, after = turn.answer.partition(PROBE)
    if not probe or turn.end is None:
        raise UserError("the chat template does not render the assistant's content; write {{ message['content'] }}")
    return AnswerFrame(turn.prompt + before, after, turn.end)


def lead_in(feedback: str) -> str:
    """Return feedback text as it appears directly in front of an answer.

    A model trained on chains is asked for an answer of that kind with `answer_frame(…).prompt + lead_in(feedback)`.
    `apply_chat_template` renders the same text from a last assistant turn of `feedback` and a newline, with
    `continue_final_message=True`; OpenAI-compatible servers take that turn as a prefill.
    """
    return f"{feedback}\n"


# -- samples -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A preference record, ready to be encoded."""

    frame: AnswerFrame
    feedback: Feedback
    answers: tuple[str, ...]
    """From worst to best; at least two."""
    where: str


@dataclass(frozen=True)
class EncodedChain:
    """The parts of a chain as token ids."""

    prompt_bad: Ids
    """The prompt and bad feedback, before the first answer."""
    prompt_good: Ids
    bad: Ids
    """Bad feedback between two answers."""
    good: Ids
    end: Ids
    answers: tuple[Ids, ...]

    def ids_and_mask(self, num_answers: int) -> tuple[Ids, list[bool]]:
        """Return the chain of the best `num_answers` answers: token ids [T], and whether each carries loss [T]."""
        *others, best = self.answers[-num_answers:]
        # Before the first answer, feedback is encoded together with the prompt, as it is served. Only the best answer
        # has an end: after the others, the text continues.
        parts: list[tuple[Ids, bool]] = []
        for index, answer in enumerate(others):
            parts += [(self.bad if index else self.prompt_bad, False), (answer, True)]
        parts += [(self.good if others else self.prompt_good, False), (best, True), (self.end, True)]
        ids = np.concatenate([part for part, _ in parts]).astype(np.int32)
        return ids, [trained for part, trained in parts for _ in part]


class HindsightEncoder(ConversationEncoder):
    """Encodes preference records as `hindsight` sets, and all other records as `ConversationEncoder` does.

    Additional counts: `bestAnswers` (records that became a conversation); `chains` and `chainedAnswers` (sequences of
    several answers, and the answers in them), `shortenedChains` (chains whose worst answers did not fit
    `sequenceLength`); left out: `tiedAnswers`, `emptyAnswers`, `repeatedAnswers`, and whole records without two
    answers of different rank, `sameAnswers`.
    """

    def __init__(
        self,
        encoder: Encoder,
        renderer: Renderer,
        loss: Loss,
        too_long: TooLong,
        sequence_length: int,
        hindsight: Hindsight,
        seed: int,
        with_last_links: bool = True,
    ) -> None:
        """`seed`: selects feedback. `with_last_links`: whether each chain is accompanied by its last link.

        Raises UserError for feedback that does not distinguish good from bad answers.
        """
        super().__init__(encoder, renderer, loss, too_long, sequence_length)
        if hindsight.mode is HindsightMode.CHAIN:
            check_feedback(hindsight.feedback)
        self._hindsight = hindsight
        self._seed = seed
        self._with_last_links = with_last_links

    def _encode_batch(self, batch: Sequence[Record]) -> list[list[Sample]]:
        if self._hindsight.mode is HindsightMode.BEST:
            best = [best_answer(record, self.counts) if record.answers else record for record in batch]
            return super()._encode_batch([record for record in best if record is not None])
        others = iter(super()._encode_batch([record for record in batch if not record.answers]))
        chained = iter(self._encode_chains([record for record in batch if record.answers]))
        return [next(chained if record.answers else others) for record in batch]

    def _encode_chains(self, records: Sequence[Record]) -> list[list[Sample]]:
        """Return the samples of each preference record; none for one that is dropped."""
        chains = [self._chain_of(record) for record in records]
        encoded = iter(self._encoded([chain for chain in chains if chain is not None]))
        return [[] if chain is None else self._samples(chain, next(encoded)) for chain in chains]

    def _chain_of(self, record: Record) -> Chain | None:
        answers = answers_to_chain(record, self.counts)
        if not answers:
            return None
        conversation = conversation_of(record)
        return Chain(
            frame=self._frame_of(conversation),
            feedback=choose_feedback(self._hindsight.feedback, self._seed, record),
            answers=answers,
            where=record.where,
        )

    def _frame_of(self, conversation: Conversation) -> AnswerFrame:
        try:
            return answer_frame(self._renderer, conversation.messages, conversation.tools)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error

    def _encoded(self, chains: Sequence[Chain]) -> list[EncodedChain]:
        """Encode all parts at once. Special tokens are recognised in prompts, as by a server, and in no answer."""
        prompts: list[str] = []
        markers: list[str] = []
        for chain in chains:
            bad, good = lead_in(chain.feedback.bad), lead_in(chain.feedback.good)
            prompts += [chain.frame.prompt + bad, chain.frame.prompt + good]
            markers += [f"\n{bad}", f"\n{good}", chain.frame.after]
        # Parts are encoded separately, so that the ids at the boundaries do not depend on the length of the chain.
        beginnings = iter(self._encoder.prompts(prompts))
        between = iter(self._encoder.continuations(markers, parse_special=True))
        contents = iter(self._encoder.continuations([answer for chain in chains for answer in chain.answers]))
        # The iterators must be consumed in the order in which the texts were listed above.
        return [
            EncodedChain(
                prompt_bad=next(beginnings),
                prompt_good=next(beginnings),
                bad=next(between),
                good=next(between),
                end=np.append(next(between), self._encoder.id_of(chain.frame.end)).astype(np.int32),
                answers=tuple(next(contents) for _ in chain.answers),
            )
            for chain in chains
        ]

    def _samples(self, chain: Chain, encoded: EncodedChain) -> list[Sample]:
        """Return the longest chain that fits, if any, and its last link."""
        last_link = self._sample(chain, encoded, 1)
        # The worst answers are dropped first: a chain must end with its best answer.
        for num_answers in range(len(chain.answers), 1, -1):
            whole = self._sample(chain, encoded, num_answers)
            if len(whole.ids) <= self._capacity:
                self.counts.update(chains=1, chainedAnswers=num_answers)
                self.counts["shortenedChains"] += num_answers < len(chain.answers)
                kept = [last_link] if self._with_last_links else []
                return [whole, *self._shorten(kept, chain.where)]
        kept = self._shorten([last_link], chain.where)
        self.counts["shortenedChains"] += len(kept)
        return kept

    def _sample(self, chain: Chain, encoded: EncodedChain, num_answers: int) -> Sample:
        ids, mask = encoded.ids_and_mask(num_answers)
        return Sample(ids, np.array(mask, np.bool_), sum(map(len, chain.answers[-num_answers:])))
