"""Two ranks on this machine, as processes that meet over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.s3 import free_port

TIMEOUT_SECONDS = 280


def report_of_two_ranks(worker: Path, folder: Path, *cases: str) -> dict[str, Any]:
    """Run `worker FOLDER CASE…` as two ranks; return the `report.json` that rank 0 has written into `folder`.

    All cases are one pair of processes: starting one costs more than training.
    """
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), *cases],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(folder / f"{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    result: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return result
