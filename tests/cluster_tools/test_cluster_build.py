"""How programs are built once, with a stand-in for Go that writes down what it was asked."""

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
STAND_IN = """#!/bin/sh
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
    """A folder with the stand-in, first in PATH, and a module as Go's cache would hold it."""
    folder = tmp_path / "go"
    chart = folder / "module" / "charts" / "tool"
    chart.mkdir(parents=True)
    (chart / "Chart.yaml").write_text("name: tool\n")
    chart.chmod(0o555)
    write_stand_in(folder, "go1.26.1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def write_stand_in(folder: Path, version: str) -> None:
    program = folder / "go"
    program.write_text(STAND_IN.format(folder=folder, version=version))
    program.chmod(0o755)


def builder(tmp_path: Path, part: Part = PART, debian: Mapping[str, Mapping[str, Path]] | None = None) -> Builder:
    return Builder(Versions("1.26", {part.name: part}, debian or {}), tmp_path / "cache")


def asked(go: Path) -> list[str]:
    return [line.partition(": ")[2] for line in (go / "asked").read_text().splitlines()]


def test_what_is_wanted_is_built_once_and_kept_by_version(
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
    said = capsys.readouterr().out
    assert "tool v1.2.3: a" in said
    assert "1 of 1 programs" in said


def test_a_program_that_does_not_compile_leaves_nothing_and_is_said_with_the_compiler_s_words(
    tmp_path: Path, go: Path
) -> None:
    (go / "broken").touch()
    made = builder(tmp_path)
    with pytest.raises(ClusterError, match="b does not compile"):
        made.ensure([("tool", ["a", "b"])])
    assert made.program("tool", "a").exists()
    assert not made.program("tool", "b").exists()


def test_programs_are_static_and_only_named_modules_go_unverified(tmp_path: Path, go: Path) -> None:
    builder(tmp_path, Part(**(vars(PART) | {"unverified": "example.com/fork"}))).ensure([("tool", ["a"])])
    lines = (go / "asked").read_text().splitlines()
    builds = [line for line in lines if ": build" in line]
    assert builds[0].startswith("example.com/fork 0: build -mod=mod -trimpath")


def test_an_old_go_is_refused_before_anything_is_fetched(tmp_path: Path, go: Path) -> None:
    write_stand_in(go, "go1.25.9")
    with pytest.raises(ClusterError, match=r"Go 1\.25\.9 is installed; 1\.26 or newer is needed"):
        builder(tmp_path).ensure([("tool", ["a"])])
    assert asked(go) == ["env GOVERSION"]


def test_a_folder_of_go_s_read_only_cache_is_copied_as_a_writable_one(tmp_path: Path, go: Path) -> None:
    target = tmp_path / "chart"
    copy_folder(go / "module" / "charts" / "tool", target)
    (target / "Chart.yaml").write_text("changed")
    assert [path.name for path in target.iterdir()] == ["Chart.yaml"]
