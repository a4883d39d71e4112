"""One stage from start to end: context, stage module, publishing. Called by the entry point on every rank."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from stagecoach_api.artifacts import REPORT, Manifest, ResolvedStage, attempt_prefix
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.model_folders import CONFIG
from stagecoach_api.names import ENV_THREADS
from stagecoach_api.references import Reference
from stagecoach_api.stage_kind import Ranks, StageConfig
from stagecoach_api.store import StoreError
from stagecoach_api.stores.base import FolderLocation, parse_location
from stagecoach_trainer.models.safety import check_model_folder
from stagecoach_trainer.runtime.attempt_files import logs_folder, warnings_file
from stagecoach_trainer.runtime.context import StageContext, StageOutcome, World
from stagecoach_trainer.runtime.distributed import process_group
from stagecoach_trainer.runtime.errors import GateFailed
from stagecoach_trainer.runtime.progress import Progress, Reporter
from stagecoach_trainer.runtime.progress_log import figures_text
from stagecoach_trainer.runtime.publish import publish, upload_attempt, upload_folder
from stagecoach_trainer.runtime.run_store import open_run_store
from stagecoach_trainer.runtime.startup import fast_imports
from stagecoach_trainer.runtime.writer import TakenOver, Writer
from stagecoach_trainer.stages import load_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttemptSettings:
    """An attempt's validated stage, paths and rank, as the entry point passes them."""

    resolved: ResolvedStage
    config: StageConfig
    work: Path
    cache: Path
    progress_file: Path | None
    world: World
    started: float
    """Seconds since the epoch."""
    reporter: Reporter | None = None
    """Reports progress to the operator; None without an operator."""


def run_stage(attempt: AttemptSettings, stop: threading.Event) -> Manifest | None:
    """Run the stage of this attempt and publish it; return its manifest (None on ranks that do not publish).

    Raises StageError, StoreError, and any other error of the stage.
    """
    context = build_context(attempt, stop)
    if STAGE_KINDS[attempt.resolved.kind].ranks is not Ranks.ALL and not attempt.world.is_main:
        return None  # the stage runs on rank 0 alone
    _log_start(attempt)
    if not attempt.world.is_main:
        return _work(attempt, context)
    writer = Writer(context.store, attempt.resolved, stop)
    # Before any work: a storage that cannot be written must end the attempt now.
    made = writer.acquire()
    try:
        if made is None:
            return _work(attempt, replace(context, writer=writer))
        if attempt.world.size > 1:  # the other ranks wait for this one: the driver finds the artifact instead
            raise TakenOver(f"artifact {attempt.resolved.digest[:12]} has been made by another attempt")
        log.info("the artifact exists already: %s", made.folder)
        return made
    finally:
        writer.release()


def _work(attempt: AttemptSettings, context: StageContext) -> Manifest | None:
    """Do the stage's work and publish it."""
    kind = STAGE_KINDS[attempt.resolved.kind]
    spread = kind.ranks is Ranks.ALL
    refuse_early(attempt.config, context)
    context.progress.report("load libraries")
    with fast_imports(training=attempt.config.trains):
        run = load_stage(kind.name)
    try:
        with process_group(attempt.world if spread else World(), alone=attempt.config.offloads):
            outcome = run(attempt.config, context)
    except GateFailed:
        _keep_report(context)
        raise
    finally:
        _keep_logs(context, attempt.started)
    if not attempt.world.is_main:
        return None
    _report_result(context, outcome)
    return publish(context, outcome, attempt.started)


def _log_start(attempt: AttemptSettings) -> None:
    resolved, threads = attempt.resolved, os.environ.get(ENV_THREADS, "?")
    if attempt.world.is_main:
        ranks = resolved.num_nodes * resolved.ranks_per_node
        log.info(
            "%s stage `%s`, attempt %d: %d rank%s, threads of each: %s, artifact %s",
            resolved.kind,
            resolved.stage,
            resolved.attempt,
            ranks,
            "s" * (ranks != 1),
            threads,
            resolved.digest[:12],
        )


def _report_result(context: StageContext, outcome: StageOutcome) -> None:
    """Log the result's figures, and report the warnings of the stage's own report, as far as that is still to do."""
    if outcome.metrics:
        log.info("result: %s", figures_text(outcome.metrics))
    path = context.output / REPORT
    try:
        report = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return
    for warning in report.get("warnings", ()) if isinstance(report, dict) else ():
        context.progress.warn(str(warning))


def refuse_early(config: StageConfig, context: StageContext) -> None:
    """Check a model in a local folder before torch is imported, which takes ten seconds.

    Raises UserError for pickles, code and malformed files. The stage repeats the check for every model it loads.
    """
    model = getattr(config, "model", None)
    if not isinstance(model, Reference) or model.uri is None:
        return
    location = parse_location(context.input(model).uri)
    if isinstance(location, FolderLocation) and (location.path / CONFIG).is_file():
        check_model_folder(location.path)


def build_context(attempt: AttemptSettings, stop: threading.Event) -> StageContext:
    """Create the attempt's folders (the output empty) and return the stage's context."""
    main = attempt.world.is_main
    context = StageContext(
        resolved=attempt.resolved,
        store=open_run_store(attempt.resolved),
        work=attempt.work,
        cache=attempt.cache,
        world=attempt.world,
        progress=_progress(attempt) if main else Progress(None),
        stop=stop,
    )
    if main:
        shutil.rmtree(context.output, ignore_errors=True)
        context.output.mkdir(parents=True)
        logs_folder(context.work).mkdir(parents=True, exist_ok=True)
    context.cache.mkdir(parents=True, exist_ok=True)
    return context


def _progress(attempt: AttemptSettings) -> Progress:
    return Progress(attempt.progress_file, reporter=attempt.reporter, warnings_file=warnings_file(attempt.work))


def _keep_report(context: StageContext) -> None:
    """Keep what a stage wrote that missed its gate: no artifact, but people want to read the report."""
    prefix = attempt_prefix(context.resolved.digest, context.resolved.attempt_id)
    try:
        upload_folder(context, context.output, f"{prefix}/output")
    except StoreError as error:
        log.warning("the report of the missed gate could not be stored: %s", error)


def _keep_logs(context: StageContext, started: float) -> None:
    """Store metrics and logs; a failure to do so must not hide the stage's own error."""
    if not context.world.is_main:
        return
    try:
        upload_attempt(context, started)
    except (StoreError, OSError) as error:
        log.warning("metrics of this attempt could not be stored: %s", error)
