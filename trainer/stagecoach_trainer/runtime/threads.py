"""The threads of a rank: how many there are, and how they wait. Imports nothing heavy: the launcher uses it too.

OpenMP's threads spin while they wait for each other, as if the cores were theirs alone. With other processes on the
machine each thread then waits for one that does not run, at full load: a step took up to ten times as long. Waiting
passively gives the core away at once and changes no digit. GNU's runtime, which PyTorch's Linux packages contain, reads
`OMP_WAIT_POLICY`; for LLVM's and Intel's `KMP_BLOCKTIME` is what counts. What the user has set is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from stagecoach_api.names import ENV_THREADS

OPENMP = "OMP_NUM_THREADS"
THREAD_VARIABLES = (OPENMP, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
WAIT_POLICY = "OMP_WAIT_POLICY"
PASSIVE = {WAIT_POLICY: "PASSIVE", "KMP_BLOCKTIME": "0"}


def thread_environment(environment: Mapping[str, str], local_ranks: int) -> dict[str, str]:
    """Return the variables to add to the environment of a rank, one of `local_ranks` on this machine.

    The number of threads, on which the last digits of every sum depend, is the user's `OMP_NUM_THREADS`, else the
    driver's, else this rank's share of the cores. Raises ValueError if the driver's is not a positive number.
    """
    threads = _number(environment.get(OPENMP, "")) or _given(environment) or _share(local_ranks)
    variables = {name: str(threads) for name in THREAD_VARIABLES} | ({} if WAIT_POLICY in environment else PASSIVE)
    kept = {name: value for name, value in variables.items() if name not in environment}
    return kept | {ENV_THREADS: str(threads)}


def _given(environment: Mapping[str, str]) -> int:
    text = environment.get(ENV_THREADS, "")
    if text and not _number(text):
        raise ValueError(f"{ENV_THREADS}: got `{text}`; it must be a positive whole number")
    return _number(text)


def _number(text: str) -> int:
    """Return the first of OpenMP's numbers of threads, one for each level of nesting; 0 if it is missing."""
    first = text.partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() else 0


def _share(local_ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks)
