"""What a source has that is not read, or that its user may not have meant: counted while reading, reported once.

Notes are counters by name. They are among the counts of a data set in reports, and `warnings_of` makes sentences of
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from stagecoach_api.conversation import Role
from stagecoach_trainer.data.messages import listed
from stagecoach_trainer.data.nulls import NULLS_KEPT, NULLS_LEFT_OUT
from stagecoach_trainer.data.records import Record

FIELD = "fieldNotRead."
"""Beginning of the counts of records with a field that is not read; its name follows."""

FILE = "fileNotRead."
EMPTY_FILE = "fileWithoutRecords."
MAX_NAMES = 200
"""Distinct names that are counted; others are counted together."""

OTHERS = "(others)"
BLANK_ANSWERS = "blankAnswers"
SCORES_DISAGREE = "scoresDisagree"
SPELLED_TOKENS = "spelledTokens"
UNREAD_NAMES = "unreadNames"
"""Counts of encoders: records that spell a special token, and those with a name that the template does not render."""

LIKED, DISLIKED = "liked", "disliked"

Notes = Counter[str]


def note_record(notes: Notes, record: Record) -> None:
    """Count what a record has that is not read or may not be meant."""
    for name in record.unread:
        notes[_bounded(notes, FIELD + name, FIELD)] += 1
    for name in record.nulls:
        notes[name] += 1
    if record.scores_disagree:
        notes[SCORES_DISAGREE] += 1
    blank = sum(turn.role is Role.ASSISTANT and not turn.content.strip() and not turn.calls for turn in record.messages)
    if blank:
        notes[BLANK_ANSWERS] += blank
    for answer in record.answers:
        if answer.liked is not None:
            notes[LIKED if answer.liked else DISLIKED] += 1


def note_files(notes: Notes, names: Iterable[str]) -> None:
    """Count files of a source that are not read."""
    for name in names:
        notes[_bounded(notes, FILE + name, FILE)] += 1


def note_empty_file(notes: Notes, name: str) -> None:
    """Count a file of a source that has no records, such as one that was not written to its end."""
    notes[_bounded(notes, EMPTY_FILE + name, EMPTY_FILE)] += 1


def _bounded(notes: Notes, key: str, prefix: str) -> str:
    return key if key in notes or len(notes) < MAX_NAMES else prefix + OTHERS


def warnings_of(counts: Mapping[str, int], name: str) -> list[str]:
    """Return a sentence for each thing that was noted about the data set `name`."""
    return [f"{name}: {sentence}" for sentence in _sentences(counts)]


def warn_of_notes(warn: Callable[[str], None], counts: Mapping[str, int], name: str) -> None:
    """Call `warn` with each sentence about the data set `name`."""
    for sentence in warnings_of(counts, name):
        warn(sentence)


def _sentences(counts: Mapping[str, int]) -> Iterator[str]:
    fields = [f"{key.removeprefix(FIELD)} ({counts[key]:,} records)" for key in counts if key.startswith(FIELD)]
    files = [key.removeprefix(FILE) for key in counts if key.startswith(FILE)]
    if fields:
        yield f"fields not read: {listed(sorted(fields))}"
    if files:
        yield f"files not read: {listed(sorted(files))}"
    if empty := [key.removeprefix(EMPTY_FILE) for key in counts if key.startswith(EMPTY_FILE)]:
        yield f"files without a record: {listed(sorted(empty))}"
    if count := counts.get(BLANK_ANSWERS):
        yield f"{count:,} answers of the assistant are blank: a model that learns them answers nothing"
    if count := counts.get(SCORES_DISAGREE):
        yield f"in {count:,} records the preferred answer has a lower score than the other; `fields` may be swapped"
    if count := counts.get(SPELLED_TOKENS):
        yield (
            f"{count:,} records spell a special token, such as an end of text, which is read as plain text; clean "
            "them if it was meant as a token"
        )
    if count := counts.get(NULLS_LEFT_OUT):
        yield (
            f"in {count:,} records, nulls were left out of tools and of calls whose tool does not allow them: writers "
            "of JSON lines fill them in"
        )
    if count := counts.get(NULLS_KEPT):
        yield (
            f"in {count:,} records a call has arguments that are null, which a model learns to write; remove them "
            "from the records if a writer of JSON lines has filled them in"
        )
    if count := counts.get(UNREAD_NAMES):
        yield f"in {count:,} records a turn has a `name` that the template does not render"


def one_class_warnings(counts: Collection[Mapping[str, int]]) -> list[str]:
    """Return a warning if all judged answers of all data sets together are good, or all are bad."""
    liked, disliked = (sum(each.get(name, 0) for each in counts) for name in (LIKED, DISLIKED))
    if bool(liked) == bool(disliked):
        return []
    only = "liked" if liked else "disliked"
    return [f"all {liked + disliked:,} answers are {only}: a model learns from the contrast of good and bad ones"]
