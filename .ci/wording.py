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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(
    r"(^|/)(requirements[^/]*\.(lock|txt)|LICENSE|.*\.json|.*/golden/.*|\.ci/wording\..*)$|^examples/data/"
)
"""Locks, licence, data and golden files, and the list itself."""
PAGES = (".md", ".yaml", ".yml", ".toml", ".tpl", ".txt", ".j2", "Dockerfile", "Makefile", "run")


@dataclass(frozen=True)
class Word:
    """A word to avoid."""

    pattern: re.Pattern[str]
    instead: str
    allow: re.Pattern[str] | None
    """Phrases in which it is right."""


def read_words() -> list[Word]:
    entries = tomllib.loads(Path(__file__).with_name("wording.toml").read_text(encoding="utf-8"))["word"]
    return [
        Word(
            re.compile(rf"(?<![\w`./-])(?:{entry['pattern']})(?!\w)", re.IGNORECASE),
            entry["instead"],
            re.compile("|".join(map(re.escape, entry["allow"])), re.IGNORECASE) if "allow" in entry else None,
        )
        for entry in entries
    ]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of everything in a file that people read."""
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


def faults(path: Path, words: list[Word]) -> Iterator[tuple[int, str, Word]]:
    for number, line in texts(path):
        for word in words:
            text = word.allow.sub("", line) if word.allow else line
            yield from ((number, found[0], word) for found in word.pattern.finditer(re.sub(r"`[^`]*`", "``", text)))


def files(given: list[str]) -> list[Path]:
    """Return the files to check: those given, or all that git tracks."""
    arguments = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *given]
    listed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    named = [name for name in listed if name.endswith((".py", *PAGES)) and not SKIPPED.search(name)]
    return [ROOT / name for name in named if (ROOT / name).is_file()]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count instead of reporting")
    parser.add_argument("paths", nargs="*")
    chosen = parser.parse_args(arguments)
    words = read_words()
    counts: Counter[str] = Counter()
    total = 0
    for path in files(chosen.paths):
        if chosen.count:
            total += sum(len(text.split()) for _, text in texts(path))
        for number, found, word in faults(path, words):
            counts[word.pattern.pattern] += 1
            if not chosen.count:
                print(f"{path.relative_to(ROOT)}:{number}: `{found}`: write {word.instead}")
    if chosen.count:
        for word in words:
            number = counts[word.pattern.pattern]
            print(f"{word.pattern.pattern[13:-6]:50} {number:5}  {number / max(total, 1) * 1e4:6.1f} per 10,000 words")
        return 0
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
