"""Confirms that the JobSet of an attempt is gone before the attempt counts as ended.

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
from stagecoach_operator.kube import JOBSETS, Body, Kube, NotServed, ObjectNotFound, RequestForbidden
from stagecoach_operator.object_cache import Cache, Children
from stagecoach_operator.object_views import RunView, controller_uid, jobset_view, template_labels
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
