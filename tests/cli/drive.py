"""The real command line with the fake trainer: `python drive.py run run.yaml` in a `Bench` folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import stagecoach_cli.commands.run as run_module
from stagecoach_cli.main import call
from stagecoach_local.machine import Machine
from stagecoach_local.prepare import PreparedRun
from stagecoach_local.run_job import Job

original = run_module.make_job


def make_job(prepared: PreparedRun, file: Path, until: str | None, start: str | None, nproc: int | None) -> Job:
    fake = Path(__file__).with_name("fake_launcher.py")
    return replace(
        original(prepared, file, until, start, nproc),
        launcher=(sys.executable, "-S", str(fake), str(Path.cwd())),
        machine=Machine(cores=2),
        poll_seconds=0.02,
        grace_seconds=2.0,
    )


run_module.make_job = make_job
sys.exit(call())
