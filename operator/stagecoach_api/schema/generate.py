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
from stagecoach_api.schema.generated_files import write_or_check
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


def generated_texts() -> dict[str, str]:
    """Return the text of every generated file by name."""
    return {name: text() for name, text in GENERATED.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if `--check` found an outdated file."""
    parser = argparse.ArgumentParser(prog="python -m stagecoach_api.schema.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the checkout")
    options = parser.parse_args(arguments)
    return write_or_check(options.root, generated_texts(), options.check)


if __name__ == "__main__":
    sys.exit(main())
