"""The JobSet of an attempt: one Indexed Job, a pod per node, one headless service."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_core.manifests.gang import gang_of, with_gang
from stagecoach_core.manifests.labels import annotations_of, labels_of, metadata
from stagecoach_core.manifests.pod import pod_template
from stagecoach_core.manifests.settings import BuildSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt


def job_set(attempt: StageAttempt, settings: BuildSettings) -> dict[str, Any]:
    """Return the JobSet. Nothing in it restarts by itself: retries are the operator's, so that their budgets are."""
    made = {
        "apiVersion": f"{names.JOBSET_GROUP}/{names.JOBSET_VERSION}",
        "kind": names.JOBSET_KIND,
        "metadata": metadata(attempt),
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            # A pod's name must be known before it is ready: ranks meet before any of them is.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {"name": names.REPLICATED_JOB, "replicas": 1, "template": job_template(attempt, settings)}
            ],
        },
    }
    return with_gang(made, gang_of(attempt.stage))


def job_template(attempt: StageAttempt, settings: BuildSettings) -> dict[str, Any]:
    """Return the Job: as many pods as nodes, each with its index; the first that fails ends it."""
    return {
        "metadata": {"labels": labels_of(attempt), "annotations": annotations_of(attempt)},
        "spec": {
            "completionMode": "Indexed",
            "completions": attempt.resolved.num_nodes,
            "parallelism": attempt.resolved.num_nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",  # never a second pod of an index while the first one still ends
            "template": pod_template(attempt, settings),
        },
    }
