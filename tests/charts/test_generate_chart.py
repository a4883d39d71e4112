"""The generated files of the chart, and the versions in Chart.yaml."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from stagecoach_api import version
from stagecoach_api.version import __version__
from stagecoach_core.manifests.settings import ManifestSettings
from tests import ROOT
from tests.charts.makers import CHART
from tests.scripts import load_script

generate = load_script("charts/generate.py")


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    for name in ("Chart.yaml", "values.yaml", "README.md", "values.schema.json"):
        shutil.copy(CHART / name, tmp_path)
    return tmp_path


def test_the_committed_files_are_up_to_date() -> None:
    assert generate.main(["--check"]) == 0


def test_an_edited_comment_is_detected_and_written_once(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = chart / "values.yaml"
    values.write_text(values.read_text().replace("# Number of operator replicas", "# Copies of the operator"))
    assert generate.main(["--check", "--chart", str(chart)]) == 1
    assert "README.md is outdated: run `make generate`" in capsys.readouterr().err
    assert generate.main(["--chart", str(chart)]) == 0
    assert "Copies of the operator" in (chart / "README.md").read_text()
    assert "Copies of the operator" in (chart / "values.schema.json").read_text()
    capsys.readouterr()
    assert generate.main(["--chart", str(chart)]) == 0
    assert capsys.readouterr().out == ""


def test_the_chart_has_the_version_of_the_package(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = chart / "Chart.yaml"
    assert re.findall(r"^(?:version|appVersion): (.*)$", metadata.read_text(), re.MULTILINE) == [__version__] * 2
    metadata.write_text(metadata.read_text().replace(f"appVersion: {__version__}", "appVersion: 9.9.9"))
    assert generate.main(["--check", "--chart", str(chart)]) == 1
    assert "Chart.yaml is outdated" in capsys.readouterr().err
    assert generate.main(["--chart", str(chart)]) == 0
    assert metadata.read_text() == (CHART / "Chart.yaml").read_text()


def test_a_chart_without_a_version_is_rejected(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chart / "Chart.yaml").write_text("name: stagecoach\n")
    assert generate.main(["--chart", str(chart)]) == 1
    assert "it must contain exactly one" in capsys.readouterr().err


def test_build_and_default_image_have_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert ROOT / project["tool"]["hatch"]["version"]["path"] == Path(version.__file__)
    assert ManifestSettings().trainer_image == f"stagecoach/trainer:{__version__}"


def test_handwritten_parts_of_the_readme_are_kept(chart: Path) -> None:
    readme = chart / "README.md"
    readme.write_text("before\n" + readme.read_text() + "after\n")
    generate.main(["--chart", str(chart)])
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")


def test_all_values_without_a_comment_are_reported(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (chart / "values.yaml").open("a") as values:
        values.write("\nalone: 1\n# A section.\nsection:\n  member: true\n")
    assert generate.main(["--chart", str(chart)]) == 1
    assert "alone, section.member" in capsys.readouterr().err


def test_a_readme_without_a_place_for_the_table_is_rejected(chart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chart / "README.md").write_text("# A chart\n")
    assert generate.main(["--chart", str(chart)]) == 1
    assert "no place for the values" in capsys.readouterr().err


def test_the_schema_of_a_value_comes_from_default_and_comment() -> None:
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
