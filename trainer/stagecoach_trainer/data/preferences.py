"""Convert raw values to preference records: a prompt, and answers to it that people compared.

Whatever the layout, ranked answers are returned best first, with ranks from 1; equal ranks are ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, Format
from stagecoach_trainer.data.records import Answer, Record, RecordError, Turn
from stagecoach_trainer.data.turns import (
    MESSAGES_TURNS,
    REASONING_FIELDS,
    Parse,
    describe,
    list_of_turns,
    optional_string_of,
    string_of,
    tools_of,
    turn_keys_of,
    turn_of,
)

PROMPT_FIELDS = ("prompt", "conversations", "messages", "question", "instruction")
"""Fields that may contain the prompt of a preference record, in order of precedence."""

MIN_ANSWERS, MAX_ANSWERS = 2, 64

VERDICT_FIELDS = ("preferred", "preference", "better", "winner", "choice", "label")
"""Fields in which a comparison may name its better answer."""

LOWER_IS_BETTER = {"score": False, "rank": True}
"""Numbers with which a comparison may judge its answers, as in `score_a` and `score_b`."""

TIE_VALUES = frozenset({"tie", "equal", "same", "both"})
LIKED_VALUES = {"good": True, "bad": False}


def detect_preferences(value: Mapping[str, Any], fields: FieldMapping) -> Format | None:
    """Detect the layout of a preference source from its first record. None if it is not a preference record."""
    if "completion_a" in value and "completion_b" in value:
        return Format.COMPARISON
    if (fields.chosen or "chosen") in value and (fields.rejected or "rejected") in value:
        return Format.PAIRS
    answers = value.get(fields.answers or "answers")
    if isinstance(answers, list) and len(answers) >= MIN_ANSWERS and _prompt_field(value, fields.prompt) is not None:
        return Format.RANKED
    if (fields.completion or "completion") in value and (fields.label or "label") in value:
        return Format.LABELS
    return None


def preference_parser(format_: Format, fields: FieldMapping) -> Parse:
    """Return the parser of a preference source. `fields`: names that differ from the layout's own."""
    match format_:
        case Format.PAIRS:
            return lambda value: _pair(value, fields)
        case Format.COMPARISON:
            return lambda value: _comparison(value, fields)
        case Format.RANKED:
            return lambda value: _ranked(value, fields)
        case Format.LABELS:
            return lambda value: _label(value, fields)
        case _:
            raise ValueError(f"{format_} is not a layout of preferences")


def canonical_preferences(value: Mapping[str, Any]) -> Record:
    """Parse a preference record of a `data` artifact. Raises RecordError."""
    turns = list_of_turns(value.get("messages"), "messages", MESSAGES_TURNS)
    answers = []
    for index, item in enumerate(_items(value, "answers")):
        if not isinstance(item, Mapping):
            raise RecordError(f"`answers[{index}]` must be an object, got {type(item).__name__}")
        rank, liked = item.get("rank"), item.get("liked")
        if not ((isinstance(rank, int) and liked is None) or (isinstance(liked, bool) and rank is None)):
            raise RecordError(f"`answers[{index}]` must have a `rank`, a whole number, or `liked`, true or false")
        said = turn_of({**item, "role": "assistant"}, MESSAGES_TURNS)
        answers.append(Answer(said.content, rank, liked, said.reasoning, said.calls))
    return Record(messages=tuple(turns), tools=tools_of(value), answers=tuple(answers))


# -- layouts -----------------------------------------------------------------------------------------------------------


def _pair(value: Mapping[str, Any], fields: FieldMapping) -> Record:
    names = (fields.chosen or "chosen", fields.rejected or "rejected")
    prompt = _optional_prompt(value, fields.prompt)
    if prompt is None:
        prompt, answers = _pair_without_prompt(value, names, fields)
    else:
        answers = [_answer(value, name, prompt) for name in names]
    return _record(value, prompt, [_judged(answers[0], rank=1), _judged(answers[1], rank=2)])


def _pair_without_prompt(
    value: Mapping[str, Any], names: tuple[str, str], fields: FieldMapping
) -> tuple[list[Turn], list[Turn]]:
    """Return the common first turns of two conversations and their last turns, as in data sets of the HH kind."""
    if not all(isinstance(value.get(name), list) for name in names):
        _required_prompt(value, fields.prompt)
    chosen, rejected = ([*_system(value), *_turns(value, name)] for name in names)
    if chosen[:-1] != rejected[:-1]:
        raise RecordError(
            f"`{names[0]}` and `{names[1]}` must be the same conversation up to their last turns; give the prompt "
            "apart, as `prompt`"
        )
    return chosen[:-1], [_only_answer(turns[-1:], name) for turns, name in zip((chosen, rejected), names, strict=True)]


def _comparison(value: Mapping[str, Any], fields: FieldMapping) -> Record:
    """Parse HuangDi's layout, in which `completion_a` is the better answer; verdicts in other fields must agree."""
    names = (fields.chosen or "completion_a", fields.rejected or "completion_b")
    prompt = _required_prompt(value, fields.prompt or "user_input")
    better, other = (_answer(value, name, prompt) for name in names)
    is_tie = _is_tie(value, names, (better.content, other.content), fields.label)
    return _record(value, prompt, [_judged(better, rank=1), _judged(other, rank=1 if is_tie else 2)])


def _ranked(value: Mapping[str, Any], fields: FieldMapping) -> Record:
    name = fields.answers or "answers"
    items = _items(value, name)
    if not MIN_ANSWERS <= len(items) <= MAX_ANSWERS:
        raise RecordError(f"`{name}` must have {MIN_ANSWERS} to {MAX_ANSWERS} answers, got {len(items)}")
    if all(isinstance(item, str) for item in items):
        answers = [Answer(string_of({name: item}, name), rank) for rank, item in enumerate(items, 1)]
    else:
        answers = _ranked_objects(items, name)
    return _record(value, _required_prompt(value, fields.prompt), answers)


def _ranked_objects(items: Sequence[Any], name: str) -> list[Answer]:
    """Return answers that have a `rank` (1 is best) or a `score` (higher is better) each, best first."""
    if not all(isinstance(item, Mapping) for item in items):
        raise RecordError(f"`{name}` must be all strings, the best first, or all objects with `rank` or `score`")
    key = "rank" if all("rank" in item for item in items) else "score"
    marks = []
    for index, item in enumerate(items):
        mark = _number(item.get(key))
        if mark is None or (key == "rank" and (mark < 1 or mark != int(mark))):
            allowed = "whole numbers from 1 on as `rank`, or numbers as `score`"
            raise RecordError(
                f"`{name}[{index}]`: every answer of a record needs one of {allowed}, got {item.get(key)!r}"
            )
        marks.append(mark if key == "rank" else -mark)  # so that lower is better for both
    said = [_said(item, f"{name}[{index}]") for index, item in enumerate(items)]
    ranks = {mark: rank for rank, mark in enumerate(sorted(set(marks)), 1)}
    ranked = [_judged(turn, rank=ranks[mark]) for turn, mark in zip(said, marks, strict=True)]
    return sorted(ranked, key=lambda answer: answer.rank or 0)


def _label(value: Mapping[str, Any], fields: FieldMapping) -> Record:
    name = fields.label or "label"
    label = value.get(name)
    liked = LIKED_VALUES.get(label.strip().lower()) if isinstance(label, str) else None
    if isinstance(label, int | float) and label in (0, 1):  # True and False are instances of int
        liked = bool(label)
    if liked is None:
        got = repr(label) if name in value else describe(value, name)
        raise RecordError(f'`{name}` must be true or false, 1 or 0, "good" or "bad", got {got}')
    prompt = _required_prompt(value, fields.prompt)
    return _record(value, prompt, [_judged(_answer(value, fields.completion or "completion", prompt), liked=liked)])


def _judged(said: Turn, rank: int | None = None, liked: bool | None = None) -> Answer:
    return Answer(said.content, rank, liked, said.reasoning, said.calls)


def _record(value: Mapping[str, Any], prompt: Sequence[Turn], answers: Sequence[Answer]) -> Record:
    if not prompt:
        raise RecordError("the prompt has no turn, so there is nothing that the answers reply to")
    if prompt[-1].role is Role.ASSISTANT:
        raise RecordError(
            "the prompt ends with a turn of the assistant, and the answers would follow it; end it with the user's turn"
        )
    return Record(messages=tuple(prompt), tools=tools_of(value), answers=tuple(answers))


# -- verdicts in a comparison ------------------------------------------------------------------------------------------


def _is_tie(value: Mapping[str, Any], names: tuple[str, str], answers: tuple[str, str], verdict: str | None) -> bool:
    """Return whether the record judges its two answers to be equally good.

    Raises RecordError if it prefers the second one or its verdict cannot be parsed, so that answers are never swapped
    silently.
    """
    tie = False
    for name in (verdict,) if verdict else VERDICT_FIELDS:
        preferred = value.get(name)
        if preferred is None or preferred in (names[0], answers[0]) or _is_one_of(preferred, {"a"}):
            continue
        if not _is_one_of(preferred, TIE_VALUES):
            raise RecordError(_disagrees(names, f"`{name}` is {preferred!r}"))
        tie = True
    for figure, lower_is_better in LOWER_IS_BETTER.items():
        first, second = (_judgement(value, f"{figure}_{letter}") for letter in "ab")
        if first is None or second is None:
            continue
        if first != second and (first < second) != lower_is_better:
            raise RecordError(_disagrees(names, f"`{figure}_a` is {first:g} and `{figure}_b` {second:g}"))
        tie = tie or first == second
    return tie


def _is_one_of(value: Any, allowed: frozenset[str] | set[str]) -> bool:
    return isinstance(value, str) and value.strip().lower() in allowed


def _disagrees(names: tuple[str, str], verdict: str) -> str:
    return (
        f"`{names[0]}` must be the preferred answer, but {verdict}; swap the two answers in the data, or name the "
        "preferred one's field in `fields.chosen`"
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _prompt_field(value: Mapping[str, Any], name: str | None) -> str | None:
    return next((field for field in ((name,) if name else PROMPT_FIELDS) if value.get(field) is not None), None)


def _required_prompt(value: Mapping[str, Any], name: str | None) -> list[Turn]:
    prompt = _optional_prompt(value, name)
    if prompt is None:
        allowed = f"`{name}`" if name else ", ".join(f"`{field}`" for field in PROMPT_FIELDS)
        there = ", ".join(sorted(map(str, value))) or "none"
        raise RecordError(f"there is no prompt: it is looked for under {allowed} (there are: {there})")
    return prompt


def _optional_prompt(value: Mapping[str, Any], name: str | None) -> list[Turn] | None:
    """Return the turns that the answers reply to. None if the value has no field for them."""
    field = _prompt_field(value, name)
    if field is None:
        return None
    if isinstance(value[field], str):
        more = (optional_string_of(value, "input") or "") if field == "instruction" else ""
        return [*_system(value), Turn(Role.USER, string_of(value, field), more)]
    if not isinstance(value[field], list):
        raise RecordError(f"`{field}` must be a string or a list of turns, got {describe(value, field)}")
    return [*_system(value), *_turns(value, field)]


def _system(value: Mapping[str, Any]) -> list[Turn]:
    system = optional_string_of(value, "system")
    return [Turn(Role.SYSTEM, system)] if system else []


def _turns(value: Mapping[str, Any], name: str) -> list[Turn]:
    items = value[name]
    return list_of_turns(items, name, turn_keys_of(items[0] if items else None))


def _answer(value: Mapping[str, Any], name: str, prompt: Sequence[Turn]) -> Turn:
    """Return the assistant's turn of an answer: a string, a turn, or turns that may repeat the prompt before it."""
    answer = value.get(name)
    if isinstance(answer, str):
        return Turn(Role.ASSISTANT, string_of(value, name))
    if isinstance(answer, Mapping):
        try:
            return _only_answer([turn_of(answer, turn_keys_of(answer))], name)
        except RecordError as error:
            raise RecordError(f"`{name}`: {error}") from error
    if not isinstance(answer, list):
        raise RecordError(f"`{name}` must be a string, a turn or a list of turns, got {describe(value, name)}")
    turns = _turns(value, name)
    # The answer's turns may repeat the prompt with or without its system prompt.
    for front in (list(prompt), [turn for turn in prompt if turn.role is not Role.SYSTEM]):
        if len(turns) > len(front) and turns[: len(front)] == front:
            return _only_answer(turns[len(front) :], name)
    return _only_answer(turns, name)


def _only_answer(turns: Sequence[Turn], name: str) -> Turn:
    """Return the only turn, which must be the assistant's."""
    if len(turns) != 1 or turns[0].role is not Role.ASSISTANT:
        roles = ", ".join(turn.role.value for turn in turns) or "none"
        raise RecordError(f"`{name}` must end in one turn of the assistant behind the prompt, got turns of: {roles}")
    return turns[0]


def _said(item: Mapping[str, Any], where: str) -> Turn:
    """Return the turn of the assistant in an answer with a judgement."""
    name = next((field for field in ("content", "text", "answer", "value") if field in item), "content")
    more = {field: item[field] for field in (*REASONING_FIELDS, "tool_calls") if field in item}
    try:
        return turn_of({"role": "assistant", "content": item.get(name), **more}, MESSAGES_TURNS)
    except RecordError as error:
        raise RecordError(f"`{where}`: {error}") from error


def _items(value: Mapping[str, Any], name: str) -> list[Any]:
    items = value.get(name)
    if not isinstance(items, list):
        raise RecordError(f"`{name}` must be a list of answers, got {describe(value, name)}")
    return items


def _judgement(value: Mapping[str, Any], name: str) -> float | None:
    """Return the number with which an answer was judged, or None. Raises RecordError if it is not numeric."""
    if value.get(name) is None:
        return None
    number = _number(value[name])
    if number is None:
        raise RecordError(f"`{name}` must be a number, got {value[name]!r:.60}; mend it, or leave it out")
    return number


def _number(value: Any) -> float | None:
    """Return a finite number, which may be written as a string; None for anything else, including booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:
        return None  # `float` accepts digit separators such as 1_000, which only Python writes
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
