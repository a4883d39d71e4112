"""Check that a release is consistent, and extract its notes from CHANGELOG.md.

python .ci/release.py vX.Y.Z [--notes FILE]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = re.compile(r"v(\d+\.\d+\.\d+(?:-[0-9A-Za-z.]+)?)")
HEADING = re.compile(r"^## (?P<version>\S+) \((?P<date>[^)]*)\)$", re.MULTILINE)
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def section(changelog: str, version: str) -> tuple[str, str] | None:
    """Return (date, text) of a version's section of the changelog, or None if there is none."""
    headings = list(HEADING.finditer(changelog))
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        if heading["version"] == version:
            return heading["date"], changelog[heading.end() : following.start() if following else None].strip()
    return None


def problems(tag: str, root: Path = ROOT) -> Iterator[str]:
    """Yield everything that keeps `tag` from being released."""
    matched = TAG.fullmatch(tag)
    if matched is None:
        yield f"tag `{tag}`: must be vX.Y.Z, such as v0.2.0"
        return
    version = matched[1]
    for file, pattern in {
        "operator/stagecoach_api/version.py": r'^__version__ = "([^"]+)"$',
        "charts/stagecoach/Chart.yaml": r"^version: (\S+)$",
    }.items():
        found = re.search(pattern, (root / file).read_text(encoding="utf-8"), re.MULTILINE)
        stated = found[1].strip('"') if found else "none"
        if stated != version:
            yield f"{file}: has version {stated}, the tag {version}; set it there and run `make generate`"
    notes = section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if notes is None:
        yield f"CHANGELOG.md: has no section `## {version} (YYYY-MM-DD)`; add one"
        return
    date, text = notes
    if not DATE.fullmatch(date):
        yield f"CHANGELOG.md: section {version} has the date `{date}`; write YYYY-MM-DD"
    if not text:
        yield f"CHANGELOG.md: section {version} is empty; list what users can notice"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("--notes", type=Path, help="write the release's notes to this file")
    chosen = parser.parse_args(arguments)
    found = list(problems(chosen.tag))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        return 1
    notes = section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), chosen.tag.removeprefix("v"))
    if chosen.notes is not None and notes is not None:
        chosen.notes.parent.mkdir(parents=True, exist_ok=True)
        chosen.notes.write_text(notes[1] + "\n", encoding="utf-8")
    print(f"{chosen.tag} can be released")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
