"""`stagecoach run`: run a TrainingRun on this machine until it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stagecoach_cli.commands.options import Failure, console, file_argument, report_errors, set_option, storage_option
from stagecoach_cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from stagecoach_local.driver import Outcome
    from stagecoach_local.prepare import PreparedRun
    from stagecoach_local.run_job import Job


@click.command("run")
@file_argument
@set_option
@storage_option
@click.option("--until", metavar="STAGE", help="Run only this stage and the stages it depends on.")
@click.option(
    "--from",
    "start",
    metavar="STAGE",
    help="Run this stage again even if it is finished (its artifact is deleted first), and later stages if its result "
    "differs.",
)
@click.option(
    "--nproc",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks of training stages. Default: what their resources request, at most what this machine has.",
)
def command(
    file: Path, overrides: tuple[str, ...], storage: str | None, until: str | None, start: str | None, nproc: int | None
) -> int:
    """Run the stages of FILE on this machine.

    They run in the order of their dependencies, and concurrently if there are enough cores. Finished stages are taken
    from the cache. Ctrl-C, or `stagecoach suspend` in another terminal, stops at a checkpoint; the same command, or
    `stagecoach resume`, resumes from there.
    """
    with report_errors():
        from dataclasses import replace

        from stagecoach_local.prepare import prepare
        from stagecoach_local.workspace import Invocation, current_workspace

        workspace = current_workspace()
        workspace.prepare()
        prepared = prepare(file, workspace, overrides, storage)
        check_trainer()
        # The lock is taken before the first look at the record, which another driver may be writing.
        with workspace.run(prepared.plan.namespace, prepared.plan.run).lock():
            job = make_job(prepared, file, until, start, nproc)
            invocation = Invocation(overrides=overrides, storage=storage, until=until, nproc=nproc)
            job = replace(job, invocation=invocation, expected=announce(console(), prepared, job))
            return work(job)


def announce(out: Console, prepared: PreparedRun, job: Job) -> dict[str, float]:
    """Print where artifacts are stored, how many are there already, and which GPUs are missing.

    Return the estimated durations of the stages to run, by name; empty if the store cannot be read.
    """
    from stagecoach_api.store import StoreError
    from stagecoach_cli.commands.plan import last_manifests, plan_lines, store_text
    from stagecoach_local.machine import missing_gpus
    from stagecoach_local.prepare import check_cache

    try:
        decision, manifests = check_cache(prepared, job.selected, job.forced)
        lines = plan_lines(prepared, decision, last_manifests(prepared, manifests), known=True)
    except StoreError:
        return {}  # the driver reports it
    lines = [line for line in lines if job.selected is None or line.name in job.selected]
    to_run = [line for line in lines if not line.hit]
    lacking = [missing_gpus(job.plan.stages[line.name].stage, job.machine) for line in to_run]
    if to_run:
        out.print(store_text(job.store.uri, lines), highlight=False, markup=False, soft_wrap=True)
    for text in lacking:
        if text is not None:
            out.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return {line.name: line.cost.seconds for line in to_run if line.cost.seconds is not None}


def make_job(prepared: PreparedRun, file: Path, until: str | None, start: str | None, nproc: int | None) -> Job:
    """Return the driver's input. Raises UnknownStage."""
    from stagecoach_core.policies.selection import starting_from
    from stagecoach_core.policies.selection import until as selected_until
    from stagecoach_local.machine import this_machine
    from stagecoach_local.run_job import Job
    from stagecoach_local.workspace import current_workspace

    return Job(
        plan=prepared.plan,
        file=file.absolute(),
        workspace=current_workspace(),
        store=prepared.store,
        machine=this_machine(),
        storage_endpoint=prepared.run.spec.storage.endpoint,
        storage_region=prepared.run.spec.storage.region,
        nproc=nproc,
        suspend=prepared.run.spec.suspend,
        cancel=prepared.run.spec.cancel,
        keep_going=prepared.run.spec.on_failure == "continue",
        selected=None if until is None else selected_until(prepared.plan, until),
        forced=frozenset() if start is None else starting_from(prepared.plan, start),
    )


def work(job: Job) -> int:
    """Run the driver with a live view, then print the outcome; return the exit code. The run's lock must be held."""
    from stagecoach_cli.display.live import open_view
    from stagecoach_local.driver import Driver
    from stagecoach_local.interrupts import Interrupts

    out = console()
    view = open_view(out)
    with Interrupts() as interrupts:
        try:
            outcome = Driver(job, view, lambda: interrupts.count, lambda: interrupts.cancelled).run()
        finally:
            view.close()
    return report(out, job, outcome)


def report(out: Console, job: Job, outcome: Outcome) -> int:
    """Print the outcome of a run; return the exit code."""
    from stagecoach_cli.display.advice import run_command
    from stagecoach_cli.display.summary import completion, next_command, print_failures, print_stages, print_summary
    from stagecoach_core.values import RunState

    state, again = outcome.decision.state, run_command(job.file, job.invocation)
    if state in (RunState.SUSPENDED, RunState.CANCELLED):
        print_stages(out, outcome.snapshot)
        resume = f"resume with `{again}`"
        if state is RunState.SUSPENDED:
            why = "`spec.suspend` is true; set it to false to resume" if job.suspend else resume
            text = f"run `{job.plan.run}` is interrupted; {why}"
        else:
            text = f"run `{job.plan.run}` is cancelled; {'`spec.cancel` is true' if job.cancel else resume}"
        out.print(text, highlight=False, markup=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    print_summary(out, outcome.snapshot, outcome.manifests, job.store)
    if state is RunState.COMPLETE:
        text = completion(outcome.snapshot, outcome.manifests)
        out.print(text, style="bold green", highlight=False, markup=False, soft_wrap=True)
        out.print(next_command(outcome.snapshot), highlight=False, markup=False, soft_wrap=True)
        return 0
    print_failures(out, outcome.snapshot)
    text = f"\nrun `{job.plan.run}` failed; when the cause is removed, continue with `{again}`"
    out.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return EXIT_FAILED


def check_trainer() -> None:
    """Raise Failure unless the trainer and its main libraries are installed; nothing is imported."""
    from importlib.util import find_spec

    missing = [name for name in ("stagecoach_trainer", "torch", "transformers") if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise Failure(f"{names} not installed; run `pip install 'stagecoach[trainer]'` to run stages on this machine")
