"""Convert raw values to records by the layout of their source; `auto` detects it from the first record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.references import PREFERENCE_FORMATS, FieldMapping, Format
from stagecoach_trainer.data.preferences import detect_preferences, preference_parser
from stagecoach_trainer.data.records import Record, RecordError, Turn
from stagecoach_trainer.data.turns import (
    MESSAGES_TURNS,
    SHAREGPT_TURNS,
    Parse,
    TurnKeys,
    describe,
    list_of_turns,
    optional_string_of,
    string_of,
    tools_of,
)


def detect_format(value: Mapping[str, Any], fields: FieldMapping) -> Format:
    """Detect the layout of a source from its first record. Raises RecordError listing what each layout needs."""
    preference = detect_preferences(value, fields)
    if preference is not None:
        return preference
    if isinstance(value.get(fields.text or "text"), str):
        return Format.TEXT
    if (fields.instruction or "instruction") in value and (fields.output or "output") in value:
        return Format.ALPACA
    for name in (fields.messages,) if fields.messages else ("messages", "conversations"):
        turns = value.get(name)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping):
            return Format.SHAREGPT if "from" in first else Format.MESSAGES
    raise RecordError(
        f"the layout cannot be detected from the fields {sorted(value)}: `text` needs `text`, `alpaca` "
        "`instruction` and `output`, `sharegpt` `conversations`, `messages` `messages`, `pairs` `chosen` and "
        "`rejected`, `comparison` `completion_a` and `completion_b`, `ranked` `answers`, `labels` `completion` and "
        "`label`; set `format`, and `fields` where names differ"
    )


def parser_for(format_: Format, fields: FieldMapping, sample: Mapping[str, Any]) -> Parse:
    """Return the parser of one source.

    Args:
        format_: The layout, not `auto`.
        fields: Names that differ from the layout's own.
        sample: A first record; `messages` may also be called `conversations` in it.
    """
    if format_ in PREFERENCE_FORMATS:
        return preference_parser(format_, fields)
    if format_ is Format.TEXT:
        name = fields.text or "text"
        return lambda value: Record(text=string_of(value, name))
    if format_ is Format.ALPACA:
        return _alpaca_parser(fields)
    if format_ is Format.SHAREGPT:
        return _turns_parser(fields.messages or "conversations", SHAREGPT_TURNS)
    default = "conversations" if "conversations" in sample and "messages" not in sample else "messages"
    return _turns_parser(fields.messages or default, MESSAGES_TURNS)


def _alpaca_parser(fields: FieldMapping) -> Parse:
    instruction = fields.instruction or "instruction"
    input_ = fields.input or "input"
    output = fields.output or "output"

    def parse(value: Mapping[str, Any]) -> Record:
        question = Turn(Role.USER, string_of(value, instruction), optional_string_of(value, input_) or "")
        answer = Turn(Role.ASSISTANT, string_of(value, output))
        system = optional_string_of(value, "system")
        first = (Turn(Role.SYSTEM, system),) if system else ()
        return Record(messages=(*first, question, answer))

    return parse


def _turns_parser(name: str, keys: TurnKeys) -> Parse:
    def parse(value: Mapping[str, Any]) -> Record:
        if not isinstance(value.get(name), list) or not value[name]:
            raise RecordError(f"`{name}` must be a list of at least one turn, got {describe(value, name)}")
        system = optional_string_of(value, "system")
        first = [Turn(Role.SYSTEM, system)] if system else []
        return Record(messages=(*first, *list_of_turns(value[name], name, keys)), tools=tools_of(value))

    return parse
