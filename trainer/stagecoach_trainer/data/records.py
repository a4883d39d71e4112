"""Records: documents, conversations and preferences, and their canonical form in shards."""

from __future__ import annotations

import json
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
class ToolCall:
    """A call of a tool, one of OpenAI's `tool_calls`."""

    name: str
    arguments: str
    """JSON text as written. If it is an object, templates read it as one, as they do when a model is served."""

    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: a message of OpenAI's form."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's `input`, kept separate so that each template can join it in its own way."""

    reasoning: str = ""
    """What the assistant thinks before it answers (`reasoning_content`)."""

    calls: tuple[ToolCall, ...] = ()
    """Tools that the assistant calls, in the same turn as its content."""

    name: str | None = None
    """Name of a participant or a tool."""

    call_id: str | None = None
    """Call that a tool's turn is the result of (`tool_call_id`)."""

    trained: bool | None = None
    """Whether the turn carries loss, if the record specifies it; None if the stage's `loss` decides."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt with its human judgement: a rank among the other answers, or good/bad."""

    content: str
    rank: int | None = None
    """Rank among the answers of the record; 1 is best, equal ranks are a tie. None if `liked` is given."""

    liked: bool | None = None
    """Whether it is a good answer. None if `rank` is given."""

    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    @property
    def is_blank(self) -> bool:
        """Whether it has no text and no calls."""
        return not (self.content.strip() or self.reasoning.strip() or self.calls)

    @property
    def turn(self) -> Turn:
        """The assistant's turn that gives this answer."""
        return Turn(Role.ASSISTANT, self.content, reasoning=self.reasoning, calls=self.calls)


@dataclass(frozen=True, slots=True)
class Record:
    """A document, a conversation, or a prompt with judged answers (a preference record)."""

    text: str | None = None
    """The document. None if the record has turns."""

    messages: tuple[Turn, ...] = ()
    """The turns of a conversation, or of the prompt that `answers` reply to; empty for a document."""

    tools: str | None = None
    """JSON list of the tools a conversation may call, each as OpenAI writes it, `{"type": "function", "function": …}`.
    None if there are none."""

    source: str = ""
    """Label of its source."""

    where: str = field(default="", compare=False)
    """Position it was read from, `file:line`."""

    answers: tuple[Answer, ...] = ()
    """A preference record's answers, best first if they are ranked; empty for other records."""

    unread: tuple[str, ...] = field(default=(), compare=False)
    """Names of fields of the value it was read from that mean nothing to its layout, each once."""

    nulls: tuple[str, ...] = field(default=(), compare=False)
    """Notes on null members of the value that it was read from (`data.nulls`)."""

    scores_disagree: bool = field(default=False, compare=False)
    """Whether scores in the value contradict the order of its answers."""

    @property
    def is_text(self) -> bool:
        return self.text is not None

    @property
    def content(self) -> str:
        """All text of the record: the document, or that of turns and answers, with reasoning and calls, by line."""
        if self.text is not None:
            return self.text
        turns = [part for turn in self.messages for part in (turn.reasoning, turn.content, turn.input, *_said(turn))]
        answers = [part for answer in self.answers for part in (answer.reasoning, answer.content, *_said(answer))]
        return "\n".join(part for part in (*turns, *answers) if part)


def _said(turn: Turn | Answer) -> list[str]:
    return [f"{call.name} {call.arguments}" for call in turn.calls]


def record_to_json(record: Record) -> dict[str, Any]:
    """Return the canonical form in which shards store a record: OpenAI's messages."""
    if record.text is not None:
        return {"text": record.text, "source": record.source}
    tools = {} if record.tools is None else {"tools": record.tools}
    answers = {"answers": [_answer_to_json(answer) for answer in record.answers]} if record.answers else {}
    return {"messages": [_turn_to_json(turn) for turn in record.messages], **answers, **tools, "source": record.source}


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    flag = {} if turn.trained is None else {"trained": turn.trained}
    calls = [_call_to_json(call, call.arguments) for call in turn.calls]
    return {**_message(turn, calls), **flag}


def _answer_to_json(answer: Answer) -> dict[str, Any]:
    verdict: dict[str, Any] = {"rank": answer.rank} if answer.rank is not None else {"liked": answer.liked}
    message = _turn_to_json(answer.turn)
    del message["role"]
    return {**message, **verdict}


def as_message(turn: Turn) -> dict[str, Any]:
    """Return a turn as the message that a server passes to a chat template: the arguments of calls are objects.

    `input` and `trained` are for the renderer, which passes neither on as it is.
    """
    message = _message(turn, [_call_to_json(call, arguments_of(call)) for call in turn.calls])
    return message if turn.trained is None else {**message, "trained": turn.trained}


def arguments_of(call: ToolCall) -> Any:
    """Return a call's arguments as an object, or as the text they are if that is not JSON of an object."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:  # a model may have written malformed arguments
        return call.arguments
    return arguments if isinstance(arguments, dict) else call.arguments


def _message(turn: Turn, calls: list[dict[str, Any]]) -> dict[str, Any]:
    more = {
        "input": turn.input,
        "reasoning_content": turn.reasoning,
        "tool_calls": calls,
        "name": turn.name,
        "tool_call_id": turn.call_id,
    }
    return {"role": turn.role.value, "content": turn.content, **{key: value for key, value in more.items() if value}}


def _call_to_json(call: ToolCall, arguments: Any) -> dict[str, Any]:
    name = {} if call.id is None else {"id": call.id}
    return {**name, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def kind_of(record: Record) -> str:
    """Return the kind of a record, as the index of a `data` artifact names it."""
    if record.is_text:
        return "text"
    return PREFERENCES if record.answers else "conversation"


def require_no_answers(record: Record) -> Record:
    """Return `record` if it is a conversation or text.

    Raises UserError for a preference record: read as a conversation, it would be a question without an answer.
    """
    if any(answer.liked is not None for answer in record.answers):
        raise UserError(
            f"{record.where}: an answer with a verdict where a conversation is expected: disliked answers "
            "would be learnt like liked ones; train on `labels` in a `dpo` stage with `loss: {kto: {}}`"
        )
    if record.answers:
        raise UserError(
            f"{record.where}: a preference record, a prompt with {len(record.answers)} answers, where a conversation "
            "is expected; train on it in a `rewardModel` or `dpo` stage, or in `sft` with `hindsight`"
        )
    return record
