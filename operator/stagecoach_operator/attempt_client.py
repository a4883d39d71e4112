"""Creates and deletes the objects of attempts.

Every write may be repeated: the operator may be killed before or after any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stagecoach_api import names
from stagecoach_api.status import Reason
from stagecoach_core.manifests.configmap import config_map
from stagecoach_core.manifests.jobset import job_set
from stagecoach_core.manifests.network_policy import network_policy
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.policies.avoidance import AvoidedNode
from stagecoach_core.resolve import resolved_stage
from stagecoach_core.values import Found, Start
from stagecoach_operator.attempt_times import waiting_since
from stagecoach_operator.confirmation import adopt
from stagecoach_operator.kube import (
    CONFIG_MAPS,
    EVENTS,
    JOBSETS,
    NETWORK_POLICIES,
    PODS,
    TRAINING_RUNS,
    AlreadyExists,
    Body,
    Conflict,
    Invalid,
    Kube,
    NotServed,
    ObjectNotFound,
    RequestForbidden,
)
from stagecoach_operator.lost_nodes import Patience
from stagecoach_operator.object_cache import Cache
from stagecoach_operator.object_views import PodView, RunView, jobset_view, run_view
from stagecoach_operator.observe import ObservedAttempt
from stagecoach_operator.planning import FrozenPlan
from stagecoach_operator.pod_startup import STUCK_SECONDS, stuck_pods
from stagecoach_operator.settings import Settings

log = logging.getLogger(__name__)

NO_JOBSET = "JobSet is not installed in this cluster (no `jobsets.jobset.x-k8s.io`); install it, and the run continues"
MAX_DIAGNOSED_PODS = 3
"""Of one attempt: the pods of a gang usually wait for the same thing."""


@dataclass(frozen=True)
class Blocker:
    """Why an attempt could not be created."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class AttemptClient:
    """The operator's writes to runs and to the objects of their attempts."""

    kube: Kube
    cache: Cache
    settings: Settings

    @property
    def patience(self) -> Patience:
        return Patience(self.settings.lost_node_seconds, self.settings.leftover_seconds)

    # -- the run itself ------------------------------------------------------------------------------------------------

    async def remove_finalizer(self, run: RunView) -> RunView:
        """Remove the finalizer that earlier versions added to runs with attempts."""
        kept = [item for item in run.finalizers if item != names.FINALIZER]
        if len(kept) == len(run.finalizers):
            return run
        # A merge patch replaces the whole list; the precondition protects finalizers that others have added meanwhile.
        patch = {"metadata": {**precondition(run), "finalizers": kept}}
        return self._stored(await self.kube.patch(TRAINING_RUNS, run.meta.namespace, run.meta.name, patch))

    async def claim(self, run: RunView) -> None:
        """Put our name on a run before its first attempt. Raises Conflict if another installation may have done so."""
        known = self.cache.runs.get(run.meta.uid, run)
        if known.status.installation != self.settings.installation:
            await self.patch_status(known, {"installation": self.settings.installation})

    async def patch_status(self, run: RunView, patch: Body) -> RunView:
        """Patch the status. Raises Conflict if the run has changed since it was observed."""
        body = {"metadata": precondition(run), "status": patch}
        return self._stored(await self.kube.patch(TRAINING_RUNS, run.meta.namespace, run.meta.name, body, "status"))

    def _stored(self, body: Body) -> RunView:
        """Store the API server's response in the cache; return the newest known version of the run."""
        view = run_view(body)
        self.cache.put_run(view)
        return self.cache.runs.get(view.meta.uid, view)

    # -- creating an attempt -------------------------------------------------------------------------------------------

    async def start(
        self,
        run: RunView,
        frozen: FrozenPlan,
        action: Start,
        artifacts: Mapping[str, Found],
        now: float,
        avoided: Sequence[AvoidedNode] = (),
    ) -> Blocker | None:
        """Create an attempt, or adopt the one that was created before a restart but not recorded.

        It waits for what is left of deleted runs at the same work: a run disappears before its pods have ended.

        Returns None if it exists now, or what prevents its creation. Raises Unavailable and Conflict.
        """
        remains = self.cache.remains_of(action.digest, self.patience, now)
        if remains:
            text = f"stage `{action.stage}`: {remains}, of a deleted run, still does the same work; waiting for its end"
            return Blocker(Reason.WAITING_FOR_PODS, text)
        attempt = replace(stage_attempt(run, frozen, action, artifacts), avoided=tuple(avoided))
        settings = self.settings.model_copy(update={"trainer_image": frozen.image})
        try:
            # The ConfigMap comes first: pods mount it, and would otherwise wait for the kubelet's next retry.
            # The NetworkPolicy at the same time: a transition takes no longer for it.
            blocker, _ = await asyncio.gather(
                self._create_config_map(config_map(attempt, settings)), self._create_network_policy(attempt)
            )
            return blocker or await self._create_jobset(run, job_set(attempt, settings))
        except NotServed:
            return Blocker(Reason.JOBSET_NOT_INSTALLED, NO_JOBSET)
        except (RequestForbidden, Invalid, ObjectNotFound) as error:
            return Blocker(Reason.CREATION_REFUSED, f"stage `{action.stage}`: the cluster rejects its objects: {error}")

    async def _create_config_map(self, body: Body) -> Blocker | None:
        """Create the ConfigMap. An existing one is left over from an earlier try to create the same attempt: its name
        contains a digest of its content."""
        try:
            await self.kube.create(CONFIG_MAPS, body)
        except AlreadyExists:
            metadata = body["metadata"]
            existing = await self.kube.get(CONFIG_MAPS, metadata["namespace"], metadata["name"])
            if existing.get("data") != body["data"]:
                text = f"a ConfigMap named {metadata['name']} exists with other content; delete it"
                return Blocker(Reason.CREATION_REFUSED, text)
        return None

    async def _create_network_policy(self, attempt: StageAttempt) -> None:
        """Create the NetworkPolicy. An existing one is left over from an earlier try to create the same attempt."""
        if self.settings.network_policies:
            with contextlib.suppress(AlreadyExists):
                await self.kube.create(NETWORK_POLICIES, network_policy(attempt))

    async def _create_jobset(self, run: RunView, body: Body) -> Blocker | None:
        """Create the JobSet, or adopt the existing one of that name if this run owns it.

        One that is being deleted is adopted, too: its end is then observed, and another attempt follows.
        """
        metadata = body["metadata"]
        try:
            jobset = await self.kube.create(JOBSETS, body)
        except AlreadyExists:
            existing = await self.kube.get(JOBSETS, metadata["namespace"], metadata["name"])
            # Names contain a hash over the run's UID, so another owner means a foreign object, which is not touched.
            labels = body["metadata"]["labels"]
            key = labels[names.LABEL_STAGE], int(labels[names.LABEL_ATTEMPT])
            foreign = await adopt(self.kube, self.cache, run, key, existing)
            return Blocker(Reason.CREATION_REFUSED, foreign) if foreign else None
        self.cache.put(jobset_view(jobset))
        return None

    # -- ending an attempt ---------------------------------------------------------------------------------------------

    async def delete(self, attempt: ObservedAttempt) -> None:
        """Delete an attempt's JobSet in the foreground: it disappears after its pods."""
        if attempt.jobset is None or attempt.jobset.meta.deleting:
            return
        meta = attempt.jobset.meta
        try:
            await self.kube.delete(JOBSETS, meta.namespace, meta.name, meta.uid)
        except (ObjectNotFound, Conflict):  # the one with this UID does not exist any more
            self.cache.remove(meta.uid)
        else:
            # The watch reports it later; until then each reconciliation would delete it again.
            self.cache.mark_deleting(meta.uid)

    async def end_pod(self, pod: PodView) -> None:
        """Delete a pod whose JobSet is gone; it has its grace period to end."""
        if await self._delete_pod(pod, None):
            self.cache.mark_deleting(pod.meta.uid)

    async def remove_lost(self, pod: PodView) -> None:
        """Remove the object of a pod whose node is lost. Its finalizers still apply."""
        try:
            await self._delete_pod(pod, 0)
        except RequestForbidden as error:
            # The pod is ignored a little later, so the attempt does not depend on it.
            log.warning("pod %s on lost node %s cannot be removed: %s", pod.meta.name, pod.node, error)

    async def _delete_pod(self, pod: PodView, grace_seconds: int | None) -> bool:
        """Delete a pod; return whether it existed."""
        meta = pod.meta
        try:
            await self.kube.delete(PODS, meta.namespace, meta.name, meta.uid, False, grace_seconds)
        except (ObjectNotFound, Conflict):  # the one with this UID does not exist any more
            self.cache.remove(meta.uid)
            return False
        return True

    # -- diagnosing ----------------------------------------------------------------------------------------------------

    async def diagnose(self, attempts: Sequence[ObservedAttempt], now: float) -> dict[str, str]:
        """Return the newest warning event of stuck pods, and of JobSets without pods, by UID."""
        warnings: dict[str, str] = {}
        for attempt in attempts:
            since = waiting_since(attempt.record, now)
            for pod in stuck_pods(attempt.pods, since, now)[:MAX_DIAGNOSED_PODS]:
                warnings[pod.meta.uid] = await self._newest_warning(
                    pod.meta.namespace, f"involvedObject.uid={pod.meta.uid}"
                )
            if lacks_pods(attempt, now) and attempt.jobset is not None:
                meta = attempt.jobset.meta
                job = f"{meta.name}-{names.REPLICATED_JOB}-0"
                selector = f"involvedObject.kind=Job,involvedObject.name={job}"
                warnings[meta.uid] = await self._newest_warning(meta.namespace, selector)
        return warnings

    async def _newest_warning(self, namespace: str, selector: str) -> str:
        """Return the newest warning event about an object. Empty if there is none, or events may not be read."""
        try:
            listing = await self.kube.list(EVENTS, namespace, fields=f"{selector},type=Warning")
        # A diagnosis is optional: a Role that does not grant access to events must not stop the run.
        except (RequestForbidden, ObjectNotFound):
            return ""
        newest = max(listing.items, key=lambda item: str(item.get("lastTimestamp") or ""), default=None)
        return "" if newest is None else f"{newest.get('reason')}: {newest.get('message')}"[:1000]


def lacks_pods(attempt: ObservedAttempt, now: float) -> bool:
    """Return whether an attempt still has no pod although nothing visible holds it back.

    The reason, such as an exceeded ResourceQuota, is then in the events of its Job.
    """
    jobset = attempt.jobset
    if jobset is None or jobset.meta.deleting or jobset.suspended or attempt.pods or attempt.deletion_reason:
        return False
    return now > waiting_since(attempt.record, now) + STUCK_SECONDS


def stage_attempt(run: RunView, frozen: FrozenPlan, action: Start, artifacts: Mapping[str, Found]) -> StageAttempt:
    """Return the values an attempt's manifests are built from."""
    storage = frozen.storage
    resolved = resolved_stage(
        plan=frozen.plan,
        start=action,
        artifacts=artifacts,
        storage_uri=frozen.storage_uri,
        storage_endpoint=storage.endpoint,
        storage_region=storage.region,
        run_uid=run.meta.uid,
    )
    credentials = None if storage.credentials is None else storage.credentials.secret_name
    stage = frozen.plan.stages[action.stage].stage
    return StageAttempt(run_uid=run.meta.uid, stage=stage, resolved=resolved, credentials=credentials)


def precondition(run: RunView) -> Body:
    """Return the metadata that make a patch fail with 409 unless the run is the one, and the version, observed."""
    return {"uid": run.meta.uid, "resourceVersion": run.meta.resource_version}
