"""Encode answered conversations for reward models to score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.records import Record, Turn
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import last_answer_encoder
from stagecoach_trainer.text.templates import Message

AnsweredConversation = tuple[Sequence[Message], str]
"""The turns so far, and the answer to score."""


def encode_answered(
    tokenizer: Any, conversations: Sequence[AnsweredConversation], system: str | None = None
) -> list[Ids]:
    """Return the token ids [T] of each conversation with its answer and the end token, encoded as in training.

    Args:
        tokenizer: The reward model's vocabulary, with the chat template.
        conversations: Prompts and answers.
        system: System prompt that replaces that of each conversation. If it is None, each keeps its own, if any.

    Raises:
        UserError: The template cannot render a conversation, or a conversation has no turn.
    """
    records = [_record(messages, answer, system, index) for index, (messages, answer) in enumerate(conversations)]
    return [sample.ids for sample in last_answer_encoder(tokenizer).encode(records)]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return a conversation with its system prompt replaced by `system`, or unchanged if `system` is None."""
    if system is None:
        return list(messages)
    has_own = bool(messages) and messages[0]["role"] == Role.SYSTEM.value
    return [{"role": Role.SYSTEM.value, "content": system}, *(messages[1:] if has_own else messages)]


def _record(messages: Sequence[Message], answer: str, system: str | None, index: int) -> Record:
    where = f"conversation {index} to be scored"
    if not messages:
        raise UserError(f"{where}: the answer has no prompt")
    turns = [
        Turn(Role(message["role"]), str(message["content"]), str(message.get("input", "")))
        for message in with_system(messages, system)
    ]
    return Record(messages=(*turns, Turn(Role.ASSISTANT, answer)), where=where)
