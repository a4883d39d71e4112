"""Parse the parts of a raw value that records consist of: strings, turns, tools."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.data.records import Record, RecordError, Turn

Parse = Callable[[Mapping[str, Any]], Record]
"""Makes a record of a raw value; the reader fills in `source` and `where`. Raises RecordError."""

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
    """Field names and role names with which a layout writes a turn."""

    role: str
    content: str
    roles: Mapping[str, Role]
    """Role by the name that the layout uses."""


SHAREGPT_TURNS = TurnKeys("from", "value", SHAREGPT_ROLES)
MESSAGES_TURNS = TurnKeys("role", "content", MESSAGES_ROLES)


def turn_keys_of(turn: Any) -> TurnKeys:
    """Return the field names that a list of turns uses, detected from one of its turns."""
    return SHAREGPT_TURNS if isinstance(turn, Mapping) and "from" in turn else MESSAGES_TURNS


def list_of_turns(items: Any, name: str, keys: TurnKeys) -> list[Turn]:
    """Return the turns of a list. Raises RecordError naming the malformed turn."""
    if not isinstance(items, list) or not items:
        got = "an empty list" if items == [] else type(items).__name__
        raise RecordError(f"`{name}` must be a list of at least one turn, got {got}")
    turns: list[Turn] = []
    for index, item in enumerate(items):
        try:
            turns.extend(turns_of(item, keys))
        except RecordError as error:
            raise RecordError(f"`{name}[{index}]`: {error}") from error
    return turns


def turns_of(item: Any, keys: TurnKeys) -> list[Turn]:
    """Return the turns of one item: two if it has both text and tool calls, else one. Raises RecordError."""
    if not isinstance(item, Mapping):
        raise RecordError(f"a turn must be an object, got {type(item).__name__}")
    name = string_of(item, keys.role)
    role = keys.roles.get(name)
    if role is None:
        raise RecordError(f"unknown `{keys.role}` {name!r}; allowed are {', '.join(sorted(keys.roles))}")
    calls = item.get("tool_calls")
    if calls:
        text = optional_string_of(item, keys.content)
        return [*([Turn(role, text)] if text else []), Turn(Role.TOOL_CALL, _tool_calls(calls))]
    return [Turn(role, string_of(item, keys.content), optional_string_of(item, "input") or "")]


def _tool_calls(calls: Any) -> str:
    """Return OpenAI's `tool_calls` as the JSON of ShareGPT data sets: one object, or a list of several."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RecordError("`tool_calls` must be a list of objects")
    functions = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
    written = []
    for function in functions:
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):  # malformed arguments written by a model stay text
                arguments = json.loads(arguments)
        written.append({"name": string_of(function, "name"), "arguments": arguments})
    return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)


def tools_of(value: Mapping[str, Any]) -> str | None:
    """Return the JSON list of tools in a value, or None if there are none. Raises RecordError."""
    tools = value.get("tools")
    if tools is None or tools in ("", []):
        return None
    if isinstance(tools, str):
        return _valid_unicode(tools, "tools")
    if isinstance(tools, list):
        return _valid_unicode(json.dumps(tools, ensure_ascii=False), "tools")
    raise RecordError(f"`tools` must be a list or JSON text, got {type(tools).__name__}")


def string_of(value: Mapping[str, Any], name: str) -> str:
    """Return the string in a field. Raises RecordError naming what the field contains."""
    text = value.get(name)
    if not isinstance(text, str):
        raise RecordError(f"`{name}` must be a string, got {describe(value, name)}")
    return _valid_unicode(text, name)


def optional_string_of(value: Mapping[str, Any], name: str) -> str | None:
    """Like `string_of`, but None if the field is null or missing."""
    return None if value.get(name) is None else string_of(value, name)


def _valid_unicode(text: str, name: str) -> str:
    """Reject lone surrogates: JSON can escape half of a surrogate pair, which UTF-8 cannot encode."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(f"`{name}` has a lone surrogate at character {error.start}") from error
    return text


def describe(value: Mapping[str, Any], name: str) -> str:
    """Describe the content of a field for an error message."""
    if name not in value:
        return f"no such field (there are: {', '.join(sorted(map(str, value))) or 'none'})"
    return type(value[name]).__name__ if value[name] != [] else "an empty list"
