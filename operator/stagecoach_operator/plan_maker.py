"""Makes plans in the background: a reconciliation never waits for a store. A plan in progress is a state of the run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stagecoach_api.artifacts import ResolvedInput
from stagecoach_api.status import Reason
from stagecoach_api.store import StoreError, Unreachable
from stagecoach_operator.object_views import RunView
from stagecoach_operator.planning import (
    CheckedRun,
    FrozenPlan,
    Rejection,
    check_run,
    look_up,
    make_frozen,
    rejected,
    spec_digest,
)
from stagecoach_operator.settings import Settings
from stagecoach_operator.store_lanes import StoreLanes, in_thread

log = logging.getLogger(__name__)

Outcome = FrozenPlan | Rejection

PLAN_SECONDS = 120.0
"""Limit of looking up the inputs of one run; a run may have many."""
MAX_CHECKS = 2
"""Specs that are validated at the same time: it takes the processor, not the network."""


@dataclass
class PlanJob:
    """A plan that is made, or has been made and not been fetched yet."""

    spec: str
    """Digest of the spec it is made from."""
    task: asyncio.Task[Outcome]


@dataclass
class PlanMaker:
    """Plans runs, one plan at a time for each."""

    lanes: StoreLanes
    settings: Settings
    enqueue: Callable[[str], None]
    """Requests a reconciliation of the run with this UID, when its plan has been made."""
    clock: Callable[[], float] = time.time
    jobs: dict[str, PlanJob] = field(default_factory=dict)
    """By the run's UID."""

    def __post_init__(self) -> None:
        self._checks = asyncio.Semaphore(MAX_CHECKS)

    def outcome(self, run: RunView, before: FrozenPlan | None) -> Outcome | None:
        """Return the plan of the run's current spec, or why there is none; None while it is made.

        `before`: the plan that is in force. An outcome is returned until it is forgotten, since storing it may fail.
        """
        uid, digest = run.meta.uid, spec_digest(run)
        job = self.jobs.get(uid)
        if job is None or job.spec != digest:
            self.forget(uid)  # of an older spec
            task = asyncio.get_running_loop().create_task(self._make(run, before), name=f"plan {run.meta.name}")
            self.jobs[uid] = PlanJob(digest, task)
            task.add_done_callback(lambda done: None if done.cancelled() else self.enqueue(uid))
            return None
        return job.task.result() if job.task.done() else None

    def is_planning(self, uid: str) -> bool:
        """Return whether a run has an outcome that is not in force yet."""
        return uid in self.jobs

    def forget(self, uid: str) -> None:
        """Drop a run's outcome, or end its making."""
        job = self.jobs.pop(uid, None)
        if job is not None:
            job.task.cancel()

    def close(self) -> None:
        for uid in list(self.jobs):
            self.forget(uid)

    async def _make(self, run: RunView, before: FrozenPlan | None) -> Outcome:
        try:
            return await self._plan(run, before)
        except Exception as error:  # a fault of ours must not leave the run without a word
            log.exception("%s/%s: cannot be planned", *run.key)
            text = f"the operator failed to plan the run ({type(error).__name__}); its log has the details"
            return rejected(run, Reason.INVALID_SPEC, text, retry=True)

    async def _plan(self, run: RunView, before: FrozenPlan | None) -> Outcome:
        async with self._checks:
            checked = await in_thread(lambda: check_run(run, self.settings, before))
        if isinstance(checked, Rejection):
            return checked
        inputs = await self._look_up(run, checked)
        if isinstance(inputs, Rejection):
            return inputs
        async with self._checks:
            return await in_thread(lambda: make_frozen(run, checked, inputs, self.settings, before))

    async def _look_up(self, run: RunView, checked: CheckedRun) -> dict[str, ResolvedInput | StoreError] | Rejection:
        lane = self.lanes.of_endpoint(checked.storage)

        def work() -> dict[str, ResolvedInput | StoreError]:
            found = look_up(checked)
            unanswered = [item for item in found.values() if isinstance(item, Unreachable)]
            if unanswered and len(unanswered) == len(found):
                raise unanswered[0]
            return found

        try:
            return await lane.run(work, PLAN_SECONDS)
        except StoreError as error:
            text = f"spec.storage.uri: {checked.storage.uri}: {error.message}"
            failed = rejected(run, Reason.STORAGE_UNREACHABLE, text, retry=True)
            return replace(failed, not_before=lane.not_before)
