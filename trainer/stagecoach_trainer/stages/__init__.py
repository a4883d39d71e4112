"""One module for each stage kind, named after it, with `run(config, context) -> StageOutcome`. Imported when needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from stagecoach_api.base import Model
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError

StageFunction = Callable[[Model, StageContext], StageOutcome]


def module_name(kind: str) -> str:
    """Return the name of the module of a stage kind."""
    return f"{__name__}.{STAGE_KINDS[kind].module}"


def load_stage(kind: str) -> StageFunction:
    """Import the module of a stage kind and return its `run`. Raises UserError if this image has no such module."""
    name = module_name(kind)
    try:
        run: StageFunction = import_module(name).run
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the module is there; something it imports is not
        raise UserError(f"kind: `{kind}` has no module {name} in this trainer; use an image that has it") from error
    return run
