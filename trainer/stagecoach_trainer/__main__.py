"""One rank of a stage: `python -m stagecoach_trainer`, started by the launcher.

Reads and validates `stage.json` before any heavy import, pins the number of threads before numpy or torch counts the
cores, runs the stage, and exits with a code of the contract.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import logging
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.names import (
    ENV_CACHE_DIR,
    ENV_PROGRESS_FILE,
    ENV_STAGE_FILE,
    ENV_THREADS,
    ENV_WORK_DIR,
)
from stagecoach_api.outcomes import AttemptResult, ExitCode
from stagecoach_api.stage_kind import StageConfig
from stagecoach_api.store import AccessDenied, Corrupt, NotFound, StoreError
from stagecoach_trainer.launcher.rank_pipes import print_into_log, print_into_pipe
from stagecoach_trainer.runtime.attempt_files import announce
from stagecoach_trainer.runtime.errors import Interrupted, StageError, UserError
from stagecoach_trainer.runtime.outcomes import GENERIC_FAILURE, RankOutcome, failure, write_outcome
from stagecoach_trainer.runtime.startup import postpone_garbage_collection

log = logging.getLogger("stagecoach")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
QUIET_LIBRARIES = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, the user's quota used up, or the limit of a file's size reached."""


def main(environment: Mapping[str, str] = os.environ) -> int:
    """Run one rank of the stage that `environment` names; return its exit code."""
    started = time.time()
    postpone_garbage_collection()
    pin_threads(environment)
    rank, work = int(environment.get("RANK", "0")), Path(environment[ENV_WORK_DIR])
    print_into_pipe(work, rank)
    start_logging(rank)
    announce(work, rank)
    stop = threading.Event()
    resolved: ResolvedStage | None = None
    try:
        resolved, config = read_stage(Path(environment[ENV_STAGE_FILE]))
        handle_signals(stop, lambda: print_into_log(work, rank), graceful=config.trains)
        digest = _run(resolved, config, environment, stop, started)
        outcome = RankOutcome(AttemptResult(exit_code=0, content_digest=digest), True, time.time())
    except BaseException as error:
        outcome = outcome_of(error, _last_step(resolved, environment), work)
        log.error("%s", outcome.result.message)  # noqa: TRY400 - `outcome_of` prints helpful tracebacks
    with contextlib.suppress(OSError):  # on a full disk, the exit code still reports the reason
        write_outcome(work, rank, outcome)
    return outcome.result.exit_code


def _run(
    resolved: ResolvedStage, config: StageConfig, environment: Mapping[str, str], stop: threading.Event, started: float
) -> str | None:
    from stagecoach_trainer.run_stage import AttemptSettings, run_stage
    from stagecoach_trainer.runtime.distributed import world_from
    from stagecoach_trainer.runtime.progress import Reporter

    progress_file = environment.get(ENV_PROGRESS_FILE)
    world = world_from(environment)
    attempt = AttemptSettings(
        resolved=resolved,
        config=config,
        work=Path(environment[ENV_WORK_DIR]),
        cache=Path(environment[ENV_CACHE_DIR]),
        progress_file=Path(progress_file) if progress_file else None,
        world=world,
        started=started,
        reporter=Reporter.from_environment(environment) if world.is_main else None,
    )
    return run_stage(attempt, stop)


# -- before the stage --------------------------------------------------------------------------------------------------


def pin_threads(environment: Mapping[str, str]) -> None:
    """Pin the number of CPU threads of this rank, on which the last digits of every sum depend."""
    local_size = int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")))
    threads = environment.get(ENV_THREADS) or str(max(1, len(os.sched_getaffinity(0)) // local_size))
    for name in (ENV_THREADS, *THREAD_VARIABLES):
        os.environ[name] = threads


def start_logging(rank: int) -> None:
    faulthandler.enable()
    name = "" if rank == 0 else f" rank {rank}"
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s{name} %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    for own in ("stagecoach", "stagecoach_trainer"):
        logging.getLogger(own).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    quieten_libraries()


def quieten_libraries() -> None:
    """Keep the libraries' progress bars and advice to their callers out of the log; what a user has set stays."""
    for variable, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(variable, value)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


def read_stage(path: Path) -> tuple[ResolvedStage, StageConfig]:
    """Read `stage.json` and validate it and its configuration. Raises UserError with all problems."""
    try:
        resolved = ResolvedStage.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {ENV_STAGE_FILE} must name a file") from error
    except ValidationError as error:
        raise UserError(f"{path}: {_problems(error)}") from error
    kind = STAGE_KINDS.get(resolved.kind)
    if kind is None:
        raise UserError(f"{path}: kind: `{resolved.kind}` is not a stage kind; one of {', '.join(STAGE_KINDS)}")
    try:
        return resolved, kind.config.model_validate_json(json.dumps(resolved.config))
    except ValidationError as error:
        raise UserError(f"{path}: config: {_problems(error)}") from error


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))


def handle_signals(stop: threading.Event, on_orphaned: Callable[[], None], graceful: bool) -> None:
    """Set `stop` on SIGTERM, SIGINT and, if standard input is a pipe, at its end: then the parent process has died.

    `on_orphaned`: called first in the latter case. `graceful`: only set the flag, which the training loop checks; else,
    and at the second signal, raise Interrupted wherever the stage is.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        del frame
        already = stop.is_set()
        stop.set()
        if not graceful or already:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if stdin_is_pipe():
        threading.Thread(target=_stop_at_end_of_stdin, args=(on_orphaned,), name="stdin", daemon=True).start()


def stdin_is_pipe() -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(0).st_mode)
    except OSError:
        return False


def _stop_at_end_of_stdin(on_orphaned: Callable[[], None]) -> None:
    while os.read(0, 4096):
        pass
    on_orphaned()
    os.kill(os.getpid(), signal.SIGTERM)


# -- after the stage ---------------------------------------------------------------------------------------------------


def outcome_of(error: BaseException, last_step: int | None = None, work: Path | None = None) -> RankOutcome:
    """Return the outcome that the contract assigns to an error; prints the traceback of an unexpected one.

    `work`: the attempt's folder, named if the error of a full disk does not name the file.
    """
    for cause in _chain(error):
        named = _named(cause, work)
        if named is not None:
            code, message = named
            return RankOutcome(failure(code, message, last_step), True, time.time())
    traceback.print_exception(error)
    message = f"{type(error).__name__}: {error}\n{_place(error)}"
    return RankOutcome(failure(GENERIC_FAILURE, message, last_step), False, time.time())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _named(error: BaseException, work: Path | None) -> tuple[int, str] | None:  # noqa: PLR0911 - one line per name
    """Return exit code and message of an error for which the contract has a code; None for others."""
    if isinstance(error, StageError):
        return error.exit_code, str(error)
    if isinstance(error, AccessDenied | Corrupt | NotFound):
        return ExitCode.USER_ERROR, str(error)  # the next attempt would fail likewise
    if isinstance(error, StoreError):
        return ExitCode.STORAGE, str(error)
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        place = error.filename or ("a file being written" if work is None else f"a file in {work}")
        return ExitCode.STORAGE, f"disk full: {place}: {error.strerror}; free space there or move the run's storage"
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "stopped by SIGINT"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        advice = "lower `batch.microBatchRows`, set `gradientCheckpointing: true`, or shard with `sharding.zero`"
        return ExitCode.USER_ERROR, f"out of memory: {error}; {advice}"
    return None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return "\n".join(f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames)


def _last_step(resolved: ResolvedStage | None, environment: Mapping[str, str]) -> int | None:
    """Return the step of the newest complete checkpoint on this machine; None if there is none."""
    if resolved is None:
        return None
    from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder, complete_checkpoints
    from stagecoach_trainer.runtime.run_store import open_run_store

    try:
        home = checkpoints_folder(open_run_store(resolved), Path(environment[ENV_CACHE_DIR]), resolved.digest)
        checkpoints = complete_checkpoints(home)
        return checkpoints[-1].step if checkpoints else None
    except (StoreError, OSError):
        return None


def run_and_exit() -> None:
    """Run and exit at once: threads and other ranks' connections must not keep an ended worker alive."""
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if code >= 0 else GENERIC_FAILURE)


if __name__ == "__main__":
    run_and_exit()
