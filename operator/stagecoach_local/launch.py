"""Starting an attempt: its folder, its `stage.json`, its process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.names import ENV_CACHE_DIR, ENV_PROGRESS_FILE, ENV_RESULT_FILE, ENV_THREADS, ENV_WORK_DIR
from stagecoach_core.resolve import resolved_stage
from stagecoach_core.values import Found, Start
from stagecoach_local import processes
from stagecoach_local.attempts import LiveAttempt
from stagecoach_local.machine import num_threads
from stagecoach_local.run_job import Job
from stagecoach_local.workspace import AttemptFolder, AttemptRecord, write_atomically


def launch(
    job: Job,
    action: Start,
    artifacts: Mapping[str, Found],
    now: float,
    on_end: Callable[[], None],
    inherited: tuple[int, ...] = (),
) -> LiveAttempt:
    """Start an attempt.

    `artifacts`: of the finished stages, by name. `on_end`: called from another thread when the process has ended.
    `inherited`: file descriptors that its process keeps open.
    An unrecorded attempt of the same number (the record was lost, or the driver was killed while starting it) is
    killed and its folder deleted.
    """
    ranks = job.ranks(action.stage)
    folder = job.folder.attempt(action.stage, action.number)
    processes.kill_all(folder.stage_file)
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    resolved = _resolved(job, action, artifacts, ranks)
    write_atomically(folder.stage_file, resolved.model_dump_json(indent=1).encode())
    process = processes.start(
        job.launcher, _environment(job, action.stage, folder, ranks), folder.stage_file, folder.log, on_end, inherited
    )
    record = AttemptRecord(
        stage=action.stage,
        digest=action.digest,
        number=action.number,
        ranks=ranks,
        pid=process.pid,
        process_created=process.created,
        started=now,
    )
    return LiveAttempt(record, folder, process)


def _resolved(job: Job, action: Start, artifacts: Mapping[str, Found], ranks: int) -> ResolvedStage:
    """Return `stage.json`: the stage as on a cluster, but all ranks on this one node."""
    resolved = resolved_stage(
        plan=job.plan,
        start=action,
        artifacts=artifacts,
        storage_uri=job.store.uri,
        storage_endpoint=job.storage_endpoint,
        storage_region=job.storage_region,
        run_uid=job.folder.uid(),
    )
    return resolved.model_copy(update={"num_nodes": 1, "ranks_per_node": ranks})


def _environment(job: Job, stage: str, folder: AttemptFolder, ranks: int) -> dict[str, str]:
    return {
        ENV_WORK_DIR: str(folder.path),
        ENV_CACHE_DIR: str(job.workspace.cache),
        ENV_RESULT_FILE: str(folder.result),
        ENV_PROGRESS_FILE: str(folder.progress),
        ENV_THREADS: str(num_threads(job.plan.stages[stage].stage, job.machine, ranks)),
        "PYTHONUNBUFFERED": "1",
    }
