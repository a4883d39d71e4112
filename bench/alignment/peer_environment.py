"""The Python environment of TRL, the alignment benches' peer: created once from pinned requirements in `build/`.

TRL 1.12.0 is the last release with PPO. It is not imported here: each side runs in processes of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.measuring import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements-trl.txt"
FOLDER = ROOT / "build" / "trl-venv"
WHEELS = ROOT.parent / "shared" / "wheels"
"""A folder of packages that may include PyTorch without CUDA; otherwise PyTorch is downloaded."""
UV = ROOT / ".uv" / "bin" / "uv"

QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
"""Environment variables for both sides' processes."""


def peer_python() -> str:
    """Return the peer's interpreter, creating its environment unless it exists with these requirements.

    Raises RuntimeError if a package cannot be installed.
    """
    python = FOLDER / "bin" / "python"
    stamp = FOLDER / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        make_environment(python)
        stamp.write_text(wanted)
    return str(python)


def make_environment(python: Path) -> None:
    """Install the requirements into a new environment."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    _uv("venv", "--quiet", "--python", sys.executable, str(FOLDER))
    torch = ["--find-links", str(WHEELS)] if any(WHEELS.glob("torch-*.whl")) else ["--torch-backend", "cpu"]
    _uv(
        *("pip", "install", "--quiet", "--python", str(python)),
        *("--no-deps", "--require-hashes", *torch, "--requirement", str(REQUIREMENTS)),
    )


def _uv(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run([str(UV), *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"uv {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
