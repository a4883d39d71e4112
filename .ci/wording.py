"""Check the wording of comments, docstrings, messages and pages against `wording.toml`.

python .ci/wording.py [PATH…]            report each word with its replacement; exit 1 if there are any
python .ci/wording.py --count [PATH…]    occurrences per 10,000 words of text
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(
    r"(^|/)(requirements[^/]*\.(lock|txt)|LICENSE|.*\.json|.*/golden/.*|\.ci/wording\..*|test_wording\.py)$|^examples/data/"
)
"""Locks, licence, data and golden files, the list itself and its tests."""
PAGES = (".md", ".yaml", ".yml", ".toml", ".tpl", ".txt", "Dockerfile", "Makefile", "run")
CODE = re.compile(r"`[^`]*`")
"""Identifiers and literals in backticks are not prose."""


@dataclass(frozen=True)
class Word:
    """A word to avoid."""

    text: str
    """Its pattern, as it is in the list."""
    pattern: re.Pattern[str]
    instead: str
    allow: re.Pattern[str] | None
    """Phrases in which it is right."""

    def occurrences(self, line: str) -> list[str]:
        """Return every occurrence in a line of text."""
        prose = CODE.sub("``", line)
        if self.allow is not None:
            prose = self.allow.sub("", prose)
        return self.pattern.findall(prose)


@dataclass(frozen=True)
class Finding:
    """One occurrence of a word to avoid."""

    path: Path
    line: int
    found: str
    word: Word

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: `{self.found}`: write {self.word.instead}"


def read_words(file: Path) -> list[Word]:
    """Read the list. A pattern matches whole words, in any case, but no part of a path or an identifier."""
    return [
        Word(
            text=entry["pattern"],
            pattern=re.compile(rf"(?<![\w`./-])(?:{entry['pattern']})(?!\w)", re.IGNORECASE),
            instead=entry["instead"],
            allow=re.compile("|".join(map(re.escape, entry["allow"])), re.IGNORECASE) if "allow" in entry else None,
        )
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["word"]
    ]


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of what people read: whole pages; in Python, comments and strings with spaces."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, line


def findings(path: Path, words: Sequence[Word]) -> Iterator[Finding]:
    for number, line in prose_of(path):
        for word in words:
            yield from (Finding(path, number, found, word) for found in word.occurrences(line))


def tracked_files(given: Sequence[str]) -> list[Path]:
    """Return the files to check, relative to the root: those below the given paths, or all, unless git ignores them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *given]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [name for name in listed if name.endswith((".py", *PAGES)) and not SKIPPED.search(name)]
    return [Path(name) for name in names if (ROOT / name).is_file()]


def print_counts(found: Sequence[Finding], paths: Sequence[Path], words: Sequence[Word]) -> None:
    total = sum(len(text.split()) for path in paths for _, text in prose_of(path))
    counts = Counter(finding.word.text for finding in found)
    for word in words:
        number = counts[word.text]
        print(f"{word.text:50} {number:5}  {number / max(total, 1) * 1e4:6.1f} per 10,000 words")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count instead of reporting")
    parser.add_argument("paths", nargs="*")
    chosen = parser.parse_args(arguments)
    words = read_words(ROOT / ".ci" / "wording.toml")
    paths = [ROOT / path for path in tracked_files(chosen.paths)]
    found = [finding for path in paths for finding in findings(path, words)]
    if chosen.count:
        print_counts(found, paths, words)
        return 0
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
