"""docs/architecture.md names packages and functions; they exist."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from tests import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^\| `([\w/.]+\.py)` \| `(\w+)` \|", PAGE, re.MULTILINE)
TRAINER = ROOT / "trainer" / "stagecoach_trainer"


def definitions(module: str) -> set[str]:
    nodes = ast.parse((ROOT / module).read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def test_the_page_has_four_walks() -> None:
    assert len(WALKS) > 20
    assert len(re.findall(r"^### An? ", PAGE, re.MULTILINE)) == 4


@pytest.mark.parametrize(("module", "name"), WALKS)
def test_a_walk_s_step_exists(module: str, name: str) -> None:
    assert name in definitions(module)


def test_every_package_of_the_trainer_is_in_the_table_in_the_order_of_its_layer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        item
        for item in project["tool"]["importlinter"]["contracts"]
        if item.get("containers") == ["stagecoach_trainer"]
    ]
    layers = [layer for line in contract["layers"] for layer in line.split(" | ")]
    packages = [layer for layer in layers if (TRAINER / layer).is_dir()]
    table = PAGE.split("| package | contents |")[1].split("\n\n")[0]
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == packages


def test_every_module_named_for_a_package_of_the_operator_folder_exists() -> None:
    for section in re.split(r"^### ", PAGE.split("## Walks")[0], flags=re.MULTILINE):
        folders = [ROOT / folder for folder in re.findall(r"operator/stagecoach_\w+", section.split("\n")[0])]
        if not folders:
            continue
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", section):
            assert any((folder / name).exists() for folder in folders), (section.split("\n")[0], name)
