"""Sets of characters that filters and rewards refer to."""

from __future__ import annotations

from enum import StrEnum


class Script(StrEnum):
    """A set of characters."""

    CJK = "cjk"
    LATIN = "latin"
    ALPHANUMERIC = "alphanumeric"
