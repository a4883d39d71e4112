"""Unexpected errors: how they are recognised when they recur, and how they are shown.

A fault is the type and the place of such an error, as text: two attempts that end with equal faults failed in the same
way. It is stored with an attempt's result, and the core compares it (`stagecoach_core.policies.ending`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stagecoach_api.outcomes import FAULT_CHARACTERS, AttemptResult, Cause, cause_of_exit

MESSAGE_CHARACTERS = 1200
"""Characters shown of an error's own message."""
LINE_CHARACTERS = 120
FRAMES = 8
"""Lines of a traceback that are shown at most."""

IMPORT_ERRORS = ("ImportError", "ModuleNotFoundError")
INSTALL = "install it where the trainer runs (on a cluster: in its image), or choose a model or setting without it"
UNNAMED = (
    "correct the setting, the data or the model that this is about; if it is a mistake of Stagecoach, report it with "
    "these lines"
)

LINES_AFTER = 12
"""Lines that may follow the traceback of a dying process: the rest of its message, and warnings of its exit."""

_OF_TORCHRUN = "ChildFailedError"
"""torchrun's own error, which follows that of its worker."""
_HEADER = "Traceback (most recent call last):"
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$')
_ERROR = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(: ?(?P<message>.*))?$")
_NO_MODULE = re.compile(r"^\S*python\S*: (?P<message>(No module named|Error while finding module) .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Frame:
    """One line of a traceback."""

    file: str
    """Path as Python reports it."""
    line: int
    function: str
    source: str = ""

    @property
    def place(self) -> str:
        """Return `folder/file.py:12 in function`."""
        return f"{short_path(self.file)}:{self.line} in {self.function}"

    def __str__(self) -> str:
        text = f"{self.place}: {self.source.strip()}" if self.source.strip() else self.place
        return text if len(text) <= LINE_CHARACTERS else f"{text[: LINE_CHARACTERS - 1]}…"


def short_path(path: str) -> str:
    """Return a module's path from its distribution's folder on; else the file's name with its folder."""
    parts = path.replace("\\", "/").split("/")
    for root in ("site-packages", "dist-packages"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) :])
    for own in ("stagecoach_trainer", "stagecoach_api"):
        if own in parts[:-1]:
            return "/".join(parts[parts.index(own) :])
    return "/".join(parts[-2:])


def fault_of(type_name: str, places: Sequence[str]) -> str:
    """Return the fault of an error of this type that was raised at these places, outermost first."""
    return " at ".join([type_name, *(" > ".join(places),) * bool(places)])[:FAULT_CHARACTERS]


def unnamed_message(type_name: str, message: str, frames: Sequence[Frame], advice: str = UNNAMED) -> str:
    """Return the message of an unexpected error: its own message, where it was raised, what to do."""
    head = f"{type_name}: {shortened(message, MESSAGE_CHARACTERS)}" if message else type_name
    return "\n".join([head, *(f"  {frame}" for frame in frames[-FRAMES:]), advice])


def shortened(text: str, characters: int) -> str:
    """Return at most this many characters of a text: its beginning and its end, which explain most."""
    if len(text) <= characters:
        return text
    mark = " … "
    head = max(0, characters - len(mark)) * 11 // 20
    tail = max(0, characters - len(mark)) - head
    return f"{text[:head]}{mark}{text[len(text) - tail :]}"[:characters]


# -- the log of a process that left no result --------------------------------------------------------------------------


def result_of_log(exit_code: int, log: str) -> AttemptResult | None:
    """Return the result that follows from the exit code and the end of the log of a process that wrote none.

    None unless it ended with a traceback. A missing Python package is the user's at once.
    """
    if exit_code <= 0:
        return None
    found = _last_error(log)
    if found is None:
        return None
    type_name, message, frames = found
    is_import = type_name in IMPORT_ERRORS
    return AttemptResult(
        exit_code=exit_code,
        cause=Cause.USER if is_import else cause_of_exit(exit_code),
        message=unnamed_message(type_name, message, frames, INSTALL if is_import else UNNAMED),
        fault=fault_of(type_name, [frame.place for frame in frames[-1:]]),
    )


def _last_error(log: str) -> tuple[str, str, list[Frame]] | None:
    """Return type, message and frames of the traceback that ends a log; None if it does not end with one."""
    found = _NO_MODULE.search(log)
    if found is not None:
        return "ModuleNotFoundError", found["message"], []
    lines = [line for line in log.splitlines() if line.strip()]
    header, frames = 0, list[Frame]()
    last: tuple[int, str, str, list[Frame]] | None = None
    for index, line in enumerate(lines):
        frame, error = _FRAME.match(line), _ERROR.match(line)
        if line == _HEADER:
            header, frames = index, []
        elif frame is not None:
            frames.append(Frame(frame["file"], int(frame["line"]), frame["function"]))
        elif error is not None and frames:  # a line that ends a traceback
            type_name = error["type"].rpartition(".")[2]
            if type_name == _OF_TORCHRUN:
                del lines[header:]
                break
            last, frames = (index, type_name, error["message"] or "", frames), []
    return None if last is None or len(lines) - last[0] > LINES_AFTER else last[1:]
