"""Whether this process may use the Hugging Face Hub. The trainer's image forbids it; a stage's setting can allow it.

The Hub's libraries read the variables when they are imported, so a stage's setting is applied before that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = {"1", "ON", "YES", "TRUE"}
"""As huggingface_hub reads them."""


def allow_downloads() -> None:
    """Allow the Hub's libraries, which must not be imported yet, to download."""
    for name in OFFLINE:
        os.environ.pop(name, None)


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the Hub's libraries must not download."""
    return any(environment.get(name, "").upper() in _TRUE for name in OFFLINE)


def data_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in which the `datasets` library keeps downloaded data sets."""
    given = environment.get("HF_DATASETS_CACHE")
    if given:
        return Path(given)
    home = environment.get("HF_HOME")
    if home:
        return Path(home) / "datasets"
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "huggingface" / "datasets"
