"""The identity of the trainer's code: what makes artifacts, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stagecoach_api import code
from stagecoach_api.code import code_identity, trainer_folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "one" / "stagecoach_trainer"
    (folder / "stages").mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "stages" / "sft.py").write_text("x = 1\n", encoding="utf-8")
    (folder / "requirements.lock").write_text("torch==1\n", encoding="utf-8")
    return folder


def test_a_copy_elsewhere_has_the_same_identity(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "site-packages" / "stagecoach_trainer"))
    assert code_identity(copy) == code_identity(package)


def test_bytecode_and_other_files_do_not_count(package: Path) -> None:
    before = code_identity(package)
    (package / "stages" / "__pycache__").mkdir()
    (package / "stages" / "__pycache__" / "sft.py").write_text("cached", encoding="utf-8")
    (package / "py.typed").write_text("", encoding="utf-8")
    assert code_identity(package) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("stages/sft.py", "x = 2\n"), ("stages/new.py", ""), ("requirements.lock", "torch==2\n"), ("__init__.py", " ")],
)
def test_one_byte_of_code_or_lock_counts(package: Path, name: str, content: str) -> None:
    before = code_identity(package)
    (package / name).write_text(content, encoding="utf-8")
    assert code_identity(package) != before


def test_a_moved_file_counts(package: Path) -> None:
    before = code_identity(package)
    (package / "stages" / "sft.py").rename(package / "sft.py")
    assert code_identity(package) != before


def test_bytes_that_move_from_one_file_to_the_next_count(package: Path) -> None:
    (package / "a.py").write_text("12", encoding="utf-8")
    (package / "b.py").write_text("3", encoding="utf-8")
    before = code_identity(package)
    (package / "a.py").write_text("1", encoding="utf-8")
    (package / "b.py").write_text("23", encoding="utf-8")
    assert code_identity(package) != before


def test_the_installed_trainer_is_found_without_importing_it() -> None:
    script = (
        "import sys; from stagecoach_api.code import code_identity; print(code_identity());"
        "sys.exit('stagecoach_trainer' in sys.modules or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == code_identity() == code_identity(trainer_folder())


def test_a_missing_trainer_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "TRAINER_PACKAGE", "no_such_trainer")
    with pytest.raises(ModuleNotFoundError, match=r"install `stagecoach\[trainer\]`"):
        code_identity()
