"""Shortcuts of a stage's start: the garbage collector pauses during imports, and transformers does without scipy."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stagecoach_trainer.runtime.startup import fast_imports, frozen_heap, postpone_garbage_collection

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def thawed_heap() -> Iterator[None]:
    """The collector sees the whole heap, which `tests.conftest` freezes; freezes it again."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_the_collector_resumes_after_the_imports_and_skips_what_they_made() -> None:
    try:
        postpone_garbage_collection()
        with fast_imports(training=False):
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()


def test_the_collector_of_a_training_process_resumes_with_its_first_step() -> None:
    postpone_garbage_collection()
    try:
        with fast_imports(training=True):
            pass
        assert not gc.isenabled()
        with frozen_heap():
            assert gc.isenabled()
            assert gc.get_freeze_count() > 0
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_a_process_that_has_not_postponed_the_collection_keeps_its_heap_as_it_is() -> None:
    count = gc.get_freeze_count()
    with frozen_heap():
        assert gc.isenabled()
        assert gc.get_freeze_count() == count


def test_a_model_is_imported_without_scipy_which_other_code_still_finds() -> None:
    code = """
import sys
from stagecoach_trainer.runtime.startup import fast_imports
with fast_imports(training=True):
    from transformers import LlamaForCausalLM
assert 'scipy' not in sys.modules
import scipy.optimize
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
