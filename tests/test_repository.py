"""Properties of the repository as a whole."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

LOCKS = ["requirements.lock", "trainer/stagecoach_trainer/requirements.lock"]


def python_files() -> list[Path]:
    return [path for room in ("operator", "trainer", "bench", "examples") for path in (ROOT / room).rglob("*.py")]


def test_the_operator_folder_is_not_a_package_that_would_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_the_test_suite_is_one_package_whose_folders_have_no_init_file() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == [ROOT / "tests" / "__init__.py"]


def pins(lock: Path) -> dict[str, set[str]]:
    """Return the locked versions by name; a universal lock may contain several per name, by Python version."""
    found: dict[str, set[str]] = {}
    for line in lock.read_text().splitlines():
        if line and line[0] not in " #":
            requirement = Requirement(line.removesuffix("\\").strip())
            version = next(iter(requirement.specifier)).version
            found.setdefault(canonicalize_name(requirement.name), set()).add(version)
    return found


@pytest.mark.parametrize(("lock", "extras"), [(LOCKS[0], ("operator", "trainer", "dev")), (LOCKS[1], ("trainer",))])
def test_the_lock_satisfies_every_requirement_of_the_project(lock: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    locked = pins(ROOT / lock)
    for text in wanted:
        requirement = Requirement(text)
        versions = locked.get(canonicalize_name(requirement.name), set())
        assert versions, f"{text} is not in {lock}: run `make lock`"
        assert all(requirement.specifier.contains(version) for version in versions), f"{text}: {lock} has {versions}"


def test_the_trainers_lock_has_the_versions_of_the_whole_lock() -> None:
    whole, trainer = pins(ROOT / LOCKS[0]), pins(ROOT / LOCKS[1])
    assert {name: versions for name, versions in trainer.items() if whole.get(name) != versions} == {}


def dangerous_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (
                f"imports {name}" for name in modules if name.split(".")[0] in {"pickle", "dill", "cloudpickle"}
            )
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"torch.load", "torch.save", "eval", "exec", "os.system"}:
            yield f"calls {called}"
        if any(
            keyword.arg in {"shell", "trust_remote_code"} and ast.unparse(keyword.value) == "True"
            for keyword in node.keywords
        ):
            yield f"calls {called} with shell or trust_remote_code"


def test_nothing_unpickles_evaluates_or_starts_a_shell() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {call}"
        for path in python_files()
        for call in dangerous_calls(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("folder", "packages"),
    [
        ("trainer", {"stagecoach_api", "stagecoach_trainer"}),
        ("operator", {"stagecoach_api", "stagecoach_core", "stagecoach_cli"}),
    ],
)
def test_an_image_that_copies_its_own_folders_builds_a_wheel_without_the_other_side(
    folder: str, packages: set[str], tmp_path: Path
) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in packages:
        room = "trainer" if package == "stagecoach_trainer" else "operator"
        shutil.copytree(ROOT / room / package, tmp_path / room / package)
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, "dist"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    rooms = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {room for room in rooms if not room.endswith(".dist-info")} == packages
