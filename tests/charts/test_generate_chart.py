"""What is made from values.yaml: committed, up to date, and checked."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT
from tests.charts.makers import CHART


def load() -> ModuleType:
    """Return charts/generate.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("charts_generate", ROOT / "charts" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate = load()


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    for name in ("values.yaml", "README.md", "values.schema.json"):
        shutil.copy(CHART / name, tmp_path)
    return tmp_path


def test_the_committed_files_are_what_the_values_say() -> None:
    assert generate.main(["--check"]) == 0


def test_an_edited_comment_is_found_and_written_once(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = chart / "values.yaml"
    values.write_text(values.read_text().replace("# Replicas of the operator", "# Copies of the operator"))
    assert generate.main(["--check", "--chart", str(chart)]) == 1
    assert "README.md is outdated: run `make generate`" in capsys.readouterr().err
    assert generate.main(["--chart", str(chart)]) == 0
    assert "Copies of the operator" in (chart / "README.md").read_text()
    assert "Copies of the operator" in (chart / "values.schema.json").read_text()
    capsys.readouterr()
    assert generate.main(["--chart", str(chart)]) == 0
    assert capsys.readouterr().out == ""


def test_what_is_written_by_hand_in_the_readme_stays(chart: Path) -> None:
    readme = chart / "README.md"
    readme.write_text("before\n" + readme.read_text() + "after\n")
    generate.main(["--chart", str(chart)])
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")


def test_all_values_without_a_comment_are_named(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (chart / "values.yaml").open("a") as values:
        values.write("\nalone: 1\n# A section.\nsection:\n  member: true\n")
    assert generate.main(["--chart", str(chart)]) == 1
    assert "alone, section.member" in capsys.readouterr().err


def test_a_readme_without_a_place_is_refused(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chart / "README.md").write_text("# A chart\n")
    assert generate.main(["--chart", str(chart)]) == 1
    assert "no place for the values" in capsys.readouterr().err


def test_a_value_s_schema_comes_from_its_default_and_its_comment() -> None:
    text = """\
# How many,
# and of what.
# Schema: {minimum: 1}
count: 2

# A section.
section:
  # On or off.
  on: false
  # Free names.
  # Schema: {additionalProperties: {type: string}}
  labels: {}
"""
    schema = json.loads(generate.schema_text(generate.read_values(text)))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["count"] == {
        "description": "How many, and of what.",
        "type": "integer",
        "minimum": 1,
        "default": 2,
    }
    section = schema["properties"]["section"]
    assert section["additionalProperties"] is False
    assert section["properties"]["on"]["type"] == "boolean"
    assert section["properties"]["labels"]["additionalProperties"] == {"type": "string"}
