"""The pod of a stage: the launcher in one container, under the restricted Pod Security profile."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_api.pods import Toleration
from stagecoach_core.manifests.environment import environment
from stagecoach_core.manifests.labels import annotations_of, labels_of
from stagecoach_core.manifests.settings import BuildSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.manifests.volumes import volume_mounts, volumes

LAUNCHER = ("python", "-m", "stagecoach_trainer.launcher")
"""Entry point of the container, whatever the image's own is."""


def pod_template(attempt: StageAttempt, settings: BuildSettings) -> dict[str, Any]:
    """Return the template of the attempt's pods."""
    return {
        "metadata": {"labels": labels_of(attempt), "annotations": annotations_of(attempt)},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": settings.grace_seconds,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **_identity(attempt, settings),
            **placement(attempt),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": settings.user_id,
                "runAsGroup": settings.group_id,
                "fsGroup": settings.group_id,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container(attempt, settings)],
            "volumes": volumes(attempt, settings),
        },
    }


def container(attempt: StageAttempt, settings: BuildSettings) -> dict[str, Any]:
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
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": volume_mounts(attempt, settings),
    }


def resources(attempt: StageAttempt) -> dict[str, Any]:
    """Return requests and limits. CPU has no limit: threads are counted already, and throttling one rank slows all."""
    asked = attempt.stage.resources
    limits = {"memory": asked.memory, **(asked.extended or {})}
    if asked.gpus_per_node:
        limits[names.GPU_RESOURCE] = str(asked.gpus_per_node)
    limits = {name: value for name, value in limits.items() if value is not None}
    requests = limits if asked.cpu is None else {"cpu": asked.cpu, **limits}
    return {"requests": dict(requests), "limits": dict(limits)}


def placement(attempt: StageAttempt) -> dict[str, Any]:
    """Return on which nodes the pods may be, and how they rank among others."""
    asked, pods = attempt.stage.resources, attempt.stage.pods
    selector = dict(pods.node_selector or {})
    tolerations = [_toleration(item) for item in pods.tolerations or ()]
    if asked.gpus_per_node:
        if asked.gpu_product is not None:
            selector[names.LABEL_GPU_PRODUCT] = asked.gpu_product
        tolerations.insert(0, {"key": names.GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    found = {"nodeSelector": selector, "tolerations": tolerations, "priorityClassName": pods.priority_class}
    return {name: value for name, value in found.items() if value}


def _toleration(toleration: Toleration) -> dict[str, Any]:
    return toleration.model_dump(mode="json", by_alias=True, exclude_none=True)


def _identity(attempt: StageAttempt, settings: BuildSettings) -> dict[str, Any]:
    """Return whose rights the pods have: towards the storage and the image's registry."""
    pods = attempt.stage.pods
    secrets = pods.image_pull_secrets if pods.image_pull_secrets is not None else settings.image_pull_secrets
    found = {
        "serviceAccountName": pods.service_account or settings.service_account,
        "imagePullSecrets": [{"name": name} for name in secrets],
    }
    return {name: value for name, value in found.items() if value}
