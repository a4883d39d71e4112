"""Makers for the tests of manifests: attempts of stages, and the Kubernetes API's fields of an object."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import kubernetes.client.models as kubernetes_models

from stagecoach_api.spec import Storage
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.resolve import resolved_stage
from stagecoach_core.values import Start
from tests.core.makers import plan_of, pretrain_stage, run_of

UID = "6f1d3c1e-8a51-4c0e-9d53-0d6a1b1c2d3e"
DIGEST = "d" * 64

REPORTING = ManifestSettings(
    trainer_image="registry.example.com/stagecoach/trainer@sha256:" + "a" * 64,
    progress_url="https://stagecoach.stagecoach-system.svc:8443",
    progress_ca="-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
)
"""Settings of an installation with a progress server."""

A100 = {
    "nodes": 16,
    "gpusPerNode": 8,
    "gpuProduct": "NVIDIA-A100-SXM4-80GB",
    "cpu": "96",
    "memory": "1000Gi",
    "sharedMemory": "64Gi",
    "extended": {"rdma/hca": "8"},
}


def make_attempt(
    number: int = 1,
    run: str = "demo",
    uid: str = UID,
    storage: Mapping[str, Any] | None = None,
    stage: Mapping[str, Any] | None = None,
    **settings: Any,
) -> StageAttempt:
    """Return an attempt of a stage that reads no other; `settings` as in YAML (`resources`, `queue`, `pods` …)."""
    document = {**(stage or pretrain_stage()), **settings}
    place = Storage.model_validate(storage or {"uri": "s3://models/demo"})
    plan = plan_of(run_of(document, name=run))
    resolved = resolved_stage(
        plan=plan,
        start=Start(document["name"], DIGEST, number),
        artifacts={},
        storage_uri=place.uri or "",
        storage_endpoint=place.endpoint,
        storage_region=place.region,
    )
    credentials = None if place.credentials is None else place.credentials.secret_name
    return StageAttempt(
        run_uid=uid, stage=plan.stages[document["name"]].stage, resolved=resolved, credentials=credentials
    )


def unknown_fields(value: Any, kind: str, path: str = "") -> Iterator[str]:
    """Yield the paths of fields that this kind of Kubernetes object does not have, and of values with a wrong type."""
    inner = re.fullmatch(r"(?:List\[|list\[)(.+)\]", kind)
    mapping = re.fullmatch(r"(?:Dict|dict)[\[(]str, (.+)[\])]", kind)
    if inner:
        for index, item in enumerate(value):
            yield from unknown_fields(item, inner[1], f"{path}[{index}]")
    elif mapping:
        for key, item in value.items():
            yield from unknown_fields(item, mapping[1], f"{path}.{key}")
    elif hasattr(kubernetes_models, kind):
        model = getattr(kubernetes_models, kind)
        attributes = {outside: inside for inside, outside in model.attribute_map.items()}
        for key, item in value.items():
            if key not in attributes:
                yield f"{path}.{key}"
            else:
                yield from unknown_fields(item, model.openapi_types[attributes[key]], f"{path}.{key}")
    elif not isinstance(value, {"str": str, "int": int, "bool": bool}.get(kind, object)):
        yield f"{path}: {value!r} is no {kind}"
