"""Encode answered conversations for reward models to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import Conversation, LastAnswerEncoder
from stagecoach_trainer.text.templates import Message, message_of

AnsweredConversation = tuple[Sequence[Message], str]
"""The turns so far, and the answer to score."""


def encode_answered(
    tokenizer: Any,
    conversations: Sequence[AnsweredConversation],
    system: str | None = None,
    tools: Sequence[Sequence[Message]] | None = None,
) -> list[Ids]:
    """Return the token ids [T] of each conversation with its answer and the end token, encoded as in training.

    Args:
        tokenizer: The reward model's vocabulary, with the chat template.
        conversations: Prompts and answers.
        system: System prompt that replaces that of each conversation. If it is None, each keeps its own, if any.
        tools: The tools of each conversation. If it is None, there are none.

    Raises:
        UserError: The template cannot render a conversation, or a conversation has no turn.
    """
    answered = [_answered(*conversation, system, index) for index, conversation in enumerate(conversations)]
    if tools is not None:
        answered = [replace(each, tools=tuple(own)) for each, own in zip(answered, tools, strict=True)]
    return [sample.ids for sample in LastAnswerEncoder(tokenizer).encode_conversations(answered)]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return a conversation with its system prompt replaced by `system`, or unchanged if `system` is None."""
    if system is None:
        return list(messages)
    has_own = bool(messages) and messages[0]["role"] == Role.SYSTEM.value
    return [message_of(Role.SYSTEM, system), *(messages[1:] if has_own else messages)]


def _answered(messages: Sequence[Message], answer: str, system: str | None, index: int) -> Conversation:
    where = f"conversation {index} to be scored"
    if not messages:
        raise UserError(f"{where}: the answer has no prompt")
    return Conversation((*with_system(messages, system), message_of(Role.ASSISTANT, answer)), (), where)
