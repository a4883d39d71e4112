"""Sets of characters, which filters and rewards name."""

from __future__ import annotations

from enum import StrEnum


class Script(StrEnum):
    """Sets of characters."""

    CJK = "cjk"
    LATIN = "latin"
    ALPHANUMERIC = "alphanumeric"
