"""Files of one attempt that launcher and workers share. Imports nothing heavy: the launcher starts its workers first.

`<work>/outcomes/rank-00000.json` holds how one worker ended, `rank-00000.pid` its process id; `<work>/logs` holds
metrics, and what each rank printed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def outcomes_folder(work: Path) -> Path:
    return work / "outcomes"


def logs_folder(work: Path) -> Path:
    return work / "logs"


def clear_outcomes(work: Path) -> None:
    """Forget what an earlier attempt in the same folder left."""
    shutil.rmtree(outcomes_folder(work), ignore_errors=True)
    outcomes_folder(work).mkdir(parents=True)


def announce(work: Path, rank: int) -> None:
    """Leave this worker's process id, so that the launcher can ask it to stop."""
    folder = outcomes_folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"rank-{rank:05d}.pid", str(os.getpid()).encode())


def announced_pids(work: Path) -> dict[int, int]:
    """Return the process id of every rank that has announced itself."""
    folder = outcomes_folder(work)
    return {int(path.stem.removeprefix("rank-")): int(path.read_text()) for path in sorted(folder.glob("rank-*.pid"))}


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees it whole or not at all. Also for files such as /dev/termination-log, which
    can be written but not replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        path.write_bytes(data)
