"""Prompts without answers, for a policy to answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.references import RecordSource
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.notes import Notes
from stagecoach_trainer.data.reading import Fetches, read_records
from stagecoach_trainer.data.records import Record
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import Conversation, conversation_of
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import GENERATED, Message, Renderer

BATCH_RECORDS = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt for a policy to answer."""

    ids: Ids
    """Token ids [T] with the generation prompt, as a served model receives them."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    where: str
    domain: str | None = None
    """Domain for reward models, if any."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a set."""

    prompts: tuple[Prompt, ...]
    counts: Mapping[str, int]
    """`records`, `prompts`, and the records left out: `tooLong`, `empty`."""


def prompt_records(context: Fetches, source: RecordSource, notes: Notes | None = None) -> Iterator[Record]:
    """Yield conversations and preference records without answers, removing generated turns at the end.

    Raises UserError for a text, which has no prompt.
    """
    for record in read_records(context, source, notes):
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
    """Return the prompts of a set that have at most `max_tokens` tokens.

    The tokenizer has the chat template; `domain` is assigned to the prompts. Counts `empty` (no turn but the system's
    has text) and `tooLong`. Raises UserError for a record that cannot be rendered.
    """
    counts = Counter(records=0, prompts=0, tooLong=0, empty=0)
    encoder, renderer = Encoder(tokenizer), Renderer(tokenizer)
    prompts: list[Prompt] = []
    remaining = prompt_records(context, source, counts)
    while batch := list(islice(remaining, BATCH_RECORDS)):
        conversations = [conversation_of(record) for record in batch if _has_prompt(record)]
        counts.update(records=len(batch), empty=len(batch) - len(conversations))
        texts = [_rendered(renderer, conversation) for conversation in conversations]
        for conversation, ids in zip(conversations, encoder.prompts(texts), strict=True):
            if len(ids) > max_tokens:
                counts["tooLong"] += 1
            else:
                prompts.append(Prompt(ids, conversation.messages, conversation.tools, conversation.where, domain))
    counts["prompts"] = len(prompts)
    return PromptSet(tuple(prompts), counts)


def _has_prompt(record: Record) -> bool:
    return any(
        turn.calls or (turn.content + turn.input).strip() for turn in record.messages if turn.role is not Role.SYSTEM
    )


def _rendered(renderer: Renderer, conversation: Conversation) -> str:
    try:
        return renderer.prompt(conversation.messages, conversation.tools)
    except UserError as error:
        raise UserError(f"{conversation.where}: {error}") from error
