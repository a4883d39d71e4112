"""Gang scheduling: all pods of a stage start together, or none does. The interface to gang schedulers.

Kueue is implemented: it admits a JobSet as a whole. Volcano and the coscheduling plugin would be two more classes here.
Both schedule pods. They need `schedulerName` in the pod template and a PodGroup, to which an annotation or a label of
the pods refers and whose `minMember` is the number of nodes. The operator would create it with the ConfigMap.
"""

from __future__ import annotations

from typing import Any, Protocol

from stagecoach_api import names
from stagecoach_api.spec import Queue, Stage


class Gang(Protocol):
    """Holds back a stage's pods until all of them can start."""

    def object_labels(self) -> dict[str, str]:
        """Return labels of the JobSet."""

    def pod_annotations(self) -> dict[str, str]:
        """Return annotations of its pods."""


class NoGang:
    """Each pod starts when it can be scheduled. The rendezvous waits for the last one."""

    def object_labels(self) -> dict[str, str]:
        return {}

    def pod_annotations(self) -> dict[str, str]:
        return {}


class KueueGang:
    """A JobSet in a LocalQueue: Kueue suspends it until quota for all of its pods is reserved."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def object_labels(self) -> dict[str, str]:
        # The manifest does not set `suspend`: Kueue's webhook does, for a JobSet that has this label.
        labels = {names.LABEL_QUEUE: self._queue.name, names.LABEL_QUEUE_PRIORITY: self._queue.priority_class}
        return {label: value for label, value in labels.items() if value is not None}

    def pod_annotations(self) -> dict[str, str]:
        # Kueue reads topology requests from the pod template, the queue from the JobSet.
        annotations = {
            names.ANNOTATION_REQUIRED_TOPOLOGY: self._queue.required_topology,
            names.ANNOTATION_PREFERRED_TOPOLOGY: self._queue.preferred_topology,
        }
        return {annotation: value for annotation, value in annotations.items() if value is not None}


def gang_of(stage: Stage) -> Gang:
    """Return the gang scheduler of a stage: Kueue if it names a queue, else none."""
    return NoGang() if stage.queue is None else KueueGang(stage.queue)


def with_gang(jobset: dict[str, Any], gang: Gang) -> dict[str, Any]:
    """Add the labels and annotations of the gang scheduler to `jobset`, which is modified, and return it."""
    jobset["metadata"]["labels"] |= gang.object_labels()
    for job in jobset["spec"]["replicatedJobs"]:
        job["template"]["spec"]["template"]["metadata"]["annotations"] |= gang.pod_annotations()
    return jobset
