"""Generated files: written, or compared with the text they should contain."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def outdated(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Return the names of the files that are missing below `folder` or differ from their text."""
    return [name for name, text in texts.items() if _read(folder / name) != text]


def write_or_check(folder: Path, texts: Mapping[str, str], check: bool) -> int:
    """Write outdated files, or report them if `check`; return the exit code: 1 if a check found any."""
    names = outdated(folder, texts)
    for name in names:
        path = folder / name
        if check:
            print(f"{name} is outdated: run `make generate`", file=sys.stderr)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[name], encoding="utf-8")
        print(f"wrote {name}")
    return 1 if check and names else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
