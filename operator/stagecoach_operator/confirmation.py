"""Confirms that the JobSet of an attempt, or a pod of it, is gone before anything follows from that.

A watch with a label selector reports an object whose label is taken off as deleted, and an object without its owner
reference is not recognised as the run's. Its pods still train: a next attempt would be a second rank 0. The names of
JobSets are known, so a read by name settles it. What is provably the run's gets its labels and its owner back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagecoach_api import names
from stagecoach_api.status import AttemptStatus
from stagecoach_core.manifests.labels import identity_labels, owner_reference
from stagecoach_operator.kube import JOBSETS, PODS, Body, Kube, NotServed, ObjectNotFound, RequestForbidden
from stagecoach_operator.object_cache import Cache, Children
from stagecoach_operator.object_views import PodView, RunView, controller_uid, jobset_view, pod_view, template_labels
from stagecoach_operator.observe import UNCLEAR_SECONDS
from stagecoach_operator.requests import AttemptKey


@dataclass
class Confirmed:
    """What reads of missing JobSets have shown, for one run."""

    gone: set[AttemptKey] = field(default_factory=set)
    """Attempts whose JobSet does not exist. Numbers are not used twice, so this stays true."""
    unclear: dict[AttemptKey, str] = field(default_factory=dict)
    """Attempts of whose JobSet it is unclear whether it is theirs, or whether it exists, with the reason."""
    read_at: float = 0.0
    """When those were last read."""
    pods_read_at: float = 0.0
    """When pods that the watch does not report were last looked for."""
    unselected: dict[str, PodView] = field(default_factory=dict)
    """Pods of the run that the watch does not report, by UID. No event announces their end, so they are read again."""

    @property
    def look_again_at(self) -> float | None:
        return self.pods_read_at + PODS_SECONDS if self.unselected else None


PODS_SECONDS = 30.0
"""How often pods that the watch does not report are read."""


async def confirm(
    kube: Kube, cache: Cache, run: RunView, records: Mapping[AttemptKey, AttemptStatus], known: Confirmed, now: float
) -> None:
    """Read the JobSets that live attempts seem to have lost. Raises Conflict and Unavailable."""
    missing = _missing(run, records, cache.of_run(run.meta.uid), known)
    known.unclear = {key: text for key, text in known.unclear.items() if key in missing}
    if not missing or (missing.keys() == known.unclear.keys() and now < known.read_at + UNCLEAR_SECONDS):
        return
    known.read_at = now
    for key, record in missing.items():
        known.unclear.pop(key, None)
        try:
            body = await kube.get(JOBSETS, run.meta.namespace, record.name)
        # An API server that starts does not serve the kind yet, although its objects exist.
        except (NotServed, RequestForbidden) as error:
            known.unclear[key] = f"whether JobSet {record.name} still exists cannot be read: {error}"
            continue
        except ObjectNotFound:
            known.gone.add(key)
            continue
        unclear = await adopt(kube, cache, run, key, body)
        if unclear:
            known.unclear[key] = unclear


def _missing(
    run: RunView, records: Mapping[AttemptKey, AttemptStatus], children: Children, known: Confirmed
) -> dict[AttemptKey, AttemptStatus]:
    owned = {(item.stage, item.number) for item in children.jobsets if item.owner_uid == run.meta.uid}
    return {
        key: record
        for key, record in records.items()
        if record.ended is None and key not in owned and key not in known.gone
    }


async def adopt(kube: Kube, cache: Cache, run: RunView, key: AttemptKey, body: Body) -> str:
    """Store a JobSet of the run, with its labels and owner restored; return why that is not possible, or nothing."""
    metadata = body["metadata"]
    if not is_of_run(body, run.meta.uid):
        return (
            f"JobSet {metadata['name']} exists, but neither its owner nor its labels show that it is this run's; "
            "delete it, or restore them"
        )
    labels = identity_labels(run.meta.name, run.meta.uid, *key)
    whole = labels.items() <= (metadata.get("labels") or {}).items() and controller_uid(body) == run.meta.uid
    if not whole and not metadata.get("deletionTimestamp"):
        body = await kube.patch(JOBSETS, metadata["namespace"], metadata["name"], _restored(run, labels, metadata))
    cache.restore(jobset_view(body))
    return ""


def is_of_run(jobset: Body, run_uid: str) -> bool:
    """Return whether a JobSet with the name of an attempt is provably the run's.

    Its owner proves it, or, without one, the labels of its Job, which cannot be changed.
    """
    controller = controller_uid(jobset)
    if controller:
        return controller == run_uid
    return template_labels(jobset).get(names.LABEL_RUN_UID) == run_uid


def _restored(run: RunView, labels: Mapping[str, str], metadata: Body) -> Body:
    """Return the patch that gives a JobSet the labels and the owner that it was created with."""
    others = [item for item in metadata.get("ownerReferences") or () if item.get("uid") != run.meta.uid]
    return {
        "metadata": {
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
            "labels": dict(labels),
            "ownerReferences": [*others, owner_reference(run.meta.name, run.meta.uid)],
        }
    }


# -- pods --------------------------------------------------------------------------------------------------------------


async def confirm_pods(
    kube: Kube, cache: Cache, run: RunView, records: Mapping[AttemptKey, AttemptStatus], known: Confirmed, now: float
) -> None:
    """Find the pods that running attempts seem to have lost. Raises Unavailable.

    A pod whose labels are taken off trains on, but its watch reports it as deleted. Its Job still owns it.
    """
    lacking = _lacking(records, cache.of_run(run.meta.uid), known.unselected)
    if not lacking:
        known.unselected.clear()
        return
    if now >= known.pods_read_at + PODS_SECONDS:
        known.pods_read_at = now
        found = await _unselected(kube, run, lacking)
        for uid in known.unselected.keys() - found.keys():
            cache.remove(uid)
        known.unselected = found
    for view in known.unselected.values():
        cache.restore(view)


async def _unselected(kube: Kube, run: RunView, lacking: Mapping[str, AttemptKey]) -> dict[str, PodView]:
    """Return the pods of Jobs that lack the label by which the watch selects, as if they had all labels."""
    found = {}
    for body in (await kube.list(PODS, run.meta.namespace)).items:
        metadata = body["metadata"]
        present = metadata.get("labels") or {}
        owners = [str(item.get("name")) for item in metadata.get("ownerReferences") or ()]
        key = next((lacking[owner] for owner in owners if owner in lacking), None)
        if key is not None and present.get(names.LABEL_MANAGED_BY) != names.MANAGED_BY:
            labels = {**present, **identity_labels(run.meta.name, run.meta.uid, *key)}
            found[metadata["uid"]] = pod_view({**body, "metadata": {**metadata, "labels": labels}})
    return found


def _lacking(
    records: Mapping[AttemptKey, AttemptStatus], children: Children, unselected: Mapping[str, PodView]
) -> dict[str, AttemptKey]:
    """Return the attempts whose pods all ran, and of which not all are watched, by the name of their Job."""
    lacking = {}
    for jobset in children.jobsets:
        key = jobset.stage, jobset.number
        record = records.get(key)
        if record is None or record.ended is not None or jobset.meta.deleting or jobset.suspended:
            continue
        own = children.pods_of(*key)
        watched = {pod.index for pod in own if pod.meta.uid not in unselected}
        has_run = record.running_since is not None or record.ran_seconds > 0
        if has_run and len(watched) < jobset.num_pods:
            lacking[f"{jobset.meta.name}-{names.REPLICATED_JOB}-0"] = key
    return lacking
