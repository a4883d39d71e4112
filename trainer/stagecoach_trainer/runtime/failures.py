"""What an error of a stage is reported as: its exit code, its message, and whether it may recur.

What only the user can mend is a user error at once. What the machine, the network or the store did is infrastructure,
however often it happens. An unexpected error gets a fault: the core charges it to the user if it recurs.
"""

from __future__ import annotations

import errno
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.faults import INSTALL, Frame, fault_of, unnamed_message
from stagecoach_api.outcomes import ExitCode
from stagecoach_api.store import (
    AccessDenied,
    Corrupt,
    InvalidLocation,
    NotFound,
    Replaced,
    StoreError,
    Unreachable,
)
from stagecoach_trainer.runtime.errors import StageError
from stagecoach_trainer.runtime.outcomes import GENERIC_FAILURE, RankOutcome, failure

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, the user's quota used up, or the limit of a file's size reached."""
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
LOST = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EPIPE, errno.ENOTCONN, errno.ETIMEDOUT),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    }
)
"""Errors of a disk, of a network file system or of a connection."""
NETWORK_ERRORS = frozenset(
    {
        *("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "ProxyError"),
        *("ConnectionError", "Timeout", "ChunkedEncodingError", "IncompleteRead", "SSLError", "MaxRetryError"),
    }
)
"""Classes of httpx, requests and urllib3, which the Hugging Face libraries raise."""

MEMORY_ADVICE = "lower `batch.microBatchRows`, set `gradientCheckpointing: true`, or shard with `sharding.zero`"
DISK_ADVICE = "free space there or move the run's storage"
OWN_PACKAGES = ("stagecoach_trainer", "stagecoach_api")
OWN_FRAMES, LAST_FRAMES = 4, 3
"""Frames shown of our own code, and of a traceback's end."""

# Another rank's end, as the ranks that wait for it see it: for gloo, torch raises RuntimeErrors with its messages.
_COMMUNICATION_ERRORS = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "DistError"})
_COMMUNICATION_FILES = re.compile(r"torch/distributed/(distributed_c10d|c10d_logger|rendezvous)\.py|deepspeed/comm/")
_COMMUNICATION = re.compile(r"NCCL|gloo|peer|Socket|socket|rendezvous|TCPStore|process group", re.IGNORECASE)
# A failing GPU or driver. Wrong indexes show as device-side asserts and illegal accesses, and recur.
_HARDWARE = re.compile(
    r"CUDA.*(ECC|launch failure|launch timed out|unknown error|device is lost|driver shutting down|busy or unavailable|"
    r"initialization error|no CUDA-capable device|NVLink|system not yet initialized)|fallen off the bus",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Named:
    """An error for which the contract has a meaning."""

    exit_code: int
    message: str
    recurs: bool = False
    """Whether another attempt may well succeed, and a second failure shows that it does not."""


def outcome_of(error: BaseException, last_step: int | None = None, work: Path | None = None) -> RankOutcome:
    """Return the outcome that the contract assigns to an error; prints the traceback of an unexpected one.

    `work`: the attempt's folder, named if the error of a full disk does not name the file.
    """
    for cause in _chain(error):
        named = _named(cause, work)
        if named is not None:
            fault = _fault(cause) if named.recurs else None
            return RankOutcome(failure(named.exit_code, named.message, last_step, fault), True, time.time())
    traceback.print_exception(error)
    fault = None if is_consequence(error) else _fault(error)
    message = unnamed_message(type(error).__name__, str(error), shown_frames(error))
    return RankOutcome(failure(GENERIC_FAILURE, message, last_step, fault), False, time.time())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _named(error: BaseException, work: Path | None) -> Named | None:  # noqa: PLR0911 - one line per name
    """Return the meaning of an error in the contract; None for unexpected errors."""
    if isinstance(error, StageError):
        return Named(error.exit_code, str(error))
    if isinstance(error, StoreError):
        return _named_store_error(error)
    if isinstance(error, OSError):
        return _named_system_error(error, work)
    if isinstance(error, ImportError):
        return Named(ExitCode.USER_ERROR, f"a Python package is missing or cannot be loaded: {error}; {INSTALL}")
    if isinstance(error, KeyboardInterrupt):
        return Named(ExitCode.INTERRUPTED, "stopped by SIGINT")
    if isinstance(error, MemoryError):
        return Named(ExitCode.USER_ERROR, f"out of memory: {error}; {MEMORY_ADVICE}")
    if type(error).__name__ == "OutOfMemoryError":  # of a GPU, whose memory other processes may have held
        return Named(GENERIC_FAILURE, f"out of memory: {error}; {MEMORY_ADVICE}", recurs=True)
    if type(error).__name__ in NETWORK_ERRORS:
        return Named(ExitCode.STORAGE, f"an endpoint cannot be reached: {type(error).__name__}: {error}")
    return None


def _named_store_error(error: StoreError) -> Named:
    if isinstance(error, Unreachable | Replaced):
        return Named(ExitCode.STORAGE, str(error))
    if isinstance(error, AccessDenied | Corrupt | NotFound | InvalidLocation):
        return Named(ExitCode.USER_ERROR, str(error))  # the next attempt would fail likewise
    return Named(ExitCode.STORAGE, str(error), recurs=True)


def _named_system_error(error: OSError, work: Path | None) -> Named | None:
    if error.errno in DISK_IS_FULL:
        place = error.filename or ("a file being written" if work is None else f"a file in {work}")
        return Named(ExitCode.STORAGE, f"disk full: {place}: {error.strerror}; {DISK_ADVICE}", recurs=True)
    if error.errno in DENIED and error.filename:
        advice = "let the user that runs the stage access it, or name another place"
        return Named(ExitCode.USER_ERROR, f"permission denied: {error.filename} ({error.strerror}); {advice}")
    if error.errno in LOST or isinstance(error, ConnectionError | TimeoutError):
        place = f"{error.filename}: " if error.filename else ""
        return Named(ExitCode.STORAGE, f"a disk or a connection failed: {place}{error.strerror or error}")
    if type(error).__name__ in NETWORK_ERRORS:
        return Named(ExitCode.STORAGE, f"an endpoint cannot be reached: {type(error).__name__}: {error}")
    return None


# -- unexpected errors ------------------------------------------------------------------------------------------------


def is_consequence(error: BaseException) -> bool:
    """Return whether an unnamed error most likely follows from the end of another rank, or from failing hardware."""
    if type(error).__name__ in _COMMUNICATION_ERRORS or _HARDWARE.search(str(error)):
        return True
    files = [frame.file.replace("\\", "/") for frame in _frames(error)]
    communicates = any(_COMMUNICATION_FILES.search(file) for file in files)
    return isinstance(error, RuntimeError) and communicates and bool(_COMMUNICATION.search(str(error)))


def shown_frames(error: BaseException) -> list[Frame]:
    """Return the frames that explain an error: the last ones of our own code, what they call, the traceback's end."""
    frames = _frames(error)
    own = [index for index, frame in enumerate(frames) if _is_ours(frame)]
    called = [index + 1 for index in own[-1:]]
    shown = {*own[-OWN_FRAMES:], *called, *range(max(0, len(frames) - LAST_FRAMES), len(frames))}
    return [frame for index, frame in enumerate(frames) if index in shown]


def _fault(error: BaseException) -> str:
    frames = _frames(error)
    own = [frame for frame in frames if _is_ours(frame)]
    return fault_of(type(error).__name__, list(dict.fromkeys(frame.place for frame in [*own[-1:], *frames[-1:]])))


def _frames(error: BaseException) -> list[Frame]:
    summaries = traceback.extract_tb(error.__traceback__)
    return [Frame(item.filename, item.lineno or 0, item.name, item.line or "") for item in summaries]


def _is_ours(frame: Frame) -> bool:
    return any(f"/{package}/" in frame.file for package in OWN_PACKAGES)
