"""Writes the files that are generated from the models, or checks that they are up to date.

python -m stagecoach_api.schema.generate [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from stagecoach_api.schema.crd import custom_resource_definition
from stagecoach_api.schema.editor_schema import editor_schema
from stagecoach_api.schema.reference import reference_page

ROOT = Path(__file__).resolve().parents[3]
"""Root of the checkout."""


@cache
def crd_text() -> str:
    body = yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=120, allow_unicode=True)
    return f"# Generated from operator/stagecoach_api by `make generate`; do not edit.\n{body}"


@cache
def schema_text() -> str:
    return json.dumps(editor_schema(), indent=2, ensure_ascii=False) + "\n"


GENERATED: Mapping[str, Callable[[], str]] = {
    "charts/stagecoach/files/trainingruns.yaml": crd_text,
    "docs/reference.md": cache(reference_page),
    "docs/schema/trainingrun.schema.json": schema_text,
}
"""Generated files, below the root of the checkout."""


def generate(root: Path) -> list[str]:
    """Write every generated file below `root`; return the names of those that changed."""
    changed = outdated(root)
    for name in changed:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GENERATED[name](), encoding="utf-8")
    return changed


def outdated(root: Path) -> list[str]:
    """Return the names of the generated files that are missing below `root` or out of date."""
    return [name for name, text in GENERATED.items() if _read(root / name) != text()]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if `--check` found an outdated file."""
    parser = argparse.ArgumentParser(prog="python -m stagecoach_api.schema.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the checkout")
    options = parser.parse_args(arguments)
    if options.check:
        names = outdated(options.root)
        for name in names:
            print(f"{name} is outdated: run `make generate`", file=sys.stderr)
        return 1 if names else 0
    for name in generate(options.root):
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
