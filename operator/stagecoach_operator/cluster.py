"""Making and ending attempts on the cluster: the writes that a decision asks for, each of which may be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagecoach_api import names
from stagecoach_api.status import Reason
from stagecoach_core.manifests.configmap import config_map
from stagecoach_core.manifests.jobset import job_set
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.resolve import resolved_stage
from stagecoach_core.values import Found, Start
from stagecoach_operator.kube import (
    CONFIG_MAPS,
    EVENTS,
    JOBSETS,
    TRAINING_RUNS,
    AlreadyExists,
    Body,
    Conflict,
    Forbidden,
    Invalid,
    Kube,
    NotFound,
    NotServed,
)
from stagecoach_operator.observe import Sight
from stagecoach_operator.planning import Snapshot
from stagecoach_operator.settings import Settings
from stagecoach_operator.status import Trouble
from stagecoach_operator.waiting import STUCK_SECONDS, stuck_pods
from stagecoach_operator.watched import Cache, RunView, jobset_view, run_view

NO_JOBSET = (
    "JobSet is not installed in this cluster (no `jobsets.jobset.x-k8s.io`); install it, and the run goes on by itself"
)
MAX_ASKED_PODS = 3


@dataclass(frozen=True)
class Cluster:
    """Where attempts are made."""

    kube: Kube
    cache: Cache
    settings: Settings

    # -- the run itself ------------------------------------------------------------------------------------------------

    async def hold(self, run: RunView) -> RunView:
        """Put our finalizer on a run that is about to have an attempt: it stays until the attempt has ended."""
        return await self._set_finalizers(run, (*run.finalizers, names.FINALIZER))

    async def release(self, run: RunView) -> RunView:
        """Take our finalizer off a run without attempts."""
        kept = tuple(item for item in run.finalizers if item != names.FINALIZER)
        return run if kept == run.finalizers else await self._set_finalizers(run, kept)

    async def _set_finalizers(self, run: RunView, finalizers: Sequence[str]) -> RunView:
        patch = {"metadata": {**precondition(run), "finalizers": list(finalizers)}}
        return self.take(await self.kube.patch(TRAINING_RUNS, run.meta.namespace, run.meta.name, patch))

    async def patch_status(self, run: RunView, patch: Body) -> RunView:
        """Write a status. Raises Conflict where the run has changed since it was looked at."""
        body = {"metadata": precondition(run), "status": patch}
        return self.take(await self.kube.patch(TRAINING_RUNS, run.meta.namespace, run.meta.name, body, "status"))

    def take(self, body: Body) -> RunView:
        """Take an answer about a run into the cache; return the newest that is known."""
        view = run_view(body)
        self.cache.put_run(view)
        return self.cache.runs.get(view.meta.uid, view)

    # -- making an attempt ---------------------------------------------------------------------------------------------

    async def start(
        self, run: RunView, snapshot: Snapshot, action: Start, artifacts: Mapping[str, Found]
    ) -> Trouble | None:
        """Make an attempt, or take up the one that was made and not written down.

        Returns what refuses it. None: it is there. Raises Unavailable and Conflict.
        """
        attempt = stage_attempt(run, snapshot, action, artifacts)
        settings = self.settings.model_copy(update={"trainer_image": snapshot.image})
        try:
            await self._make_config_map(config_map(attempt, settings))
            return await self._make_jobset(run, job_set(attempt, settings))
        except NotServed:
            return Trouble(Reason.JOBSET_NOT_INSTALLED, NO_JOBSET)
        except (Forbidden, Invalid, NotFound) as error:
            return Trouble(Reason.CREATION_REFUSED, f"stage `{action.stage}`: the cluster refuses its pods: {error}")

    async def _make_config_map(self, body: Body) -> None:
        """Create the ConfigMap. One of the same name is what an attempt of the same number left that never began."""
        try:
            await self.kube.create(CONFIG_MAPS, body)
        except AlreadyExists:
            metadata = body["metadata"]
            found = await self.kube.get(CONFIG_MAPS, metadata["namespace"], metadata["name"])
            if found.get("data") == body["data"] and not found["metadata"].get("deletionTimestamp"):
                return
            await self._delete_quietly(found)
            await self.kube.create(CONFIG_MAPS, body)

    async def _delete_quietly(self, body: Body) -> None:
        metadata = body["metadata"]
        try:
            await self.kube.delete(CONFIG_MAPS, metadata["namespace"], metadata["name"], metadata["uid"], False)
        except NotFound:
            return

    async def _make_jobset(self, run: RunView, body: Body) -> Trouble | None:
        """Create the JobSet, or adopt the one of that name: only if it is this run's. One that is being deleted is
        waited for."""
        metadata = body["metadata"]
        try:
            made = await self.kube.create(JOBSETS, body)
        except AlreadyExists:
            made = await self.kube.get(JOBSETS, metadata["namespace"], metadata["name"])
            if jobset_view(made).owner_uid != run.meta.uid:
                text = f"another object has the name {metadata['name']}; delete that JobSet"
                return Trouble(Reason.CREATION_REFUSED, text)
        self.cache.put(jobset_view(made))
        return None

    # -- ending an attempt ---------------------------------------------------------------------------------------------

    async def delete(self, sight: Sight) -> None:
        """Delete an attempt's JobSet, its pods first: it is gone when they are."""
        if sight.jobset is None or sight.jobset.meta.deleting:
            return
        meta = sight.jobset.meta
        try:
            await self.kube.delete(JOBSETS, meta.namespace, meta.name, meta.uid)
        except (NotFound, Conflict):
            self.cache.remove(meta.uid)
        else:
            self.cache.mark_deleting(meta.uid)

    # -- asking why ----------------------------------------------------------------------------------------------------

    async def diagnose(self, sights: Sequence[Sight], now: float) -> dict[str, str]:
        """Return what the events of stuck pods, and of JobSets without pods, say; by UID."""
        found: dict[str, str] = {}
        for sight in sights:
            for pod in stuck_pods(sight.pods, now)[:MAX_ASKED_PODS]:
                found[pod.meta.uid] = await self._warnings(pod.meta.namespace, f"involvedObject.uid={pod.meta.uid}")
            if lacks_pods(sight, now) and sight.jobset is not None:
                meta = sight.jobset.meta
                job = f"{meta.name}-{names.REPLICATED_JOB}-0"
                selector = f"involvedObject.kind=Job,involvedObject.name={job}"
                found[meta.uid] = await self._warnings(meta.namespace, selector)
        return found

    async def _warnings(self, namespace: str, selector: str) -> str:
        """Return the newest warning about an object. Empty: there is none, or we may not read events."""
        try:
            listing = await self.kube.list(EVENTS, namespace, fields=f"{selector},type=Warning")
        except (Forbidden, NotFound):
            return ""
        newest = max(listing.items, key=lambda item: str(item.get("lastTimestamp") or ""), default=None)
        return "" if newest is None else f"{newest.get('reason')}: {newest.get('message')}"[:1000]


def lacks_pods(sight: Sight, now: float) -> bool:
    """Tell whether an attempt that nothing holds back has no pod after a while."""
    jobset = sight.jobset
    if jobset is None or jobset.meta.deleting or jobset.suspended or sight.pods or sight.doomed:
        return False
    return now > jobset.meta.created + STUCK_SECONDS


def stage_attempt(run: RunView, snapshot: Snapshot, action: Start, artifacts: Mapping[str, Found]) -> StageAttempt:
    """Return what an attempt's manifests are made of."""
    storage = snapshot.storage
    resolved = resolved_stage(
        plan=snapshot.plan,
        start=action,
        artifacts=artifacts,
        storage_uri=snapshot.storage_uri,
        storage_endpoint=storage.endpoint,
        storage_region=storage.region,
    )
    credentials = None if storage.credentials is None else storage.credentials.secret_name
    return StageAttempt(
        run_uid=run.meta.uid, stage=snapshot.plan.stages[action.stage].stage, resolved=resolved, credentials=credentials
    )


def precondition(run: RunView) -> Body:
    """Return the metadata that make a patch fail unless the run is as it was looked at."""
    return {"uid": run.meta.uid, "resourceVersion": run.meta.resource_version}
