"""`data`: read sources, filter, deduplicate, split, write shards with an index and a funnel report."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Count, Fraction, Identifier, Model, Pattern, Weight
from stagecoach_api.character_sets import Script
from stagecoach_api.constraints import exactly_one
from stagecoach_api.draft import Draft, Fault, configs
from stagecoach_api.references import ArtifactType, RecordSource, Split
from stagecoach_api.stage_kind import StageConfig, StageKind


class DataSource(RecordSource):
    """Files to read: JSONL, JSON, plain text, Parquet, CSV or TSV, plain or compressed (.gz, .zst). The URI may be a
    glob."""

    name: Identifier | None = None
    """Name of the source in reports and in each record's `source` field. If unset: the file's or the stage's name."""

    weight: Weight = 1.0
    """How often each training record is written: 1 once, 2 twice, 0.5 every second one, selected by the hash of its
    content. Held-out records are written once."""

    @property
    def label(self) -> str:
        return self.name or super().label


class UnicodeForm(StrEnum):
    """Unicode normalisation forms (UAX #15)."""

    NONE = "none"
    NFC = "NFC"
    NFKC = "NFKC"


class Normalize(Model):
    """Change the text of every record: of documents, of the turns of conversations, of answers. Calls of tools stay as
    they are."""

    unicode: UnicodeForm = UnicodeForm.NFC
    """Unicode normalisation form."""

    collapse_whitespace: bool = False
    """Replace runs of spaces with one space and runs of empty lines with one, and strip both ends. It flattens the
    indentation of code and the columns of tables, so set it for prose only."""


class Length(Model):
    """Drop records whose text is too short or too long, without blanks at both ends. The text of a conversation is that
    of all its turns."""

    min_characters: Count = 1
    """Smallest number of characters."""

    max_characters: Count | None = None
    """Largest number of characters. If unset: no limit."""


class Match(Model):
    """Keep or drop records by a regular expression (RE2: linear time, no backtracking). Exactly one member must be
    set."""

    constraints = (exactly_one("keep", "drop"),)

    keep: Pattern | None = None
    """Drop records that do not match. If unset: `drop` is set."""

    drop: Pattern | None = None
    """Drop records that match. If unset: `keep` is set."""


class CharacterShare(Model):
    """Drop records with too small a share of characters of one script. Whitespace does not count."""

    script: Script
    """Script whose characters count."""

    at_least: Fraction
    """Smallest share of the record's characters that belong to `script`."""


class Repetition(Model):
    """Drop records that repeat themselves (after Gopher's rules, arXiv 2112.11446)."""

    max_duplicate_lines: Fraction = 0.3
    """Largest share of lines that repeat an earlier line."""

    max_top_character: Fraction = 0.3
    """Largest share of one character among all characters, without whitespace."""


class Deduplicate(Model):
    """Keep the first of the records with the same text (exact, with both ends trimmed)."""


class DataStep(Model):
    """One step of the pipeline. Exactly one member must be set."""

    constraints = (exactly_one("normalize", "length", "match", "character_share", "repetition", "deduplicate"),)

    normalize: Normalize | None = None
    """Change the text. If unset: another member is set."""

    length: Length | None = None
    """Filter by length. If unset: another member is set."""

    match: Match | None = None
    """Filter by a regular expression. If unset: another member is set."""

    character_share: CharacterShare | None = None
    """Filter by script. If unset: another member is set."""

    repetition: Repetition | None = None
    """Filter by repetition. If unset: another member is set."""

    deduplicate: Deduplicate | None = None
    """Remove exact duplicates across all sources. If unset: another member is set."""


class Order(StrEnum):
    """Order of the training records in the shards."""

    SHUFFLED = "shuffled"
    AS_GIVEN = "asGiven"


class DataStage(StageConfig):
    """Turn raw sources into a clean, deduplicated data set with a training part and a held-out part."""

    sources: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=256)]
    """Sources of the records, read in this order."""

    steps: Annotated[tuple[DataStep, ...], Field(max_length=64)] = (
        DataStep(normalize=Normalize()),
        DataStep(length=Length()),
        DataStep(deduplicate=Deduplicate()),
    )
    """Steps of the pipeline, run in this order. The default writes equal characters in one way (Unicode's NFC), drops
    empty records and removes duplicates; blanks and line ends stay as they are."""

    held_out_share: Fraction = 0.0
    """Share of the records held out for measurement, selected by the hash of their content so that no duplicate is in
    both parts."""

    order: Order = Order.SHUFFLED
    """Order of the training records: shuffled by the stage's seed, or as the sources give them."""

    max_malformed_share: Fraction = 0.0
    """Largest share of records that may be unreadable (invalid UTF-8, malformed JSON, missing fields). They are counted
    and listed by file and line. Above this share the stage fails."""

    shard_bytes: Annotated[int, Field(ge=1024, le=1 << 40)] = 256 * 1024 * 1024
    """Size of a shard, in bytes of JSON before compression."""


# -- rules -------------------------------------------------------------------------------------------------------------


def length_limits_are_in_order(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, DataStage):
        for index, step in enumerate(config.steps):
            length = step.length
            if length is None or length.max_characters is None:
                continue
            if length.min_characters > length.max_characters:
                yield Fault(
                    stage.at("steps", index, "length"),
                    length.model_dump(),
                    "`minCharacters` must be at most `maxCharacters`",
                    "swap them, or change one",
                )


def some_source_is_written(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, DataStage):
        if all(source.weight == 0 for source in config.sources):
            yield Fault(stage.at("sources"), [0] * len(config.sources), "all weights are 0", "raise one above 0")


def parts_that_are_read_have_records(draft: Draft) -> Iterator[Fault]:
    """A stage without held-out records has no held-out part; one that holds out all of them has no training part."""
    stages = draft.by_name
    for stage in draft.stages:
        for link in stage.links:
            data = stages[link.target].config if link.target in stages else None
            if ArtifactType.RECORDS not in link.reads or not isinstance(data, DataStage):
                continue
            share, split = data.held_out_share, stage.raw_at(link.path).get("split", Split.TRAIN)
            if (split, share) not in ((Split.HELD_OUT, 0.0), (Split.TRAIN, 1.0)):
                continue
            held, bound, other = ("no", "above 0", "train") if share == 0.0 else ("all", "below 1", "heldout")
            yield Fault(
                (*link.path, "split"),
                split,
                f"`{link.target}` holds out {held} records",
                f"give `{link.target}` a `heldOutShare` {bound}, or read its `{other}` part",
            )


KIND = StageKind(
    name="data",
    position=10,
    summary="Read, filter, deduplicate and split records.",
    config=DataStage,
    makes=ArtifactType.RECORDS,
    tables=(),
    rules=(length_limits_are_in_order, some_source_is_written, parts_that_are_read_have_records),
)
