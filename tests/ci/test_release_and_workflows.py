"""The release check and the workflows: what they call exists, and what they promise holds."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.scripts import load_script

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


release = load_script(".ci/release.py")


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_of_a_workflow_exists(workflow: Path) -> None:
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        for made in re.findall(r"\bmake ([a-z -]+)", command):
            assert set(made.split()) <= TARGETS, command
        for script in re.findall(r"\.ci/[\w.]+", command):
            assert (ROOT / script).is_file(), command


def test_the_matrix_has_every_supported_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8"))["jobs"]
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert supported == ">=3.11,<3.14"
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_an_unknown_part_of_the_ci_is_an_error() -> None:
    ended = subprocess.run([ROOT / ".ci" / "run", "nonsense"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "unknown part: nonsense; one of lint, verify" in ended.stderr


# -- releases ----------------------------------------------------------------------------------------------------------


def project(folder: Path, version: str, chart: str, changelog: str) -> Path:
    (folder / "operator" / "stagecoach_api").mkdir(parents=True)
    (folder / "operator" / "stagecoach_api" / "version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    (folder / "charts" / "stagecoach").mkdir(parents=True)
    (folder / "charts" / "stagecoach" / "Chart.yaml").write_text(f"name: x\nversion: {chart}\n", encoding="utf-8")
    (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    return folder


def test_a_consistent_release_has_no_problems(tmp_path: Path) -> None:
    changelog = "# Changelog\n\n## 0.2.0 (2026-12-01)\n- New.\n\n## 0.1.0 (2026-11-01)\n- First.\n"
    assert list(release.problems("v0.2.0", project(tmp_path, "0.2.0", "0.2.0", changelog))) == []
    assert release.section(changelog, "0.2.0") == ("2026-12-01", "- New.")
    assert release.section(changelog, "0.1.0") == ("2026-11-01", "- First.")


@pytest.mark.parametrize(
    ("tag", "chart", "changelog", "expected"),
    [
        ("0.2.0", "0.2.0", "", "must be vX.Y.Z"),
        ("v0.3.0", "0.2.0", "## 0.3.0 (2026-12-01)\n- New.\n", "version.py: has version 0.2.0, the tag 0.3.0"),
        ("v0.2.0", "0.1.0", "## 0.2.0 (2026-12-01)\n- New.\n", "Chart.yaml: has version 0.1.0, the tag 0.2.0"),
        ("v0.2.0", "0.2.0", "## 0.1.0 (2026-12-01)\n- Old.\n", "has no section"),
        ("v0.2.0", "0.2.0", "## 0.2.0 (unreleased)\n- New.\n", "has the date `unreleased`"),
        ("v0.2.0", "0.2.0", "## 0.2.0 (2026-12-01)\n\n## 0.1.0 (2026-11-01)\n- Old.\n", "is empty"),
    ],
)
def test_what_keeps_a_tag_from_being_released_is_named(
    tag: str, chart: str, changelog: str, expected: str, tmp_path: Path
) -> None:
    found = list(release.problems(tag, project(tmp_path, "0.2.0", chart, changelog)))
    assert any(expected in problem for problem in found), found
