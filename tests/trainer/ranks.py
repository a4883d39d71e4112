"""Two ranks on this machine, as processes that meet over gloo. They are started once and run the cases of all tests.

Starting a pair costs some fifteen seconds of processor time, more than most tests train.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.distributed import process_group, world_from
from tests import ROOT
from tests.s3 import free_port

TIMEOUT_SECONDS = 280
SIZE = 2
DONE = "done"


class RankCases(Protocol):
    """A module with the cases of a test."""

    def report(self, folder: Path, cases: Sequence[str], world: World) -> dict[str, Any]:
        """Run the cases as one of the ranks; return their results."""


class Ranks:
    """The two processes. After a failure they are of no use any more."""

    def __init__(self) -> None:
        self._logs = [Path(tempfile.mkdtemp(prefix="ranks")) / f"{rank}.log" for rank in range(SIZE)]
        self._ranks = [self._start(rank, port) for port in [free_port()] for rank in range(SIZE)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(SIZE),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.ranks"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._logs[rank].open("wb"),
            text=True,
        )

    def run(self, module: str, folder: Path, cases: Sequence[str]) -> dict[str, Any]:
        """Run the cases of a module (`RankCases`) on both ranks; return the report of rank 0."""
        task = json.dumps({"module": module, "folder": str(folder), "cases": list(cases)})
        for rank in self._ranks:
            assert rank.stdin is not None
            print(task, file=rank.stdin, flush=True)
        with ThreadPoolExecutor(SIZE) as threads:
            answers = [threads.submit(_line_of, rank) for rank in self._ranks]
            try:
                ended = [answer.result(TIMEOUT_SECONDS) for answer in answers]
            except TimeoutError:
                self.stop()  # which ends the threads' reading
                ended = []
        assert ended == [DONE] * SIZE, "\n".join(log.read_text()[-3000:] for log in self._logs)
        result: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return result

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()


def _line_of(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline().strip()


_running: list[Ranks] = []


@atexit.register
def _stop_all() -> None:
    for ranks in _running:
        ranks.stop()
    _running.clear()


def report_of_two_ranks(module: str, folder: Path, *cases: str) -> dict[str, Any]:
    """Run the cases of the module named `module` (`RankCases`) as two ranks; return the report of rank 0."""
    if not _running:
        _running.append(Ranks())
    try:
        return _running[0].run(module, folder, cases)
    except BaseException:
        _stop_all()
        raise


# -- one rank ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run one task after another from standard input. An error ends the process, and with it its group."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
    world = world_from(os.environ)
    with process_group(world):
        import deepspeed  # noqa: F401  # by now, as most cases do

        for line in sys.stdin:
            task = json.loads(line)
            module: RankCases = importlib.import_module(task["module"])
            gc.freeze()  # DeepSpeed collects garbage for every engine it makes: not among all that was ever imported
            report = module.report(Path(task["folder"]), task["cases"], world)
            if world.is_main:
                (Path(task["folder"]) / "report.json").write_text(json.dumps(report))
            print(DONE, file=answers, flush=True)


if __name__ == "__main__":
    main()
