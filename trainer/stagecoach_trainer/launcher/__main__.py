"""The entry point of a stage's container and of the local driver: `python -m stagecoach_trainer.launcher`.

Starts the workers (one directly, several under torchrun), keeps what they print, passes on the wish to stop, and writes
how the attempt ended: torchrun turns every worker's exit code into 1, so workers leave theirs in files. Imports neither
torch nor the stages, and pydantic only when the workers are on their way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from stagecoach_api.names import (
    ENV_MASTER_ADDRESS,
    ENV_MASTER_PORT,
    ENV_NODE_RANK,
    ENV_RESULT_FILE,
    ENV_STAGE_FILE,
    ENV_THREADS,
    ENV_WORK_DIR,
    MASTER_PORT,
)
from stagecoach_trainer.launcher.rank_pipes import RankPipe, open_pipes
from stagecoach_trainer.runtime.attempt_files import announced_pids, clear_outcomes, replace_file

if TYPE_CHECKING:
    from stagecoach_api.outcomes import AttemptResult
    from stagecoach_trainer.launcher.rank_logs import RankLogs

DEFAULT_GRACE_SECONDS = 300.0
"""Time the workers have to save a checkpoint once they are asked to stop."""

POLL_SECONDS = 0.2
LOG_SECONDS = 30.0
"""How long the end of an attempt may be held up by storing the last of its logs."""
MIN_LOG_SECONDS = 5.0
"""The same of an attempt that was asked to stop and has used its grace period up: a pod is killed ten seconds later."""


class Launcher:
    """One attempt's workers, from start to result."""

    def __init__(self, environment: Mapping[str, str], grace_seconds: float) -> None:
        self._environment = environment
        self._grace_seconds = grace_seconds
        self._work = Path(environment[ENV_WORK_DIR])
        self._stop_at: float | None = None
        self._logs: RankLogs | None = None

    def run(self) -> AttemptResult:
        """Run the attempt to its end."""
        started = time.time()
        self._listen()  # first: in a container this is process 1, which SIGTERM passes by until it is listened to
        clear_outcomes(self._work)
        try:
            stage = Path(self._environment[ENV_STAGE_FILE]).read_bytes()
            nodes, ranks = gang_size(stage)
            command = worker_command(nodes, ranks, self._grace_seconds, self._environment)
            first = ranks * int(self._environment[ENV_NODE_RANK]) if nodes > 1 else 0
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return _unusable(error)
        pipes = open_pipes(self._work, range(first, first + ranks))
        child = self._start(command, ranks, pipes[0])
        self._keep_logs(pipes, ranks, stage, started)  # this and the next line import while the workers import theirs
        from stagecoach_trainer.runtime.outcomes import combine, read_outcomes

        code = self._wait(child)
        if code < 0 and nodes * ranks > 1:  # torchrun was killed, so nobody has ended its workers
            self._kill(announced_pids(self._work).values())
        outcomes, own = read_outcomes(self._work), range(first, first + ranks)
        if nodes * ranks > 1 and code > 0:
            code = self._death_of([rank for rank in own if rank not in outcomes]) or code
        result = combine(outcomes, own, code)
        return result if self._stop_at is None else _as_stopped(result)

    def finish(self) -> None:
        """Store the last of the logs; takes half a minute at most, and less where a grace period ends."""
        if self._logs is None:
            return
        seconds = LOG_SECONDS
        if self._stop_at is not None:
            left = self._stop_at + self._grace_seconds - time.monotonic()
            seconds = min(max(left, MIN_LOG_SECONDS), LOG_SECONDS)
        self._logs.finish(seconds)

    def request_stop(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Note that the attempt is to stop; `_wait` passes it on. Safe in a signal handler."""
        del number, frame
        if self._stop_at is None:
            self._stop_at = time.monotonic()

    def _start(self, command: Sequence[str], ranks: int, output: RankPipe) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=worker_environment(self._environment, ranks),
            stdin=subprocess.PIPE,  # its end tells the workers that this process is gone, even by kill -9
            stdout=output.writer,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process only, which passes it on
        )

    def _keep_logs(self, pipes: Sequence[RankPipe], ranks: int, stage: bytes, started: float) -> None:
        from stagecoach_trainer.launcher.rank_logs import RankLogs

        self._logs = RankLogs(pipes, self._work, stage, started)
        if len(pipes) < ranks:
            self._logs.say(f"no named pipes in {self._work}: all ranks print into the log of rank {pipes[0].rank}")

    def _death_of(self, ranks: Sequence[int]) -> int:
        """Return the exit code with which one of these ranks died, as torchrun tells it. 0: it does not."""
        from stagecoach_trainer.runtime.outcomes import torchrun_deaths

        if self._logs is None or not ranks:
            return 0
        deaths, pids = torchrun_deaths(self._logs.drain()), announced_pids(self._work)
        return next((deaths[pids[rank]] for rank in ranks if pids.get(rank) in deaths), 0)

    def _listen(self) -> None:
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, self.request_stop)
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=self._watch_stdin, name="stdin", daemon=True).start()

    def _watch_stdin(self) -> None:
        while os.read(0, 4096):
            pass
        self.request_stop()

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        asked: set[int] = set()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(POLL_SECONDS)
            reap_orphans(child.pid)
            if self._stop_at is None:
                continue
            self._ask_to_stop(child, asked)
            if time.monotonic() - self._stop_at > self._grace_seconds:
                self._kill({child.pid, *announced_pids(self._work).values()})

    @staticmethod
    def _kill(pids: Iterable[int]) -> None:
        for pid in pids:
            send(pid, signal.SIGKILL)

    def _ask_to_stop(self, child: subprocess.Popen[bytes], asked: set[int]) -> None:
        """Send SIGTERM once to every worker, as soon as it has announced itself (before, it could only die of it).

        Not to torchrun, which would kill the workers after a grace of its own.
        """
        for pid in announced_pids(self._work).values():
            if pid not in asked and child.poll() is None:
                asked.add(pid)
                send(pid, signal.SIGTERM)


def _unusable(error: Exception) -> AttemptResult:
    from stagecoach_api.outcomes import ExitCode
    from stagecoach_trainer.runtime.outcomes import failure

    return failure(ExitCode.USER_ERROR, f"the stage file cannot be used: {type(error).__name__}: {error}")


def _as_stopped(result: AttemptResult) -> AttemptResult:
    """Return the result of an attempt that was asked to stop: whatever it died of then is no fault of the run."""
    from stagecoach_api.outcomes import ExitCode
    from stagecoach_trainer.runtime.outcomes import interrupted

    if result.exit_code in (ExitCode.DONE, ExitCode.INTERRUPTED):
        return result
    return interrupted(f"asked to stop, and ended otherwise: {result.message[:2000]}")


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap_orphans(but: int) -> None:
    """Take note of ended processes that others left behind: in a container this is process 1, to which they fall.

    `but`: the child that is waited for elsewhere.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == but:
                return
            os.waitpid(ended.si_pid, 0)


def gang_size(stage: bytes) -> tuple[int, int]:
    """Return the number of nodes, and of ranks on each. Raises ValueError for a stage file that is none."""
    told = json.loads(stage)
    nodes, ranks = int(told.get("numNodes", 1)), int(told.get("ranksPerNode", 1))
    if nodes < 1 or ranks < 1:
        raise ValueError(f"numNodes {nodes}, ranksPerNode {ranks}; both must be at least 1")
    return nodes, ranks


def worker_command(nodes: int, ranks: int, grace_seconds: float, environment: Mapping[str, str]) -> list[str]:
    """Return the command that runs all workers of this node."""
    if nodes == ranks == 1:
        return [sys.executable, "-m", "stagecoach_trainer"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=0"]
    torchrun.append(f"--shutdown-timeout={int(grace_seconds)}")
    if nodes == 1:
        torchrun.append("--standalone")
    else:  # c10d sorts hosts by name (-10 before -2): the rank is the pod's index
        torchrun += [
            f"--nnodes={nodes}",
            f"--node-rank={environment[ENV_NODE_RANK]}",
            f"--master-addr={environment[ENV_MASTER_ADDRESS]}",
            f"--master-port={environment.get(ENV_MASTER_PORT, MASTER_PORT)}",
        ]
    return [*torchrun, "-m", "stagecoach_trainer"]


def worker_environment(environment: Mapping[str, str], ranks: int) -> dict[str, str]:
    """Return the workers' environment, the number of threads of each pinned."""
    threads = environment.get(ENV_THREADS) or str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return {**environment, ENV_THREADS: threads, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}


def write_result(result: AttemptResult, path: Path) -> None:
    from stagecoach_trainer.runtime.outcomes import fitting, serialise

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, serialise(fitting(result)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one attempt; return the exit code of the worker that ended first.

    The result is written before the last logs are stored: nothing that happens then can take it away.
    """
    parser = argparse.ArgumentParser(prog="stagecoach-trainer", description="Run one attempt of one stage.")
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=DEFAULT_GRACE_SECONDS,
        help="time to save a checkpoint once asked to stop (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    launcher = Launcher(os.environ, options.grace_seconds)
    result = launcher.run()
    with contextlib.suppress(OSError):  # a full disk: the exit code still tells
        write_result(result, Path(os.environ[ENV_RESULT_FILE]))
    launcher.finish()
    return result.exit_code if result.exit_code >= 0 else 128 - result.exit_code


def run_and_exit() -> None:
    """Run and leave at once: a store or a reader that does not answer must not keep an ended attempt alive."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_exit()
