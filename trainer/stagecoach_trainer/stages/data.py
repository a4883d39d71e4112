"""`data`: read sources, run records through the pipeline, split, write shards, account for every record."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from stagecoach_api.artifacts import REPORT, REPORT_TEXT
from stagecoach_api.kinds.data import DataSource, DataStage, Order
from stagecoach_api.references import Split
from stagecoach_trainer.data.funnel import (
    MAX_COUNTED,
    MAX_LISTED,
    Funnel,
    describe_malformed,
    report_json,
    report_markdown,
    total,
)
from stagecoach_trainer.data.reading import INDEX, Malformed, read_path
from stagecoach_trainer.data.records import Record, kind_of
from stagecoach_trainer.data.shards import RecordSink, ShardWriter, ShufflingWriter, split_index
from stagecoach_trainer.data.steps import Dropped, StepCounter, build_steps, content_hash, prompt_hash
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.runtime.inputs import input_files

RECORDS_PER_HEARTBEAT = 512
EXPANSION = 4
"""Estimated ratio of record bytes to (often compressed) file bytes; only sets the number of spool files."""


def run(config: DataStage, context: StageContext) -> StageOutcome:
    """Write the data set of `config` to `context.output`.

    Raises:
        UserError: A source is missing or mixes layouts, too many records are malformed, or no record is left.
        Interrupted: The stage was asked to stop; the next attempt starts from scratch.
    """
    pipeline = build_steps(config.steps)
    labels = source_labels(config.sources)
    paths = [context.fetch(source) for source in config.sources]
    sinks = _open_sinks(config, context, paths)
    work = _Progress(config, context, pipeline, sinks, {label: Funnel() for label in labels})
    for source, label, path in zip(config.sources, labels, paths, strict=True):
        work.read_source(source, label, path)
    work.check()
    splits = {split.value: split_index(sinks[split].close()) for split in Split}
    report = report_json(work.funnels, pipeline, work.malformed)
    index = {"format": work.format, "splits": splits, "sources": report["sources"]}
    _write_json(context.output / INDEX, index)
    _write_json(context.output / REPORT, report)
    (context.output / REPORT_TEXT).write_text(report_markdown(report), encoding="utf-8")
    return StageOutcome(metrics=_metrics(work.funnels, splits))


def source_labels(sources: tuple[DataSource, ...]) -> list[str]:
    """Return each source's label; a repeated label gets its position appended."""
    labels: list[str] = []
    for index, source in enumerate(sources):
        label = source.label
        labels.append(label if label not in labels else f"{label}#{index + 1}")
    return labels


def _open_sinks(config: DataStage, context: StageContext, paths: list[Path]) -> dict[Split, RecordSink]:
    train = ShardWriter(context.output, Split.TRAIN.value, config.shard_bytes)
    held_out = ShardWriter(context.output, Split.HELD_OUT.value, config.shard_bytes)
    if config.order is Order.AS_GIVEN:
        return {Split.TRAIN: train, Split.HELD_OUT: held_out}

    def on_range(done: int, num_ranges: int) -> None:
        context.progress.report("write", done, num_ranges, "ranges")

    expected = EXPANSION * sum(_bytes_below(path) for path in paths)
    shuffling = ShufflingWriter(train, context.work / "spool", context.seed, expected, on_range)
    return {Split.TRAIN: shuffling, Split.HELD_OUT: held_out}


def _bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in input_files(path))


@dataclass
class _Progress:
    """Running state of the stage: counts, and the sinks that records are written to."""

    config: DataStage
    context: StageContext
    pipeline: list[StepCounter]
    sinks: dict[Split, RecordSink]
    funnels: dict[str, Funnel]
    """Funnel by source label."""

    malformed: list[Malformed] = field(default_factory=list)
    """The first `MAX_LISTED` malformed records."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Malformed records by reason; of reasons, the first `MAX_COUNTED`."""

    format: str = ""
    """`text`, `conversation` or `preferences`."""

    num_read: int = 0

    def read_source(self, source: DataSource, label: str, path: Path) -> None:
        """Process all records of a source."""
        funnel = self.funnels[label]
        for item in self._watched(read_path(path, source, funnel.notes)):
            funnel.read += 1
            if isinstance(item, Malformed):
                funnel.malformed += 1
                if item.reason in self.reasons or len(self.reasons) < MAX_COUNTED:
                    self.reasons[item.reason] += 1
                if len(self.malformed) < MAX_LISTED:
                    self.malformed.append(item)
                continue
            self._check_kind(item, label)
            self._process(replace(item, source=label), source.weight, funnel)

    def _watched(self, records: Iterator[Record | Malformed]) -> Iterator[Record | Malformed]:
        """Report progress and honour the stop flag while reading."""
        for record in records:
            if self.num_read % RECORDS_PER_HEARTBEAT == 0:
                self.context.progress.report("read", self.num_read, None, "records")
                if self.context.stop.is_set():
                    raise Interrupted(f"stopped after {self.num_read:,} records; the next attempt starts from scratch")
            self.num_read += 1
            yield record

    def _process(self, record: Record, weight: float, funnel: Funnel) -> None:
        """Run one record through the pipeline and write the result."""
        for step in self.pipeline:
            result = step.apply(record)
            if isinstance(result, Dropped):
                funnel.dropped[result.reason] += 1
                return
            record = result
        # Split by prompt: if one answer to a prompt is held out, its other answers must not be trained on.
        if _draw(prompt_hash(record, f"split:{self.context.seed}".encode())) < self.config.held_out_share:
            self.sinks[Split.HELD_OUT].add(record)
            funnel.held_out += 1
        else:
            copies = _copies(record, weight, self.context.seed)
            if copies == 0:
                funnel.dropped["weight"] += 1
                return
            for _ in range(copies):
                self.sinks[Split.TRAIN].add(record)
            funnel.copies += copies
            funnel.train += 1
        funnel.characters += len(record.content)

    def _check_kind(self, record: Record, label: str) -> None:
        kind = kind_of(record)
        if self.format and kind != self.format:
            raise UserError(
                f"{record.where}: source {label} has a {kind} record, but earlier records are {self.format} records; "
                "a data set holds one kind: make one `data` stage for each"
            )
        self.format = kind

    def check(self) -> None:
        """Raise UserError if the data set is empty or has too many malformed records."""
        for label, funnel in self.funnels.items():
            funnel.check(label)
        whole = total(self.funnels.values())
        if whole.read and whole.malformed / whole.read > self.config.max_malformed_share:
            formats = {source.label: source.format for source in self.config.sources}
            problems = describe_malformed(self.malformed, self.reasons, formats)
            raise UserError(
                f"{whole.malformed:,} of {whole.read:,} records are malformed "
                f"({whole.malformed / whole.read:.2%}; maxMalformedShare allows "
                f"{self.config.max_malformed_share:.2%}): {problems}. Fix them, or raise "
                "maxMalformedShare to leave them out"
            )
        if not whole.kept:
            raise UserError(_why_empty(whole, list(self.funnels)))
        if 0 < self.config.held_out_share < 1 and not (whole.held_out and whole.train):
            empty = "train" if whole.held_out else "heldout"
            raise UserError(
                f"heldOutShare: at {self.config.held_out_share} of {whole.kept:,} records the split `{empty}` is "
                "empty; change the share or give more records"
            )


def _draw(hash_: bytes) -> float:
    """Return a number in [0, 1) that is a function of the hash, so equal text gives equal numbers."""
    return int.from_bytes(hash_[:7], "big") / (1 << 56)


def _copies(record: Record, weight: float, seed: int) -> int:
    whole = int(weight)
    part = weight - whole
    return whole + (part > 0 and _draw(content_hash(record, f"weight:{seed}".encode())) < part)


def _why_empty(whole: Funnel, labels: list[str]) -> str:
    if not whole.read:
        return f"the data set is empty: the sources have no records ({', '.join(labels)}); check their `uri`"
    reason, count = max([("malformed", whole.malformed), *sorted(whole.dropped.items())], key=lambda item: item[1])
    return (
        f"the data set is empty: none of {whole.read:,} records is left; most, {count:,}, were dropped by `{reason}`: "
        "relax that step or check the source"
    )


def _metrics(funnels: dict[str, Funnel], splits: dict[str, dict[str, int]]) -> dict[str, float]:
    whole = total(funnels.values())
    return {
        "records.read": whole.read,
        "records.malformed": whole.malformed,
        "records.dropped": whole.dropped.total(),
        "records.train": splits[Split.TRAIN.value]["records"],
        "records.heldOut": splits[Split.HELD_OUT.value]["records"],
        "characters.train": splits[Split.TRAIN.value]["characters"],
        "characters.heldOut": splits[Split.HELD_OUT.value]["characters"],
    }


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
