"""`stagecoach resume`: resume a suspended, cancelled or interrupted run, or retry a failed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import (
    TARGET_RULE,
    InvalidInput,
    cluster_options,
    notify,
    report_errors,
    wait_option,
)

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_cli.cluster.runs import ClusterRun
    from stagecoach_local.workspace import RunFolder


@click.command(
    "resume",
    help=f"""Resume a stopped run, or retry a failed one.

    A suspended, cancelled or interrupted run resumes from its last checkpoints. A failed run is retried with full retry
    budgets.

    On a cluster this sets `spec.suspend` and `spec.cancel` to false and, if the run has failed, the annotation
    stagecoach.dev/retry to a new value, the time. A local run is resumed in this terminal, as by `stagecoach run` with
    the same file and options (except --from).

    {TARGET_RULE}""",
)
@click.argument("run")
@cluster_options
@wait_option("the cluster's operator has resumed the run")
@click.pass_context
def command(ctx: click.Context, run: str, context: str | None, namespace: str | None, wait: bool) -> int:
    with report_errors():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        folder = local_run(run, choice)
        if folder is None:
            resume_on_cluster(run, choice, wait)
            return 0
        return resume_local(ctx, folder)


def resume_on_cluster(name: str, choice: ClusterChoice, wait: bool) -> None:
    import time

    from stagecoach_api.status import ConditionType
    from stagecoach_cli.cluster.runs import cluster_run
    from stagecoach_cli.cluster.watch import wait_quietly
    from stagecoach_cli.target import cluster_of

    api, name = cluster_of(name, choice)
    before = cluster_run(api.run(name))
    patch = patch_to_resume(before, time.time())
    if not patch:
        click.echo(f"{before.title}: {before.state.value.lower()}; nothing to resume")
        return
    run = cluster_run(api.patch_run(name, patch))
    is_retry = "metadata" in patch
    click.echo(f"{run.title}: {'retrying' if is_retry else 'resuming from its checkpoints'}")
    if wait:
        old = before.condition(ConditionType.FAILED)

        def has_resumed(item: ClusterRun) -> bool:
            failed = item.condition(ConditionType.FAILED)
            # A failure after the retry is a new transition of the condition, and ends the wait too.
            is_new = old is None or failed is None or failed.last_transition_time != old.last_transition_time
            is_stopped = item.is_true(ConditionType.SUSPENDED) or (item.is_true(ConditionType.FAILED) and not is_new)
            return item.is_observed and not is_stopped

        run = wait_quietly(api, name, has_resumed, notify)
        click.echo(f"{run.title}: {run.state.value.lower()}")


def patch_to_resume(run: ClusterRun, now: float) -> dict[str, Any]:
    """Return the merge patch that resumes a run; empty if nothing stops it. `now`: seconds since the epoch."""
    from datetime import UTC, datetime

    from stagecoach_api.names import ANNOTATION_RETRY
    from stagecoach_api.status import ConditionType

    spec = {field: False for field in ("suspend", "cancel") if run.spec.get(field)}
    patch: dict[str, Any] = {"spec": spec} if spec else {}
    if run.is_true(ConditionType.FAILED) and not run.is_cancelled:
        # A value is carried out once. The time makes it a new one; it is compared with no clock.
        time = datetime.fromtimestamp(now, UTC)
        patch["metadata"] = {"annotations": {ANNOTATION_RETRY: time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}}
    return patch


def resume_local(ctx: click.Context, folder: RunFolder) -> int:
    """Run `stagecoach run` with the recorded options; return its exit code. It fails if a driver holds the lock."""
    from stagecoach_cli.commands.run import command as run_command

    record = folder.load()
    if record is None or not Path(record.file).is_file():
        file = "its file" if record is None else record.file
        raise InvalidInput(f"{folder.name}: {file} does not exist; resume with `stagecoach run FILE`")
    invocation = record.invocation
    code: int = ctx.invoke(
        run_command,
        file=Path(record.file),
        overrides=invocation.overrides,
        storage=invocation.storage,
        until=invocation.until,
        start=None,
        nproc=invocation.nproc,
    )
    return code
