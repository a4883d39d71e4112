"""Garbage is looked for when there can be some, and transformers' models are imported without what they do not need."""

from __future__ import annotations

import gc
import subprocess
import sys

from stagecoach_trainer.runtime import gc_pause as garbage


def test_garbage_is_looked_for_again_and_not_among_what_was_there() -> None:
    try:
        garbage.put_off()
        assert not gc.isenabled()
        garbage.take_up()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_model_is_imported_without_scipy_and_others_still_find_it() -> None:
    code = (
        "import sys; from stagecoach_trainer.runtime.skip_scipy import leave_out_scipy; leave_out_scipy(); "
        "from transformers import LlamaForCausalLM; assert 'scipy' not in sys.modules; import scipy.optimize"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
