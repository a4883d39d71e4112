"""The Kubernetes objects that the operator would create for a run, built without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.spec import TrainingRun
from stagecoach_core.manifests.configmap import config_map
from stagecoach_core.manifests.jobset import job_set
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.plan import make_plan
from stagecoach_core.resolve import artifacts_of, resolved_stage
from stagecoach_core.values import External, Found, Plan, StageView, Start

UNKNOWN_UID = "00000000-0000-0000-0000-000000000000"
"""Placeholder for the UID that the API server assigns to a run; it is part of the hash in every name."""


def cluster_plan(run: TrainingRun, local: Plan, code: str) -> Plan:
    """Return the plan the operator would make: that of the local driver, but with the stages' own images."""
    externals: dict[str, External] = {}
    for planned in local.stages.values():
        externals |= planned.externals
    return make_plan(run, externals, code)


def manifests(
    run: TrainingRun, plan: Plan, views: Mapping[str, StageView], settings: ManifestSettings, storage_uri: str
) -> list[dict[str, Any]]:
    """Return the ConfigMap and JobSet of every stage's first attempt, in topological order."""
    found: list[dict[str, Any]] = []
    credentials = run.spec.storage.credentials
    for name, planned in plan.stages.items():
        attempt = StageAttempt(
            run_uid=UNKNOWN_UID,
            stage=planned.stage,
            resolved=_resolved(run, plan, name, views, storage_uri),
            credentials=None if credentials is None else credentials.secret_name,
        )
        found += [config_map(attempt, settings), job_set(attempt, settings)]
    return found


def _resolved(
    run: TrainingRun, plan: Plan, name: str, views: Mapping[str, StageView], storage_uri: str
) -> ResolvedStage:
    """Return `stage.json` of a stage's first attempt, with placeholders for values that depend on unfinished stages."""
    artifacts = artifacts_of(views)
    reads = {item.stage for _, item in plan.stages[name].stage.references() if item.stage is not None}
    unfinished = sorted(reads - artifacts.keys())
    if unfinished:
        artifacts = {read: _placeholder(read) for read in reads}
    digest = views[name].digest or f"<known when {', '.join(unfinished)} is finished>"
    return resolved_stage(
        plan=plan,
        start=Start(name, digest, number=1),
        artifacts=artifacts,
        storage_uri=storage_uri,
        storage_endpoint=run.spec.storage.endpoint,
        storage_region=run.spec.storage.region,
        run_uid=UNKNOWN_UID,
    )


def _placeholder(stage: str) -> Found:
    """Return an artifact whose values name what is not known yet."""
    return Found(f"<stage digest of {stage}>", f"<content digest of {stage}>", uri=f"<output of {stage}>")


# -- YAML --------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text as literal blocks, and no aliases, which are hard to read in manifests."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """Return YAML documents; the order of members is kept."""
    return yaml.dump_all(documents, Dumper=_Dumper, allow_unicode=True, sort_keys=False, explicit_start=True, width=120)
