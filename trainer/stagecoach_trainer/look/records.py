"""The first records of every local source: whether they can be read, and whether the stage can use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from stagecoach_api.fields import FieldPath, walk_values
from stagecoach_api.kinds.data import DataStage
from stagecoach_api.references import PREFERENCE_FORMATS, Format, RecordSource
from stagecoach_api.stage_kind import StageConfig
from stagecoach_api.store import StoreEntry, StoreError, list_external
from stagecoach_api.stores.base import FolderLocation, parse_location
from stagecoach_trainer.data.notes import DISLIKED, LIKED, Notes, warnings_of
from stagecoach_trainer.data.reading import Malformed, proposal, read_path
from stagecoach_trainer.data.records import PREFERENCES, Record, kind_of
from stagecoach_trainer.look.finding import Finding
from stagecoach_trainer.runtime.errors import UserError

MAX_RECORDS = 64
"""Records of each source that are looked at: enough to see its layout, few enough to take no time."""

TEXT, CONVERSATION = "text", "conversation"
NAMES = {TEXT: "plain text", CONVERSATION: "conversations", PREFERENCES: "preference records"}
EXPECTED: dict[str, tuple[frozenset[str], str]] = {
    "pretrain.data": (frozenset({TEXT}), "make text of them in a `data` stage, or train on them in an `sft` stage"),
    "pretrain.heldOut.sets": (frozenset({TEXT}), "make text of them in a `data` stage"),
    "rewardModel.data": (frozenset({PREFERENCES}), "give preferences (pairs, comparison, ranked)"),
    "rewardModel.heldOut.sets": (frozenset({PREFERENCES}), "give preferences (pairs, comparison, ranked)"),
    "dpo.data": (frozenset({PREFERENCES}), "give preferences (pairs, comparison, ranked)"),
    "dpo.heldOut.sets": (frozenset({PREFERENCES}), "give preferences (pairs, comparison, ranked)"),
    "ppo.data": (frozenset({CONVERSATION, PREFERENCES}), "give conversations, whose last answer is left out"),
    "ppo.pretraining.data": (frozenset({TEXT, CONVERSATION}), "give text or conversations"),
    "evaluate.exactMatch.data": (frozenset({CONVERSATION}), "give conversations whose last turn is the right answer"),
    "evaluate.rewards.data": (frozenset({CONVERSATION, PREFERENCES}), "give conversations"),
}
"""Kinds of records that a stage can use, by the field of the source, and what to do about others. Any, if it is not
listed."""


def look_at_records(kind: str, config: StageConfig, local: dict[str, str]) -> Iterator[Finding]:
    """Yield what is wrong with the first records of a stage's sources.

    Args:
        kind: Name of the stage's kind.
        config: Its configuration.
        local: Absolute URIs of the inputs on this machine, by the URI as written.
    """
    kinds: dict[str, FieldPath] = {}
    for path, value in walk_values(config, (kind,)):
        if isinstance(value, RecordSource) and value.uri in local:
            for finding in _look_at_source(path, value, local[value.uri], config):
                if isinstance(finding, Finding):
                    yield finding
                else:
                    kinds.setdefault(finding, path)
    if isinstance(config, DataStage) and len(kinds) > 1:
        first, second = list(kinds.items())[:2]
        yield Finding(
            (*second[1], "uri"),
            str(second[0]),
            f"has {NAMES[second[0]]}, and another source has {NAMES[first[0]]}",
            "make one `data` stage for each: a data set holds one kind",
        )


def _look_at_source(path: FieldPath, source: RecordSource, uri: str, config: StageConfig) -> Iterator[Finding | str]:
    """Yield what is wrong with a source, and the kind of its records."""
    records: list[Record] = []
    malformed: list[Malformed] = []
    notes: Notes = Counter()
    try:
        with _as_local_path(uri) as folder:
            for item in islice(read_path(folder, source, notes), MAX_RECORDS):
                (malformed if isinstance(item, Malformed) else records).append(item)  # type: ignore[arg-type]
    except (UserError, StoreError) as error:
        yield Finding.from_error((*path, "uri"), source.uri, str(error), "correct the file, or give another one")
        return
    if not records and not malformed:
        yield Finding((*path, "uri"), source.uri, "has no records", "check the path")
        return
    if malformed and not _are_tolerated(len(malformed), len(records), config):
        yield _unreadable(path, source, malformed, len(records) + len(malformed))
    kinds = Counter(kind_of(record) for record in records)
    yield from _unusable(path, source, kinds, config)
    yield from _remarkable(path, source, notes)
    yield from kinds


@contextmanager
def _as_local_path(uri: str) -> Iterator[Path]:
    """Return the file or the folder at a URI; the files that match a glob are gathered in a temporary folder."""
    root, entries = list_external(uri, hash_file=lambda path: "")
    location, base = parse_location(uri), parse_location(root)
    if not isinstance(location, FolderLocation) or not isinstance(base, FolderLocation):
        raise StoreError(uri, "is not on this machine; give a local path")
    if location.path.exists():
        yield location.path
        return
    with TemporaryDirectory(prefix="stagecoach-look-") as folder:
        _link(entries, base.path, Path(folder))
        yield Path(folder)


def _link(entries: Sequence[StoreEntry], source: Path, folder: Path) -> None:
    for entry in entries[:MAX_RECORDS]:  # a record is in one file, so more files are never opened
        target = folder / entry.key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source / entry.key)


def _are_tolerated(num_malformed: int, num_records: int, config: StageConfig) -> bool:
    """Whether the stage may leave these records out: a few of them, if it is set to. The first ones are no fair sample
    of the others."""
    return isinstance(config, DataStage) and config.max_malformed_share > 0 and num_records > 0 < num_malformed


def _unreadable(path: FieldPath, source: RecordSource, malformed: Sequence[Malformed], num_read: int) -> Finding:
    layout = "" if source.format is Format.AUTO else f" as `{source.format}`"
    reason, count = Counter(item.reason for item in malformed).most_common(1)[0]
    first = next(item for item in malformed if item.reason == reason)
    others = len(malformed) - count
    which = "none" if len(malformed) == num_read else f"{len(malformed)} cannot"
    rule = f"of the first {num_read} records {which}{' can' if which == 'none' else ''} be read{layout}"
    text = f"{rule}: {first.where}: {reason}{f'; and {others} for other reasons' if others else ''}"
    if which != "none":
        remedy = "correct them; a `data` stage can count and leave out malformed records (`maxMalformedShare`)"
        return Finding((*path, "uri"), source.uri, text, remedy)
    if source.format is Format.AUTO:
        return Finding((*path, "uri"), source.uri, text, "correct them, or set `format` and `fields`")
    remedy = proposal(first.looks_like, source.format) or "set the `format` they have, and `fields` where names differ"
    return Finding((*path, "format"), str(source.format), text, remedy)


def _remarkable(path: FieldPath, source: RecordSource, notes: Notes) -> Iterator[Finding]:
    """Yield a warning for each thing in the records that is not read, or may not be meant."""
    # The number of liked answers is left out: files are often sorted by it.
    counts = {name: count for name, count in notes.items() if name not in (LIKED, DISLIKED)}
    for sentence in warnings_of(counts, f"in the first {MAX_RECORDS} records"):
        remedy = "map names with `fields`, or correct the records, unless this is meant"
        yield Finding((*path, "uri"), source.uri, sentence, remedy, fatal=False)


def _unusable(path: FieldPath, source: RecordSource, kinds: Counter[str], config: StageConfig) -> Iterator[Finding]:
    """Yield a finding if the stage cannot use records of these kinds."""
    field = ".".join(str(step) for step in path if isinstance(step, str))
    if kinds[PREFERENCES] and field in ("sft.data", "sft.heldOut.sets") and getattr(config, "hindsight", None) is None:
        remedy = "add `hindsight: {}`, or train on them in a `rewardModel` or `dpo` stage"
        yield Finding((*path, "uri"), source.uri, "has preference records, each with several answers", remedy)
    if field not in EXPECTED or source.format in PREFERENCE_FORMATS:
        return
    expected, remedy = EXPECTED[field]
    wrong = [kind for kind in kinds if kind not in expected]
    if wrong:
        wanted = " or ".join(NAMES[kind] for kind in sorted(expected))
        yield Finding((*path, "uri"), source.uri, f"has {NAMES[wrong[0]]}, and the stage reads {wanted} here", remedy)
