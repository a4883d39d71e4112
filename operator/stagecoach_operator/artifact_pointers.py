"""Pointers: small files in the store through which a run's artifacts are found by stage name.

An operator without write access to the store omits them: the run's status names the artifacts, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from stagecoach_api.artifacts import Pointer, pointer_key
from stagecoach_api.spec import Storage
from stagecoach_api.store import AccessDenied, StoreError
from stagecoach_core.artifacts import pointer_to
from stagecoach_core.values import StageView
from stagecoach_operator.artifact_lookup import ArtifactLookups, StoreKey, store_key
from stagecoach_operator.object_views import RunView
from stagecoach_operator.planning import FrozenPlan

log = logging.getLogger(__name__)


@dataclass
class Pointers:
    """Writes the pointer of every finished stage, once."""

    lookups: ArtifactLookups
    _written: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stage digests by stage, by the run's UID."""
    _closed: set[StoreKey] = field(default_factory=set)
    """Stores the operator may not write to."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def point(self, run: RunView, frozen: FrozenPlan, views: Mapping[str, StageView], now: float) -> None:
        """Write missing pointers in the background."""
        if store_key(frozen.storage) in self._closed:
            return
        known = self._written.setdefault(run.meta.uid, {})
        for name, view in views.items():
            found = view.artifact
            if found is None or known.get(name) == found.stage_digest:
                continue
            known[name] = found.stage_digest
            pointer = pointer_to(found, frozen.plan, name, view, now)
            self._begin(run, frozen.storage, pointer)

    def forget(self, run_uid: str) -> None:
        self._written.pop(run_uid, None)

    def _begin(self, run: RunView, storage: Storage, pointer: Pointer) -> None:
        task = asyncio.get_running_loop().create_task(self._write(run, storage, pointer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, run: RunView, storage: Storage, pointer: Pointer) -> None:
        key = pointer_key(run.meta.namespace, run.meta.name, pointer.stage)
        data = pointer.model_dump_json(indent=1).encode()
        try:
            await self.lookups.in_lane(storage, lambda store: store.write(key, data))
        except AccessDenied:
            self._closed.add(store_key(storage))
        except StoreError as error:
            self._written.get(run.meta.uid, {}).pop(pointer.stage, None)
            log.warning("%s/%s: cannot write the pointer of `%s`: %s", *run.key, pointer.stage, error)
