"""Generated files: committed, up to date, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagecoach_api.schema.generate import GENERATED, generated_texts, main
from stagecoach_api.schema.generated_files import outdated
from tests import ROOT


def test_the_committed_files_match_the_models() -> None:
    assert outdated(ROOT, generated_texts()) == []


def test_generating_writes_every_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == list(GENERATED)

    assert main(["--root", str(tmp_path)]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == sorted(GENERATED)
    assert main(["--check", "--root", str(tmp_path)]) == 0

    capsys.readouterr()
    assert main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


def test_an_edited_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(tmp_path)])
    name = next(iter(GENERATED))
    (tmp_path / name).write_text("edited by hand", encoding="utf-8")
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert f"{name} is outdated: run `make generate`" in capsys.readouterr().err
