"""Parts of the kinds' rules on record formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagecoach_api.draft import Draft, DraftStage, Fault, configs
from stagecoach_api.fields import FieldPath
from stagecoach_api.references import PREFERENCE_FORMATS, Format, RecordSource
from stagecoach_api.training import MeasuredTraining


def training_sets(config: MeasuredTraining) -> Iterator[tuple[FieldPath, RecordSource]]:
    """Yield the data sets a stage trains and measures on, each with its path."""
    yield from numbered(("data",), config.data)
    yield from numbered(("heldOut", "sets"), config.held_out.sets)


def numbered(path: FieldPath, sources: Sequence[RecordSource]) -> Iterator[tuple[FieldPath, RecordSource]]:
    for index, source in enumerate(sources):
        yield (*path, index), source


def wrong_format(stage: DraftStage, path: FieldPath, source: RecordSource, rule: str, remedy: str) -> Fault:
    return Fault(stage.at(*path, "format"), str(source.format), rule, remedy)


def only_preferences(draft: Draft, kind: type[MeasuredTraining]) -> Iterator[Fault]:
    """Yield a fault for every data set of the stages of a kind that is known not to be preferences."""
    for stage, config in configs(draft, kind):
        for path, source in training_sets(config):
            if source.format is not Format.AUTO and source.format not in PREFERENCE_FORMATS:
                yield wrong_format(
                    stage,
                    path,
                    source,
                    "these records do not state which answer is preferred",
                    "give preferences (pairs, comparison, ranked), or train on these in an `sft` stage",
                )
