"""The stage kinds: one module for each, found by name. A new kind needs no line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from stagecoach_api.stage_kind import StageKind


def _discover() -> Mapping[str, StageKind]:
    """Import every module of this package. Raises TypeError for one whose `KIND` is missing or has another name."""
    kinds: list[StageKind] = []
    for module in iter_modules(__path__):
        kind = getattr(import_module(f"{__name__}.{module.name}"), "KIND", None)
        if not isinstance(kind, StageKind) or kind.module != module.name:
            raise TypeError(f"{__name__}.{module.name} must declare a StageKind of that name as `KIND`")
        kinds.append(kind)
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: (kind.position, kind.name))}


STAGE_KINDS: Mapping[str, StageKind] = _discover()
"""Every kind by its name in YAML, in the order of their positions."""
