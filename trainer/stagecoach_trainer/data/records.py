"""Records: documents, conversations and preferences, and their canonical form in shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.runtime.errors import UserError

PREFERENCES = "preferences"
"""What the index calls records with answers that people compared; the others are `text` and `conversation`."""


class RecordError(ValueError):
    """A value is no record of its layout; the message says which field, what was got and what is allowed."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's `input`, kept apart so that a template may join it in its own way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One of several answers to a prompt, and what people think of it: a rank among the others, or a verdict."""

    content: str
    rank: int | None = None
    """Place among the answers of the record; 1 is best, equal ranks are a tie. None: `liked` is given."""

    liked: bool | None = None
    """Whether it is a good answer. None: `rank` is given."""


@dataclass(frozen=True, slots=True)
class Record:
    """One document, one conversation, or one prompt with answers that people compared (a preference record)."""

    text: str | None = None
    """The document. None: it has turns."""

    messages: tuple[Turn, ...] = ()
    """The turns of a conversation, or of the prompt in front of `answers`; empty for a document."""

    tools: str | None = None
    """JSON list of the tools a conversation may call. None: none are given."""

    source: str = ""
    """Label of the source it came from."""

    where: str = field(default="", compare=False)
    """`file:line` it was read from."""

    answers: tuple[Answer, ...] = ()
    """A preference record's answers, the best first where they are ranked; else empty."""

    @property
    def is_text(self) -> bool:
        return self.text is not None

    @property
    def content(self) -> str:
        """All text of the record: the document, or the text of the turns and of the answers line by line."""
        if self.text is not None:
            return self.text
        parts = [part for turn in self.messages for part in (turn.content, turn.input) if part]
        return "\n".join([*parts, *(answer.content for answer in self.answers if answer.content)])


def record_to_json(record: Record) -> dict[str, Any]:
    """Return the canonical form in which shards hold a record."""
    if record.text is not None:
        return {"text": record.text, "source": record.source}
    messages = []
    for turn in record.messages:
        message = {"role": turn.role.value, "content": turn.content}
        if turn.input:
            message["input"] = turn.input
        messages.append(message)
    tools = {} if record.tools is None else {"tools": record.tools}
    answers = {"answers": [_answer_to_json(answer) for answer in record.answers]} if record.answers else {}
    return {"messages": messages, **answers, **tools, "source": record.source}


def _answer_to_json(answer: Answer) -> dict[str, Any]:
    verdict: dict[str, Any] = {"rank": answer.rank} if answer.rank is not None else {"liked": answer.liked}
    return {"content": answer.content, **verdict}


def kind_of(record: Record) -> str:
    """Return what sort of record it is, in the words of a `data` artifact's index."""
    if record.is_text:
        return "text"
    return PREFERENCES if record.answers else "conversation"


def require_no_answers(record: Record) -> Record:
    """Return a record that is a conversation or text.

    Raises UserError for a preference record: read as a conversation it would be a question without an answer.
    """
    if record.answers:
        raise UserError(
            f"{record.where}: a preference record, a prompt with {len(record.answers)} answers, where a conversation "
            "is expected; train on it in a `rewardModel` or `dpo` stage, or in `sft` with `hindsight`"
        )
    return record
