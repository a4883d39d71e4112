"""Convert raw values to records by the layout of their source; `auto` detects it from the first record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.references import PREFERENCE_FORMATS, FieldMapping, Format
from stagecoach_trainer.data.contract import Content
from stagecoach_trainer.data.messages import listed
from stagecoach_trainer.data.names import Names
from stagecoach_trainer.data.preferences import (
    TURN_LISTS,
    detect_preferences,
    label_field,
    preference_parser,
)
from stagecoach_trainer.data.records import Record, RecordError, Turn
from stagecoach_trainer.data.turns import (
    MESSAGES_TURNS,
    REASONING_FIELDS,
    SHAREGPT_TURNS,
    Parse,
    TurnKeys,
    describe,
    list_of_turns,
    optional_string_of,
    reasoning_of,
    string_of,
    unread_in_turns,
    with_lists,
)

# -- detection ---------------------------------------------------------------------------------------------------------


def detect_format(value: Mapping[str, Any], fields: FieldMapping) -> Format:
    """Detect the layout of a source from its first record.

    Raises RecordError if the record fits none, listing what each layout needs, or more than one.
    """
    value = with_lists(value, (fields.messages,) if fields.messages else TURN_LISTS)
    fitting = list(dict.fromkeys(_fitting(value, fields)))
    # Fields that the source names show which layout is meant.
    fitting = [format_ for format_ in fitting if format_ in _named(fields)] or fitting
    found = _without_renderings(fitting, value, fields)
    if len(found) == 1:
        return found[0]
    if found:
        formats = " and ".join(f"`{format_}`" for format_ in found)
        raise RecordError(
            f"the fields [{_fields_of(value)}] fit {formats}; set `format` to the one to read: other fields are then "
            "counted as not read"
        )
    if len([name for name in TURN_LISTS if _has_turns(value, name)]) > 1:
        raise RecordError("there are turns in `messages` and in `conversations`; name one in `fields.messages`")
    raise RecordError(
        f"the layout cannot be detected from the fields [{_fields_of(value)}]: `text` needs `text`, `alpaca` "
        "`instruction` and `output`, `sharegpt` `conversations`, `messages` `messages`, `pairs` `chosen` and "
        "`rejected`, `comparison` `completion_a` and `completion_b`, `ranked` `answers`, `labels` `completion` and "
        "`label`; set `format`, and `fields` where names differ"
    )


def _fields_of(value: Mapping[str, Any]) -> str:
    return listed(repr(name) for name in sorted(value))


def _fitting(value: Mapping[str, Any], fields: FieldMapping) -> Iterator[Format]:
    yield from detect_preferences(value, fields)
    if isinstance(value.get(fields.text or "text"), str):
        yield Format.TEXT
    if (fields.instruction or "instruction") in value and (fields.output or "output") in value:
        yield Format.ALPACA
    names = [name for name in ((fields.messages,) if fields.messages else TURN_LISTS) if _has_turns(value, name)]
    if len(names) == 1:
        if all(value[names[0]][0].get(role) is not None for role in ("from", "role")):
            raise RecordError(f"`{names[0]}[0]` has both `from` and `role`, which fit two layouts; leave one out")
        yield Format.SHAREGPT if "from" in value[names[0]][0] else Format.MESSAGES


def _has_turns(value: Mapping[str, Any], name: str) -> bool:
    turns = value.get(name)
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping)


def _named(fields: FieldMapping) -> set[Format]:
    """Return the layouts that the named fields belong to."""
    owners = {
        Format.TEXT: (fields.text,),
        Format.ALPACA: (fields.instruction, fields.output),
        Format.SHAREGPT: (fields.messages,),
        Format.MESSAGES: (fields.messages,),
        Format.PAIRS: (fields.chosen, fields.rejected),
        Format.COMPARISON: (fields.chosen, fields.rejected),
        Format.RANKED: (fields.answers,),
        Format.LABELS: (fields.completion, fields.label),
    }
    return {format_ for format_, names in owners.items() if any(names)}


def _without_renderings(found: Sequence[Format], value: Mapping[str, Any], fields: FieldMapping) -> list[Format]:
    """Leave out layouts whose fields repeat, or are part of, those of another one."""
    rest = list(found)
    preference = next((format_ for format_ in rest if format_ in PREFERENCE_FORMATS), None)
    if preference is Format.LABELS and isinstance(value.get(label_field(value, fields)), bool):
        rest = [format_ for format_ in rest if format_ in (Format.LABELS, Format.TEXT)]
    elif preference not in (None, Format.LABELS):  # turns are the prompt, or the better conversation once more
        rest = [format_ for format_ in rest if format_ not in (Format.SHAREGPT, Format.MESSAGES)]
    if len(rest) > 1 and Format.TEXT in rest and _is_rendering(value, fields):
        rest.remove(Format.TEXT)
    return rest


def _is_rendering(value: Mapping[str, Any], fields: FieldMapping) -> bool:
    """Return whether the text of a record contains the texts of all its other fields."""
    text = value[fields.text or "text"]
    names = (fields.instruction or "instruction", fields.input or "input", fields.output or "output")
    parts = [value[name] for name in names if isinstance(value.get(name), str)]
    for name in (fields.messages,) if fields.messages else TURN_LISTS:
        turns = value[name] if _has_turns(value, name) else []
        parts += [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    return bool(parts) and all(isinstance(part, str) and part.strip() in text for part in parts)


# -- parsers -----------------------------------------------------------------------------------------------------------


def parser_for(format_: Format, fields: FieldMapping, sample: Mapping[str, Any], keys: TurnKeys | None = None) -> Parse:
    """Return the parser of one source. It refuses fields that would change what is learnt, and names the others.

    Args:
        format_: The layout, not `auto`.
        fields: Names that differ from the layout's own.
        sample: A first record; `messages` may also be called `conversations` in it.
        keys: Names with which turns are written, if they differ from the layout's.
    """
    names = Names(fields, keys)
    if format_ in PREFERENCE_FORMATS:
        return preference_parser(format_, names)
    if format_ is Format.TEXT:
        return _text_parser(names)
    if format_ is Format.ALPACA:
        return _alpaca_parser(names)
    if format_ is Format.SHAREGPT:
        default = "messages" if "messages" in sample and "conversations" not in sample else "conversations"
        return _turns_parser(names, fields.messages or default, keys or SHAREGPT_TURNS)
    default = "conversations" if "conversations" in sample and "messages" not in sample else "messages"
    return _turns_parser(names, fields.messages or default, keys or MESSAGES_TURNS)


def _text_parser(names: Names) -> Parse:
    name = names.fields.text or "text"
    contract = names.contract(Content.TEXT, name)

    def parse(value: Mapping[str, Any]) -> Record:
        return Record(text=string_of(value, name), unread=contract.unread(value))

    return parse


def _alpaca_parser(names: Names) -> Parse:
    fields = names.fields
    instruction, output = fields.instruction or "instruction", fields.output or "output"
    input_, history = fields.input or "input", fields.history or "history"
    contract = names.contract(Content.CONVERSATION, instruction, input_, output, history, *REASONING_FIELDS)

    def parse(value: Mapping[str, Any]) -> Record:
        question = Turn(Role.USER, string_of(value, instruction), optional_string_of(value, input_) or "")
        answer = Turn(Role.ASSISTANT, string_of(value, output), reasoning=reasoning_of(value))
        messages = (*names.system(value), *names.history(value), question, answer)
        return Record(messages=messages, tools=names.tools(value), unread=contract.unread(value))

    return parse


def _turns_parser(names: Names, name: str, keys: TurnKeys) -> Parse:
    contract = names.contract(Content.CONVERSATION, name)

    def parse(value: Mapping[str, Any]) -> Record:
        value = with_lists(value, (name,))
        if not isinstance(value.get(name), list) or not value[name]:
            raise RecordError(f"`{name}` must be a list of at least one turn, got {describe(value, name)}")
        turns = (*names.system(value), *list_of_turns(value[name], name, keys))
        unread = (*contract.unread(value), *sorted(unread_in_turns(value[name], name, keys, names.fields.ignore)))
        return Record(messages=turns, tools=names.tools(value), unread=unread)

    return parse
