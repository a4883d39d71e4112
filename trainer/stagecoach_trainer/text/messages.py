"""Messages as chat templates read them, and what of a message must be found in its rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.runtime.errors import UserError

Message = Mapping[str, Any]
"""A turn in OpenAI's form. Two more keys are for the renderer and reach no template as they are: `input` (Alpaca's) and
`trained` (whether the turn carries loss)."""

TEXT_KEYS = ("content", "input", "reasoning_content")
_THINKING = re.compile(r"</?think>")
"""Templates move thinking that is written into the content, and normalise the line ends around it."""


def message_of(role: Role, content: str, extra_input: str = "") -> dict[str, str]:
    """Return a turn of text in the form that chat templates read."""
    message = {"role": role.value, "content": content}
    return {**message, "input": extra_input} if extra_input else message


def parse_tools(tools: str | None) -> list[dict[str, Any]] | None:
    """Return the tool descriptions of a record. Raises UserError unless they are a JSON list of objects."""
    if tools is None or not tools.strip():
        return None
    try:
        descriptions = json.loads(tools)
    except json.JSONDecodeError as error:
        raise UserError(f"`tools` is not JSON: {error}") from error
    if not isinstance(descriptions, list) or not all(isinstance(item, dict) for item in descriptions):
        raise UserError("`tools` must be a JSON list of objects, each describing one tool")
    return descriptions or None


def text_of(message: Message) -> str:
    """Return the text of a turn, with Alpaca's `input` on a separate line."""
    return "\n".join(part for part in (str(message.get("content") or ""), str(message.get("input", ""))) if part)


def described(message: Message) -> str:
    """Return a turn as plain text for a reader: its text, and its calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in (text_of(message), *calls) if part)


# -- changing the strings of a message ---------------------------------------------------------------------------------


def with_strings(message: Message, of_text: Callable[[str], str], of_call: Callable[[str], str]) -> dict[str, Any]:
    """Return a message whose strings are changed: its texts by `of_text`, the names, keys and values of its calls by
    `of_call`."""
    changed: dict[str, Any] = dict(message)
    for key in TEXT_KEYS:
        if changed.get(key):
            changed[key] = of_text(changed[key])
    if message.get("tool_calls"):
        changed["tool_calls"] = [_with_strings(call, of_call) for call in message["tool_calls"]]
    return changed


def _with_strings(call: Message, change: Callable[[str], str]) -> dict[str, Any]:
    function = call["function"]
    arguments = _changed(function["arguments"], change)
    return {**call, "function": {**function, "name": change(function["name"]), "arguments": arguments}}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value


def strings_of(message: Message) -> Iterator[str]:
    """Yield all strings of a message that a record's author wrote."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    with_strings(message, note, note)
    yield from found


def num_characters(message: Message) -> int:
    """Return the number of characters that the model must generate: text, reasoning, names and arguments of calls."""
    calls = sum(
        len(call["function"]["name"]) + len(_text_of_arguments(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    )
    return len(message.get("content") or "") + len(message.get("reasoning_content", "")) + calls


def _text_of_arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# -- what a rendering lacks --------------------------------------------------------------------------------------------


def missing_part(message: Message, rendered: str, with_reasoning: bool) -> str | None:
    """Return a description of a part of `message` that does not occur in `rendered`, or None if all of it does.

    White space around a text does not count, since many templates trim it.
    """
    texts = {"content": message.get("content"), "`input`": message.get("input")}
    if with_reasoning:
        texts["reasoning"] = message.get("reasoning_content")
    for name, text in texts.items():
        if text and not _occurs(text, rendered, may_be_json=message["role"] == Role.TOOL.value):
            return f"its {name} {_short(text)}"
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if function["name"] not in rendered:
            return f"its call of {function['name']!r}"
        for leaf in _leaves(function["arguments"]):
            if not any(spelling in rendered for spelling in _spellings(leaf)):
                return f"the argument {_short(str(leaf))} of its call of {function['name']!r}"
    return None


def _occurs(text: str, rendered: str, may_be_json: bool) -> bool:
    if text.strip() in rendered:
        return True
    if may_be_json and any(spelling in rendered for spelling in _spellings(text)):
        return True
    position = 0
    for part in _THINKING.split(text):
        position = rendered.find(part.strip(), position)
        if position < 0:
            return False
    return "think>" in text


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and plain values of a call's arguments."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _spellings(value: Any) -> tuple[str, ...]:
    """Return the ways in which templates write a value: as JSON, as Python, or the text itself."""
    if isinstance(value, str):
        written = (json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1])
        return (value.strip(), *written)
    return (json.dumps(value), repr(value))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
