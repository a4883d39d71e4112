"""The JobSet of an attempt: one Indexed Job, a pod per node, one headless service."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_core.manifests.gang import gang_of, with_gang
from stagecoach_core.manifests.labels import annotations_of, labels_of, metadata
from stagecoach_core.manifests.pod import pod_template
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt


def job_set(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the JobSet. Kubernetes restarts nothing in it: the operator retries, so that it can keep the budgets."""
    body = {
        "apiVersion": f"{names.JOBSET_GROUP}/{names.JOBSET_VERSION}",
        "kind": names.JOBSET_KIND,
        "metadata": metadata(attempt),
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            # A pod's DNS name must resolve before it is ready: the rendezvous takes place before any pod is.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {"name": names.REPLICATED_JOB, "replicas": 1, "template": job_template(attempt, settings)}
            ],
        },
    }
    return with_gang(body, gang_of(attempt.stage))


def job_template(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the Job: one indexed pod per node. The first pod that fails ends it."""
    return {
        "metadata": {"labels": labels_of(attempt), "annotations": annotations_of(attempt)},
        "spec": {
            "completionMode": "Indexed",
            "completions": attempt.resolved.num_nodes,
            "parallelism": attempt.resolved.num_nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",  # never two pods of an index, even while the first is terminating
            "template": pod_template(attempt, settings),
        },
    }
