"""`stagecoach logs`: the output of an attempt's ranks."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import (
    TARGET_RULE,
    Failure,
    InvalidInput,
    cluster_options,
    endpoint_option,
    notify,
    report_errors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_cli.cluster.runs import ClusterAttempt, ClusterRun
    from stagecoach_local.workspace import AttemptRecord, RunFolder

POLL_SECONDS = 0.3
CLUSTER_POLL_SECONDS = 2.0
CHUNK_BYTES = 1 << 16


@click.command(
    "logs",
    help=f"""Print the logs of an attempt at a stage.

    Without --attempt, this is the stage's newest attempt; without STAGE, the run's attempt that started last. If there
    are several ranks, each line starts with its rank, such as [rank 3].

    On a cluster the logs are read from the attempt's pods, or, once pods have been deleted, from the run's storage,
    which keeps each rank's log. That needs your own S3 credentials, found as by the AWS SDK.

    {TARGET_RULE}""",
)
@click.argument("run")
@click.argument("stage", required=False)
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Number of the attempt. Default: the newest.")
@click.option("--rank", type=click.IntRange(min=0), metavar="R", help="Print only this rank. Default: all ranks.")
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the attempt has ended.")
@cluster_options
@click.option("--storage", metavar="URI", help="Storage of the logs of ended attempts. Default: the run's storage.")
@endpoint_option
def command(
    run: str,
    stage: str | None,
    attempt: int | None,
    rank: int | None,
    follow: bool,
    context: str | None,
    namespace: str | None,
    storage: str | None,
    endpoint: str | None,
) -> None:
    with report_errors():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        folder = local_run(run, choice)
        if folder is not None:
            print_local_logs(folder, stage, attempt, rank, follow)
        else:
            ClusterLogs(run, choice, rank, storage, endpoint).print(stage, attempt, follow)


# -- local runs --------------------------------------------------------------------------------------------------------


def print_local_logs(folder: RunFolder, stage: str | None, attempt: int | None, rank: int | None, follow: bool) -> None:
    chosen = choose_local_attempt(folder, stage, attempt)
    path = log_file(folder, chosen, rank)
    notify(f"{chosen.stage}, attempt {chosen.number}: {path}")
    with path.open("rb") as file:
        while True:
            ended = has_ended(folder, chosen)  # before the last read, so that no output is missed
            while chunk := file.read(CHUNK_BYTES):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            if not follow or ended:
                return
            time.sleep(POLL_SECONDS)


def log_file(folder: RunFolder, attempt: AttemptRecord, rank: int | None) -> Path:
    """Return the attempt's log of all ranks, or the separate log of `rank`."""
    files = folder.attempt(attempt.stage, attempt.number)
    if rank is None:
        return files.log
    logs = sorted((files.path / "logs").glob(f"rank-{rank:05d}.*.log"))
    if not logs:
        raise InvalidInput(f"attempt {attempt.number} of {attempt.stage} has no log of rank {rank}; omit --rank")
    return logs[-1]


def choose_local_attempt(folder: RunFolder, stage: str | None, number: int | None) -> AttemptRecord:
    """Return the newest matching attempt. Raises WorkspaceError, which lists the known attempts."""
    from stagecoach_local.workspace import WorkspaceError

    record = folder.load()
    attempts = sorted(record.attempts if record is not None else (), key=lambda item: item.started)
    chosen = [item for item in attempts if stage in (None, item.stage) and number in (None, item.number)]
    if chosen:
        return chosen[-1]
    requested = attempt_phrase(stage, number)
    known = format_attempts(attempts) or "none, because every stage came from the cache"
    raise WorkspaceError(f"run `{folder.path.name}` has no {requested} on this machine; known attempts: {known}")


def attempt_phrase(stage: str | None, number: int | None) -> str:
    """Return a description of the requested attempt for messages."""
    return f"attempt {number} of {stage}" if number else f"attempt of {stage}" if stage else "attempt"


def format_attempts(attempts: Iterable[AttemptRecord | ClusterAttempt]) -> str:
    return ", ".join(f"{item.stage} {item.number}" for item in attempts)


def has_ended(folder: RunFolder, attempt: AttemptRecord) -> bool:
    record = folder.load()
    attempts = record.attempts if record is not None else ()
    ended = any(
        item.ended is not None for item in attempts if (item.stage, item.number) == (attempt.stage, attempt.number)
    )
    return ended or not folder.is_locked


# -- runs of a cluster -------------------------------------------------------------------------------------------------


class ClusterLogs:
    """The logs of a cluster's run."""

    def __init__(
        self, run: str, choice: ClusterChoice, rank: int | None, storage: str | None, endpoint: str | None
    ) -> None:
        from stagecoach_cli.target import cluster_of

        self._api, self._name = cluster_of(run, choice)
        self._rank = rank
        self._storage = storage
        self._endpoint = endpoint

    def print(self, stage: str | None, number: int | None, follow: bool) -> None:
        """Print the logs of the newest matching attempt, from its pods if they all exist, else from the store."""
        from stagecoach_cli.cluster.pod_logs import Follower, PodChoice, copy_logs

        run, attempt = self._find_attempt(stage, number, follow)
        self._check_rank(run, attempt)
        notify(f"{attempt.stage}, attempt {attempt.number}")
        pods = PodChoice(
            run.selector(attempt), run.num_pods(attempt.stage), run.ranks_per_pod(attempt.stage), self._rank
        )
        if follow and not attempt.ended:
            follower = Follower(self._api, pods, lambda: self._is_over(attempt), notify)
            if follower.follow():
                return
            run = self._read()
        found = pods.find(self._api)
        # Of an ended attempt some pods may already be deleted; the store has the logs of all ranks.
        if found and (not attempt.ended or len({pod.index for pod in found}) >= pods.num_wanted):
            copy_logs(self._api, found, pods, notify)
            return
        self._print_stored(run, attempt)

    def _read(self) -> ClusterRun:
        from stagecoach_cli.cluster.runs import cluster_run

        return cluster_run(self._api.run(self._name))

    def _find_attempt(self, stage: str | None, number: int | None, follow: bool) -> tuple[ClusterRun, ClusterAttempt]:
        """Return the newest matching attempt; with `follow`, wait for one to start."""
        shown = ""
        while True:
            run = self._read()
            chosen = choose_cluster_attempt(run, stage, number)
            if chosen is not None:
                return run, chosen
            if not follow or run.is_over or run.rejection is not None or (stage and not run.stage_spec(stage)):
                known = format_attempts(run.attempts()) or "none"
                raise InvalidInput(f"{run.title} has no {attempt_phrase(stage, number)}; known attempts: {known}")
            waiting = f"{run.title} has not started{f' {stage}' if stage else ''} yet; waiting"
            if waiting != shown:
                notify(waiting)
                shown = waiting
            time.sleep(CLUSTER_POLL_SECONDS)

    def _check_rank(self, run: ClusterRun, attempt: ClusterAttempt) -> None:
        ranks = run.num_pods(attempt.stage) * run.ranks_per_pod(attempt.stage)
        if self._rank is not None and self._rank >= ranks:
            raise InvalidInput(f"--rank {self._rank}: {attempt.stage} has {ranks} rank{'s' * (ranks > 1)}, from rank 0")

    def _is_over(self, attempt: ClusterAttempt) -> bool:
        """Whether the attempt has ended or is no longer in the status."""
        from stagecoach_cli.cluster.api import UnknownObject

        try:
            attempts = self._read().attempts()
        except UnknownObject:
            return True  # the run has been deleted, and its pods with it
        return all(item.ended for item in attempts if (item.stage, item.number) == (attempt.stage, attempt.number))

    def _print_stored(self, run: ClusterRun, attempt: ClusterAttempt) -> None:
        from stagecoach_api.artifacts import attempt_id, attempt_logs_prefix
        from stagecoach_api.store import open_store
        from stagecoach_cli.artifacts.logs import print_stored_logs, stored_logs
        from stagecoach_cli.cluster.pod_logs import write_line

        settings = run.storage
        uri = self._storage or (None if settings is None else settings.uri)
        if uri is None:
            raise Failure(
                f"the pods of attempt {attempt.number} of {attempt.stage} no longer exist, and {run.title} does not "
                "name the storage of its logs, which is the operator's default; give it by --storage s3://bucket/prefix"
            )
        endpoint = self._endpoint or (None if settings is None else settings.endpoint)
        store = open_store(uri, endpoint, None if settings is None else settings.region)
        name = attempt_id(run.uid, attempt.stage, attempt.number)
        logs = stored_logs(store, attempt.digest, name, self._rank)
        if not logs:  # those of an operator of an earlier version lie under the attempt's number alone
            logs = stored_logs(store, attempt.digest, attempt_id("", attempt.stage, attempt.number), self._rank)
        if not logs:
            prefix = f"{store.uri}/{attempt_logs_prefix(attempt.digest, name)}"
            raise Failure(
                f"attempt {attempt.number} of {attempt.stage} no longer has pods, and has no logs in {prefix}"
            )
        print_stored_logs(store, logs, write_line, notify)


def choose_cluster_attempt(run: ClusterRun, stage: str | None, number: int | None) -> ClusterAttempt | None:
    """Return the newest matching attempt, None if there is none.

    The status keeps only the newest attempts; an older one is found by the digest in the stage's `forgotten`.
    """
    from stagecoach_cli.cluster.runs import ClusterAttempt

    attempts = run.attempts()
    chosen = [item for item in attempts if stage in (None, item.stage) and number in (None, item.number)]
    if chosen:
        return chosen[-1]
    status = next((item for item in run.status.stages if item.name == stage), None)
    if status is None or number is None or status.forgotten is None or not status.attempts:
        return None
    first = status.attempts[0]
    if number >= first.number:
        return None
    return ClusterAttempt(status.name, number, status.forgotten.digest, first.started.timestamp(), ended=True)
