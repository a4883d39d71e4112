"""How a stage names its inputs: another stage's artifact, or a URI."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Identifier, Model, Name, ShortText, Uri, Weight
from stagecoach_api.constraints import Constraint, exactly_one, given, implies


def hub_advice(name: str, kind: str) -> str:
    """Return how to use a `model` or `dataset` of the Hugging Face Hub, which no run fetches: what it reads has a
    digest before the first stage starts."""
    repository = " --repo-type dataset" if kind == "dataset" else ""
    folder = f"{kind}s/{name.rsplit('/', 1)[-1]}"
    return (
        f"a {kind} of the Hugging Face Hub is fetched before the run: "
        f"`hf download {name}{repository} --local-dir {folder}`, then give that folder, or its copy on S3"
    )


class ArtifactType(StrEnum):
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
    """Layout of the records of a data source."""

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
"""Layouts of records that state which answer is preferred."""


class Reference(Model):
    """An input: the artifact of a stage of this run, or a folder or file at a URI. Exactly one of the two must be
    set."""

    constraints = (exactly_one("stage", "uri"),)

    stage: Name | None = None
    """Name of a stage of this run whose artifact is read. If unset: `uri` is set."""

    uri: Uri | None = None
    """Folder or file: `s3://…`, `file:///…`, or a path relative to `spec.storage.inputs`. If unset: `stage` is set."""

    @property
    def key(self) -> str:
        """Return the input's name in a resolved stage: `stage:NAME` or `uri:URI`."""
        return f"stage:{self.stage}" if self.stage is not None else f"uri:{self.uri}"


FieldName = Annotated[str, Field(min_length=1, max_length=128)]
"""The name of a field of a record, or of a column of a table."""


class FieldMapping(Model):
    """Names of the source's fields, where they differ from the format's own."""

    text: FieldName | None = None
    """Field with the text of a `text` record. If unset: `text`."""

    instruction: FieldName | None = None
    """Field with the instruction of an `alpaca` record. If unset: `instruction`."""

    input: FieldName | None = None
    """Field with the input of an `alpaca` record or of a prompt. If unset: `input`."""

    output: FieldName | None = None
    """Field with the output of an `alpaca` record. If unset: `output`."""

    history: FieldName | None = None
    """Field with the earlier turns of an `alpaca` record, as pairs of question and answer. If unset: `history`."""

    system: FieldName | None = None
    """Field with the system prompt of a conversation. If unset: `system`, `system_prompt` or `system_message`."""

    tools: FieldName | None = None
    """Field with the tools of a conversation, as a list or its JSON. If unset: `tools`, or `functions`."""

    messages: FieldName | None = None
    """Field with the turns of a conversation. If unset: `conversations` for `sharegpt`, `messages` for `messages`."""

    prompt: FieldName | None = None
    """Field with the prompt of a preference record, as text or turns. If unset: the first of `prompt`, `conversations`,
    `messages`, `question` and `instruction` that the record has; `user_input` for `comparison`."""

    chosen: FieldName | None = None
    """Field with the preferred answer of a preference record. If unset: `chosen`; `completion_a` for `comparison`."""

    rejected: FieldName | None = None
    """Field with the other answer of a preference record. If unset: `rejected`; `completion_b` for `comparison`."""

    answers: FieldName | None = None
    """Field with the list of answers of a `ranked` record. If unset: `answers`."""

    completion: FieldName | None = None
    """Field with the answer of a `labels` record. If unset: `completion`, or the last turn of `messages` or
    `conversations`, or `output`."""

    label: FieldName | None = None
    """Field that states whether the answer of a `labels` record is good. If unset: `label` or `kto_tag`."""

    ignore: Annotated[tuple[FieldName, ...], Field(max_length=64)] = ()
    """Fields left out knowingly. A field that would change what is learnt (media, weights, verdicts) is refused unless
    it is listed here; other fields that the format does not read are counted and named in the report."""


class RecordSource(Reference):
    """Records to read: one part of a `data` artifact, or files at a URI, which may be a glob."""

    constraints = (
        Constraint(
            implies(given("dataset"), given("uri")),
            "`dataset` names a set of the folder at `uri`",
            "give the folder's `uri`, or leave `dataset` out",
        ),
    )

    split: Split = Split.TRAIN
    """Part of a `data` artifact. Ignored for files."""

    format: Format = Format.AUTO
    """Layout of the records. `auto` detects it from the first record, and refuses one that fits two layouts. A `data`
    artifact states its own."""

    fields: FieldMapping = FieldMapping()
    """Names of the source's fields, where they differ from the format's own."""

    dataset: ShortText | None = None
    """Name of a set in LLaMA-Factory's `dataset_info.json` in the folder at `uri`, which states the file, layout and
    fields. If unset: all data files at `uri` are read."""

    max_samples: int | None = Field(default=None, ge=1)
    """Number of records to read, starting with the first. If unset: all."""

    @property
    def label(self) -> str:
        """Return the name of this source in reports if it has no `name`."""
        return self.stage or self.dataset or (self.uri or "").rstrip("/").rsplit("/", 1)[-1]


class WeightedSource(RecordSource):
    """Records to train on and their share of the mix."""

    name: Identifier | None = None
    """Name of the set in phases and reports. If unset: the stage's or the file's name."""

    weight: Weight | None = None
    """Share of the training tokens drawn from this set, relative to the other weights. Set it for every set or for
    none. A set whose share exceeds its size is repeated more often than others. If unset: in proportion to its size."""

    @property
    def label(self) -> str:
        return self.name or super().label


class NamedSource(RecordSource):
    """Records with a name, to measure on."""

    name: Identifier
    """Name of the set in reports, such as `zh`."""

    @property
    def label(self) -> str:
        return self.name
