"""What a stage works with: its configuration's inputs as local paths, folders to write to, a stop flag, progress."""

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
    """What a stage says of itself when it is done; its files lie in `context.output`."""

    tokens: int = 0
    """Training tokens consumed."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Headline figures for the manifest and the final table."""


@dataclass(frozen=True)
class StageContext:
    """Everything around a stage that is not its configuration."""

    resolved: ResolvedStage
    store: Store
    work: Path
    """Scratch folder of this attempt."""
    cache: Path
    """Folder shared by all attempts on this machine; content-addressed."""
    world: World
    progress: Progress
    stop: threading.Event
    """Set when the stage is asked to stop."""

    @property
    def output(self) -> Path:
        """Folder whose content becomes the artifact."""
        return self.work / "output"

    @property
    def seed(self) -> int:
        return self.resolved.seed

    def input(self, reference: Reference) -> ResolvedInput:
        """Return where `reference` was found."""
        return self.resolved.inputs[reference.key]

    def fetch(self, reference: Reference) -> Path:
        """Return a local folder or file with the input's content; an artifact's bytes are checked first."""
        return self.fetch_resolved(self.input(reference))

    def fetch_resolved(self, found: ResolvedInput) -> Path:
        """Like `fetch`, for an input that a model card names."""
        self.progress.report("fetch")
        path = fetch_input(found, self.store, self.cache, self.resolved.storage_endpoint, self.resolved.storage_region)
        self.progress.report("prepare")  # whatever is done with it next: reading, loading, importing
        return path
