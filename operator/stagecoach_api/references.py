"""How a stage names what it reads: another stage's artifact, or a URI."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from stagecoach_api.base import Identifier, Model, Name, Uri, Weight


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

    stage: Name | None = None
    """Name of a stage of this run whose artifact is read. None: `uri` is given."""

    uri: Uri | None = None
    """A folder or file: `s3://…`, `file:///…`, or a path relative to `spec.storage.inputs`. None: `stage` is given."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Reference:
        if (self.stage is None) == (self.uri is None):
            raise ValueError("give exactly one of `stage` and `uri`")
        return self

    @property
    def key(self) -> str:
        """The input's name in a resolved stage: `stage:NAME` or `uri:URI`."""
        return f"stage:{self.stage}" if self.stage is not None else f"uri:{self.uri}"


class FieldMapping(Model):
    """Names of the source's fields where they differ from the format's own."""

    text: Identifier | None = None
    """Field of a `text` record. None: `text`."""

    instruction: Identifier | None = None
    """Field of an `alpaca` record. None: `instruction`."""

    input: Identifier | None = None
    """Field of an `alpaca` record. None: `input`."""

    output: Identifier | None = None
    """Field of an `alpaca` record. None: `output`."""

    messages: Identifier | None = None
    """Field that holds the turns. None: `conversations` for `sharegpt`, `messages` for `messages`."""

    prompt: Identifier | None = None
    """Field with what answers reply to, text or turns, in a preference record. None: `prompt`, `conversations`,
    `messages`, `question` or `instruction`, whichever is there; `user_input` for `comparison`."""

    chosen: Identifier | None = None
    """Field of the preferred answer. None: `chosen`; `completion_a` for `comparison`."""

    rejected: Identifier | None = None
    """Field of the other answer. None: `rejected`; `completion_b` for `comparison`."""

    answers: Identifier | None = None
    """Field with the list of a `ranked` record's answers. None: `answers`."""

    completion: Identifier | None = None
    """Field of a `labels` record's answer. None: `completion`."""

    label: Identifier | None = None
    """Field that says whether a `labels` record's answer is a good one. None: `label`."""


class RecordSource(Reference):
    """Records to read: one part of a `data` artifact, or files at a URI (a glob is allowed)."""

    split: Split = Split.TRAIN
    """Part of a `data` artifact. Default: train. Ignored for files."""

    format: Format = Format.AUTO
    """Layout of the records. Default: auto, told from the first record. A `data` artifact knows its own."""

    fields: FieldMapping = FieldMapping()
    """Field names that differ from the format's own. Default: none do."""

    max_samples: int | None = Field(default=None, ge=1)
    """Read at most this many records, from the first on. None: all."""

    @property
    def label(self) -> str:
        """What reports call this source where it has no name of its own."""
        return self.stage or (self.uri or "").rsplit("/", 1)[-1]


class WeightedSource(RecordSource):
    """Records to train on, and their share of the mix."""

    name: Identifier | None = None
    """What phases and reports call this set. None: the stage's or the file's name."""

    weight: Weight | None = None
    """Share of the training tokens drawn from this set, relative to the other weights. None: in proportion to its size.
    Give a weight to every set or to none. A set whose share exceeds its size is passed over more often (replay)."""

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
