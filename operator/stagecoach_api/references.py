"""How a stage names what it reads: another stage's artifact, or a URI."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from stagecoach_api.base import Identifier, Model, Name, Uri, Weight
from stagecoach_api.constraints import exactly_one


class Artifact(StrEnum):
    """The kinds of artifact that stages make and other stages read."""

    RECORDS = "records"
    VOCABULARY = "vocabulary"
    MODEL = "model"
    REWARD_MODEL = "rewardModel"
    REPORT = "report"


class Split(StrEnum):
    """The two parts of a `data` artifact."""

    TRAIN = "train"
    HELD_OUT = "heldout"


class Format(StrEnum):
    """How the records of a data source are laid out."""

    AUTO = "auto"
    TEXT = "text"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    MESSAGES = "messages"
    PAIRS = "pairs"
    COMPARISON = "comparison"
    RANKED = "ranked"
    LABELS = "labels"


PREFERENCE_FORMATS = frozenset({Format.PAIRS, Format.COMPARISON, Format.RANKED, Format.LABELS})
"""Layouts of records that say which answer people prefer."""


class Reference(Model):
    """An input: the artifact of a stage of this run, or something that lies at a URI. Exactly one of the two."""

    constraints = (exactly_one("stage", "uri"),)

    stage: Name | None = None
    """Name of a stage of this run whose artifact is read. If unset: `uri` is given."""

    uri: Uri | None = None
    """A folder or file: `s3://…`, `file:///…`, or a path relative to `spec.storage.inputs`. If unset: `stage` is
    given."""

    @property
    def key(self) -> str:
        """The input's name in a resolved stage: `stage:NAME` or `uri:URI`."""
        return f"stage:{self.stage}" if self.stage is not None else f"uri:{self.uri}"


class FieldMapping(Model):
    """Names of the source's fields where they differ from the format's own."""

    text: Identifier | None = None
    """Field of a `text` record. If unset: `text`."""

    instruction: Identifier | None = None
    """Field of an `alpaca` record. If unset: `instruction`."""

    input: Identifier | None = None
    """Field of an `alpaca` record. If unset: `input`."""

    output: Identifier | None = None
    """Field of an `alpaca` record. If unset: `output`."""

    messages: Identifier | None = None
    """Field that holds the turns. If unset: `conversations` for `sharegpt`, `messages` for `messages`."""

    prompt: Identifier | None = None
    """Field with what answers reply to, text or turns, in a preference record. If unset: `prompt`, `conversations`,
    `messages`, `question` or `instruction`, whichever is there; `user_input` for `comparison`."""

    chosen: Identifier | None = None
    """Field of the preferred answer. If unset: `chosen`; `completion_a` for `comparison`."""

    rejected: Identifier | None = None
    """Field of the other answer. If unset: `rejected`; `completion_b` for `comparison`."""

    answers: Identifier | None = None
    """Field with the list of a `ranked` record's answers. If unset: `answers`."""

    completion: Identifier | None = None
    """Field of a `labels` record's answer. If unset: `completion`."""

    label: Identifier | None = None
    """Field that says whether a `labels` record's answer is a good one. If unset: `label`."""


class RecordSource(Reference):
    """Records to read: one part of a `data` artifact, or files at a URI (a glob is allowed)."""

    split: Split = Split.TRAIN
    """Part of a `data` artifact. Default: train. Ignored for files."""

    format: Format = Format.AUTO
    """Layout of the records. Default: auto, told from the first record. A `data` artifact knows its own."""

    fields: FieldMapping = FieldMapping()
    """Field names that differ from the format's own. Default: none do."""

    max_samples: int | None = Field(default=None, ge=1)
    """Read at most this many records, from the first on. If unset: all."""

    @property
    def label(self) -> str:
        """What reports call this source where it has no name of its own."""
        return self.stage or (self.uri or "").rsplit("/", 1)[-1]


class WeightedSource(RecordSource):
    """Records to train on, and their share of the mix."""

    name: Identifier | None = None
    """What phases and reports call this set. If unset: the stage's or the file's name."""

    weight: Weight | None = None
    """Share of the training tokens drawn from this set, relative to the other weights. If unset: in proportion to its
    size. Give a weight to every set or to none. A set whose share exceeds its size is passed over more often
    (replay)."""

    @property
    def label(self) -> str:
        return self.name or super().label


class NamedSource(RecordSource):
    """Records with a name, to measure on."""

    name: Identifier
    """What the report calls this set, for example `zh`."""

    @property
    def label(self) -> str:
        return self.name
