"""A stage's environment: its inputs as local paths, folders to write to, a stop flag, progress reports."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stagecoach_api.artifacts import ResolvedInput, ResolvedStage
from stagecoach_api.references import Reference
from stagecoach_api.store import Store
from stagecoach_trainer.runtime.inputs import fetch_input
from stagecoach_trainer.runtime.progress import Progress
from stagecoach_trainer.runtime.writer import Writer


@dataclass(frozen=True)
class World:
    """This process among the ranks of the stage."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class StageOutcome:
    """The result of a stage, in addition to its files in `context.output`."""

    tokens: int = 0
    """Training tokens consumed."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Main metrics, for the manifest and the final table."""


@dataclass(frozen=True)
class StageContext:
    """Everything a stage uses in addition to its configuration."""

    resolved: ResolvedStage
    store: Store
    work: Path
    """Scratch folder of this attempt."""
    cache: Path
    """Content-addressed folder shared by all attempts on this machine."""
    world: World
    progress: Progress
    stop: threading.Event
    """Set when the stage is asked to stop."""
    writer: Writer | None = None
    """The right to write to the artifact; None where no other attempt can be at work, as in a part of a stage."""

    def confirm_writer(self) -> None:
        """Raise TakenOver if another attempt has the right to write to the artifact now. Rank 0 confirms for all."""
        if self.writer is not None:
            self.writer.check()

    @property
    def output(self) -> Path:
        """The folder whose content becomes the artifact."""
        return self.work / "output"

    @property
    def seed(self) -> int:
        return self.resolved.seed

    def input(self, reference: Reference) -> ResolvedInput:
        """Return the input that `reference` was resolved to."""
        return self.resolved.inputs[reference.key]

    def fetch(self, reference: Reference) -> Path:
        """Return a local folder or file with the input's content, after checking an artifact's bytes."""
        return self.fetch_resolved(self.input(reference))

    def fetch_resolved(self, found: ResolvedInput) -> Path:
        """Like `fetch`, for an input that is already resolved, such as the base in a model card."""
        self.progress.report("fetch")
        if self.world.is_main:
            self.progress.note(f"input: {found.uri}")
        path = fetch_input(found, self.store, self.cache, self.resolved.storage_endpoint, self.resolved.storage_region)
        self.progress.report("prepare")  # the caller's next work: reading, loading, importing
        return path
