"""`data`: read sources, filter, deduplicate, split, write shards with an index and a funnel report."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from stagecoach_api.base import Count, Fraction, Identifier, Model, Pattern, Weight
from stagecoach_api.character_sets import Script
from stagecoach_api.references import RecordSource
from stagecoach_api.training import require_exactly_one


class DataSource(RecordSource):
    """Files to read: JSONL, JSON, plain text or Parquet, plain or compressed (.gz, .zst); a glob is allowed."""

    name: Identifier | None = None
    """What reports and each record's `source` field call it. None: the file's or stage's name."""

    weight: Weight = 1.0
    """How often each training record is written: 1 once, 2 twice, 0.5 every second one (chosen by its content's
    hash). Held-out records are written once. Default: 1."""

    @property
    def label(self) -> str:
        return self.name or super().label


class UnicodeForm(StrEnum):
    """Unicode normalisation forms (UAX #15)."""

    NONE = "none"
    NFC = "NFC"
    NFKC = "NFKC"


class Normalize(Model):
    """Change the text itself; every record passes."""

    unicode: UnicodeForm = UnicodeForm.NFC
    """Unicode normalisation form. Default: NFC."""

    collapse_whitespace: bool = True
    """Make runs of blanks one blank, at most one empty line in a row, and strip both ends. Default: true."""


class Length(Model):
    """Drop records whose text is too short or too long. A conversation counts the text of all its turns."""

    min_characters: Count = 1
    """Fewest characters. Default: 1."""

    max_characters: Count | None = None
    """Most characters. None: no limit."""


class Match(Model):
    """Keep or drop by a regular expression (RE2: linear time, no backtracking)."""

    keep: Pattern | None = None
    """Only records in which this is found pass. None: `drop` is given."""

    drop: Pattern | None = None
    """Records in which this is found are dropped. None: `keep` is given."""

    @model_validator(mode="after")
    def _one(self) -> Match:
        require_exactly_one(self, "keep", "drop")
        return self


class CharacterShare(Model):
    """Drop records with too small a share of characters of one script; blanks do not count."""

    script: Script
    """The characters that are counted."""

    at_least: Fraction
    """Smallest share of the record's characters that must belong to `script`."""


class Repetition(Model):
    """Drop records that repeat themselves (after Gopher's rules, arXiv 2112.11446)."""

    max_duplicate_lines: Fraction = 0.3
    """Largest share of lines that are copies of an earlier line. Default: 0.3."""

    max_top_character: Fraction = 0.3
    """Largest share that one character may have of all, blanks apart. Default: 0.3."""


class Deduplicate(Model):
    """Keep the first record of those with the same text (exact, after trimming the ends)."""


class DataStep(Model):
    """One step of the pipeline; steps run in the order given. Exactly one member."""

    normalize: Normalize | None = None
    """Change the text itself. None: another member is given."""

    length: Length | None = None
    """Filter by length. None: another member is given."""

    match: Match | None = None
    """Filter by pattern. None: another member is given."""

    character_share: CharacterShare | None = None
    """Filter by script. None: another member is given."""

    repetition: Repetition | None = None
    """Filter by repetition. None: another member is given."""

    deduplicate: Deduplicate | None = None
    """Exact deduplication over all sources. None: another member is given."""

    @model_validator(mode="after")
    def _one(self) -> DataStep:
        require_exactly_one(self, *type(self).model_fields)
        return self


class Order(StrEnum):
    """Order of the training records in the shards."""

    SHUFFLED = "shuffled"
    AS_GIVEN = "asGiven"


class DataStage(Model):
    """Turn raw sources into a clean, deduplicated data set in two parts, train and held out."""

    sources: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=256)]
    """Where the records come from, in this order."""

    steps: Annotated[tuple[DataStep, ...], Field(max_length=64)] = (
        DataStep(normalize=Normalize()),
        DataStep(length=Length()),
        DataStep(deduplicate=Deduplicate()),
    )
    """The pipeline, in order. Default: normalise, drop the empty, deduplicate."""

    held_out_share: Fraction = 0.0
    """Share of the records kept apart for measurement, chosen by their content's hash so that no duplicate stands in
    both parts. Default: 0."""

    order: Order = Order.SHUFFLED
    """Order of training records: shuffled by the run's seed, or as the sources give them. Default: shuffled."""

    max_malformed_share: Fraction = 0.0
    """Largest share of records that may be unreadable (bad UTF-8, malformed JSON, missing fields). They are counted
    and named by file and line; above the share the stage fails. Default: 0."""

    shard_bytes: Annotated[int, Field(ge=1024, le=1 << 40)] = 256 * 1024 * 1024
    """Size at which a new shard is begun, in bytes of JSON before compression. Default: 256 MiB."""
