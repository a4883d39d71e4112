"""Metadata common to all objects of an attempt: labels, annotations, owner."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_core.manifests.stage_attempt import StageAttempt


def labels_of(attempt: StageAttempt) -> dict[str, str]:
    """Return the labels of the JobSet, the Job, the pods and the ConfigMap."""
    return identity_labels(attempt.resolved.run, attempt.run_uid, attempt.resolved.stage, attempt.resolved.attempt)


def identity_labels(run: str, run_uid: str, stage: str, number: int) -> dict[str, str]:
    """Return the labels that show which attempt an object belongs to."""
    return {
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_RUN: run,
        names.LABEL_RUN_UID: run_uid,
        names.LABEL_STAGE: stage,
        names.LABEL_ATTEMPT: str(number),
    }


def annotations_of(attempt: StageAttempt) -> dict[str, str]:
    """Return the annotations of the same objects. The digest is not a label: 64 characters exceed the limit of 63."""
    return {names.ANNOTATION_STAGE_DIGEST: attempt.resolved.digest}


def metadata(attempt: StageAttempt) -> dict[str, Any]:
    """Return the metadata of an object that the run owns directly."""
    return {
        "name": attempt.name,
        "namespace": attempt.resolved.namespace,
        "labels": labels_of(attempt),
        "annotations": annotations_of(attempt),
        "ownerReferences": [owner_reference(attempt.resolved.run, attempt.run_uid)],
    }


def owner_reference(run: str, run_uid: str) -> dict[str, Any]:
    """Return the owner reference to the run: when it is deleted, the garbage collector deletes the object."""
    return {
        "apiVersion": names.API_GROUP_VERSION,
        "kind": names.KIND,
        "name": run,
        "uid": run_uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def managed_selector() -> str:
    """Return the label selector of all objects that the operator has created."""
    return f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
