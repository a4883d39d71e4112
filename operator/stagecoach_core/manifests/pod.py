"""The pod of a stage: one container that runs the launcher, under the `restricted` Pod Security Standard."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_api.pods import Toleration
from stagecoach_core.manifests.affinity import affinity
from stagecoach_core.manifests.environment import environment
from stagecoach_core.manifests.labels import annotations_of, labels_of
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.manifests.volumes import volume_mounts, volumes

LAUNCHER = ("python", "-m", "stagecoach_trainer.launcher")
"""Command of the container; it overrides the image's entry point."""


def pod_template(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the template of the attempt's pods."""
    return {
        "metadata": {"labels": labels_of(attempt), "annotations": annotations_of(attempt)},
        "spec": {
            "restartPolicy": "Never",  # the operator retries
            "terminationGracePeriodSeconds": settings.grace_seconds,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # no variables for every service of the namespace
            **_identity(attempt, settings),
            **placement(attempt),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": settings.user_id,
                "runAsGroup": settings.group_id,
                "fsGroup": settings.group_id,
                "fsGroupChangePolicy": "OnRootMismatch",  # no recursive chown of large volumes at each start
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container(attempt, settings)],
            "volumes": volumes(attempt, settings),
        },
    }


def container(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the trainer's container."""
    return {
        "name": names.TRAINER_CONTAINER,
        "image": attempt.stage.image or settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": [*LAUNCHER, f"--grace-seconds={settings.launcher_grace_seconds}"],
        "workingDir": names.DATA_MOUNT,
        "env": environment(attempt, settings),
        "ports": [{"name": "rendezvous", "containerPort": names.MASTER_PORT}],
        "resources": resources(attempt),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_LOG,
        # A launcher that was killed (out of memory) writes no result: the end of its log is then the only explanation.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": volume_mounts(attempt, settings),
    }


def resources(attempt: StageAttempt) -> dict[str, Any]:
    """Return requests and limits.

    CPU has no limit: the number of threads is fixed already, and throttling one rank would slow down all of them.
    """
    requested = attempt.stage.resources
    limits = {"memory": requested.memory, **(requested.extended or {})}
    if requested.gpus_per_node:
        limits[names.GPU_RESOURCE] = str(requested.gpus_per_node)
    limits = {name: value for name, value in limits.items() if value is not None}
    requests = limits if requested.cpu is None else {"cpu": requested.cpu, **limits}
    return {"requests": dict(requests), "limits": dict(limits)}


def placement(attempt: StageAttempt) -> dict[str, Any]:
    """Return the fields that determine on which nodes the pods run, and their priority."""
    requested, pods = attempt.stage.resources, attempt.stage.pods
    selector = dict(pods.node_selector or {})
    tolerations = [_toleration(item) for item in pods.tolerations or ()]
    if requested.gpus_per_node:
        if requested.gpu_product is not None:
            selector[names.LABEL_GPU_PRODUCT] = requested.gpu_product
        tolerations.insert(0, {"key": names.GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    fields = {
        "nodeSelector": selector,
        "affinity": affinity(attempt),
        "tolerations": tolerations,
        "priorityClassName": pods.priority_class,
    }
    return {name: value for name, value in fields.items() if value}


def _toleration(toleration: Toleration) -> dict[str, Any]:
    return toleration.model_dump(mode="json", by_alias=True, exclude_none=True)


def _identity(attempt: StageAttempt, settings: ManifestSettings) -> dict[str, Any]:
    """Return the identity of the pods towards the store (service account) and the image registry (pull secrets)."""
    pods = attempt.stage.pods
    secrets = pods.image_pull_secrets if pods.image_pull_secrets is not None else settings.image_pull_secrets
    fields = {
        "serviceAccountName": pods.service_account or settings.service_account,
        "imagePullSecrets": [{"name": name} for name in secrets],
    }
    return {name: value for name, value in fields.items() if value}
