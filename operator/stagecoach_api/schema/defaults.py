"""Defaults of fields as text, for descriptions and tables: in YAML's flow style, as a user would write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from pydantic.fields import FieldInfo

from stagecoach_api.base import Model

_SIZES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 10**9), ("MB", 10**6))


def described(name: str, field: FieldInfo) -> str:
    """Return a field's description as one paragraph, with its default unless that is null or empty."""
    text = " ".join((field.description or "").split())
    default = default_text(field)
    if default in {"", "{}", "[]", '""'}:
        return text
    size = _size(field.default) if name.lower().endswith("bytes") else ""
    return f"{text} Default: {default}{size}."


def default_text(field: FieldInfo) -> str:
    """Return a field's default, empty if it has none or null. Of a model, only what differs from its own defaults."""
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    return "" if default is None else _text(default)


def _text(value: Any) -> str:
    if isinstance(value, Model):
        value = value.model_dump(by_alias=True, exclude_defaults=True)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # `1e-08` and `1.0` are Python's ways to write these.
        return re.sub(r"e-0(?=\d)", "e-", f"{value:.15g}")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][-\w./]*", value):
        return f'"{value}"'
    return str(value)


def _size(value: int) -> str:
    for unit, factor in _SIZES:
        if value >= factor and value % factor == 0:
            return f" ({value // factor} {unit})"
    return ""
