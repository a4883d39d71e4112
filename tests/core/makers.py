"""Makers for tests of the core: small runs, plans and observations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagecoach_api.outcomes import Cause
from stagecoach_api.spec import TrainingRun
from stagecoach_core.decide import decide
from stagecoach_core.plan import external_uris, make_plan
from stagecoach_core.values import (
    Attempt,
    AttemptState,
    Decision,
    External,
    Found,
    LookUp,
    Missing,
    Observed,
    Plan,
    Start,
    Stop,
)

CODE = "sha256:code"
TRAINING: dict[str, Any] = {"batch": {"tokens": 64}, "optimizer": {"learningRate": 1e-3}, "sequenceLength": 16}


def data_stage(name: str, *inputs: str, uri: str | None = None, **settings: Any) -> dict[str, Any]:
    """A `data` stage that reads the stages `inputs`, or else a file: `uri`, or one named after the stage."""
    sources = [{"stage": item} for item in inputs] or [{"uri": uri or f"{name}.jsonl"}]
    return {"name": name, "data": {"sources": sources}, **settings}


def sft_stage(name: str = "sft", **config: Any) -> dict[str, Any]:
    base = {"model": {"uri": "base"}, "data": [{"uri": "a.json"}], "template": {"name": "alpaca"}}
    return {"name": name, "sft": {**TRAINING, **base, **config}}


def pretrain_stage(name: str = "pretrain", **config: Any) -> dict[str, Any]:
    return {"name": name, "pretrain": {**TRAINING, "model": {"uri": "base"}, "data": [{"uri": "a.json"}], **config}}


def run_of(*stages: dict[str, Any], name: str = "demo", **spec: Any) -> TrainingRun:
    return TrainingRun.model_validate({"metadata": {"name": name}, "spec": {"stages": list(stages), **spec}})


def plan_of(run: TrainingRun, contents: Mapping[str, str] | None = None, code: str = CODE) -> Plan:
    """Plan a run; `contents`: digests of external inputs by URI; the others get one derived from their URI."""
    digests = contents or {}
    externals = {
        key: External(uri=f"file:///inputs/{uri}", digest=digests.get(uri, f"content of {uri}"))
        for key, uri in external_uris(run).items()
    }
    return make_plan(run, externals, code)


def plan_for(*stages: dict[str, Any], **spec: Any) -> Plan:
    return plan_of(run_of(*stages, **spec))


def chain(*names: str) -> Plan:
    """A plan in which every stage reads the one before it."""
    return plan_for(*(data_stage(name, *names[place - 1 : place]) for place, name in enumerate(names)))


def found(digest: str, content: str | None = None) -> Found:
    return Found(digest, content or f"content of {digest}", f"file:///store/artifacts/{digest}/output")


def attempt(stage: str, digest: str, number: int = 1, **fields: Any) -> Attempt:
    """A running attempt, or an ended one if `ended` is given."""
    fields.setdefault("state", AttemptState.RUNNING if fields.get("ended") is None else AttemptState.ENDED)
    fields.setdefault("started", 0.0)
    return Attempt(stage, digest, number, **fields)


def failed(stage: str, digest: str, number: int = 1, cause: Cause = Cause.INFRASTRUCTURE, **fields: Any) -> Attempt:
    return attempt(stage, digest, number, **{"ended": 1.0, "cause": cause, "message": f"failure {number}", **fields})


def digests_of(plan: Plan, **observation: Any) -> dict[str, str]:
    """Digest of every stage, each finished with its usual content."""
    artifacts: dict[str, Found | Missing] = {}
    while True:
        decision = decide(plan, Observed(artifacts=artifacts, **observation), now=0.0)
        asked = [action for action in decision.actions if isinstance(action, LookUp)]
        if not asked:
            return {name: view.digest for name, view in decision.stages.items() if view.digest is not None}
        artifacts.update({action.digest: found(action.digest) for action in asked})


def starts(decision: Decision) -> list[str]:
    return [action.stage for action in decision.actions if isinstance(action, Start)]


def stops(decision: Decision) -> list[Stop]:
    return [action for action in decision.actions if isinstance(action, Stop)]


def look_ups(decision: Decision) -> list[str]:
    return [action.stage for action in decision.actions if isinstance(action, LookUp)]
