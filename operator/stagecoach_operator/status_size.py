"""Keeps the status of a run small enough to be stored. Pure.

etcd refuses objects above 1.5 MiB, the API server's watch caches hold every run, and texts may be in Chinese, of three
bytes a character. So texts are shortened, and attempts only counted, in a fixed order, until the status fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagecoach_api.base import Model
from stagecoach_api.faults import shortened
from stagecoach_api.status import AttemptStatus, ForgottenAttempts, StageStatus, TrainingRunStatus
from stagecoach_operator.attempt_history import MAX_ATTEMPTS, MAX_GROUPS, merged_groups

MAX_BYTES = 256 * 1024
"""Bytes of the status as JSON in UTF-8. Unknown fields of a newer version (`with_unknown`) come on top."""

ATTEMPT_TEXTS = ("message", "stopping")
STAGE_TEXTS = ("message", "waiting_for")


@dataclass(frozen=True)
class Room:
    """How much a status may hold."""

    attempts: int = MAX_ATTEMPTS
    """Attempts of each stage that are listed; older ones are only counted."""
    old_characters: int | None = None
    """Characters of a text of an attempt that is not its stage's newest. None for no other limit than the fields'."""
    characters: int | None = None
    """Characters of any other text, too."""
    groups: int = MAX_GROUPS
    nodes: int | None = None
    """Avoided nodes that are listed of each stage."""
    pods: int = 1
    """Pods with index 0 and waits that are listed of each attempt, if its texts are shortened."""


ROOMS = (
    Room(),
    Room(old_characters=120),
    Room(attempts=4, old_characters=120),
    Room(attempts=2, old_characters=120),
    Room(attempts=2, old_characters=120, characters=480, groups=2, nodes=4),
    Room(attempts=1, old_characters=0, characters=40, groups=1, nodes=1, pods=0),
)
"""In the order in which they are tried."""


def fitted(make: Callable[[Room], TrainingRunStatus]) -> TrainingRunStatus:
    """Return the status in the first room in which it fits; `make` counts the attempts that a room does not list."""
    for room in ROOMS:
        status = reduced(make(room), room)
        if num_bytes(status) <= MAX_BYTES:
            break
    return status


def num_bytes(status: Model) -> int:
    """Return the size of a status as it is stored."""
    return len(status.model_dump_json(exclude_none=True).encode())


def reduced(status: TrainingRunStatus, room: Room) -> TrainingRunStatus:
    """Return a status with its texts and lists shortened to what a room has."""
    conditions = tuple(
        item.model_copy(update=_texts(item, ("message",), room.characters)) for item in status.conditions
    )
    stages = tuple(_stage(stage, room) for stage in status.stages)
    return status.model_copy(update={"conditions": conditions, "stages": stages})


def _stage(stage: StageStatus, room: Room) -> StageStatus:
    older = tuple(_attempt(item, room, room.old_characters) for item in stage.attempts[:-1])
    newest = tuple(_attempt(item, room, room.characters) for item in stage.attempts[-1:])
    changed = {
        **_texts(stage, STAGE_TEXTS, room.characters),
        "attempts": (*older, *newest),
        "avoided_nodes": stage.avoided_nodes[: room.nodes],
        "forgotten": _forgotten(stage.forgotten, room),
    }
    return stage.model_copy(update=changed)


def _forgotten(counted: ForgottenAttempts | None, room: Room) -> ForgottenAttempts | None:
    return counted and counted.model_copy(update={"groups": merged_groups(counted.groups, room.groups)})


def _attempt(attempt: AttemptStatus, room: Room, characters: int | None) -> AttemptStatus:
    """Return an attempt with shortened texts. Its `fault` is kept: later ones are compared with it."""
    changed: dict[str, object] = _texts(attempt, ATTEMPT_TEXTS, characters)
    if room.characters is not None:
        incarnations, waits = (
            items[max(0, len(items) - room.pods) :] for items in (attempt.incarnations, attempt.waits)
        )
        changed |= {"warnings": (), "incarnations": incarnations, "waits": waits}
    return attempt.model_copy(update=changed)


def _texts(model: Model, names: tuple[str, ...], characters: int | None) -> dict[str, object]:
    if characters is None:
        return {}
    return {name: shortened(getattr(model, name), characters) for name in names}
