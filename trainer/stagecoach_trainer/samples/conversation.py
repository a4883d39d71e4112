"""Encode conversations as token ids with a mask of the tokens that carry loss.

For every trained turn, the ids before its first trained token are the ids that `apply_chat_template` gives for the
conversation so far with the generation prompt. A tokenizer may encode an earlier answer differently once more text
surrounds it; in that case the sample ends, and the turn begins a new sample with its prompt encoded as served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from stagecoach_api.conversation import Loss, Role, TooLong, Turns
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.records import Record, as_message, require_no_answers
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import Message, Renderer, TrainedTurn, parse_tools

BATCH_RECORDS = 256

LAST_ANSWER = Loss(roles=(Role.ASSISTANT,), turns=Turns.LAST)

NO_LIMIT = 1 << 62
"""Sequence length of an encoder that never shortens a sample."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sample:
    """A sequence to train on."""

    ids: Ids
    """Token ids [T]."""

    trained: Mask
    """Whether token t carries loss [T]."""

    characters: int
    """Number of characters that carry loss."""

    @property
    def has_loss(self) -> bool:
        """Whether any trained token can be predicted, which the first token of a sequence cannot."""
        return bool(self.trained[1:].any())


@dataclass(frozen=True)
class Conversation:
    """A record in the form that chat templates read."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    where: str


class ConversationEncoder:
    """Encodes records one by one and counts the results.

    Counts: `records`, `samples`, `tokens`, `trainedTokens`; `extraSamples` (turns that had to begin a new sample so
    that their prompt is encoded as served), `splitRecords`; dropped or shortened samples: `tooLong` (dropped), `cut`,
    `noLoss` (no token carries loss); `spelledTokens` (records whose text spells a special token, such as `</s>`) and
    `unreadNames` (records with a participant's name that the template does not render).
    """

    def __init__(
        self, encoder: Encoder, renderer: Renderer, loss: Loss, too_long: TooLong, sequence_length: int
    ) -> None:
        self._encoder = encoder
        self._renderer = renderer
        self._loss = loss
        self._too_long = too_long
        self._capacity = sequence_length
        self.counts: Counter[str] = Counter()

    def encode(self, records: Iterable[Record]) -> Iterator[Sample]:
        """Yield the samples of `records`, in order.

        Raises UserError naming a record that the template cannot render, that is a preference record, or, under
        `tooLong: fail`, that is too long.
        """
        remaining = iter(records)
        while batch := list(islice(remaining, BATCH_RECORDS)):
            self.counts["records"] += len(batch)
            for samples in self._encode_batch(batch):
                yield from self._count(samples)

    def _encode_batch(self, batch: Sequence[Record]) -> list[list[Sample]]:
        """Return the samples of each record; none for a record that is dropped."""
        conversations = [conversation_of(require_no_answers(record)) for record in batch if record.text is None]
        self._count_oddities(batch, conversations)
        chains = iter(self._chains(conversations))
        texts = iter(self._encoder.documents([record.text for record in batch if record.text is not None]))
        return [self._text(record, next(texts)) if record.text is not None else next(chains) for record in batch]

    def _count_oddities(self, batch: Sequence[Record], conversations: Sequence[Conversation]) -> None:
        """Count what is trained in a way that its author may not expect."""
        spelled = sum(any(map(self._renderer.spells_special, each.messages)) for each in conversations)
        spelled += sum(record.text is not None and self._renderer.spells_special(record.text) for record in batch)
        if spelled:
            self.counts["spelledTokens"] += spelled

    def _count_unread_names(
        self, conversations: Sequence[Conversation], turns: Sequence[Sequence[TrainedTurn]]
    ) -> None:
        for conversation, trained in zip(conversations, turns, strict=True):
            # The name of a tool repeats that of its call, so templates may leave it out.
            said = [each["name"] for each in conversation.messages if "name" in each and each["role"] != Role.TOOL]
            if said and trained and any(name not in trained[-1].prompt + trained[-1].answer for name in said):
                self.counts["unreadNames"] += 1

    def _count(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if not sample.has_loss:
                self.counts["noLoss"] += 1
                continue
            self.counts["samples"] += 1
            self.counts["tokens"] += len(sample.ids)
            # The first token of a sequence is not predicted, so it has no loss.
            self.counts["trainedTokens"] += int(np.count_nonzero(sample.trained[1:]))
            yield sample

    # -- plain text ----------------------------------------------------------------------------------------------------

    def _text(self, record: Record, ids: Ids) -> list[Sample]:
        """Return the samples of a plain text, in which every token carries loss."""
        text = record.text or ""
        whole = document(self._encoder, ids)
        sample = Sample(whole, np.ones(len(whole), np.bool_), len(text))
        if len(whole) <= self._capacity:
            return [sample]
        if self._too_long is TooLong.SPLIT:
            self.counts["splitRecords"] += 1
            # Characters of a piece are estimated by its share of the tokens: pieces may begin inside a character.
            share = len(text) / len(whole)
            pieces = [whole[start : start + self._capacity] for start in range(0, len(whole), self._capacity)]
            return [Sample(piece, np.ones(len(piece), np.bool_), round(len(piece) * share)) for piece in pieces]
        return self._shorten([sample], record.where)

    # -- conversations -------------------------------------------------------------------------------------------------

    def _chains(self, conversations: Sequence[Conversation]) -> list[list[Sample]]:
        """Return the samples of each conversation, none longer than the sequence length."""
        return [
            self._fit(conversation, samples)
            for conversation, samples in zip(conversations, self._encode_whole(conversations), strict=True)
        ]

    def _fit(self, conversation: Conversation, samples: list[Sample]) -> list[Sample]:
        if not samples:
            self.counts["noLoss"] += 1
            return []
        self.counts["extraSamples"] += len(samples) - 1
        if self._fits(samples):
            return samples
        if self._too_long is TooLong.SPLIT:
            self.counts["splitRecords"] += 1
            return self._split(conversation)
        return self._shorten(samples, conversation.where)

    def _fits(self, samples: Sequence[Sample]) -> bool:
        return all(len(sample.ids) <= self._capacity for sample in samples)

    def _shorten(self, samples: Sequence[Sample], where: str) -> list[Sample]:
        kept: list[Sample] = []
        for sample in samples:
            if len(sample.ids) <= self._capacity:
                kept.append(sample)
            elif self._too_long is TooLong.FAIL:
                raise UserError(
                    f"{where}: {len(sample.ids)} tokens do not fit `sequenceLength` {self._capacity}; raise it, or set "
                    "`tooLong` to split, drop or cut"
                )
            elif self._too_long is TooLong.CUT:
                self.counts["cut"] += 1
                kept.append(self._cut(sample))
            else:
                self.counts["tooLong"] += 1
        return kept

    def _cut(self, sample: Sample) -> Sample:
        trained = sample.trained[: self._capacity]
        share = int(np.count_nonzero(trained)) / max(1, int(np.count_nonzero(sample.trained)))
        return Sample(sample.ids[: self._capacity], trained, round(sample.characters * share))

    def _split(self, conversation: Conversation) -> list[Sample]:
        """Split a conversation into samples of whole exchanges, each with the system prompt.

        An exchange is a user's turn and the turns up to the next one; an exchange that does not fit alone is dropped
        and counted.
        """
        system, exchanges = exchanges_of(conversation.messages)
        if self._loss.turns is Turns.LAST:
            return self._last_exchanges(conversation, system, exchanges)
        samples: list[Sample] = []
        start = 0
        while start < len(exchanges):
            stop, best = start, list[Sample]()
            # Lengths are known only after encoding: markers and template text depend on the turns in the sample.
            while stop < len(exchanges):
                tried = self._piece(conversation, system, exchanges[start : stop + 1])
                if not self._fits(tried):
                    break
                stop, best = stop + 1, tried
            if stop == start:
                self.counts["tooLong"] += 1
                stop = start + 1
            samples += best
            start = stop
        return samples

    def _last_exchanges(
        self, conversation: Conversation, system: list[Message], exchanges: list[list[Message]]
    ) -> list[Sample]:
        """Return the samples of the last turn with as many preceding exchanges as fit."""
        # From the longest context to the shortest; the first that fits is the longest.
        for start in range(len(exchanges)):
            samples = self._piece(conversation, system, exchanges[start:])
            if samples and self._fits(samples):
                return samples
        self.counts["tooLong"] += 1
        return []

    def _piece(self, conversation: Conversation, system: list[Message], exchanges: list[list[Message]]) -> list[Sample]:
        messages = (*system, *(message for exchange in exchanges for message in exchange))
        return self._encode_whole([Conversation(messages, conversation.tools, conversation.where)])[0]

    # -- encoding ------------------------------------------------------------------------------------------------------

    def _encode_whole(self, conversations: Sequence[Conversation]) -> list[list[Sample]]:
        """Return the samples of each conversation, of any length."""
        turns = [self._trained_turns(conversation) for conversation in conversations]
        self._count_unread_names(conversations, turns)
        # All turns are encoded at once, because the tokenizer encodes a batch in parallel.
        flat = [turn for trained in turns for turn in trained]
        prompts = self._encoder.prompts([turn.prompt for turn in flat])
        answers = self._answers(flat)
        encoded = iter(zip(flat, prompts, answers, strict=True))
        return [self._chain([next(encoded) for _ in trained]) for trained in turns]

    def _trained_turns(self, conversation: Conversation) -> list[TrainedTurn]:
        try:
            return self._renderer.trained_turns(conversation.messages, self._loss, conversation.tools)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error

    def _answers(self, turns: Sequence[TrainedTurn]) -> list[Ids]:
        """Encode the text to generate. Special tokens that the template writes are recognised, those that a record's
        author spells never are."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        plain = iter(self._encoder.continuations([piece.text for piece in pieces if piece.is_plain]))
        others = [piece.text for piece in pieces if not piece.is_plain]
        written = iter(self._encoder.continuations(others, parse_special=True))
        answers = []
        for turn in turns:
            end = [] if turn.end is None else [np.array([self._encoder.id_of(turn.end)], np.int32)]
            ids = [next(plain if piece.is_plain else written) for piece in turn.pieces]
            answers.append(np.concatenate([np.empty(0, np.int32), *ids, *end]).astype(np.int32))
        return answers

    def _chain(self, turns: Sequence[tuple[TrainedTurn, Ids, Ids]]) -> list[Sample]:
        """Join turns into as few samples as their served prompts allow."""
        samples: list[Sample] = []
        for turn, prompt, answer in turns:
            last = samples[-1] if samples else None
            mask, characters = np.zeros(len(prompt), np.bool_), 0
            # The turn continues the last sample only if its served prompt begins with that sample's very ids.
            if last is not None and np.array_equal(prompt[: len(last.ids)], last.ids):
                mask[: len(last.ids)] = last.trained
                characters = last.characters
                samples.pop()
            ids = np.concatenate([prompt, answer])
            trained = np.concatenate([mask, np.ones(len(answer), np.bool_)])
            samples.append(Sample(ids, trained, characters + turn.num_characters))
        return samples


class LastAnswerEncoder(ConversationEncoder):
    """Encodes conversations with loss on the last answer only, whatever a turn's own mark, and never cuts a sample."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(Encoder(tokenizer), Renderer(tokenizer), LAST_ANSWER, TooLong.FAIL, NO_LIMIT)

    def _trained_turns(self, conversation: Conversation) -> list[TrainedTurn]:
        return super()._trained_turns(replace(conversation, messages=without_marks(conversation.messages)))

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Return the one sample of each conversation. Raises UserError as `encode` does."""
        return [samples[-1] for samples in self._encode_whole(conversations)]


def without_marks(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages without their own marks of whether they are trained."""
    return tuple({key: value for key, value in message.items() if key != "trained"} for message in messages)


def conversation_of(record: Record) -> Conversation:
    """Return a record's turns in the form that chat templates read. Raises UserError for malformed tools."""
    try:
        tools = parse_tools(record.tools) or []
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error
    return Conversation(tuple(map(as_message, record.messages)), tuple(tools), record.where)


def document(encoder: Encoder, ids: Ids) -> Ids:
    """Return a document as LLaMA reads it: the BOS token, the text, the EOS token."""
    front = [] if encoder.bos is None else [encoder.bos]
    back = [] if encoder.eos is None else [encoder.eos]
    return np.concatenate([np.array(front, np.int32), ids, np.array(back, np.int32)]).astype(np.int32)


def exchanges_of(
    messages: Sequence[Message],
) -> tuple[list[Message], list[list[Message]]]:
    """Return the system message, if any, and the exchanges, each from a user's turn up to the next."""
    has_system = bool(messages) and messages[0]["role"] == Role.SYSTEM.value
    system = list(messages[:1]) if has_system else []
    exchanges: list[list[Message]] = []
    for message in messages[len(system) :]:
        if message["role"] == Role.USER.value or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return system, exchanges
