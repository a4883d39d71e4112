"""A record as a closed contract: a field that means something is honoured or refused, and every other one is named.

A layout reads certain fields. Of the rest, those that would change what is learnt (media, weights, verdicts, earlier
turns) are refused, unless the source lists them in `fields.ignore`. Fields without a known meaning are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from stagecoach_trainer.data.records import RecordError

LIKED_VALUES = {"good": True, "bad": False, "true": True, "false": False, "1": True, "0": False}
"""Verdicts as text; those of tables, whose cells are all text, among them."""

LABEL_FIELDS = ("label", "kto_tag")
"""Fields that state whether an answer is good, in TRL's and in LLaMA-Factory's data sets."""

MEDIA_FIELDS = ("image", "images", "audio", "audios", "video", "videos", "image_url", "input_audio")
WEIGHT_FIELDS = ("weight", "weights", "sample_weight", "loss_weight")
FLAG_FIELDS = ("train", "trained", "loss")
MASK_FIELDS = ("mask", "loss_mask")
"""Marks of what carries loss. Data sets disagree on whether 1 means that it does."""

TURN_TOOLS = ("tools", "functions")
RECORD_REASONING = ("reasoning_content", "reasoning", "thinking")
OTHER_REASONING = ("reasoning_details", "thinking_blocks", "thought", "thoughts")
OTHER_CALLS = ("tool_call", "toolCalls", "function_calls", "functionCall", "functionCalls")


class Content(Enum):
    """What a layout makes of a record."""

    TEXT = auto()
    CONVERSATION = auto()
    PREFERENCES = auto()


@dataclass(frozen=True, slots=True)
class Contract:
    """The fields that a layout reads, and those that a source leaves out knowingly."""

    content: Content
    reads: frozenset[str]
    ignores: frozenset[str] = frozenset()

    def unread(self, value: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the fields of a record that have content and are not read.

        Raises RecordError for a field that would change what is learnt.
        """
        rest = [name for name in value if name not in self.reads and name not in self.ignores]
        return tuple(name for name in rest if is_unread(name, value[name], _meanings_of(self.content)))


def is_empty(value: Any) -> bool:
    """Return whether a field has no content: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def verdict_of(label: Any) -> bool | None:
    """Return whether a label calls an answer good; None if it is no such label."""
    if isinstance(label, str):
        return LIKED_VALUES.get(label.strip().lower())
    if isinstance(label, int | float) and label in (0, 1):  # True and False are instances of int
        return bool(label)
    return None


def as_number(value: Any) -> Any:
    """Return the number that a cell of a table contains as text; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# -- meanings ----------------------------------------------------------------------------------------------------------

Meaning = Callable[[Any], str | None]
"""Returns why a field that is not read is refused: empty if it changes nothing, None if it has no such meaning."""


def is_unread(name: str, value: Any, meanings: Mapping[str, Meaning]) -> bool:
    """Return whether a field outside a contract has content. Raises RecordError if it changes what is learnt."""
    if is_empty(value):
        return False
    meaning = meanings.get(name)
    reason = None if meaning is None else meaning(value)
    if reason:
        raise RecordError(f"`{name}` {reason}; to leave it out knowingly, list it in `fields.ignore`")
    return reason is None


def _always(reason: str) -> Meaning:
    return lambda value: reason


def _weight(value: Any) -> str | None:
    value = as_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return None
    return (
        "" if value == 1 else f"is {value!r:.40}, and records have no weight: give a source a `weight`, or a turn one"
    )


def _flag(value: Any) -> str | None:
    flag = verdict_of(value)
    if flag is None:
        return None
    return "" if flag else "is false: a record that is not trained on is left out of the file"


def _label(value: Any) -> str | None:
    if verdict_of(value) is None:
        return None
    return f"is {value!r:.40}, a verdict on the answer that this layout does not read: set `format: labels`"


def _channel(value: Any) -> str | None:
    reason = "is not `final`, so the turn is reasoning or a call: write it as `reasoning_content` or `tool_calls`"
    return "" if value == "final" else reason


def _each(names: Iterable[str], meaning: Meaning) -> dict[str, Meaning]:
    return dict.fromkeys(names, meaning)


_MEDIA = _each(MEDIA_FIELDS, _always("is a medium, and only text is read"))
_MASKS = _each(MASK_FIELDS, _always("marks what carries loss, but not how: write `train: true` or `false` in turns"))
_ANY = _MEDIA | _MASKS | _each(WEIGHT_FIELDS, _weight) | _each(FLAG_FIELDS, _flag)
_PREFERENCES = _ANY | {
    "history": _always("has earlier turns that this layout does not read: write them as turns of the prompt"),
    "documents": _always("is read by chat templates, but not passed to them: write the documents into a turn"),
    "chat_template_kwargs": _always("sets the chat template, which a stage's `template` does"),
}
_CONVERSATION = (
    _PREFERENCES
    | _each(LABEL_FIELDS, _label)
    | _each(
        ("rejected_response", "rejected_messages"),
        _always("is a rejected answer that this layout does not read: write `chosen` and `rejected`"),
    )
    | _each(RECORD_REASONING, _always("is at the record: write it in the turn of the assistant that thinks it"))
)
TURN_MEANINGS = (
    _MEDIA
    | _MASKS
    | _each(TURN_TOOLS, _always("is in a turn: write it at the record, for the whole conversation"))
    | _each(OTHER_REASONING, _always("is reasoning in a form that is not read: write its text as `reasoning_content`"))
    | _each(OTHER_CALLS, _always("is a call in a form that is not read: write it as a list in `tool_calls`"))
    | {"channel": _channel}
)
"""Meanings of fields of a turn, except those that turns are read from."""


def _meanings_of(content: Content) -> Mapping[str, Meaning]:
    match content:
        case Content.TEXT:
            return _ANY
        case Content.CONVERSATION:
            return _CONVERSATION
        case Content.PREFERENCES:
            return _PREFERENCES
