"""What people judged: the better of two answers, marks, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stagecoach_trainer.data.records import RecordError

VERDICT_FIELDS = ("preferred", "preference", "better", "winner", "choice", "label")
"""Fields in which a comparison may name its better answer."""

LOWER_IS_BETTER = {"score": False, "rank": True}
"""Numbers with which a comparison may judge its answers, as in `score_a` and `score_b`."""

COMPARISON_FIGURES = tuple(f"{figure}_{letter}" for figure in LOWER_IS_BETTER for letter in "ab")

PAIR_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
)  # fmt: skip
"""Fields in which a pair may state the scores of its answers: TRL's, and those of other published sets."""

TIE_VALUES = frozenset({"tie", "equal", "same", "both"})


def is_tie(value: Mapping[str, Any], names: tuple[str, str], answers: tuple[str, str], verdict: str | None) -> bool:
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
            raise RecordError(_disagrees(names, f"`{name}` is {preferred!r:.60}"))
        tie = True
    for figure, lower_is_better in LOWER_IS_BETTER.items():
        first, second = (_judgement(value, f"{figure}_{letter}") for letter in "ab")
        if first is None or second is None:
            continue
        if first != second and (first < second) != lower_is_better:
            raise RecordError(_disagrees(names, f"`{figure}_a` is {first:g} and `{figure}_b` {second:g}"))
        tie = tie or first == second
    return tie


def scores_disagree(value: Mapping[str, Any]) -> bool:
    """Return whether the rejected answer of a pair has a higher score than the chosen one."""
    for chosen, rejected in PAIR_SCORES:
        first, second = number_of(value.get(chosen)), number_of(value.get(rejected))
        if first is not None and second is not None and first < second:
            return True
    return False


def marks_of(items: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the answers' ranks, or their negated scores: lower is better for both. Raises RecordError."""
    key = "rank" if all("rank" in item for item in items) else "score"
    marks = []
    for index, item in enumerate(items):
        mark = number_of(item.get(key))
        if mark is None or (key == "rank" and (mark < 1 or mark != int(mark))):
            allowed = "whole numbers from 1 on as `rank`, or numbers as `score`"
            raise RecordError(
                f"`{name}[{index}]`: every answer of a record needs one of {allowed}, got {item.get(key)!r:.60}"
            )
        marks.append(mark if key == "rank" else -mark)
    return marks


def ranks_disagree(items: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a score contradicts the ranks, if the answers have both."""
    found = [(number_of(item.get("rank")), number_of(item.get("score"))) for item in items]
    both = [(rank, score) for rank, score in found if rank is not None and score is not None]
    return any(first[0] < second[0] and first[1] < second[1] for first in both for second in both)


def number_of(value: Any) -> float | None:
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


def _judgement(value: Mapping[str, Any], name: str) -> float | None:
    """Return the number with which an answer was judged, or None. Raises RecordError if it is not numeric."""
    if value.get(name) is None:
        return None
    number = number_of(value[name])
    if number is None:
        raise RecordError(f"`{name}` must be a number, got {value[name]!r:.60}; mend it, or leave it out")
    return number


def _is_one_of(value: Any, allowed: frozenset[str] | set[str]) -> bool:
    return isinstance(value, str) and value.strip().lower() in allowed


def _disagrees(names: tuple[str, str], verdict: str) -> str:
    return (
        f"`{names[0]}` must be the preferred answer, but {verdict}; swap the two answers in the data, or name the "
        "preferred one's field in `fields.chosen`"
    )
