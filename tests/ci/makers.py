"""The scripts of `.ci`, which is no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests import ROOT


def load_script(name: str) -> ModuleType:
    """Import `.ci/NAME.py`."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
