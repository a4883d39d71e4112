"""The terminal output, as text: the live table, plain lines, the tables at the end."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from stagecoach_api.artifacts import Manifest
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.outcomes import Cause
from stagecoach_api.progress import ProgressEvent
from stagecoach_api.status import LIVING
from stagecoach_api.store import open_store
from stagecoach_api.summary_tables import HELD_OUT_TABLES, ChangeTable, MetricTable
from stagecoach_cli.display.live import LiveView, PlainView
from stagecoach_cli.display.numbers import duration, metric, metric_label, quantity
from stagecoach_cli.display.rows import Hidden, chosen_rows, overall_line, render_lines
from stagecoach_cli.display.summary import (
    BeforeAfter,
    changes,
    completion,
    next_command,
    print_failures,
    print_summary,
    shown,
    stage_table,
)
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import RunState, StageState, StageView
from tests.cli.display.terminal import Terminal

NOW = 1_700_000_000.0
GOLDEN = Path(__file__).parent / "golden"
BITS, ACCURACY = HELD_OUT_TABLES
TOKENS, REWARDS = STAGE_KINDS["tokenizer"].tables[0], STAGE_KINDS["ppo"].tables[-1]


def digest(letter: str) -> str:
    return letter * 64


def row(name: str, kind: str, view: StageView, **more: object) -> StageRow:
    return StageRow(name=name, kind=kind, view=view, **more)  # type: ignore[arg-type]


def rows() -> tuple[StageRow, ...]:
    """One stage in each state."""
    training = ProgressEvent(
        time=NOW,
        activity="train",
        done=123,
        total=400,
        unit="steps",
        metrics={"learningRate": 0.002, "tokensPerSecond": 18_200, "loss": 3.4216},
    )
    return (
        row("corpus", "data", StageView(StageState.CACHED, digest("a")), seconds=2.1),
        row("words", "tokenizer", StageView(StageState.SUCCEEDED, digest("b"), attempt=1), seconds=75.0),
        row(
            "base",
            "pretrain",
            StageView(StageState.RUNNING, digest("c"), attempt=2),
            progress=training,
            started=NOW - 42,
            eta=NOW + 95,
        ),
        row("other", "pretrain", StageView(StageState.RUNNING, digest("d"), attempt=1), started=NOW - 1),
        row("held", "data", StageView(StageState.STOPPING, digest("e"), attempt=1, message="the run is suspended")),
        row("sft", "sft", StageView(StageState.PENDING, waiting_for="stage `base`")),
        row(
            "again",
            "data",
            StageView(StageState.RETRYING, waiting_for="the pause after attempt 1 to end", message="killed\nby hand"),
        ),
        row(
            "score", "evaluate", StageView(StageState.FAILED, digest("f"), attempt=1, message="data.jsonl:3: malformed")
        ),
        row("release", "export", StageView(StageState.SKIPPED, message="stage `score` failed")),
    )


def snapshot(*stage_rows: StageRow, state: RunState = RunState.PROGRESSING, now: float = NOW) -> Snapshot:
    return Snapshot("tiny", "file:///store", state, now, stage_rows)


def manifest(kind: str, letter: str, tokens: int = 0, **metrics: float) -> Manifest:
    return Manifest(
        stage_digest=digest(letter),
        content_digest=digest(letter),
        kind=kind,
        objects=(),
        config={},
        code="test",
        seed=0,
        tokens=tokens,
        seconds=75.0,
        metrics=metrics,
        created=NOW,
    )


# -- while it runs -----------------------------------------------------------------------------------------------------


def lines_of(*stage_rows: StageRow, width: int = 80, room: int | None = None) -> list[str]:
    lines = render_lines(snapshot(*stage_rows), width, room=room, live=True)
    assert all(line.cell_len <= width for line in lines)
    return [line.plain for line in lines]


def training(done: float, total: float = 400, activity: str = "train", **metrics: float) -> ProgressEvent:
    figures = {"learningRate": 0.002, "tokensPerSecond": 18_200.0, "loss": 3.4216, **metrics}
    return ProgressEvent(time=NOW, activity=activity, done=done, total=total, unit="steps", metrics=figures)


def running(progress: ProgressEvent | None, name: str = "base", **more: object) -> StageRow:
    view = StageView(StageState.RUNNING, digest("c"), attempt=1)
    return row(name, "pretrain", view, **{"progress": progress, "started": NOW - 42, **more})


def test_every_state_is_shown_on_a_wide_terminal() -> None:
    assert lines_of(*rows(), width=120) == (GOLDEN / "live.txt").read_text(encoding="utf-8").splitlines()


def test_80_columns_have_step_loss_speed_and_the_time_left() -> None:
    """The time left was never shown on a laptop, and at 80 columns the tokens per second were cut off."""
    assert lines_of(*rows(), width=80) == (GOLDEN / "live-80.txt").read_text(encoding="utf-8").splitlines()


@settings(max_examples=40)
@given(
    width=st.integers(80, 200),
    name=st.from_regex(r"[a-z][a-z0-9-]{0,61}[a-z]", fullmatch=True),
    done=st.integers(1, 10**9),
    left=st.floats(0.0, 1e7),
    speed=st.floats(0.001, 1e9),
    metrics=st.dictionaries(
        st.sampled_from(["loss", "reward", "kl", "gradNorm", "klCoefficient"]), st.floats(-1e9, 1e9)
    ),
    activity=st.sampled_from(["train", "measure", "check the first batch"]),
)
def test_step_speed_and_time_left_are_always_seen(
    width: int, name: str, done: int, left: float, speed: float, metrics: dict[str, float], activity: str
) -> None:
    event = ProgressEvent(
        time=NOW,
        activity=activity,
        done=done,
        total=done + 10.0,
        unit="steps",
        metrics={**metrics, "tokensPerSecond": speed, "batch": 3, "batches": 10},
    )
    (line,) = lines_of(running(event, name, eta=NOW + left), width=width)
    assert f"step {quantity(done)}/{quantity(done + 10.0)}" in line
    assert f"{metric(speed)} tok/s" in line
    assert f"{duration(left)} left" in line


def test_measuring_does_not_hide_the_step() -> None:
    event = training(200, activity="measure", batch=3, batches=10)
    (line,) = lines_of(running(event, eta=NOW + 65), width=100)
    assert "step 200/400  measure 3/10  loss 3.422" in line
    assert "1 m 05 s left" in line


def test_before_the_first_step_it_is_shown_what_is_done_and_for_how_long() -> None:
    """Up to 35 seconds passed with `prepare` and nothing that moved."""
    loading = ProgressEvent(time=NOW - 7, activity="load model")
    encoding = ProgressEvent(time=NOW - 1, activity="tokenise zh", done=12_345, unit="tokens")
    assert [line.split("base")[1].strip() for line in lines_of(running(None), running(loading), running(encoding))] == [
        "starting  42 s",
        "load model  7.0 s",
        "tokenise zh 12.3k tokens  1.0 s",
    ]


def test_a_stopped_stage_shows_where_it_will_resume() -> None:
    """After Ctrl-C the stage waited for an answer of the store."""
    stopped = row("base", "pretrain", StageView(StageState.PENDING, waiting_for="the store"), saved_step=1250)
    assert lines_of(stopped) == ["·  base  stopped, saved at step 1,250"]


def test_the_time_left_is_unknown_only_until_a_pace_or_an_earlier_run_gives_it() -> None:
    event = training(1)
    assert "? left" in lines_of(running(event))[0]
    assert "~1 m 18 s left" in lines_of(running(event, expected=120.0))[0]
    assert "? left" in lines_of(running(event, expected=30.0))[0], "it takes longer than expected"
    assert "  5.0 s left" in lines_of(running(event, expected=120.0, eta=NOW + 5))[0]


def test_of_40_stages_the_running_ones_are_seen_on_24_lines() -> None:
    done = [
        row(f"done-{number}", "data", StageView(StageState.SUCCEEDED, digest("a")), seconds=1.0) for number in range(25)
    ]
    waiting = [row(f"next-{number}", "sft", StageView(StageState.PENDING)) for number in range(14)]
    lines = lines_of(*done, running(training(3), "now"), *waiting, room=22)
    assert len(lines) <= 22
    assert lines[0] == "✔  20 more finished"
    assert [line.split()[1] for line in lines[1:6]] == [f"done-{number}" for number in range(20, 25)]
    assert lines[6].split()[1] == "now"
    assert [line.split()[1] for line in lines[7:]] == [f"next-{number}" for number in range(14)]


@given(
    states=st.lists(st.sampled_from(list(StageState)), min_size=1, max_size=60),
    room=st.integers(3, 60),
)
def test_no_stage_is_lost_and_none_that_runs_is_hidden(states: list[StageState], room: int) -> None:
    shown = chosen_rows([row(f"s{index}", "data", StageView(state)) for index, state in enumerate(states)], room)
    assert len(shown) <= max(room, 3)
    visible = [item for item in shown if isinstance(item, StageRow)]
    assert len(visible) + sum(item.count for item in shown if isinstance(item, Hidden)) == len(states)
    assert [item.name for item in visible] == sorted((item.name for item in visible), key=lambda name: int(name[1:]))
    living = sum(state in LIVING for state in states)
    assert sum(item.view.state in LIVING for item in visible) >= min(living, room - 2)


def test_the_run_as_a_whole_has_a_bar_and_the_time_left() -> None:
    done = row("corpus", "data", StageView(StageState.CACHED, digest("a")), seconds=2.0)
    now = running(training(100), eta=NOW + 30)
    later = row("sft", "sft", StageView(StageState.PENDING), expected=60.0)
    whole = replace(snapshot(done, now, later), started=NOW - 90)
    assert overall_line(whole, 80).plain == (
        "━━━━━━━━━━──────────  1 of 3 stages done  1 m 30 s so far  ~1 m 30 s left"
    )
    unknown = replace(whole, rows=(done, now, replace(later, expected=None)))
    assert overall_line(unknown, 80).plain == (
        "━━━━━━━─────────────  1 of 3 stages done  1 m 30 s so far  more than 30 s left"
    )


def test_a_terminal_without_unicode_gets_ascii_icons() -> None:
    lines = render_lines(snapshot(*rows()), 100, ascii_only=True, live=True)
    assert [line.plain[0] for line in lines] == ["+", "+", ">", ">", "#", ".", "r", "x", "-"]
    assert all(line.plain.replace("×", "").isascii() for line in lines)


# -- on a terminal -----------------------------------------------------------------------------------------------------


def view_on(terminal: Terminal) -> LiveView:
    console = Console(file=terminal, force_terminal=True, width=terminal.width, height=terminal.height)  # type: ignore[arg-type]
    return LiveView(console)


def resize(view: LiveView, terminal: Terminal, width: int) -> None:
    terminal.width = width
    view._console.width = width


def test_the_view_draws_in_place_and_leaves_nothing_behind() -> None:
    terminal = Terminal(80)
    terminal.write("$ stagecoach run tiny.yaml\n")
    view = view_on(terminal)
    for step in (1, 2):
        view.show(snapshot(*rows()[:2], running(training(step))))
        assert len(terminal.rows) == 1 + 3 + 1
        assert f"step {step}/400" in terminal.rows[3]
    view.close()
    assert terminal.rows == ["$ stagecoach run tiny.yaml"]


def test_a_message_stays_above_the_stages() -> None:
    terminal = Terminal(80)
    view = view_on(terminal)
    view.show(snapshot(running(training(1))))
    view.notify("base: warning: the gradient norm rose")
    assert terminal.rows[0] == "base: warning: the gradient norm rose"
    assert [row for row in terminal.rows if "step 1/400" in row] == [terminal.rows[1]]
    view.close()
    assert terminal.rows == ["base: warning: the gradient norm rose"]


@settings(max_examples=30)
@given(widths=st.lists(st.integers(20, 200), min_size=1, max_size=6))
def test_resizing_leaves_no_rows_behind(widths: list[int]) -> None:
    terminal = Terminal(100)
    terminal.write("before\n")
    view = view_on(terminal)
    for step, width in enumerate(widths):
        view.show(snapshot(*rows(), running(training(step))))
        resize(view, terminal, width)
    view.show(snapshot(*rows(), running(training(99))))
    assert terminal.rows[0] == "before"
    assert len(terminal.rows) == 1 + len(rows()) + 1 + 1
    view.close()
    assert terminal.rows == ["before"]


def test_an_echoed_ctrl_c_is_erased() -> None:
    terminal = Terminal(80)
    view = view_on(terminal)
    view.show(snapshot(running(training(1))))
    terminal.write("^C")
    view.notify("stopping base at a checkpoint; press Ctrl-C again to kill")
    assert not any("^C" in row for row in terminal.rows)
    view.close()
    assert terminal.rows == ["stopping base at a checkpoint; press Ctrl-C again to kill"]


def test_what_has_not_changed_is_not_drawn_again() -> None:
    terminal = Terminal(80)
    view = view_on(terminal)
    view.show(snapshot(running(training(1))))
    written: list[str] = []
    terminal.write = lambda text: written.append(text) or len(text)  # type: ignore[method-assign,func-returns-value]
    view.show(snapshot(running(training(1))))
    assert not any(written)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_plain_lines_show_changes_at_once_and_progress_every_15_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.localtime", lambda seconds=None: __import__("time").gmtime(seconds))
    console = Console(file=io.StringIO(), width=160, color_system=None)
    view = PlainView(console)
    pending = row("base", "pretrain", StageView(StageState.PENDING, waiting_for="stage `corpus`"))
    begun = row("base", "pretrain", StageView(StageState.RUNNING, digest("c"), attempt=1), started=NOW, ranks=2)
    event = ProgressEvent(time=NOW, activity="train", done=100, total=400, unit="steps", metrics={"loss": 3.2})
    working = row("base", "pretrain", begun.view, progress=event, started=NOW, ranks=2)
    done = row("base", "pretrain", StageView(StageState.SUCCEEDED, digest("c"), attempt=1), seconds=31.0)
    view.show(snapshot(pending))
    view.show(snapshot(begun, now=NOW + 1))
    for second in range(2, 32):
        view.show(snapshot(working, now=NOW + second))
    view.show(snapshot(done, now=NOW + 32))
    view.show(snapshot(done, now=NOW + 99))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "22:13:21 base: started on 2 ranks",
        "22:13:23 base: step 100/400  loss 3.2  ? left",
        "22:13:38 base: step 100/400  loss 3.2  ? left",
        "22:13:52 base: done in 31 s  cccccccccccc",
    ]


def test_a_retry_is_shown_with_its_attempt() -> None:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    view = PlainView(console)
    for attempt, state in ((1, StageState.RUNNING), (1, StageState.RETRYING), (2, StageState.RUNNING)):
        view.show(snapshot(row("one", "data", StageView(state, digest("a"), attempt=attempt, message="killed"))))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split(" ", 1)[1] for line in console.file.getvalue().splitlines()]
    assert lines == ["one: started", "one: retrying: killed", "one: started, attempt 2"]


# -- at the end --------------------------------------------------------------------------------------------------------


def test_the_tables_at_the_end_have_every_metric(tmp_path: Path) -> None:
    stages = (
        ("words", "tokenizer", "a", 0, {"tokensPerCharacter.zh.before": 2.871, "tokensPerCharacter.zh.after": 0.7123}),
        (
            "base",
            "pretrain",
            "b",
            400_000,
            {"heldOut.zh.before.bitsPerCharacter": 12.0, "heldOut.zh.bitsPerCharacter": 6.5},
        ),
        ("sft", "sft", "c", 81_234, {"heldOut.zh.bitsPerCharacter": 6.4, "heldOut.en.bitsPerCharacter": 2.25}),
        ("score", "evaluate", "d", 0, {"poetics.exactMatch": 0.935, "heldOut.zh.perplexity": 12345.6}),
    )
    manifests = {
        digest(letter): manifest(kind, letter, tokens, **figures) for _, kind, letter, tokens, figures in stages
    }
    done = [
        row(name, kind, StageView(StageState.SUCCEEDED, digest(letter)), seconds=75.0)
        for name, kind, letter, *_ in stages
    ]
    console = Console(file=io.StringIO(), width=100, color_system=None)
    print_summary(console, snapshot(*done, state=RunState.COMPLETE), manifests, open_store(str(tmp_path)))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip().replace(str(tmp_path), "/store") for line in console.file.getvalue().splitlines()]
    assert lines == (GOLDEN / "summary.txt").read_text(encoding="utf-8").splitlines()


def test_the_stages_table_notes_where_stages_resumed_and_fits_80_columns() -> None:
    done = StageView(StageState.SUCCEEDED, digest("a"), attempt=3, restarts={Cause.HANG: 2})
    cached = row("words", "tokenizer", StageView(StageState.CACHED, digest("b")), seconds=75.0)
    table = stage_table(
        [row("base", "pretrain", done, seconds=7620.0, resumed_from=1250), cached],
        {digest("a"): manifest("pretrain", "a", 400_000), digest("b"): manifest("tokenizer", "b")},
    )
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "cached (1 m 15 s)" in text
    assert text.count("resumed") == 1
    assert all(word in text for word in ("1,250", "restarted", "hang", "2 h 07 m"))
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())


def test_a_complete_run_ends_with_its_totals_and_the_next_command() -> None:
    """A run ended without a word of success, time, tokens or what to do next."""
    release = row("release", "export", StageView(StageState.SUCCEEDED, digest("a")), seconds=10.0)
    cached = row("base", "pretrain", StageView(StageState.CACHED, digest("b")), seconds=75.0)
    skipped = row("score", "evaluate", StageView(StageState.SKIPPED))
    used = manifest("export", "a", 1_500_000).model_copy(update={"gpu_seconds": 5400.0})
    manifests = {digest("a"): used, digest("b"): manifest("pretrain", "b", 10**9)}
    whole = replace(snapshot(release, cached, skipped, state=RunState.COMPLETE), started=NOW - 245)
    assert completion(whole, manifests) == (
        "run `tiny` is complete: 2 of 3 stages done, 1 from the cache, in 4 m 05 s, 1.5M training tokens, 1.5 GPU-hours"
    )
    assert next_command(whole) == "copy release with `stagecoach artifacts get tiny/release FOLDER`"


def test_a_failed_stage_shows_cause_message_log_and_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {number}\n" for number in range(40)), encoding="utf-8")
    view = StageView(StageState.FAILED, digest("a"), attempt=2, restarts={Cause.USER: 1}, message="bad data\nin line 3")
    console = Console(file=io.StringIO(), width=100, color_system=None)
    print_failures(console, snapshot(row("corpus", "data", view, log=log)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[:5] == ["", "corpus failed (user × 1)", "  bad data", "  in line 3", f"  log: {log}"]
    assert lines[5:] == [f"  | line {number}" for number in range(25, 40)]


def test_held_out_metrics_are_read_for_every_set_even_one_with_dots_in_its_name() -> None:
    metrics = {
        "heldOut.zh.v1.before.bitsPerCharacter": 4.0,
        "heldOut.zh.v1.bitsPerCharacter": 3.0,
        "heldOut.en.bitsPerCharacter": 2.0,
        "heldOut.en.loss": 1.0,
    }
    assert changes(metrics, BITS) == {"zh.v1": BeforeAfter(4.0, 3.0), "en": BeforeAfter(None, 2.0)}
    assert isinstance(TOKENS, ChangeTable)
    assert changes({"tokensPerCharacter.zh.after": 0.5}, TOKENS) == {"zh": BeforeAfter(None, 0.5)}


def test_alignment_metrics_are_selected_by_set_and_by_name() -> None:
    metrics = {"heldOut.pairs.before.accuracy": 0.5, "heldOut.pairs.accuracy": 0.9, "heldOut.pairs.loss": 0.3}
    assert changes(metrics, ACCURACY) == {"pairs": BeforeAfter(0.5, 0.9)}
    assert isinstance(REWARDS, MetricTable)
    assert shown({"reward": 1.5, "kl": 0.2, "policyLoss": 0.1}, REWARDS) == {"reward": 1.5, "kl": 0.2}


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (185, "3 m 05 s"), (7620, "2 h 07 m"), (273_600, "3 d 04 h")],
)
def test_durations_are_formatted_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (812, "812"), (999.9, "1k"), (12_345, "12.3k"), (4_200_000, "4.2M"), (1.57e9, "1.57B"), (2e12, "2T")],
)
def test_quantities_are_formatted_for_people(value: float, text: str) -> None:
    assert quantity(value) == text


def test_metrics_and_their_names_are_formatted_for_people() -> None:
    assert [metric(value) for value in (3.42161, 18_200, float("nan"), 0.002)] == [
        "3.422",
        "18.2k",
        "NaN",
        "0.002",
    ]
    assert [metric_label(name) for name in ("tokensPerSecond", "gradNorm", "loss")] == ["tokens/s", "grad norm", "loss"]
