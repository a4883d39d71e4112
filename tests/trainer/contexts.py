"""Stage contexts for the trainer's tests, whose store, work and cache folders are below one folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.store import Store, open_store
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.progress import Progress


def resolved_stage(storage: Path | str, **fields: Any) -> ResolvedStage:
    """Return a resolved stage that stores its artifact in `storage`."""
    values: dict[str, Any] = {
        "namespace": "default",
        "run": "test",
        "stage": "stage",
        "kind": "pretrain",
        "attempt": 1,
        "digest": "d" * 64,
        "config": {},
        "seed": 7,
        "code": "c" * 64,
        "storage_uri": str(storage),
    }
    return ResolvedStage(**(values | fields))


def stage_context(
    resolved: ResolvedStage,
    work: Path,
    cache: Path,
    world: World | None = None,
    store: Store | None = None,
    progress: Path | None = None,
) -> StageContext:
    """Return a context of a resolved stage; its output folder exists. `progress`: file of progress reports."""
    (work / "output").mkdir(parents=True, exist_ok=True)
    return StageContext(
        resolved=resolved,
        store=store or open_store(resolved.storage_uri),
        work=work,
        cache=cache,
        world=world or World(),
        progress=Progress(progress),
        stop=threading.Event(),
    )
