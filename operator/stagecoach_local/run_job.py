"""The input of the local driver: a planned run, and where and how to run it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stagecoach_api.store import Store
from stagecoach_api.stores.retry import OUTAGE_PAUSE_SECONDS
from stagecoach_core.values import Plan
from stagecoach_local.machine import Machine, num_ranks
from stagecoach_local.workspace import Invocation, RunFolder, Workspace

LAUNCHER = (sys.executable, "-m", "stagecoach_trainer.launcher")
"""Command of an attempt's process."""

POLL_SECONDS = 0.2
GRACE_SECONDS = 330.0
"""Time between asking an attempt to stop and killing it; longer than the launcher's own grace period."""


@dataclass(frozen=True)
class Job:
    """A planned run, and where and how to run it."""

    plan: Plan
    file: Path
    workspace: Workspace
    store: Store
    machine: Machine
    storage_endpoint: str | None = None
    storage_region: str | None = None
    nproc: int | None = None
    """Ranks of training stages; None to use their resources, limited by this machine."""
    suspend: bool = False
    """`spec.suspend` of the run."""
    cancel: bool = False
    """`spec.cancel` of the run."""
    keep_going: bool = False
    """Whether `spec.onFailure` of the run is `continue`."""
    selected: frozenset[str] | None = None
    """Stages to work on; None for all."""
    forced: frozenset[str] = frozenset()
    """Stages to run again even if they are finished."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """Estimated durations of stages in seconds, by name, as far as they are known."""
    invocation: Invocation = field(default_factory=Invocation)
    launcher: tuple[str, ...] = LAUNCHER
    poll_seconds: float = POLL_SECONDS
    grace_seconds: float = GRACE_SECONDS
    store_pause_seconds: float = OUTAGE_PAUSE_SECONDS

    @property
    def folder(self) -> RunFolder:
        """Folder of the run's record and attempts."""
        return self.workspace.run(self.plan.namespace, self.plan.run)

    def kind(self, stage: str) -> str:
        return self.plan.stages[stage].stage.kind

    def ranks(self, stage: str) -> int:
        """Return the number of ranks of a stage on this machine."""
        return num_ranks(self.plan.stages[stage].stage, self.machine, self.nproc)
