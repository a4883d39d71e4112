"""The plug-in term: a function of a package in the trainer's image, found by the entry-point group
`stagecoach.rewards`."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from stagecoach_api.rewards import PluginReward
from stagecoach_trainer.rewards.term import Completion, Term, prompt_text
from stagecoach_trainer.runtime.errors import UserError

GROUP = "stagecoach.rewards"


class PluginTerm(Term):
    """Calls the function with two lists of text, prompts and answers. Raises UserError if it cannot be loaded."""

    def __init__(self, config: PluginReward, where: str) -> None:
        self._name = f"{where}.entryPoint: {config.entry_point}"
        self._function = _load(config.entry_point, where)

    def values(self, batch: Sequence[Completion]) -> list[float]:
        prompts = [prompt_text(completion.prompt) for completion in batch]
        try:
            found = self._function(prompts, [completion.answer for completion in batch])
        except Exception as error:  # a plug-in may raise anything
            raise UserError(f"{self._name} failed: {type(error).__name__}: {error}") from error
        return self._checked(found, len(batch))

    def _checked(self, found: Any, wanted: int) -> list[float]:
        try:
            values = list(found)
        except TypeError as error:
            raise UserError(
                f"{self._name} returned {type(found).__name__}; it must return a list of numbers"
            ) from error
        if len(values) != wanted:
            raise UserError(
                f"{self._name} returned {len(values)} values for {wanted} answers; it must return one per answer"
            )
        for index, value in enumerate(values):
            if type(value) is bool or not isinstance(value, numbers.Real):
                raise UserError(f"{self._name} returned {value!r:.60} for answer {index}; it must return numbers")
        return [float(value) for value in values]


def _load(name: str, where: str) -> Callable[[list[str], list[str]], Any]:
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise UserError(
            f"{where}.entryPoint: the group `{GROUP}` has no entry point {name}, only: {listed}; install a package "
            "that provides it in the trainer's image"
        )
    try:
        function = known[name].load()
    except Exception as error:  # importing runs code that may fail in any way
        raise UserError(f"{where}.entryPoint: {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{where}.entryPoint: {name} is {type(function).__name__}, which is not callable")
    loaded: Callable[[list[str], list[str]], Any] = function
    return loaded
