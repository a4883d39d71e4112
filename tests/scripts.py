"""Scripts of the repository that are outside of any package, imported for tests."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests import ROOT


def load_script(path: str) -> ModuleType:
    """Import a script by its path below the repository's root."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
