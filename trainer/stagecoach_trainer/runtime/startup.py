"""Shortcuts that bring a stage to its first step sooner. None of them changes what the stage computes.

Of the six to seven seconds until a training stage's first step:

- Python's garbage collector would spend half a second on the objects of torch and transformers, all of which live until
  the process ends (measured with `gc.callbacks`). It is off during the imports, and what exists after them is frozen.
- transformers would import scipy, for the losses of object detection, which takes another half second (measured with
  `-X importtime`). A training process imports its models without it.
- The launcher starts the workers first and does its own imports while they do theirs (`launcher.__main__`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def postpone_garbage_collection() -> None:
    """Disable the garbage collector until `fast_imports` or `frozen_heap` enables it again."""
    gc.disable()


@contextmanager
def fast_imports(training: bool) -> Iterator[None]:
    """Import a stage's module in the block. `training`: the stage trains, and imports its model's code later."""
    if training:
        _hide_scipy()
    yield
    if not training:
        _freeze_and_enable()


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Resume a postponed garbage collection: collect once, then exempt everything that exists for as long as the block
    lasts. Does nothing in a process that has not postponed it."""
    if gc.isenabled():
        yield
        return
    gc.collect()
    _freeze_and_enable()
    try:
        yield
    finally:
        gc.unfreeze()


def _freeze_and_enable() -> None:
    gc.freeze()
    gc.enable()


def _hide_scipy() -> None:
    """Make transformers believe that scipy is not installed; other code still finds it."""
    import transformers.utils

    transformers.utils.is_scipy_available = _no  # type: ignore[attr-defined]  # its models import the check by this name


def _no() -> bool:
    return False
