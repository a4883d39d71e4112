"""The declaration of a stage kind: everything the rest of the code needs to know about it, in one place.

A kind is a module of `stagecoach_api.kinds` with its configuration models and a `KIND`, and a module of the same
name in `stagecoach_trainer.stages` with its `run`. Both are found by name; no list mentions them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from pydantic.alias_generators import to_camel

from stagecoach_api.base import Model
from stagecoach_api.draft import Rule
from stagecoach_api.fields import Step, fields_of, shape_of
from stagecoach_api.references import ArtifactType, RecordSource, Reference
from stagecoach_api.summary_tables import MetricTable, SummaryTable


class Ranks(StrEnum):
    """The ranks that work on a stage."""

    ONE = "one"
    """Rank 0 alone; the others end at once."""
    ALL = "all"
    """As many as the stage's `resources` ask for, in one process group."""


class StageConfig(Model):
    """Base of the kinds' configurations, with what drivers and the CLI ask of any of them."""

    trains: ClassVar[bool] = False
    """`run` is a training loop: it stops at the next step when the context's `stop` is set, writes
    checkpoints, and uses transformers for language models only. Other stages are interrupted where they are."""

    @property
    def offloads(self) -> bool:
        """Return whether DeepSpeed offloads a state to the CPU, for which a single rank needs a process group too."""
        return False

    @property
    def downloads(self) -> bool:
        """Return whether the stage may download from the Hugging Face Hub; no other stage does."""
        return False

    def planned_tokens(self) -> int | None:
        """Return the tokens a stage is to train on; None if it does not train or that depends on its data."""
        return None

    def new_vocabulary_size(self) -> int:
        """Return the most pieces a stage adds to its base vocabulary."""
        return 0


RECORDS_ONLY = frozenset({ArtifactType.RECORDS})


@dataclass(frozen=True)
class StageKind:
    """One kind of stage. Raises TypeError if its name or `reads` do not fit."""

    name: str
    """Its name in YAML, in camelCase."""
    position: int
    """Place in lists of kinds, lowest first."""
    summary: str
    """One sentence in the imperative mood: the description of the member of `Stage`."""
    config: type[StageConfig]
    makes: ArtifactType
    """What other stages may read from it."""
    reads: Mapping[str, frozenset[ArtifactType]] = field(default_factory=dict)
    """Artifacts that each `Reference` of the configuration accepts, by its path without indexes, such as
    `rewards.model`. Sources of records are not listed: they read records."""
    ranks: Ranks = Ranks.ONE
    heavy: bool = False
    """Keeps every core busy; otherwise it mostly reads and writes. On one machine few heavy stages run side by side."""
    release: bool = False
    """Its artifact is for use outside the run: the summary shows sample answers and the artifact's folder."""
    tables: tuple[SummaryTable, ...] = (MetricTable("Metrics"),)
    """Tables of its stages' metrics in the summary of a run."""
    rules: tuple[Rule, ...] = ()
    """Rules of this kind over a draft, beyond the constraints that its models declare."""

    def __post_init__(self) -> None:
        if to_camel(self.module) != self.name:
            raise TypeError(f"kind `{self.name}`: the name must be in camelCase, such as `{to_camel(self.module)}`")
        references = {path for path, model in references_of(self.config) if not issubclass(model, RecordSource)}
        if references != set(self.reads):
            missing, unknown = sorted(references - set(self.reads)), sorted(set(self.reads) - references)
            raise TypeError(f"kind `{self.name}`: `reads` lacks {missing} and has {unknown}, which are not references")

    @property
    def module(self) -> str:
        """Return the name of its modules, such as `reward_model`."""
        return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", self.name).lower()

    def readable_at(self, path: Sequence[Step]) -> frozenset[ArtifactType]:
        """Return the artifacts that the reference at a path below the configuration accepts."""
        return self.reads.get(".".join(step for step in path if isinstance(step, str)), RECORDS_ONLY)


def reads(*artifacts: ArtifactType) -> frozenset[ArtifactType]:
    return frozenset(artifacts)


def references_of(model: type[Model], path: str = "") -> Iterator[tuple[str, type[Reference]]]:
    """Yield the path without indexes, and the model, of every reference below `model`."""
    for name, info in fields_of(model).items():
        shape = shape_of(info.annotation)
        inner = shape.model or (shape_of(shape.item).model if shape.item is not None else None)
        place = f"{path}.{name}" if path else name
        if inner is not None and issubclass(inner, Reference):
            yield place, inner
        elif inner is not None:
            yield from references_of(inner, place)
