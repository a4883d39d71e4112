"""Programs are built once, shown with a fake Go that records its arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.build import Builder, copy_folder
from tests.cluster.report import ClusterError
from tests.cluster.versions import Part, Versions

PART = Part(
    "tool",
    "example.com/tool",
    "v1.2.3",
    {"a": "example.com/tool/a", "b": "example.com/tool/b"},
    {"chart": "charts/tool"},
)
FAKE_GO = """#!/bin/sh
echo "$GONOSUMDB $CGO_ENABLED: $*" >> "{folder}/asked"
case "$1 $2" in
  "env GOVERSION") echo "{version}" ;;
  "mod download") echo '{{"Dir": "{folder}/module", "GoMod": "{folder}/module/go.mod"}}' ;;
  "mod edit") echo '{{"Go": "1.24"}}' ;;
  *) while [ "$1" != -o ]; do shift; done
     [ "$3" = example.com/tool/b ] && [ -e "{folder}/broken" ] && {{ echo "b does not compile" >&2; exit 2; }}
     echo "program of $3" > "$2"; chmod +x "$2" ;;
esac
"""


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fake Go, first in PATH, and a module as in Go's cache."""
    folder = tmp_path / "go"
    chart = folder / "module" / "charts" / "tool"
    chart.mkdir(parents=True)
    (chart / "Chart.yaml").write_text("name: tool\n")
    chart.chmod(0o555)
    write_fake_go(folder, "go1.26.1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def write_fake_go(folder: Path, version: str) -> None:
    program = folder / "go"
    program.write_text(FAKE_GO.format(folder=folder, version=version))
    program.chmod(0o755)


def builder(tmp_path: Path, part: Part = PART, debian: Mapping[str, Mapping[str, Path]] | None = None) -> Builder:
    return Builder(Versions("1.26", {part.name: part}, debian or {}), tmp_path / "cache")


def asked(go: Path) -> list[str]:
    return [line.partition(": ")[2] for line in (go / "asked").read_text().splitlines()]


def test_programs_are_built_once_and_kept_by_version(
    tmp_path: Path, go: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = builder(tmp_path)
    made.ensure([("tool", ["a"])])
    assert made.program("tool", "a") == tmp_path / "cache" / "bin" / "tool-v1.2.3" / "a"
    assert made.program("tool", "a").read_text() == "program of example.com/tool/a\n"
    assert (made.folder("tool", "chart") / "Chart.yaml").read_text() == "name: tool\n"
    assert not made.program("tool", "b").exists()
    before = asked(go)
    made.ensure([("tool", ["a"])])
    assert asked(go) == before
    output = capsys.readouterr().out
    assert "tool v1.2.3: a" in output
    assert "1 of 1 programs" in output


def test_a_failed_build_leaves_nothing_and_raises_with_the_compilers_output(tmp_path: Path, go: Path) -> None:
    (go / "broken").touch()
    made = builder(tmp_path)
    with pytest.raises(ClusterError, match="b does not compile"):
        made.ensure([("tool", ["a", "b"])])
    assert made.program("tool", "a").exists()
    assert not made.program("tool", "b").exists()


def test_programs_are_static_and_only_named_modules_are_not_verified(tmp_path: Path, go: Path) -> None:
    builder(tmp_path, Part(**(vars(PART) | {"unverified": "example.com/fork"}))).ensure([("tool", ["a"])])
    lines = (go / "asked").read_text().splitlines()
    builds = [line for line in lines if ": build" in line]
    assert builds[0].startswith("example.com/fork 0: build -mod=mod -trimpath")


def test_an_old_go_is_rejected_before_anything_is_fetched(tmp_path: Path, go: Path) -> None:
    write_fake_go(go, "go1.25.9")
    with pytest.raises(ClusterError, match=r"Go 1\.25\.9 is installed; 1\.26 or newer is needed"):
        builder(tmp_path).ensure([("tool", ["a"])])
    assert asked(go) == ["env GOVERSION"]


def test_a_folder_of_the_read_only_module_cache_is_copied_as_a_writable_one(tmp_path: Path, go: Path) -> None:
    target = tmp_path / "chart"
    copy_folder(go / "module" / "charts" / "tool", target)
    (target / "Chart.yaml").write_text("changed")
    assert [path.name for path in target.iterdir()] == ["Chart.yaml"]
