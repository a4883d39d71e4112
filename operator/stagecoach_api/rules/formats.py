"""Parts of the kinds' rules on record formats."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

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


def wrong_formats(
    stage: DraftStage,
    sources: Iterable[tuple[FieldPath, RecordSource]],
    formats: Collection[Format],
    rule: str,
    remedy: str,
) -> Iterator[Fault]:
    """Yield a fault for every source whose records have one of `formats`."""
    for path, source in sources:
        if source.format in formats:
            yield Fault(stage.at(*path, "format"), str(source.format), rule, remedy)


def only_preferences(draft: Draft, kind: type[MeasuredTraining]) -> Iterator[Fault]:
    """Yield a fault for every data set of the stages of a kind that is known not to be preferences."""
    for stage, config in configs(draft, kind):
        yield from wrong_formats(
            stage,
            training_sets(config),
            set(Format) - {Format.AUTO, *PREFERENCE_FORMATS},
            "these records do not state which answer is preferred",
            "give preferences (pairs, comparison, ranked), or train on these in an `sft` stage",
        )
