"""Importing transformers for language models alone."""

from __future__ import annotations

import sys

UNWANTED = "scipy"
"""transformers imports it, where it is installed, for the losses of object detection: a twentieth of the start."""


def import_language_models() -> None:
    """Import what every model needs of transformers. Whoever wants scipy afterwards gets it."""
    if UNWANTED in sys.modules:
        return
    sys.modules[UNWANTED] = None  # type: ignore[assignment]  # how Python marks a module that is not to be found
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        del sys.modules[UNWANTED]
