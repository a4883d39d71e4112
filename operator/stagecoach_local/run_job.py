"""What the local driver is given: a run, planned, and where and how it is to be worked on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from stagecoach_api.store import Store
from stagecoach_api.stores.retry import OUTAGE_PAUSE_SECONDS
from stagecoach_core.values import Plan
from stagecoach_local.machine import Machine, num_ranks
from stagecoach_local.workspace import Invocation, RunFolder, Workspace

LAUNCHER = (sys.executable, "-m", "stagecoach_trainer.launcher")
"""What an attempt runs as."""

POLL_SECONDS = 0.2
GRACE_SECONDS = 330.0
"""How long an attempt that was asked to stop may take before it is killed: longer than the launcher itself waits."""


@dataclass(frozen=True)
class Job:
    """A run, planned, and where and how it is to be worked on."""

    plan: Plan
    file: Path
    workspace: Workspace
    store: Store
    machine: Machine
    storage_endpoint: str | None = None
    storage_region: str | None = None
    nproc: int | None = None
    """Ranks of training stages. None: what their resources say, as far as the machine goes."""
    suspend: bool = False
    """The run itself says that it is to stop (`spec.suspend`)."""
    cancel: bool = False
    """The run itself says that it is to end (`spec.cancel`)."""
    selected: frozenset[str] | None = None
    forced: frozenset[str] = frozenset()
    invocation: Invocation = field(default_factory=Invocation)
    launcher: tuple[str, ...] = LAUNCHER
    poll_seconds: float = POLL_SECONDS
    grace_seconds: float = GRACE_SECONDS
    store_pause_seconds: float = OUTAGE_PAUSE_SECONDS

    @property
    def folder(self) -> RunFolder:
        """Where the run's record and its attempts lie."""
        return self.workspace.run(self.plan.namespace, self.plan.run)

    def kind(self, stage: str) -> str:
        return self.plan.stages[stage].stage.kind

    def ranks(self, stage: str) -> int:
        """Return the ranks a stage has on this machine."""
        return num_ranks(self.plan.stages[stage].stage, self.machine, self.nproc)
