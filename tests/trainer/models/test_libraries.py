"""Importing transformers without scipy, in a process of its own: in this one everything is imported already."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from stagecoach_trainer.models.libraries import import_language_models

import_language_models()
assert "transformers.modeling_utils" in sys.modules
assert not [name for name in sys.modules if name.split(".")[0] == "scipy"]
import scipy.optimize
"""


def test_models_are_imported_without_scipy_and_scipy_can_be_imported_afterwards() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=300)
