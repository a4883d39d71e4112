"""Files of one attempt that launcher and workers share. Imports nothing heavy: the launcher starts its workers first.

`<work>/outcomes/rank-00000.json` contains the outcome of a worker and `rank-00000.pid` its process id;
`<work>/outcomes/warnings.jsonl` the stage's warnings, one JSON string per line; `<work>/logs` contains metrics and the
output of each rank.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def outcomes_folder(work: Path) -> Path:
    return work / "outcomes"


def logs_folder(work: Path) -> Path:
    return work / "logs"


def clear_outcomes(work: Path) -> None:
    """Delete the outcomes of an earlier attempt in the same folder."""
    shutil.rmtree(outcomes_folder(work), ignore_errors=True)
    outcomes_folder(work).mkdir(parents=True)


def announce(work: Path, rank: int) -> None:
    """Write this worker's process id to a file, so that the launcher can ask it to stop."""
    folder = outcomes_folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"rank-{rank:05d}.pid", str(os.getpid()).encode())


def announced_pids(work: Path) -> dict[int, int]:
    """Return the process ids of the ranks that have announced themselves, by rank."""
    folder = outcomes_folder(work)
    return {int(path.stem.removeprefix("rank-")): int(path.read_text()) for path in sorted(folder.glob("rank-*.pid"))}


def warnings_file(work: Path) -> Path:
    """Return the path of the stage's warnings, which outlive a worker that is killed."""
    return outcomes_folder(work) / "warnings.jsonl"


def written_warnings(work: Path) -> list[str]:
    """Return the warnings written to this node so far, without the line that a killed worker left unfinished."""
    try:
        lines = warnings_file(work).read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    return [str(json.loads(line)) for line in lines if line.endswith(b"\n")]


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically, or directly if it can be written but not replaced, such as /dev/termination-log."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        path.write_bytes(data)
