"""Problems of a run, with everything needed to fix them: where, the value found, the rule, what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_VALUE_CHARACTERS = 80
MAX_PROBLEMS_SHOWN = 100


@dataclass(frozen=True)
class Problem:
    """One problem."""

    path: str
    """Field path, such as `stages.tune.sft.optimizer.learningRate`. Empty for the whole document."""

    value: Any
    """Value found there; `MISSING` if there was none."""

    rule: str
    """What must hold, as a clause: `must be at most 10`."""

    remedy: str
    """What to do, as an instruction: `write a value of at most 10`."""

    line: int | None = None
    """Line of the run file, from 1; None if unknown or if the value came from elsewhere."""

    source: str = ""
    """File the value came from, or the `--set` that gave it. Empty if unknown."""

    def __str__(self) -> str:
        place = self.source
        if self.line is not None:
            place = f"{self.source}:{self.line}" if self.source else f"line {self.line}"
        where = ": ".join(part for part in (place, self.path) if part)
        got = "" if self.value is MISSING else f" (got {format_value(self.value)})"
        return f"{where}: {self.rule}{got}; {self.remedy}" if where else f"{self.rule}{got}; {self.remedy}"


class _Missing:
    """The value of a field that is absent."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


class InvalidRun(Exception):
    """A run that cannot be accepted, with all its problems."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = "1 problem in the run:" if count == 1 else f"{count} problems in the run:"
        shown = [f"- {problem}" for problem in self.problems[:MAX_PROBLEMS_SHOWN]]
        more = [f"- and {count - MAX_PROBLEMS_SHOWN:,} more"] if count > MAX_PROBLEMS_SHOWN else []
        return "\n".join([head, *shown, *more])


_USER_IN_URI = re.compile(r"//[^/@\s]+@")


def format_value(value: Any) -> str:
    """Format a value as JSON on one line, shortened, without credentials in a URI."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = _USER_IN_URI.sub("//***@", text)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed word most similar to `word`, whatever its case; None if there is no similar one."""
    by_lower = {_plain(candidate): candidate for candidate in allowed}
    close = difflib.get_close_matches(_plain(word), by_lower, n=1, cutoff=0.6)
    begun = [candidate for candidate in by_lower if len(word) > 1 and candidate.startswith(_plain(word))]
    found = close or begun
    return by_lower[found[0]] if found else None


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def suggest(word: str, allowed: Sequence[str]) -> str:
    """Return a sentence with the word that was probably meant and the allowed ones."""
    near = nearest(word, allowed)
    known = ", ".join(allowed) if allowed else "none"
    return f"did you mean `{near}`? There are: {known}" if near is not None else f"use one of: {known}"
