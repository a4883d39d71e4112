"""Parse the parts of a raw value that records consist of: strings, turns, tools.

Turns are read in OpenAI's form and in ShareGPT's. What a model calls and what it thinks belong to its turn, as in
OpenAI's `tool_calls` and `reasoning_content`; ShareGPT's turns of calls become part of the turn whose end they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.data.contract import OTHER_CALLS, OTHER_REASONING, TURN_MEANINGS, is_unread
from stagecoach_trainer.data.messages import listed
from stagecoach_trainer.data.records import Record, RecordError, ToolCall, Turn

Parse = Callable[[Mapping[str, Any]], Record]
"""Makes a record of a raw value; the reader fills in `source` and `where`. Raises RecordError."""

USER_ROLES = ("human", "user")
CALL_ROLES = frozenset({"function_call", "tool_call", "toolCall"})
"""Names of the assistant's role in turns whose content is the JSON of its calls, as in ShareGPT data sets. `toolCall`
and `environment` are in data sets that earlier versions wrote."""

SHAREGPT_ROLES = {
    **dict.fromkeys(USER_ROLES, Role.USER),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model", *CALL_ROLES), Role.ASSISTANT),
    "system": Role.SYSTEM,
    **dict.fromkeys(("observation", "function_response", "tool"), Role.TOOL),
}
MESSAGES_ROLES = {
    "user": Role.USER,
    **dict.fromkeys(("assistant", *CALL_ROLES), Role.ASSISTANT),
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("tool", "function", "observation", "environment"), Role.TOOL),
}

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields with what the assistant thinks before it answers: OpenAI-compatible servers', OpenRouter's and gpt-oss's."""

FLAG_FIELDS = ("trained", "train", "training", "weight", "loss")
"""Fields that specify whether a turn carries loss: ours, axolotl's, OpenAI's, ms-swift's."""

ASSISTANT_FLAGS = frozenset({"weight", "loss"})
"""Flags defined for the assistant's turns alone: 1 on another turn changes nothing."""


TURN_FIELDS = frozenset(
    {"input", "name", "tool_calls", "function_call", "tool_call_id", *REASONING_FIELDS, *FLAG_FIELDS}
)
"""Fields that turns are read from, except role and content."""


PART_FIELDS = frozenset({"type", "text", "thinking"})
CALL_FIELDS = frozenset({"id", "type", "index", "function"})
FUNCTION_FIELDS = frozenset({"name", "arguments", "parameters"})
"""Fields that the parts of a content, calls, and the functions that they call are read from."""


@dataclass(frozen=True, slots=True)
class TurnKeys:
    """Field names and role names with which a layout writes a turn."""

    role: str
    content: str
    roles: Mapping[str, Role]
    """Role by the name that the layout uses."""

    calls: frozenset[str] = CALL_ROLES
    """Names of roles whose content is the JSON of calls."""


SHAREGPT_TURNS = TurnKeys("from", "value", SHAREGPT_ROLES)
MESSAGES_TURNS = TurnKeys("role", "content", MESSAGES_ROLES)


def turn_keys_of(turn: Any) -> TurnKeys:
    """Return the field names that a list of turns uses, detected from one of its turns."""
    return SHAREGPT_TURNS if isinstance(turn, Mapping) and "from" in turn else MESSAGES_TURNS


def with_lists(value: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """Return a value whose lists of turns are lists, also where a table contains them as JSON."""
    decoded = {}
    for name in names:
        if isinstance(value.get(name), str) and value[name].lstrip().startswith("["):
            with suppress(ValueError):
                decoded[name] = json.loads(value[name])
    return {**value, **decoded} if decoded else value


def list_of_turns(items: Any, name: str, keys: TurnKeys) -> list[Turn]:
    """Return the turns of a list. Raises RecordError naming the malformed turn."""
    if not isinstance(items, list) or not items:
        got = "an empty list" if items == [] else type(items).__name__
        raise RecordError(f"`{name}` must be a list of at least one turn, got {got}")
    turns: list[Turn] = []
    for index, item in enumerate(items):
        try:
            turn = turn_of(item, keys)
        except RecordError as error:
            raise RecordError(f"`{name}[{index}]`: {error}") from error
        if turns and item[keys.role] in keys.calls and _is_one_turn(turns[-1], turn):
            turns[-1] = replace(turns[-1], calls=turns[-1].calls + turn.calls)
        else:
            turns.append(turn)
    return turns


def _is_one_turn(first: Turn, calls: Turn) -> bool:
    """Return whether calls directly after a turn are its end: the same author, nothing in between.

    Words after calls are not: every template renders the words of a turn before its calls.
    """
    same = (first.role, first.name, first.trained) == (calls.role, calls.name, calls.trained)
    return same and not calls.reasoning


def turn_of(item: Any, keys: TurnKeys) -> Turn:
    """Return the turn of one item. Raises RecordError."""
    if not isinstance(item, Mapping):
        raise RecordError(f"a turn must be an object, got {type(item).__name__}")
    name = string_of(item, keys.role)
    role = keys.roles.get(name)
    if role is None:
        raise RecordError(f"unknown `{keys.role}` {name!r}; allowed are {', '.join(sorted(keys.roles))}")
    calls = _calls_of(item)
    reasoning = reasoning_of(item)
    if name in keys.calls:
        if calls:
            raise RecordError(f"a turn of `{name}` has its calls in `{keys.content}`, not in `tool_calls` as well")
        content, calls = "", _calls_in(string_of(item, keys.content), keys.content)
    else:
        content, thought = _content_of(item, keys.content, may_be_null=bool(calls or reasoning))
        reasoning = reasoning or thought
    if role is not Role.ASSISTANT and (calls or reasoning):
        what = "tool calls" if calls else "reasoning"
        raise RecordError(f"a turn of `{name}` has {what}; only the assistant's can")
    return Turn(
        role,
        content,
        input=optional_string_of(item, "input") or "",
        reasoning=reasoning,
        calls=calls,
        name=optional_string_of(item, "name") or None,
        call_id=(optional_string_of(item, "tool_call_id") or None) if role is Role.TOOL else None,
        trained=_flag_of(item, role),
    )


def unread_in_turns(items: Any, name: str, keys: TurnKeys, ignores: Collection[str] = ()) -> set[str]:
    """Return the fields of turns that are not read, as `name[].field`, without those in `ignores`.

    Raises RecordError for one that would change what is learnt.
    """
    found: set[str] = set()
    for index, item in enumerate(items if isinstance(items, list) else [items]):
        for path, field, value in _not_read(item, keys) if isinstance(item, Mapping) else ():
            if field in ignores or f"{name}[].{path}" in ignores:
                continue
            try:
                if is_unread(field, value, {} if _is_repeated(item, field) else TURN_MEANINGS):
                    found.add(f"{name}[].{path}")
            except RecordError as error:
                raise RecordError(f"`{name}[{index}]`: {error}") from error
    return found


def _is_repeated(item: Mapping[str, Any], field: str) -> bool:
    """Return whether a field states once more what is read from another one: servers write reasoning in two forms."""
    if field in OTHER_REASONING:
        return any(item.get(name) for name in REASONING_FIELDS)
    return field in OTHER_CALLS and bool(item.get("tool_calls") or item.get("function_call"))


def _not_read(item: Mapping[str, Any], keys: TurnKeys) -> Iterator[tuple[str, str, Any]]:
    """Yield path, name and value of the fields of a turn, its parts and its calls that turns are not read from."""
    for field, value in item.items():
        # A call's id is read in the turn of its result alone.
        is_stray = field == "tool_call_id" and keys.roles.get(str(item.get(keys.role))) is not Role.TOOL
        if is_stray or (field not in TURN_FIELDS and field not in (keys.role, keys.content)):
            yield field, field, value
    content = item.get(keys.content)
    for part in content if isinstance(content, list) else ():
        for field in part if isinstance(part, Mapping) else ():
            if field not in PART_FIELDS:
                yield f"{keys.content}[].{field}", field, part[field]
    written = {"tool_calls": item.get("tool_calls"), "function_call": item.get("function_call")}
    if item.get(keys.role) in keys.calls and isinstance(content, str):
        with suppress(ValueError):
            written[keys.content] = json.loads(content)
    for name, calls in written.items():
        for call in calls if isinstance(calls, list) else [calls]:
            yield from _not_read_of_call(call, f"{name}[]" if isinstance(calls, list) else name)


def _not_read_of_call(call: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    function = call.get("function") if isinstance(call, Mapping) else None
    outer = CALL_FIELDS if isinstance(function, Mapping) else CALL_FIELDS | FUNCTION_FIELDS
    for place, part, reads in ((path, call, outer), (f"{path}.function", function, FUNCTION_FIELDS)):
        for field, value in part.items() if isinstance(part, Mapping) else ():
            if field not in reads:
                yield f"{place}.{field}", field, value


# -- content -----------------------------------------------------------------------------------------------------------


def _content_of(item: Mapping[str, Any], name: str, may_be_null: bool) -> tuple[str, str]:
    """Return the words of a turn, and what it thinks if its content is a list of parts."""
    if item.get(name) is None and may_be_null:
        return "", ""
    if not isinstance(item.get(name), list):
        return string_of(item, name), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(item[name]):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "thinking" and isinstance(part.get("thinking"), str | list):
            thoughts.append(_content_of(part, "thinking", may_be_null=False)[0])
        elif kind in ("text", "input_text", "output_text"):
            texts.append(string_of(part, "text"))
        else:
            raise RecordError(
                f"`{name}[{index}]` must be a part of type `text` or `thinking`, got {kind or part!r:.40}"
            )
    if len(texts) > 1 or len(thoughts) > 1:
        raise RecordError(
            f"`{name}` has {len(texts)} parts of text and {len(thoughts)} of thinking; servers join them in different "
            "ways, so write them as one"
        )
    return "".join(texts), "".join(thoughts)


def reasoning_of(item: Mapping[str, Any]) -> str:
    """Return what the assistant thinks before it answers. Raises RecordError if two fields differ."""
    found = {name: text for name in REASONING_FIELDS if (text := optional_string_of(item, name))}
    if len(set(found.values())) > 1:
        raise RecordError(f"{', '.join(f'`{name}`' for name in found)} differ; keep the one that the model must think")
    return next(iter(found.values()), "")


def _flag_of(item: Mapping[str, Any], role: Role) -> bool | None:
    """Return whether a turn is marked as carrying loss; None if it has no flag. Raises RecordError."""
    found: dict[str, bool] = {}
    for name in FLAG_FIELDS:
        value = item.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError(f"`{name}` must be 0 or 1, false or true, got {value!r:.40}: a turn is trained or not")
        if not (value and name in ASSISTANT_FLAGS and role is not Role.ASSISTANT):
            found[name] = bool(value)
    if len(set(found.values())) > 1:
        raise RecordError(f"{' and '.join(f'`{name}` {value}' for name, value in found.items())} contradict each other")
    return next(iter(found.values()), None)


# -- calls and tools ---------------------------------------------------------------------------------------------------


def _calls_of(item: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Return the calls in OpenAI's `tool_calls`, or in its older `function_call`. Raises RecordError."""
    calls, older = item.get("tool_calls"), item.get("function_call")
    if calls and older:
        raise RecordError("a turn has both `tool_calls` and `function_call`; leave one out")
    if older:
        return (_call_of(older, "function_call"),)
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise RecordError(f"`tool_calls` must be a list of objects, got {type(calls).__name__}")
    return tuple(_call_of(call, f"tool_calls[{index}]") for index, call in enumerate(calls))


def _calls_in(text: str, name: str) -> tuple[ToolCall, ...]:
    """Return the calls of a turn whose content is their JSON: one object, or a list of several. Raises RecordError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RecordError(f"`{name}` must be the JSON of a tool call, with `name` and `arguments`: {error}") from error
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RecordError(f"`{name}` must be the JSON of at least one tool call, got an empty list")
    return tuple(_call_of(call, name) for call in calls)


def _call_of(call: Any, where: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise RecordError(f"`{where}` must be an object, got {type(call).__name__}")
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, Mapping) or call.get("type", "function") not in ("function", None):
        raise RecordError(f"`{where}` must be the call of a function, got {dict(call)!r:.80}")
    try:
        return ToolCall(string_of(function, "name"), _arguments(function), optional_string_of(call, "id") or None)
    except RecordError as error:
        raise RecordError(f"`{where}`: {error}") from error


def _arguments(function: Mapping[str, Any]) -> str:
    given = [name for name in ("arguments", "parameters") if function.get(name) is not None]
    if len(given) > 1:
        raise RecordError("a call has both `arguments` and `parameters`; leave one out")
    name = given[0] if given else "arguments"
    arguments = function.get(name)
    if isinstance(arguments, str):
        return _valid_unicode(arguments, name)
    if arguments is None:
        return "{}"
    return _valid_unicode(json.dumps(arguments, ensure_ascii=False), name)


def tools_of(value: Mapping[str, Any]) -> str | None:
    """Return the JSON list of a value's tools, each in OpenAI's form, or None if it has none. Raises RecordError."""
    if value.get("tools") and value.get("functions"):
        raise RecordError("a record has both `tools` and `functions`; leave one out")
    name = "functions" if value.get("functions") else "tools"
    tools = value.get(name)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RecordError(f"`{name}` is not JSON: {error}") from error
    if tools is None or tools == [] or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list):
        raise RecordError(f"`{name}` must be a list or JSON text of one, got {type(tools).__name__}")
    wrapped = [_wrapped(tool, f"{name}[{index}]") for index, tool in enumerate(tools)]
    return _valid_unicode(json.dumps(wrapped, ensure_ascii=False), name)


def _wrapped(tool: Any, where: str) -> Mapping[str, Any]:
    """Return a tool as servers pass it to templates; data sets often leave out the wrapping."""
    if not isinstance(tool, Mapping):
        raise RecordError(f"`{where}` must be an object that describes a tool, got {type(tool).__name__}")
    function = tool.get("function")
    described = function if isinstance(function, Mapping) else tool
    if not isinstance(described.get("name"), str) or tool.get("type", "function") != "function":
        got = repr(dict(tool))[:80]
        raise RecordError(f"`{where}` must be the description of a function with its `name`, got {got}")
    if described is function:
        return tool if "type" in tool else {"type": "function", **tool}
    return {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}


# -- strings -----------------------------------------------------------------------------------------------------------


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
        return f"no such field (there are: {listed(sorted(map(str, value))) or 'none'})"
    return type(value[name]).__name__ if value[name] != [] else "an empty list"
