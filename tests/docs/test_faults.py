"""docs/faults.md names existing tests, and every row of its table has one."""

from __future__ import annotations

import ast
import re

import pytest

from tests import ROOT

PAGE = ROOT / "docs" / "faults.md"


def rows() -> list[list[str]]:
    """Return the cells of the table's rows, without its head."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def functions_of(path: str) -> set[str]:
    """Return the names of a file's test functions."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row[0]))
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    fault, what_happens, tests = row
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert all((fault, what_happens)), row
    assert named, f"{fault}: names no test as `tests/….py::test_…`"
    for path, function in named:
        assert function in functions_of(path), f"{fault}: {path} has no {function}"


def test_rows_are_sorted_by_fault() -> None:
    faults = [row[0].lower() for row in rows()]
    assert faults == sorted(faults)
