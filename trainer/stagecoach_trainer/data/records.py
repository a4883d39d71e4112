"""Records: documents, conversations and preferences, and their canonical form in shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.runtime.errors import UserError

PREFERENCES = "preferences"
"""Kind of a record with compared answers, as the index names it; the others are `text` and `conversation`."""


class RecordError(ValueError):
    """A value does not match its layout; the message names the field, what was got and what is allowed.

    The message is listed in the report of a `data` stage, so rewording one changes the artifact.
    """


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's `input`, kept separate so that each template can join it in its own way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt with its human judgement: a rank among the other answers, or good/bad."""

    content: str
    rank: int | None = None
    """Rank among the answers of the record; 1 is best, equal ranks are a tie. None if `liked` is given."""

    liked: bool | None = None
    """Whether it is a good answer. None if `rank` is given."""


@dataclass(frozen=True, slots=True)
class Record:
    """A document, a conversation, or a prompt with judged answers (a preference record)."""

    text: str | None = None
    """The document. None if the record has turns."""

    messages: tuple[Turn, ...] = ()
    """The turns of a conversation, or of the prompt that `answers` reply to; empty for a document."""

    tools: str | None = None
    """JSON list of the tools a conversation may call. None if there are none."""

    source: str = ""
    """Label of its source."""

    where: str = field(default="", compare=False)
    """Position it was read from, `file:line`."""

    answers: tuple[Answer, ...] = ()
    """A preference record's answers, best first if they are ranked; empty for other records."""

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
    """Return the canonical form in which shards store a record."""
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
    """Return the kind of a record, as the index of a `data` artifact names it."""
    if record.is_text:
        return "text"
    return PREFERENCES if record.answers else "conversation"


def require_no_answers(record: Record) -> Record:
    """Return `record` if it is a conversation or text.

    Raises UserError for a preference record: read as a conversation, it would be a question without an answer.
    """
    if record.answers:
        raise UserError(
            f"{record.where}: a preference record, a prompt with {len(record.answers)} answers, where a conversation "
            "is expected; train on it in a `rewardModel` or `dpo` stage, or in `sft` with `hindsight`"
        )
    return record
