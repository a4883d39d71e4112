"""Outcome files, by which workers report to the launcher how they ended: torchrun maps every exit code to 1."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.faults import result_of_log, shortened
from stagecoach_api.outcomes import MAX_WARNINGS, AttemptResult, Cause, ExitCode, bounded_warnings, cause_of_exit
from stagecoach_trainer.runtime.attempt_files import outcomes_folder, replace_file

MAX_RESULT_BYTES = 4000
"""Kubernetes truncates a Pod's termination message at 4,096 bytes; truncated JSON cannot be parsed."""

MESSAGE_CHARACTERS = 2500
GENERIC_FAILURE = 1
"""Exit code of a worker that ended for an unknown reason."""


@dataclass(frozen=True)
class RankOutcome:
    """The end of one rank."""

    result: AttemptResult
    named: bool
    """Whether the contract has an exit code for the error. False for an unexpected exception, which is often a
    consequence of another rank's."""
    time: float
    """Seconds since the epoch."""


def write_outcome(work: Path, rank: int, outcome: RankOutcome) -> None:
    folder = outcomes_folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"result": outcome.result.model_dump(mode="json"), "named": outcome.named, "time": outcome.time}
    replace_file(folder / f"rank-{rank:05d}.json", json.dumps(about).encode())


def read_outcomes(work: Path) -> dict[int, RankOutcome]:
    """Return the outcomes of the ranks that have written one, by rank."""
    outcomes = {}
    for path in sorted(outcomes_folder(work).glob("rank-*.json")):
        about = json.loads(path.read_text())
        result = AttemptResult.model_validate(about["result"])
        outcomes[int(path.stem.removeprefix("rank-"))] = RankOutcome(result, about["named"], about["time"])
    return outcomes


def combine(
    outcomes: dict[int, RankOutcome],
    ranks: Collection[int],
    exit_code: int,
    end_of_log: Callable[[int], str] = lambda rank: "",
) -> AttemptResult:
    """Return the attempt's result from the outcomes of the workers of `ranks` and their parent process's exit code.

    `end_of_log`: returns the end of a rank's log, which explains a worker that ended before it could report.

    One rank's failure makes the others fail, so the earliest named failure is the reason, else the signal that killed a
    rank without an outcome, else the earliest error of a rank's own. That a rank was asked to stop explains nothing:
    torchrun asks the others once one has failed.
    """
    failures = sorted(
        (outcome for outcome in outcomes.values() if outcome.result.exit_code != ExitCode.DONE),
        key=lambda outcome: outcome.time,
    )
    named = [item for item in failures if item.named and item.result.exit_code != ExitCode.INTERRUPTED]
    silent = sorted(set(ranks) - set(outcomes))
    if not named and silent and exit_code < 0:  # killed: torchrun does not list the ranks that it has ended itself
        return _without_outcome(silent, exit_code, end_of_log)
    explaining = named or [item for item in failures if item.result.fault]
    if explaining:
        return explaining[0].result
    if exit_code != ExitCode.DONE and (silent or not failures):
        return _without_outcome(silent, exit_code, end_of_log)
    if failures:
        return min(failures, key=lambda item: item.named).result
    if silent or not outcomes:
        return _without_outcome(silent, GENERIC_FAILURE, end_of_log)
    return outcomes[min(outcomes)].result


def torchrun_deaths(text: bytes) -> dict[int, int]:
    """Return the exit codes of dead workers by process id, parsed from torchrun's final output: its own exit code is
    always 1."""
    return {int(pid): int(code) for code, pid in _DEATH.findall(text)}


_DEATH = re.compile(rb"^\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)", re.MULTILINE)


def _without_outcome(silent: list[int], exit_code: int, end_of_log: Callable[[int], str]) -> AttemptResult:
    died = result_of_log(exit_code, end_of_log(silent[0] if silent else 0))
    if died is not None:
        return fitting(died)
    who = "the worker" if silent in ([], [0]) else f"rank {', '.join(map(str, silent))}"
    message = f"{who} ended without reporting a reason, exit code {exit_code}; see the last lines of its log"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        message = f"{who} was killed by signal {-exit_code} ({name})"
    if exit_code == -signal.SIGKILL:
        message += "; the usual reason is a lack of memory"
    return AttemptResult(exit_code=exit_code, cause=cause_of_exit(exit_code), message=message)


def failure(exit_code: int, message: str, last_step: int | None = None, fault: str | None = None) -> AttemptResult:
    """Return the result of a failed attempt, its message shortened to what the contract allows."""
    cause = cause_of_exit(exit_code)
    text = shortened(message, MESSAGE_CHARACTERS)
    return fitting(AttemptResult(exit_code=exit_code, cause=cause, message=text, last_step=last_step, fault=fault))


def interrupted(message: str) -> AttemptResult:
    return AttemptResult(exit_code=ExitCode.INTERRUPTED, cause=Cause.PREEMPTION, message=message)


def fitting(result: AttemptResult) -> AttemptResult:
    """Return the result with the middle of its message cut so that its JSON has at most MAX_RESULT_BYTES bytes."""
    while len(serialise(result)) > MAX_RESULT_BYTES:
        keep = len(result.message) * 9 // 20
        message = f"{result.message[:keep]} … {result.message[-keep:]}"
        result = result.model_copy(update={"message": message})
    return result


def with_warnings(result: AttemptResult, warnings: Sequence[str]) -> AttemptResult:
    """Return the result with as many of the stage's warnings as there is room for next to its message."""
    if not warnings:
        return result
    for number in range(MAX_WARNINGS, 1, -1):
        noted = result.model_copy(update={"warnings": bounded_warnings(warnings, number)})
        if len(serialise(noted)) <= MAX_RESULT_BYTES:
            return noted
    return fitting(result.model_copy(update={"warnings": bounded_warnings(warnings, 0)}))


def serialise(result: AttemptResult) -> bytes:
    return result.model_dump_json(exclude_none=True).encode()
