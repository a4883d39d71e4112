"""The entry point of a stage's container and of the local driver: `python -m stagecoach_trainer.launcher`.

Starts the workers (one directly, several under torchrun), stores their output, forwards requests to stop, and writes
the attempt's result: torchrun maps every worker's exit code to 1, so workers write theirs to files. Imports neither
torch nor the stages, and pydantic only after the workers have started.
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
    ENV_WORK_DIR,
    MASTER_PORT,
)
from stagecoach_trainer.launcher.rank_pipes import RankPipe, open_pipes
from stagecoach_trainer.launcher.stack_dumps import StackDumps, flight_recorder_environment
from stagecoach_trainer.runtime.attempt_files import announced_pids, clear_outcomes, replace_file, written_warnings
from stagecoach_trainer.runtime.threads import thread_environment

if TYPE_CHECKING:
    from stagecoach_api.outcomes import AttemptResult
    from stagecoach_trainer.launcher.rank_logs import RankLogs

DEFAULT_GRACE_SECONDS = 300.0
"""Time that workers have to save a checkpoint after they are asked to stop."""

POLL_SECONDS = 0.2
LOG_SECONDS = 30.0
"""Upper limit of the delay of an attempt's end by storing the end of its logs."""
MIN_LOG_SECONDS = 5.0
"""The same for an attempt that has used up its grace period: its pod is killed ten seconds later."""


class Launcher:
    """One attempt's workers, from start to result."""

    def __init__(self, environment: Mapping[str, str], grace_seconds: float) -> None:
        self._environment = environment
        self._grace_seconds = grace_seconds
        self._work = Path(environment[ENV_WORK_DIR])
        self._stop_at: float | None = None
        self._logs: RankLogs | None = None
        self._first = 0

    def run(self) -> AttemptResult:
        """Run the attempt to its end."""
        started = time.time()
        self._handle_stop_requests()  # first: as PID 1 in a container, it ignores SIGTERM until a handler is installed
        try:
            clear_outcomes(self._work)
            stage = Path(self._environment[ENV_STAGE_FILE]).read_bytes()
            nodes, ranks = gang_size(stage)
            command = worker_command(nodes, ranks, self._grace_seconds, self._environment)
            first = self._first = ranks * int(self._environment[ENV_NODE_RANK]) if nodes > 1 else 0
            variables = worker_environment(self._environment, ranks)
            variables |= flight_recorder_environment(self._environment, self._work)
        except OSError as error:
            return _unreadable(error)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return _unusable(error)
        pipes = open_pipes(self._work, range(first, first + ranks))
        child = self._start(command, variables, pipes[0])
        # The imports of this and the next line overlap with those of the workers (`runtime.startup`).
        self._keep_logs(pipes, ranks, stage, started)
        from stagecoach_trainer.runtime.outcomes import combine, read_outcomes, with_warnings

        code = self._wait(child, StackDumps(self._environment, self._grace_seconds, self._note))
        if code < 0 and nodes * ranks > 1:  # torchrun was killed, so its workers still run
            self._kill(announced_pids(self._work).values())
        outcomes, own = read_outcomes(self._work), range(first, first + ranks)
        if nodes * ranks > 1 and code > 0:
            code = self._death_of([rank for rank in own if rank not in outcomes]) or code
        result = combine(outcomes, own, code, lambda rank: self._end_of_log(max(0, rank - first)))
        result = result if self._stop_at is None else _as_stopped(result)
        return with_warnings(result, written_warnings(self._work))

    def finish(self) -> None:
        """Store the end of the logs; takes at most LOG_SECONDS, and less towards the end of a grace period."""
        if self._logs is None:
            return
        seconds = LOG_SECONDS
        if self._stop_at is not None:
            left = self._stop_at + self._grace_seconds - time.monotonic()
            seconds = min(max(left, MIN_LOG_SECONDS), LOG_SECONDS)
        self._logs.finish(seconds)

    def request_stop(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Record that the attempt is to stop; `_wait` forwards it. Safe in a signal handler."""
        del number, frame
        if self._stop_at is None:
            self._stop_at = time.monotonic()

    def _start(self, command: Sequence[str], variables: Mapping[str, str], output: RankPipe) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,  # its end signals to the workers that this process has died, even by SIGKILL
            stdout=output.writer,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal then reaches this process alone, which forwards it
        )

    def _keep_logs(self, pipes: Sequence[RankPipe], ranks: int, stage: bytes, started: float) -> None:
        from stagecoach_trainer.launcher.rank_logs import RankLogs

        self._logs = RankLogs(pipes, self._work, stage, started)
        if len(pipes) < ranks:
            self._logs.say(f"no named pipes in {self._work}: all ranks print to the log of rank {pipes[0].rank}")

    def _death_of(self, ranks: Sequence[int]) -> int:
        """Return the exit code of one of these ranks from torchrun's output; 0 if it reports none."""
        from stagecoach_trainer.runtime.outcomes import torchrun_deaths

        if self._logs is None or not ranks:
            return 0
        deaths, pids = torchrun_deaths(self._logs.drain()), announced_pids(self._work)
        return next((deaths[pids[rank]] for rank in ranks if pids.get(rank) in deaths), 0)

    def _end_of_log(self, index: int) -> str:
        """Return the end of the output of one of this node's workers."""
        return "" if self._logs is None else self._logs.end_of(index).decode(errors="replace")

    def _handle_stop_requests(self) -> None:
        """Stop on SIGTERM, SIGINT and, if standard input is a pipe, at its end, when the driver has died."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, self.request_stop)
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=self._watch_stdin, name="stdin", daemon=True).start()

    def _watch_stdin(self) -> None:
        while os.read(0, 4096):
            pass
        self.request_stop()

    def _note(self, rank: int, text: str) -> None:
        if self._logs is not None:
            self._logs.note(max(0, rank - self._first), text)

    def _wait(self, child: subprocess.Popen[bytes], dumps: StackDumps) -> int:
        asked: set[int] = set()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(POLL_SECONDS)
            reap_orphans(child.pid)
            # The flag is polled rather than handled in the signal handler, which may interrupt any line of this thread.
            if self._stop_at is None:
                continue
            dumps.look(announced_pids(self._work))
            self._ask_to_stop(child, asked)
            if time.monotonic() - self._stop_at > self._grace_seconds:
                self._kill({child.pid, *announced_pids(self._work).values()})

    @staticmethod
    def _kill(pids: Iterable[int]) -> None:
        for pid in pids:
            send(pid, signal.SIGKILL)

    def _ask_to_stop(self, child: subprocess.Popen[bytes], asked: set[int]) -> None:
        """Send SIGTERM once to every worker that has announced itself; before, it has no handler and would die.

        torchrun gets no signal: it would kill the workers after its own grace period.
        """
        for pid in announced_pids(self._work).values():
            if pid not in asked and child.poll() is None:
                asked.add(pid)
                send(pid, signal.SIGTERM)


def _unusable(error: Exception) -> AttemptResult:
    from stagecoach_api.outcomes import ExitCode
    from stagecoach_trainer.runtime.outcomes import failure

    return failure(
        ExitCode.USER_ERROR,
        f"the attempt cannot start: {type(error).__name__}: {error}; check {ENV_STAGE_FILE} and the variables",
    )


def _unreadable(error: OSError) -> AttemptResult:
    """Return the result of an attempt whose stage file or work folder cannot be accessed."""
    from stagecoach_trainer.runtime.failures import outcome_of

    result = outcome_of(error).result
    return result if result.fault is None else _unusable(error)


def _as_stopped(result: AttemptResult) -> AttemptResult:
    """Return the result of an attempt that was asked to stop: a failure after that is not the run's."""
    from stagecoach_api.outcomes import ExitCode
    from stagecoach_trainer.runtime.outcomes import interrupted

    if result.exit_code in (ExitCode.DONE, ExitCode.INTERRUPTED):
        return result
    return interrupted(f"asked to stop, but ended differently: {result.message[:2000]}")


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap_orphans(but: int) -> None:
    """Reap ended processes whose parents have died: in a container this is PID 1, which inherits them.

    `but`: the child that is waited for elsewhere. Stops when it is the next one to reap.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            # WNOWAIT only looks, so that the awaited child's status stays for `Popen.wait`.
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == but:
                return
            os.waitpid(ended.si_pid, 0)


def gang_size(stage: bytes) -> tuple[int, int]:
    """Return the number of nodes and of ranks per node. Raises ValueError for an invalid stage file."""
    resolved = json.loads(stage)
    nodes, ranks = int(resolved.get("numNodes", 1)), int(resolved.get("ranksPerNode", 1))
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
    """Return the workers' environment: this one, the threads of each worker, unbuffered output."""
    return {**environment, **thread_environment(environment, ranks), "PYTHONUNBUFFERED": "1"}


def write_result(result: AttemptResult, path: Path) -> None:
    from stagecoach_trainer.runtime.outcomes import fitting, serialise

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, serialise(fitting(result)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one attempt; return the exit code of its result.

    The result is written before the end of the logs is stored, so a failure there cannot lose it.
    """
    parser = argparse.ArgumentParser(prog="stagecoach-trainer", description="Run one attempt of one stage.")
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=DEFAULT_GRACE_SECONDS,
        help="time to save a checkpoint after a request to stop (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    launcher = Launcher(os.environ, options.grace_seconds)
    result = launcher.run()
    with contextlib.suppress(OSError):  # on a full disk, the exit code still reports the reason
        write_result(result, Path(os.environ[ENV_RESULT_FILE]))
    launcher.finish()
    return result.exit_code if result.exit_code >= 0 else 128 - result.exit_code


def run_and_exit() -> None:
    """Run and exit at once: threads that wait for a store or a reader must not keep an ended attempt alive."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_exit()
