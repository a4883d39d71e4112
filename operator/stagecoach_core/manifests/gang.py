"""All pods of a stage start together, or none: the seam to whatever schedules gangs.

Kueue is implemented: it admits a JobSet as a whole. Volcano and the coscheduling plugin would be two more classes here.
Both work on pods: `schedulerName` in the pod template, and a PodGroup that is named by an annotation or a label of it
and whose `minMember` is the number of nodes; the operator would create that object beside the ConfigMap.
"""

from __future__ import annotations

from typing import Any, Protocol

from stagecoach_api import names
from stagecoach_api.spec import Queue, Stage


class Gang(Protocol):
    """Something that holds a stage's pods back until all of them can start."""

    def object_labels(self) -> dict[str, str]:
        """Return labels of the JobSet."""

    def pod_annotations(self) -> dict[str, str]:
        """Return annotations of its pods."""


class NoGang:
    """Pods start as they find room. The rendezvous waits for the last one."""

    def object_labels(self) -> dict[str, str]:
        return {}

    def pod_annotations(self) -> dict[str, str]:
        return {}


class KueueGang:
    """A JobSet in a LocalQueue: it is held suspended until quota for all of its pods is reserved."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def object_labels(self) -> dict[str, str]:
        found = {names.LABEL_QUEUE: self._queue.name, names.LABEL_QUEUE_PRIORITY: self._queue.priority_class}
        return {label: value for label, value in found.items() if value is not None}

    def pod_annotations(self) -> dict[str, str]:
        found = {
            names.ANNOTATION_REQUIRED_TOPOLOGY: self._queue.required_topology,
            names.ANNOTATION_PREFERRED_TOPOLOGY: self._queue.preferred_topology,
        }
        return {annotation: value for annotation, value in found.items() if value is not None}


def gang_of(stage: Stage) -> Gang:
    """Return what schedules the stage's gang: Kueue where it names a queue, else nothing."""
    return NoGang() if stage.queue is None else KueueGang(stage.queue)


def with_gang(jobset: dict[str, Any], gang: Gang) -> dict[str, Any]:
    """Add what the gang needs to a JobSet that was just built, and return it."""
    jobset["metadata"]["labels"] |= gang.object_labels()
    for job in jobset["spec"]["replicatedJobs"]:
        job["template"]["spec"]["template"]["metadata"]["annotations"] |= gang.pod_annotations()
    return jobset
