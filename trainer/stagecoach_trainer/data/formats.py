"""A raw value to a `Record`, by the layout of its source; told from the first record where the source says `auto`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.references import FieldMapping, Format
from stagecoach_api.stages.sft import Role


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
class Record:
    """One document or one conversation."""

    text: str | None = None
    """The document. None: it is a conversation."""

    messages: tuple[Turn, ...] = ()
    """The turns of a conversation; empty for a document."""

    tools: str | None = None
    """JSON list of the tools a conversation may call. None: none are given."""

    source: str = ""
    """Label of the source it came from."""

    where: str = field(default="", compare=False)
    """`file:line` it was read from."""

    @property
    def is_text(self) -> bool:
        return self.text is not None

    @property
    def content(self) -> str:
        """All text of the record: the document, or the turns' text line by line."""
        if self.text is not None:
            return self.text
        return "\n".join(part for turn in self.messages for part in (turn.content, turn.input) if part)


Parse = Callable[[Mapping[str, Any]], Record]
"""Make a record of one value; `source` and `where` are filled in by the reader. Raises RecordError."""

USER_ROLES = ("human", "user")
SHAREGPT_ROLES = {
    **dict.fromkeys(USER_ROLES, Role.USER),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), Role.ASSISTANT),
    "system": Role.SYSTEM,
    "function_call": Role.TOOL_CALL,
    **dict.fromkeys(("observation", "function_response", "tool"), Role.ENVIRONMENT),
}
MESSAGES_ROLES = {
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("toolCall", "function_call", "tool_call"), Role.TOOL_CALL),
    **dict.fromkeys(("environment", "tool", "function", "observation"), Role.ENVIRONMENT),
}


def detect_format(value: Mapping[str, Any], fields: FieldMapping) -> Format:
    """Tell the layout of a source from its first record. Raises RecordError naming what each layout needs."""
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
        f"the layout cannot be told from the fields {sorted(value)}: `text` needs `text`, `alpaca` `instruction` and "
        "`output`, `sharegpt` `conversations`, `messages` `messages`; set `format`, and `fields` where names differ"
    )


def parser_for(format_: Format, fields: FieldMapping, sample: Mapping[str, Any]) -> Parse:
    """Return the parser of one source.

    Args:
        format_: The layout, not `auto`.
        fields: Names that differ from the layout's own.
        sample: A first record: `messages` are looked for under `conversations` too.
    """
    if format_ is Format.TEXT:
        name = fields.text or "text"
        return lambda value: Record(text=_string(value, name))
    if format_ is Format.ALPACA:
        return _alpaca_parser(fields)
    if format_ is Format.SHAREGPT:
        return _turns_parser(fields.messages or "conversations", "from", "value", SHAREGPT_ROLES)
    default = "conversations" if "conversations" in sample and "messages" not in sample else "messages"
    return _turns_parser(fields.messages or default, "role", "content", MESSAGES_ROLES)


def _alpaca_parser(fields: FieldMapping) -> Parse:
    instruction = fields.instruction or "instruction"
    input_ = fields.input or "input"
    output = fields.output or "output"

    def parse(value: Mapping[str, Any]) -> Record:
        question = Turn(Role.USER, _string(value, instruction), _optional_string(value, input_) or "")
        answer = Turn(Role.ASSISTANT, _string(value, output))
        system = _optional_string(value, "system")
        first = (Turn(Role.SYSTEM, system),) if system else ()
        return Record(messages=(*first, question, answer))

    return parse


def _turns_parser(name: str, role_key: str, content_key: str, roles: Mapping[str, Role]) -> Parse:
    def parse(value: Mapping[str, Any]) -> Record:
        items = value.get(name)
        if not isinstance(items, list) or not items:
            raise RecordError(f"`{name}` must be a list of at least one turn, got {_describe(value, name)}")
        turns: list[Turn] = []
        system = _optional_string(value, "system")
        if system:
            turns.append(Turn(Role.SYSTEM, system))
        for index, item in enumerate(items):
            try:
                turns.extend(_turns_of(item, role_key, content_key, roles))
            except RecordError as error:
                raise RecordError(f"`{name}[{index}]`: {error}") from error
        return Record(messages=tuple(turns), tools=_tools(value))

    return parse


def _turns_of(item: Any, role_key: str, content_key: str, roles: Mapping[str, Role]) -> list[Turn]:
    if not isinstance(item, Mapping):
        raise RecordError(f"a turn must be an object, got {type(item).__name__}")
    name = _string(item, role_key)
    role = roles.get(name)
    if role is None:
        raise RecordError(f"unknown `{role_key}` {name!r}; allowed are {', '.join(sorted(roles))}")
    calls = item.get("tool_calls")
    if calls:
        said = _optional_string(item, content_key)
        return [*([Turn(role, said)] if said else []), Turn(Role.TOOL_CALL, _tool_calls(calls))]
    return [Turn(role, _string(item, content_key), _optional_string(item, "input") or "")]


def _tool_calls(calls: Any) -> str:
    """Write OpenAI's `tool_calls` as the JSON that ShareGPT sets have: one object, or a list of several."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RecordError("`tool_calls` must be a list of objects")
    functions = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
    said = []
    for function in functions:
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # a model's malformed arguments stay the text they are
                arguments = json.loads(arguments)
        said.append({"name": _string(function, "name"), "arguments": arguments})
    return json.dumps(said[0] if len(said) == 1 else said, ensure_ascii=False)


def _tools(value: Mapping[str, Any]) -> str | None:
    tools = value.get("tools")
    if tools is None or tools in ("", []):
        return None
    if isinstance(tools, str):
        return _valid_unicode(tools, "tools")
    if isinstance(tools, list):
        return _valid_unicode(json.dumps(tools, ensure_ascii=False), "tools")
    raise RecordError(f"`tools` must be a list or JSON text, got {type(tools).__name__}")


def _string(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise RecordError(f"`{name}` must be a string, got {_describe(value, name)}")
    return _valid_unicode(found, name)


def _optional_string(value: Mapping[str, Any], name: str) -> str | None:
    return None if value.get(name) is None else _string(value, name)


def _valid_unicode(text: str, name: str) -> str:
    """JSON may spell half a surrogate pair, which is no character and cannot be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(f"`{name}` has a lone surrogate at character {error.start}") from error
    return text


def _describe(value: Mapping[str, Any], name: str) -> str:
    if name not in value:
        return f"no such field (there are: {', '.join(sorted(map(str, value))) or 'none'})"
    return type(value[name]).__name__ if value[name] != [] else "an empty list"
