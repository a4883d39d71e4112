"""`--help` and `plan` are fast. Measured by the modules they must not import, not by time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stagecoach_cli.main import COMMANDS
from tests.cli.makers import Bench, chain

pytestmark = pytest.mark.slow

HEAVY = (
    *("torch", "transformers", "pydantic", "boto3", "botocore", "rich", "yaml", "psutil", "kubernetes", "urllib3"),
    "stagecoach_api.spec",
)
COMMAND_LINES = [
    [],
    *[[name] for name in COMMANDS],
    *[["artifacts", name] for name in ("ls", "get", "verify", "lineage", "gc")],
]
SCRIPT = """
import sys
from stagecoach_cli.main import call
code = call(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
print("LOADED", ",".join(loaded))
sys.exit(code)
"""


def run_line(folder: Path, heavy: tuple[str, ...], *arguments: str) -> tuple[str, list[str]]:
    """Return the output of a command line, and which of the `heavy` modules it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(heavy), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    output, _, loaded = done.stdout.rpartition("LOADED ")
    return output, [name for name in loaded.strip().split(",") if name]


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: " ".join(line) or "stagecoach")
def test_help_imports_nothing_heavy(line: list[str], tmp_path: Path) -> None:
    output, loaded = run_line(tmp_path, HEAVY, *line, "--help")
    assert "Usage: stagecoach" in output
    assert loaded == []


def test_a_plan_imports_neither_torch_nor_an_s3_client(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write(chain())
    output, loaded = run_line(tmp_path, ("torch", "transformers", "deepspeed", "boto3"), "plan", "run.yaml")
    assert "6 of 6 stages to run" in output
    assert loaded == []


def test_version_prints_the_programs_name(tmp_path: Path) -> None:
    output, loaded = run_line(tmp_path, HEAVY, "version")
    assert output.startswith("stagecoach 0.")
    assert loaded == []
