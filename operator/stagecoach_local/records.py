"""The driver's output about a run: its record in the workspace, and its pointers in the store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from stagecoach_api.artifacts import Manifest, Pointer, pointer_key
from stagecoach_api.status import FINISHED
from stagecoach_api.store import NotFound
from stagecoach_core.artifacts import pointer_to
from stagecoach_core.values import Decision, Found, StageView
from stagecoach_local.run_job import Job
from stagecoach_local.store_outages import StoreOutages
from stagecoach_local.workspace import AttemptRecord, RunRecord, StageRecord


@dataclass
class RunRecorder:
    """Writes a run's record and pointers when they have changed."""

    job: Job
    outages: StoreOutages

    _saved: RunRecord | None = None
    _pointers: dict[str, Found] = field(default_factory=dict)
    """Artifacts whose pointers are written, by stage name."""

    def save(
        self,
        decision: Decision,
        views: Mapping[str, StageView],
        manifests: Mapping[str, Manifest],
        attempts: Iterable[AttemptRecord],
        now: float,
    ) -> None:
        """Write the run's record if it differs from the last one. `manifests`: of finished stages, by stage digest."""
        record = RunRecord(
            namespace=self.job.plan.namespace,
            run=self.job.plan.run,
            file=str(self.job.file),
            storage_uri=self.job.store.uri,
            storage_endpoint=self.job.storage_endpoint,
            storage_region=self.job.storage_region,
            invocation=self.job.invocation,
            state=decision.state,
            message=decision.message,
            updated=0.0,  # not part of the comparison below
            stages={name: self._stage_record(name, view, manifests) for name, view in views.items()},
            attempts=tuple(sorted(attempts, key=lambda item: (item.started, item.stage, item.number))),
        )
        if record != self._saved:
            self.job.folder.save(record.model_copy(update={"updated": now}))
            self._saved = record

    def _stage_record(self, name: str, view: StageView, manifests: Mapping[str, Manifest]) -> StageRecord:
        manifest = manifests.get(view.digest or "") if view.state in FINISHED else None
        return StageRecord(
            kind=self.job.kind(name),
            state=view.state,
            digest=view.digest,
            content_digest=None if view.artifact is None else view.artifact.content_digest,
            uri=None if view.artifact is None else view.artifact.uri,
            attempt=view.attempt,
            ranks=self.job.ranks(name),
            restarts=dict(view.restarts),
            waiting_for=view.waiting_for,
            message=view.message,
            seconds=None if manifest is None else manifest.seconds,
        )

    def write_pointers(self, views: Mapping[str, StageView], now: float) -> None:
        """Write the pointers of newly finished stages into the store."""
        for name, view in views.items():
            found = view.artifact
            if found is None or view.state not in FINISHED or self._pointers.get(name) == found:
                continue
            pointer = pointer_to(found, self.job.plan, name, view, now)
            if self.outages.call(partial(self._write_pointer, pointer)):
                self._pointers[name] = found

    def is_complete(self, views: Mapping[str, StageView]) -> bool:
        """Whether the pointer of every finished stage is written."""
        return {name for name, view in views.items() if view.state in FINISHED} <= self._pointers.keys()

    def _write_pointer(self, pointer: Pointer) -> None:
        key = pointer_key(self.job.plan.namespace, self.job.plan.run, pointer.stage)
        if not self._is_written(key, pointer):
            self.job.store.write(key, pointer.model_dump_json(indent=1).encode() + b"\n")

    def _is_written(self, key: str, pointer: Pointer) -> bool:
        """Whether the store has this pointer already, possibly with another time or cache flag."""
        with contextlib.suppress(NotFound, ValueError):
            known = Pointer.model_validate_json(self.job.store.read(key))
            return known == pointer.model_copy(update={"cached": known.cached, "recorded": known.recorded})
        return False
