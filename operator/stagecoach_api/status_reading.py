"""Reading a status that another version has written: what it does not know is passed over where nothing depends on it.

An unknown field is left out. An unknown value matters only if a decision depends on it: taken for nothing, a
finished stage would run again, or a living attempt be stopped. `with_unknown` puts what was left out back, so that the
version that knows it finds it unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stagecoach_api.base import Model
from stagecoach_api.fields import fields_of
from stagecoach_api.outcomes import Cause
from stagecoach_api.status import (
    Artifact,
    AttemptStatus,
    Condition,
    ConditionType,
    ForgottenAttempts,
    Restarts,
    StageStatus,
    Summary,
    TrainingRunStatus,
)

Path = tuple[str | int, ...]
Holder = dict[str, Any]

ROUNDS = 8
"""How often an odd status is mended and read again; each round removes whole fields."""
LAST_NUMBER = 10**9
"""Number of the last attempt that a status can hold."""

_CRITICAL = frozenset({"name", "artifact", "forgotten", "countedFrom", "attempts"})
"""Fields of a stage that decisions depend on."""
_CRITICAL_OF_ATTEMPTS = frozenset({"number", "digest", "name", "started", "ended", "cause", "contentDigest"})
"""Fields of an attempt that decisions depend on, whether or not it has ended."""
_CRITICAL_OF_LIVING = _CRITICAL_OF_ATTEMPTS | {"stopCause", "stopping", "exitCode", "runningSince", "ranSeconds"}
_WORDS = ("cause", "stopCause")


@dataclass(frozen=True)
class StatusReading:
    """A status as far as this version knows it."""

    status: TrainingRunStatus
    unreadable: str = ""
    """Why it cannot be read; `status` is then empty, and must not be written. Empty if it can."""


def read_status(raw: object) -> StatusReading:
    """Return a run's status. `raw`: JSON, of any shape."""
    try:
        known = json.loads(json.dumps({} if raw is None else raw))
    except (TypeError, ValueError, RecursionError) as error:
        return StatusReading(TrainingRunStatus(), f"status: {error}")
    if not isinstance(known, dict):
        return StatusReading(TrainingRunStatus(), "status: it is no object")
    for _ in range(ROUNDS):
        try:
            status = TrainingRunStatus.model_validate_json(json.dumps(known))
        except ValidationError as error:
            found = [(item["loc"], item["type"], item["msg"]) for item in error.errors()]
        else:
            problem = _inconsistency(status)
            return StatusReading(TrainingRunStatus() if problem else status, problem)
        stuck = [(path, text) for path, kind, text in found if not _mend(known, path, kind)]
        if stuck:
            path, text = stuck[0]
            return StatusReading(TrainingRunStatus(), f"status.{'.'.join(map(str, path))}: {text}")
        if isinstance(known.get("conditions"), list):
            known["conditions"] = [item for item in known["conditions"] if item is not None]
    return StatusReading(TrainingRunStatus(), "status: too many fields of another version")


def _inconsistency(status: TrainingRunStatus) -> str:
    """Return what in a status contradicts itself. Empty if nothing does."""
    names = [stage.name for stage in status.stages]
    if len(set(names)) < len(names):
        return "status.stages: a name occurs twice"
    for stage in status.stages:
        numbers = [record.number for record in stage.attempts]
        if len(set(numbers)) < len(numbers):
            return f"status.stages.{stage.name}.attempts: a number occurs twice"
        if max([*numbers, stage.attempt, stage.counted_from]) >= LAST_NUMBER:
            return f"status.stages.{stage.name}.attempts: the numbers are used up"
    return ""


def _mend(known: Holder, path: Path, kind: str) -> bool:  # noqa: PLR0911 - one per case
    """Take an odd value out of a status; return whether nothing depends on it."""
    if kind == "extra_forbidden":
        return _dropped(known, path)
    match path:
        case ("conditions", int(index), *_):
            # Not removed yet: other problems are named by their places.
            known["conditions"][index] = None
            return True
        case ("conditions" | "summary" | "observedGeneration", *_):
            return _dropped(known, path[:1])
        case ("stages", int(), "state"):
            return _changed(known, path[:2], lambda stage: stage.update(state="Pending"))
        case ("stages", int(), "attempts", int(), str(name), *_):
            return _mend_attempt(known, path[:4], name)
        case ("stages", int(), str(name), *_) if name not in _CRITICAL:
            return _dropped(known, path[:3])
    return False


def _mend_attempt(known: Holder, path: Path, name: str) -> bool:
    attempt = _found(known, path)
    if not isinstance(attempt, dict):
        return False
    has_ended = bool(attempt.get("ended"))
    if name == "cause" and has_ended and isinstance(attempt.get(name), str):
        # It failed, for whatever reason: only an attempt without a cause has succeeded.
        attempt[name] = Cause.INFRASTRUCTURE.value
        return True
    critical = _CRITICAL_OF_ATTEMPTS if has_ended else _CRITICAL_OF_LIVING
    return name not in critical and _dropped(known, (*path, name))


def _found(known: Any, path: Path) -> Any:
    for step in path:
        try:
            known = known[step]
        except (KeyError, IndexError, TypeError):
            return None
    return known


def _changed(known: Holder, path: Path, change: Callable[[Holder], object]) -> bool:
    holder = _found(known, path)
    if not isinstance(holder, dict):
        return False
    change(holder)
    return True


def _dropped(known: Holder, path: Path) -> bool:
    """Remove a field."""
    return _changed(known, path[:-1], lambda holder: holder.pop(str(path[-1]), None))


# -- writing back ------------------------------------------------------------------------------------------------------

_PARTS: dict[type[Model], dict[str, tuple[type[Model], str]]] = {
    TrainingRunStatus: {"conditions": (Condition, "type"), "stages": (StageStatus, "name"), "summary": (Summary, "")},
    StageStatus: {
        "attempts": (AttemptStatus, "number"),
        "artifact": (Artifact, ""),
        "restarts": (Restarts, ""),
        "forgotten": (ForgottenAttempts, ""),
    },
}
"""Parts of a status by field, with the model and, in a list, the field that names an item."""


def with_unknown(raw: object, body: Holder, model: type[Model] = TrainingRunStatus) -> Holder:
    """Return a status to write with everything of the stored one that this version does not know. `body`: as JSON."""
    if not isinstance(raw, dict):
        return body
    kept = {key: value for key, value in raw.items() if key not in fields_of(model)}
    if model is AttemptStatus and raw.get("ended"):
        kept |= {key: raw[key] for key in _WORDS if isinstance(raw.get(key), str) and raw[key] not in set(Cause)}
    made = {**body, **kept}
    for key, (part, name) in _PARTS.get(model, {}).items():
        if name and isinstance(made.get(key), list):
            made[key] = _items_with_unknown(raw.get(key), made[key], part, name)
        elif isinstance(made.get(key), dict):
            made[key] = with_unknown(raw.get(key), made[key], part)
    return made


def _items_with_unknown(raw: object, items: list[Holder], model: type[Model], name: str) -> list[Holder]:
    stored = [item for item in raw if isinstance(item, dict)] if isinstance(raw, list) else []
    found: list[Holder] = []
    for item in items:
        before: Mapping[str, Any] = next((other for other in stored if other.get(name) == item.get(name)), {})
        found.append(with_unknown(before, item, model))
    if model is Condition:
        types = {str(kind) for kind in ConditionType}
        found += [item for item in stored if isinstance(item.get(name), str) and item[name] not in types]
    return found
