"""Attempts of a run on this machine: their records, processes and progress."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import ValidationError

from stagecoach_api.faults import result_of_log
from stagecoach_api.outcomes import AttemptResult, cause_of_exit
from stagecoach_api.progress import RESUME, Pace, ProgressEvent
from stagecoach_core.policies.ending import end_of_attempt
from stagecoach_core.values import Attempt, AttemptState
from stagecoach_local.processes import AttemptProcess
from stagecoach_local.tail import ProgressTail, last_lines
from stagecoach_local.workspace import AttemptFolder, AttemptRecord

MESSAGE_LINES = 15
"""Lines of the log that are used as the message of an attempt that left none."""
TRACEBACK_LINES = 400
"""Lines of the log that are searched for the traceback of such an attempt."""

MESSAGE_CHARACTERS = 2400


@dataclass
class LiveAttempt:
    """An attempt whose process has not been observed to end."""

    record: AttemptRecord
    folder: AttemptFolder
    process: AttemptProcess
    tail: ProgressTail = field(init=False)
    progress: ProgressEvent | None = None
    pace: Pace = field(default_factory=Pace)
    longest_silence: float = 0.0

    def __post_init__(self) -> None:
        self.tail = ProgressTail(self.folder.progress)

    def refresh(self) -> list[str]:
        """Read the progress that the trainer has reported since the last call; return new warnings."""
        events = self.tail.added()
        for event in events:
            before = self.record.started if self.progress is None else self.progress.time
            self.longest_silence = max(self.longest_silence, event.time - before)
            self.progress = event
            self.pace.add(event)
            if event.activity == RESUME:
                self.record = self.record.model_copy(update={"resumed_from": int(event.done)})
        return [event.warning for event in events if event.warning]

    def observed(self) -> Attempt:
        """Return the attempt as the core sees it."""
        record = self.record
        return Attempt(
            stage=record.stage,
            digest=record.digest,
            number=record.number,
            state=AttemptState.STOPPING if record.stopping else AttemptState.RUNNING,
            started=record.started,
            running_since=record.started,
            cause=record.stop_cause,
            message=record.stopping,
            heartbeat=None if self.progress is None else self.progress.time,
            longest_silence=self.longest_silence,
        )


def observed_end(record: AttemptRecord) -> Attempt:
    """Return an ended attempt as the core sees it."""
    return Attempt(
        stage=record.stage,
        digest=record.digest,
        number=record.number,
        state=AttemptState.ENDED,
        started=record.started,
        running_since=record.started,
        ended=record.ended,
        cause=record.cause,
        message=record.message,
        fault=record.fault,
        last_step=record.last_step,
    )


def ended_record(attempt: LiveAttempt, now: float, earlier: Iterable[Attempt] = ()) -> AttemptRecord:
    """Return the record of an attempt whose process has ended, from its result file or else from its exit code.

    `earlier`: see `end_of_attempt`.
    """
    code = attempt.process.exit_code
    result = read_result(attempt.folder) or _result_of_process(attempt, code)
    end = end_of_attempt(attempt.record.stop_cause, result, earlier, attempt.record.number)
    message = end.message
    if end.cause is not None and not message:
        message = _message(attempt, code)
    return attempt.record.model_copy(
        update={
            "ended": _end_time(attempt, now),
            "cause": end.cause,
            "message": message,
            "content_digest": None if result is None else result.content_digest,
            "last_step": None if result is None else result.last_step,
            "fault": "" if result is None else result.fault or "",
        }
    )


def _result_of_process(attempt: LiveAttempt, code: int | None) -> AttemptResult | None:
    """Return what follows from the exit code and the log of a launcher that died before it wrote a result."""
    if code is None or code < 0:  # a signal
        return None
    log = "\n".join(last_lines(attempt.folder.log, TRACEBACK_LINES))
    return result_of_log(code, log) or AttemptResult(exit_code=code, cause=cause_of_exit(code))


def read_result(folder: AttemptFolder) -> AttemptResult | None:
    """Return the launcher's result file; None if it is missing or incomplete."""
    try:
        return AttemptResult.model_validate_json(folder.result.read_bytes())
    except (OSError, ValidationError):
        return None


def _end_time(attempt: LiveAttempt, now: float) -> float:
    """Return when the attempt ended, in seconds since the epoch.

    The exit of a process that an earlier driver started is not observed: its newest file gives the time.
    """
    if attempt.process.is_ours:
        return now
    times = [attempt.record.started]
    for path in (attempt.folder.log, attempt.folder.progress, attempt.folder.result):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return min(now, max(times))


def _message(attempt: LiveAttempt, code: int | None) -> str:
    if code is None:
        summary = "the process is gone and left no result: it was killed, or the machine was restarted"
    elif code < 0:
        summary = f"killed by {_signal_name(-code)}{_HINTS.get(-code, '')}"
    else:
        summary = f"the process ended with exit code {code} and left no result"
    # Only a process that was not killed explains its end in its log, with a traceback for instance.
    lines = last_lines(attempt.folder.log, MESSAGE_LINES)
    return "\n".join([summary, *lines])[-MESSAGE_CHARACTERS:] if code is not None and code > 0 else summary


_HINTS: dict[int, str] = {signal.SIGKILL: " (manually, or because memory ran out)"}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
