"""The API that users, drivers and trainers share: typed models, without torch or client libraries.

The names below are its public interface. They are imported on first use, so that `import stagecoach_api` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagecoach_api.code import code_identity
    from stagecoach_api.kinds import STAGE_KINDS
    from stagecoach_api.problems import InvalidRun, Problem
    from stagecoach_api.reading.loading import LoadedRun, load_run, parse_run
    from stagecoach_api.reading.validation import validate
    from stagecoach_api.spec import Stage, TrainingRun
    from stagecoach_api.status import RunState, StageState, TrainingRunStatus

__all__ = [
    "STAGE_KINDS",
    "InvalidRun",
    "LoadedRun",
    "Problem",
    "RunState",
    "Stage",
    "StageState",
    "TrainingRun",
    "TrainingRunStatus",
    "code_identity",
    "load_run",
    "parse_run",
    "validate",
]

_HOMES = {
    "stagecoach_api.code": ("code_identity",),
    "stagecoach_api.reading.loading": ("LoadedRun", "load_run", "parse_run"),
    "stagecoach_api.problems": ("InvalidRun", "Problem"),
    "stagecoach_api.spec": ("Stage", "TrainingRun"),
    "stagecoach_api.kinds": ("STAGE_KINDS",),
    "stagecoach_api.status": ("RunState", "StageState", "TrainingRunStatus"),
    "stagecoach_api.reading.validation": ("validate",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
