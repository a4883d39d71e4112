"""The steps of the `data` pipeline. Each is a small class with one method and its own counters.

A step returns the record, possibly changed, or the reason for which it is dropped. To add one: a member of
`stagecoach_api.kinds.data.DataStep`, a class here, a line in `STEPS`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from stagecoach_api.character_sets import Script
from stagecoach_api.kinds.data import (
    CharacterShare,
    DataStep,
    Deduplicate,
    Length,
    Match,
    Normalize,
    Repetition,
    UnicodeForm,
)
from stagecoach_trainer.data.records import Answer, Record, Turn
from stagecoach_trainer.runtime.errors import UserError

HASH_BYTES = 16
"""128 bits: the chance that any two of 10^12 texts collide is below 10^-14."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Result of a step that drops a record."""

    reason: str


class Step(Protocol):
    """One step of the pipeline."""

    def apply(self, record: Record) -> Record | Dropped: ...


@dataclass
class StepCounter:
    """A step with counters of what it did."""

    label: str
    """The step's name, with its position appended if the pipeline has several steps of that name."""

    step: Step
    seen: int = 0
    changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def apply(self, record: Record) -> Record | Dropped:
        """Run the step and count what it did."""
        self.seen += 1
        result = self.step.apply(record)
        if isinstance(result, Dropped):
            self.dropped[result.reason] += 1
            return Dropped(f"{self.label}.{result.reason}")
        if result is not record:
            self.changed += 1
        return result


def content_hash(record: Record, key: bytes = b"") -> bytes:
    """Return a 16-byte hash of a record's content, each text trimmed; its source does not matter.

    `deduplicate` and the split rely on equal content giving equal hashes. Each `key` (up to 64 bytes) gives an
    independent hash.
    """
    hasher = hashlib.blake2b(digest_size=HASH_BYTES, key=key)
    if record.text is not None:
        hasher.update(record.text.strip().encode())
        return hasher.digest()
    for turn in record.messages:
        # \x1c and \x1d (file and group separator) make "a" + "bc" hash differently from "ab" + "c".
        more = f"{turn.name or ''}\x1d{turn.call_id or ''}\x1e" if turn.name or turn.call_id else ""
        hasher.update(f"{turn.role.value}\x1d{turn.content.strip()}\x1d{turn.input.strip()}\x1c{more}".encode())
        hasher.update(_more_of(turn))
    hasher.update((record.tools or "").encode())
    for answer in record.answers:
        verdict = answer.rank if answer.rank is not None else answer.liked
        hasher.update(f"\x1c{verdict}\x1d{answer.content.strip()}".encode())
        hasher.update(_more_of(answer))
    return hasher.digest()


def _more_of(turn: Turn | Answer) -> bytes:
    """Return the reasoning and the calls of a turn, for a hash; nothing if it has neither."""
    reasoning = f"\x1e{turn.reasoning.strip()}" if turn.reasoning.strip() else ""
    calls = "".join(f"\x1f{call.name}\x1d{call.arguments}\x1d{call.id or ''}" for call in turn.calls)
    return (reasoning + calls).encode()


def prompt_hash(record: Record, key: bytes = b"") -> bytes:
    """Like `content_hash` without the answers of a preference record: equal for all records with the same prompt."""
    return content_hash(replace(record, answers=()) if record.answers else record, key)


class NormalizeStep:
    """Normalises Unicode, whitespace and empty lines."""

    _LINE_END = re.compile(r"\r\n?|[\v\f\x85\u2028\u2029]")
    _BLANKS = re.compile(r"[^\S\n]{2,}|[^\S\n ]")
    _EMPTY_LINES = re.compile(r"\n(?: ?\n){2,}")

    def __init__(self, config: Normalize) -> None:
        self._form: Any = None if config.unicode is UnicodeForm.NONE else config.unicode.value
        self._collapse = config.collapse_whitespace

    def apply(self, record: Record) -> Record:
        if record.text is not None:
            text = self.clean(record.text)
            return record if text == record.text else replace(record, text=text)
        turns = tuple(
            replace(
                turn,
                content=self.clean(turn.content),
                input=self.clean(turn.input),
                reasoning=self.clean(turn.reasoning),
            )
            for turn in record.messages
        )
        answers = tuple(
            replace(answer, content=self.clean(answer.content), reasoning=self.clean(answer.reasoning))
            for answer in record.answers
        )
        if (turns, answers) == (record.messages, record.answers):
            return record
        return replace(record, messages=turns, answers=answers)

    def clean(self, text: str) -> str:
        """Return the normalised text."""
        # `is_normalized` has a quick check (Unicode UAX #15, section 9) that spares most texts the normalisation.
        if self._form is not None and not text.isascii() and not unicodedata.is_normalized(self._form, text):
            text = unicodedata.normalize(self._form, text)
        if not self._collapse:
            return text
        text = self._LINE_END.sub("\n", text)
        text = self._BLANKS.sub(" ", text)
        return self._EMPTY_LINES.sub("\n\n", text).strip()


class LengthStep:
    """Drops records with too few or too many characters."""

    def __init__(self, config: Length) -> None:
        self._min = config.min_characters
        self._max = config.max_characters

    def apply(self, record: Record) -> Record | Dropped:
        length = len(record.content.strip())
        if length < self._min:
            return Dropped("tooShort")
        if self._max is not None and length > self._max:
            return Dropped("tooLong")
        return record


class MatchStep:
    """Keeps or drops records that contain a regular expression."""

    def __init__(self, config: Match, where: str) -> None:
        import re2  # runs in linear time, so no pattern can stall the stage

        self._keeps = config.keep is not None
        pattern = config.keep if config.keep is not None else config.drop
        options = re2.Options()
        options.log_errors = False
        try:
            self._search: Callable[[str], object] = re2.compile(pattern, options).search
        except re2.error as error:
            member = "keep" if self._keeps else "drop"
            raise UserError(
                f"{where}.match.{member}: {pattern!r} is not a valid RE2 pattern: {_message_of(error)}; "
                "RE2 has no look-arounds and no back-references"
            ) from error

    def apply(self, record: Record) -> Record | Dropped:
        matched = self._search(record.content) is not None
        if matched == self._keeps:
            return record
        return Dropped("notMatched" if self._keeps else "matched")


SCRIPTS = {
    # Han (with extensions and compatibility forms), kana, bopomofo, hangul; punctuation belongs to no script.
    Script.CJK: re.compile(
        "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
        "\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9d"
        "\U00020000-\U0003ffff]+"
    ),
    Script.LATIN: re.compile(
        "[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a]+"
    ),
    Script.ALPHANUMERIC: re.compile(r"[^\W_]+"),
}
_NOT_BLANK = re.compile(r"\S+")


def count_characters(pattern: re.Pattern[str], text: str) -> int:
    """Return the number of characters of `text` that matches of `pattern` cover."""
    return sum(map(len, pattern.findall(text)))


class CharacterShareStep:
    """Drops records with too small a share of one script among their non-blank characters."""

    def __init__(self, config: CharacterShare) -> None:
        self._pattern = SCRIPTS[config.script]
        self._reason = f"{config.script.value}Share"
        self._at_least = config.at_least

    def apply(self, record: Record) -> Record | Dropped:
        text = record.content
        total = count_characters(_NOT_BLANK, text)
        share = count_characters(self._pattern, text) / total if total else 0.0
        return record if share >= self._at_least else Dropped(self._reason)


class RepetitionStep:
    """Drops records with many duplicate lines or one dominant character (after Gopher's rules, arXiv 2112.11446)."""

    def __init__(self, config: Repetition) -> None:
        self._max_lines = config.max_duplicate_lines
        self._max_character = config.max_top_character

    def apply(self, record: Record) -> Record | Dropped:
        text = record.content
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        if lines and 1 - len(set(lines)) / len(lines) > self._max_lines:
            return Dropped("duplicateLines")
        characters = Counter(text)
        for blank in [character for character in characters if character.isspace()]:
            del characters[blank]
        total = characters.total()
        if total and max(characters.values()) / total > self._max_character:
            return Dropped("topCharacter")
        return record


class DeduplicateStep:
    """Drops exact duplicates across all sources, keeping the first. Needs about 110 bytes of memory per record."""

    def __init__(self, config: Deduplicate) -> None:
        del config  # it has no settings
        self._seen: set[bytes] = set()

    def apply(self, record: Record) -> Record | Dropped:
        key = content_hash(record)
        if key in self._seen:
            return Dropped("duplicate")
        self._seen.add(key)
        return record


STEPS: dict[str, Callable[[Any, str], Step]] = {
    "normalize": lambda config, _: NormalizeStep(config),
    "length": lambda config, _: LengthStep(config),
    "match": MatchStep,
    "character_share": lambda config, _: CharacterShareStep(config),
    "repetition": lambda config, _: RepetitionStep(config),
    "deduplicate": lambda config, _: DeduplicateStep(config),
}
"""Factories of the steps by their member of `DataStep`; called with its value and field path."""


def build_steps(configs: Sequence[DataStep]) -> list[StepCounter]:
    """Return the pipeline. Raises UserError if a pattern does not compile."""
    named = [(name, getattr(config, name)) for config in configs for name in STEPS if getattr(config, name) is not None]
    times = Counter(name for name, _ in named)
    pipeline = []
    for index, (name, config) in enumerate(named):
        alias = DataStep.model_fields[name].alias or name
        label = alias if times[name] == 1 else f"{alias}{index + 1}"
        pipeline.append(StepCounter(label, STEPS[name](config, f"steps[{index}]")))
    return pipeline


def _message_of(error: Exception) -> str:
    message = error.args[0] if error.args else str(error)
    return message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
