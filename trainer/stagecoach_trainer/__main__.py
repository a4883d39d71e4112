"""One rank of a stage: `python -m stagecoach_trainer`, started by the launcher.

Reads and validates `stage.json` before any heavy import, pins the number of threads before numpy or torch counts the
cores, runs the stage, and exits with a code of the contract.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from stagecoach_api.artifacts import Manifest, ResolvedStage, uri_below
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.names import (
    ENV_CACHE_DIR,
    ENV_PROGRESS_FILE,
    ENV_STAGE_FILE,
    ENV_WORK_DIR,
)
from stagecoach_api.outcomes import AttemptResult
from stagecoach_api.stage_kind import StageConfig
from stagecoach_api.store import StoreError
from stagecoach_api.stores.base import parse_location
from stagecoach_trainer.launcher.rank_pipes import print_into_log, print_into_pipe
from stagecoach_trainer.runtime.attempt_files import announce
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.runtime.failures import outcome_of
from stagecoach_trainer.runtime.hub import allow_downloads
from stagecoach_trainer.runtime.outcomes import GENERIC_FAILURE, RankOutcome, write_outcome
from stagecoach_trainer.runtime.startup import postpone_garbage_collection
from stagecoach_trainer.runtime.threads import thread_environment

log = logging.getLogger("stagecoach")

QUIET_LIBRARIES = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


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
        if config.downloads:
            allow_downloads()
        manifest = _run(resolved, config, environment, stop, started)
        outcome = RankOutcome(_success(resolved, manifest), True, time.time())
    except BaseException as error:
        outcome = outcome_of(error, _last_step(resolved, environment), work)
        log.error("%s", outcome.result.message)  # noqa: TRY400 - `outcome_of` prints helpful tracebacks
    with contextlib.suppress(OSError):  # on a full disk, the exit code still reports the reason
        write_outcome(work, rank, outcome)
    return outcome.result.exit_code


def _run(
    resolved: ResolvedStage, config: StageConfig, environment: Mapping[str, str], stop: threading.Event, started: float
) -> Manifest | None:
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


def _success(resolved: ResolvedStage, manifest: Manifest | None) -> AttemptResult:
    """Return the result of a rank that ended well. `manifest`: of the artifact, on the rank that published it."""
    if manifest is None:
        return AttemptResult(exit_code=0)
    uri = uri_below(parse_location(resolved.storage_uri).uri, manifest.folder)
    endpoint = resolved.storage_endpoint or ""
    return AttemptResult(
        exit_code=0, content_digest=manifest.content_digest, artifact_uri=uri, artifact_endpoint=endpoint
    )


# -- before the stage --------------------------------------------------------------------------------------------------


def pin_threads(environment: Mapping[str, str]) -> None:
    """Set the number of threads of this rank and how they wait, unless the user has (`runtime.threads`)."""
    local_size = int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")))
    os.environ.update(thread_environment(environment, local_size))


def start_logging(rank: int) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the launcher's request (`launcher.stack_dumps`)
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


# -- after the stage --------------------------------------------------------------------------------------------------


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
