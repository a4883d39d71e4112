"""`stagecoach logs`: what an attempt's ranks have printed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import (
    WHICH_WORLD,
    Failure,
    InvalidInput,
    cluster_options,
    endpoint_option,
    explained,
    say,
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
    help=f"""Print what the ranks of a stage's attempt have written; without STAGE, of the attempt that started last.

    On a cluster it comes from the attempt's pods, all at once with --follow, and when they are gone from the store,
    where each rank's log is kept with the attempt; that needs your own S3 credentials, found as the AWS SDK finds them.
    Of several ranks each line begins with its own, such as [rank 3].

    {WHICH_WORLD}""",
)
@click.argument("run")
@click.argument("stage", required=False)
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Default: the newest.")
@click.option("--rank", type=click.IntRange(min=0), metavar="R", help="Only this rank. Default: all.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the attempt has ended.")
@cluster_options
@click.option("--storage", metavar="URI", help="Where ended attempts' logs are kept. Default: the run's storage.")
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
    with explained():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        folder = local_run(run, choice)
        if folder is not None:
            print_local(folder, stage, attempt, rank, follow)
        else:
            ClusterLogs(run, choice, rank, storage, endpoint).print(stage, attempt, follow)


# -- of this folder ----------------------------------------------------------------------------------------------------


def print_local(folder: RunFolder, stage: str | None, attempt: int | None, rank: int | None, follow: bool) -> None:
    chosen = choose(folder, stage, attempt)
    path = log_file(folder, chosen, rank)
    say(f"{chosen.stage}, attempt {chosen.number}: {path}")
    with path.open("rb") as file:
        while True:
            ended = has_ended(folder, chosen)  # asked before the last read, so that nothing is missed
            while chunk := file.read(CHUNK_BYTES):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            if not follow or ended:
                return
            time.sleep(POLL_SECONDS)


def log_file(folder: RunFolder, attempt: AttemptRecord, rank: int | None) -> Path:
    """Return the attempt's log of all ranks, or of one where each has its own."""
    files = folder.attempt(attempt.stage, attempt.number)
    if rank is None:
        return files.log
    own = sorted((files.path / "logs").glob(f"rank-{rank:05d}.*.log"))
    if not own:
        raise InvalidInput(f"attempt {attempt.number} of {attempt.stage} has no log of rank {rank}; leave --rank out")
    return own[-1]


def choose(folder: RunFolder, stage: str | None, number: int | None) -> AttemptRecord:
    """Return the attempt that is meant. Raises WorkspaceError, naming those there are."""
    from stagecoach_local.workspace import WorkspaceError

    record = folder.load()
    attempts = sorted(record.attempts if record is not None else (), key=lambda item: item.started)
    chosen = [item for item in attempts if stage in (None, item.stage) and number in (None, item.number)]
    if chosen:
        return chosen[-1]
    wanted = words_for(stage, number)
    there = listed(attempts) or "none: every stage came from the cache"
    raise WorkspaceError(f"run `{folder.path.name}` has no {wanted} on this machine; there are: {there}")


def words_for(stage: str | None, number: int | None) -> str:
    """Return what was asked for in words."""
    return f"attempt {number} of {stage}" if number else f"attempt of {stage}" if stage else "attempt"


def listed(attempts: Iterable[AttemptRecord | ClusterAttempt]) -> str:
    return ", ".join(f"{item.stage} {item.number}" for item in attempts)


def has_ended(folder: RunFolder, attempt: AttemptRecord) -> bool:
    record = folder.load()
    known = record.attempts if record is not None else ()
    ended = any(
        item.ended is not None for item in known if (item.stage, item.number) == (attempt.stage, attempt.number)
    )
    return ended or not folder.is_locked


# -- of a cluster ------------------------------------------------------------------------------------------------------


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
        """Print the logs of the attempt that is meant: of its pods, or from the store."""
        from stagecoach_cli.cluster.pod_logs import Follower, PodChoice, copy_logs

        run, attempt = self._await(stage, number, follow)
        self._check_rank(run, attempt)
        say(f"{attempt.stage}, attempt {attempt.number}")
        pods = PodChoice(
            run.selector(attempt), run.num_pods(attempt.stage), run.ranks_per_pod(attempt.stage), self._rank
        )
        if follow and not attempt.ended:
            follower = Follower(self._api, pods, lambda: self._is_over(attempt), say)
            if follower.follow():
                return
            run = self._read()
        found = pods.find(self._api)
        if found and (not attempt.ended or len({pod.index for pod in found}) >= pods.num_listed):
            copy_logs(self._api, found, pods, say)
            return
        self._print_stored(run, attempt)

    def _read(self) -> ClusterRun:
        from stagecoach_cli.cluster.runs import cluster_run

        return cluster_run(self._api.run(self._name))

    def _await(self, stage: str | None, number: int | None, follow: bool) -> tuple[ClusterRun, ClusterAttempt]:
        """Return the attempt that is meant; with `follow` one that has yet to come is waited for."""
        said = ""
        while True:
            run = self._read()
            chosen = choose_attempt(run, stage, number)
            if chosen is not None:
                return run, chosen
            if not follow or run.is_over or run.refusal is not None or (stage and not run.stage_spec(stage)):
                there = listed(run.attempts()) or "none"
                raise InvalidInput(f"{run.title} has no {words_for(stage, number)}; there are: {there}")
            waiting = f"{run.title} has not begun{f' {stage}' if stage else ''} yet; waiting"
            if waiting != said:
                say(waiting)
                said = waiting
            time.sleep(CLUSTER_POLL_SECONDS)

    def _check_rank(self, run: ClusterRun, attempt: ClusterAttempt) -> None:
        ranks = run.num_pods(attempt.stage) * run.ranks_per_pod(attempt.stage)
        if self._rank is not None and self._rank >= ranks:
            raise InvalidInput(f"--rank {self._rank}: {attempt.stage} has {ranks} rank{'s' * (ranks > 1)}, from 0 on")

    def _is_over(self, attempt: ClusterAttempt) -> bool:
        """Whether the attempt has ended, or is no longer remembered."""
        from stagecoach_cli.cluster.api import UnknownObject

        try:
            known = self._read().attempts()
        except UnknownObject:
            return True  # the run is gone, its pods go
        return all(item.ended for item in known if (item.stage, item.number) == (attempt.stage, attempt.number))

    def _print_stored(self, run: ClusterRun, attempt: ClusterAttempt) -> None:
        from stagecoach_api.store import open_store
        from stagecoach_cli.artifacts.logs import copy_stored, stored_logs
        from stagecoach_cli.cluster.pod_logs import write_line

        settings = run.storage
        uri = self._storage or (None if settings is None else settings.uri)
        if uri is None:
            raise Failure(
                f"the pods of attempt {attempt.number} of {attempt.stage} are gone, and {run.title} names no storage "
                "where its logs are kept: the operator's own is used; give it by --storage s3://bucket/prefix"
            )
        endpoint = self._endpoint or (None if settings is None else settings.endpoint)
        store = open_store(uri, endpoint, None if settings is None else settings.region)
        logs = stored_logs(store, attempt.digest, attempt.number, self._rank)
        if not logs:
            from stagecoach_api.artifacts import attempt_logs_prefix

            place = f"{store.uri}/{attempt_logs_prefix(attempt.digest, attempt.number)}"
            raise Failure(f"attempt {attempt.number} of {attempt.stage} has no pods any more, and no logs in {place}")
        copy_stored(store, logs, write_line, say)


def choose_attempt(run: ClusterRun, stage: str | None, number: int | None) -> ClusterAttempt | None:
    """Return the newest of the attempts that are meant; None where there is none.

    One that the status has no more room for is found by its stage's present digest.
    """
    from stagecoach_cli.cluster.runs import ClusterAttempt

    attempts = run.attempts()
    chosen = [item for item in attempts if stage in (None, item.stage) and number in (None, item.number)]
    if chosen:
        return chosen[-1]
    told = next((item for item in run.status.stages if item.name == stage), None)
    if told is None or number is None or told.forgotten is None or not told.attempts:
        return None
    first = told.attempts[0]
    if number >= first.number:
        return None
    return ClusterAttempt(told.name, number, told.forgotten.digest, first.started.timestamp(), ended=True)
