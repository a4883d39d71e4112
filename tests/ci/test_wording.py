"""The wording check: it reads what people read, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ROOT
from tests.scripts import load_script

wording = load_script(".ci/wording.py")
WORDS = wording.read_words(ROOT / ".ci" / "wording.toml")


def found_in(folder: Path, name: str, text: str) -> list[str]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return [finding.found for finding in wording.findings(path, WORDS)]


@pytest.mark.parametrize(
    "source",
    [
        '"""The file lies there."""\n',
        "x = 1  # it lies there\n",
        'raise ValueError("the file lies there")\n',
        'x = f"the file lies in {folder}"\n',
    ],
)
def test_comments_docstrings_and_messages_of_python_files_are_read(source: str, tmp_path: Path) -> None:
    assert found_in(tmp_path, "module.py", source) == ["lies"]


@pytest.mark.parametrize(
    "source",
    ["lies = 1\n", 'x = "lies"\n', "# what `lies` holds\n", "# see docs/lies.md and half-lies\n", "# believes\n"],
)
def test_identifiers_single_words_code_and_paths_are_not(source: str, tmp_path: Path) -> None:
    assert found_in(tmp_path, "module.py", source) == []


def test_pages_are_read_whole_and_phrases_may_span_words(tmp_path: Path) -> None:
    assert found_in(tmp_path, "page.md", "# Anew\n\nTraining goes on.\n") == ["Anew", "goes on"]


def test_an_allowed_phrase_is_not_reported(tmp_path: Path) -> None:
    assert found_in(tmp_path, "page.md", "Words such as stop words.\n") == []
    assert found_in(tmp_path, "page.md", "In other words.\n") == ["other words"]


def test_every_word_has_a_replacement() -> None:
    assert len(WORDS) > 10
    assert all(word.instead for word in WORDS)


def test_a_finding_names_the_place_the_word_and_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("one\nmade anew\n", encoding="utf-8")
    (finding,) = wording.findings(path, WORDS)
    assert str(finding).startswith(f"{path}:2: `anew`: write again")
