"""What a record is, and how the parts of a raw value become one: strings, turns, tools."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.data.records import Record, RecordError, Turn

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


@dataclass(frozen=True, slots=True)
class TurnKeys:
    """How a layout spells a turn."""

    role: str
    content: str
    roles: Mapping[str, Role]
    """Its words for the roles."""


SHAREGPT_TURNS = TurnKeys("from", "value", SHAREGPT_ROLES)
MESSAGES_TURNS = TurnKeys("role", "content", MESSAGES_ROLES)


def turn_keys_of(turn: Any) -> TurnKeys:
    """Tell from one turn how a list of turns is spelled."""
    return SHAREGPT_TURNS if isinstance(turn, Mapping) and "from" in turn else MESSAGES_TURNS


def list_of_turns(items: Any, name: str, keys: TurnKeys) -> list[Turn]:
    """Return the turns of a list. Raises RecordError naming the turn that is none."""
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else type(items).__name__
        raise RecordError(f"`{name}` must be a list of at least one turn, got {found}")
    turns: list[Turn] = []
    for index, item in enumerate(items):
        try:
            turns.extend(turns_of(item, keys))
        except RecordError as error:
            raise RecordError(f"`{name}[{index}]`: {error}") from error
    return turns


def turns_of(item: Any, keys: TurnKeys) -> list[Turn]:
    """Return a turn: one, or two where it both speaks and calls a tool. Raises RecordError."""
    if not isinstance(item, Mapping):
        raise RecordError(f"a turn must be an object, got {type(item).__name__}")
    name = string_of(item, keys.role)
    role = keys.roles.get(name)
    if role is None:
        raise RecordError(f"unknown `{keys.role}` {name!r}; allowed are {', '.join(sorted(keys.roles))}")
    calls = item.get("tool_calls")
    if calls:
        said = optional_string_of(item, keys.content)
        return [*([Turn(role, said)] if said else []), Turn(Role.TOOL_CALL, _tool_calls(calls))]
    return [Turn(role, string_of(item, keys.content), optional_string_of(item, "input") or "")]


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
        said.append({"name": string_of(function, "name"), "arguments": arguments})
    return json.dumps(said[0] if len(said) == 1 else said, ensure_ascii=False)


def tools_of(value: Mapping[str, Any]) -> str | None:
    """Return the JSON list of tools a value gives, or None. Raises RecordError."""
    tools = value.get("tools")
    if tools is None or tools in ("", []):
        return None
    if isinstance(tools, str):
        return _valid_unicode(tools, "tools")
    if isinstance(tools, list):
        return _valid_unicode(json.dumps(tools, ensure_ascii=False), "tools")
    raise RecordError(f"`tools` must be a list or JSON text, got {type(tools).__name__}")


def string_of(value: Mapping[str, Any], name: str) -> str:
    """Return the string in a field. Raises RecordError naming what is there."""
    found = value.get(name)
    if not isinstance(found, str):
        raise RecordError(f"`{name}` must be a string, got {describe(value, name)}")
    return _valid_unicode(found, name)


def optional_string_of(value: Mapping[str, Any], name: str) -> str | None:
    """Like `string_of`; None where the field is null or missing."""
    return None if value.get(name) is None else string_of(value, name)


def _valid_unicode(text: str, name: str) -> str:
    """JSON may spell half a surrogate pair, which is no character and cannot be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(f"`{name}` has a lone surrogate at character {error.start}") from error
    return text


def describe(value: Mapping[str, Any], name: str) -> str:
    """Return words on what a field holds."""
    if name not in value:
        return f"no such field (there are: {', '.join(sorted(map(str, value))) or 'none'})"
    return type(value[name]).__name__ if value[name] != [] else "an empty list"
