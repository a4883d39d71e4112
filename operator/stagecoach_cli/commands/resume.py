"""`stagecoach resume`: go on with a run that was suspended, cancelled or interrupted, or try a failed one once more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stagecoach_cli.commands.options import WHICH_WORLD, InvalidInput, cluster_options, explained, say, wait_option

if TYPE_CHECKING:
    from stagecoach_cli.cluster.api import ClusterChoice
    from stagecoach_cli.cluster.runs import ClusterRun
    from stagecoach_local.workspace import RunFolder


@click.command(
    "resume",
    help=f"""Go on with a run from its last checkpoints: one that was suspended, cancelled or interrupted.

    A run that failed is tried once more: its retry budgets begin anew. On a cluster this takes `spec.suspend` and
    `spec.cancel` back, and of a failed run sets the annotation stagecoach.dev/retry to the present time. Here it works
    on the run in this terminal, as `stagecoach run` did with the same file and options (--from apart).

    {WHICH_WORLD}""",
)
@click.argument("run")
@cluster_options
@wait_option("the cluster's operator works on it again")
@click.pass_context
def command(ctx: click.Context, run: str, context: str | None, namespace: str | None, wait: bool) -> int:
    with explained():
        from stagecoach_cli.cluster.api import ClusterChoice
        from stagecoach_cli.target import local_run

        choice = ClusterChoice(context, namespace)
        folder = local_run(run, choice)
        if folder is None:
            resume_on_cluster(run, choice, wait)
            return 0
        return resume_here(ctx, folder)


def resume_on_cluster(name: str, choice: ClusterChoice, wait: bool) -> None:
    import time

    from stagecoach_api.status import ConditionType
    from stagecoach_cli.cluster.runs import cluster_run
    from stagecoach_cli.cluster.watch import watch_quietly
    from stagecoach_cli.target import cluster_of

    api, name = cluster_of(name, choice)
    before = cluster_run(api.run(name))
    patch = patch_to_resume(before, time.time())
    if not patch:
        click.echo(f"{before.title}: {before.state.value.lower()}; there is nothing to resume")
        return
    run = cluster_run(api.patch_run(name, patch))
    again = "metadata" in patch
    click.echo(f"{run.title}: {'one more try is asked for' if again else 'goes on from its checkpoints'}")
    if wait:
        old = before.condition(ConditionType.FAILED)

        def goes_on(item: ClusterRun) -> bool:
            failed = item.condition(ConditionType.FAILED)
            news = old is None or failed is None or failed.last_transition_time != old.last_transition_time
            stands = item.holds(ConditionType.SUSPENDED) or (item.holds(ConditionType.FAILED) and not news)
            return item.is_seen and not stands

        run = watch_quietly(api, name, goes_on, say)
        click.echo(f"{run.title}: {run.state.value.lower()}")


def patch_to_resume(run: ClusterRun, now: float) -> dict[str, Any]:
    """Return the merge patch that lets a run go on; empty where nothing keeps it. `now`: seconds since the epoch."""
    from datetime import UTC, datetime

    from stagecoach_api.names import ANNOTATION_RETRY
    from stagecoach_api.status import ConditionType

    spec = {field: False for field in ("suspend", "cancel") if run.spec.get(field)}
    patch: dict[str, Any] = {"spec": spec} if spec else {}
    if run.holds(ConditionType.FAILED) and not run.is_cancelled:
        # After every failure by the cluster's clock too, which may go before this machine's.
        ends = [item.ended.timestamp() for stage in run.status.stages for item in stage.attempts if item.ended]
        asked = datetime.fromtimestamp(max([now, *(end + 1.0 for end in ends)]), UTC)
        patch["metadata"] = {"annotations": {ANNOTATION_RETRY: asked.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}}
    return patch


def resume_here(ctx: click.Context, folder: RunFolder) -> int:
    """Work on the run as `stagecoach run` would; return its exit code. The lock tells where somebody does."""
    from stagecoach_cli.commands.run import command as run_command

    record = folder.load()
    if record is None or not Path(record.file).is_file():
        file = "its file" if record is None else record.file
        raise InvalidInput(f"{folder.name}: {file} is gone; go on with `stagecoach run FILE`")
    asked = record.invocation
    code: int = ctx.invoke(
        run_command,
        file=Path(record.file),
        overrides=asked.overrides,
        storage=asked.storage,
        until=asked.until,
        start=None,
        nproc=asked.nproc,
    )
    return code
