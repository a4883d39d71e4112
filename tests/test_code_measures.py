"""Limits on the size of functions and files, and on names that mean two things."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

MAX_FUNCTION_LINES = 60
"""Without the docstring: about a screen."""
MAX_FILE_LINES = 500

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, str]:
    """Source text by path, of everything that is installed."""
    paths = [path for folder in ("operator", "trainer") for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def functions(source: str) -> Iterator[FunctionNode]:
    yield from (node for node in ast.walk(ast.parse(source)) if isinstance(node, FunctionNode))


def num_lines(function: FunctionNode) -> int:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def test_no_function_is_longer_than_a_screen() -> None:
    found = {
        f"{path}: {function.name}": num_lines(function)
        for path, source in modules().items()
        for function in functions(source)
        if num_lines(function) > MAX_FUNCTION_LINES
    }
    assert found == {}


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {path: source.count("\n") for path, source in modules().items()}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_two_classes_have_the_same_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_every_package_has_a_docstring() -> None:
    packages = [path for path in modules() if Path(path).name == "__init__.py"]
    assert packages
    undocumented = [path for path in packages if not ast.get_docstring(ast.parse((ROOT / path).read_text()))]
    assert undocumented == []
