"""The terminal output, as text: the live table, plain lines, the tables at the end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from stagecoach_api.artifacts import Manifest
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.outcomes import Cause
from stagecoach_api.progress import ProgressEvent
from stagecoach_api.store import open_store
from stagecoach_api.summary_tables import HELD_OUT_TABLES, ChangeTable, MetricTable
from stagecoach_cli.display.live import LiveView, PlainView, render_rows
from stagecoach_cli.display.numbers import duration, metric, metric_label, quantity
from stagecoach_cli.display.summary import (
    BeforeAfter,
    changes,
    print_failures,
    print_summary,
    shown,
)
from stagecoach_core.snapshot import Snapshot, StageRow
from stagecoach_core.values import RunState, StageState, StageView

NOW = 1_700_000_000.0
GOLDEN = Path(__file__).parent / "golden"
BITS, ACCURACY = HELD_OUT_TABLES
TOKENS, REWARDS = STAGE_KINDS["tokenizer"].tables[0], STAGE_KINDS["ppo"].tables[-1]


def text_of(*renderables: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for item in renderables:
        console.print(item)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def digest(letter: str) -> str:
    return letter * 64


def row(name: str, kind: str, view: StageView, **more: object) -> StageRow:
    return StageRow(name=name, kind=kind, view=view, **more)  # type: ignore[arg-type]


def rows() -> tuple[StageRow, ...]:
    """One stage in each state."""
    training = ProgressEvent(
        time=NOW,
        activity="train",
        done=123_000,
        total=400_000,
        unit="tokens",
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


def test_the_live_table_shows_every_state() -> None:
    assert text_of(render_rows(snapshot(*rows()), width=100)) == (GOLDEN / "live.txt").read_text(encoding="utf-8")


def test_a_narrow_terminal_keeps_room_for_the_description() -> None:
    lines = text_of(render_rows(snapshot(*rows()), width=80), width=80).splitlines()
    assert lines[2] == "▶  base     ━━━         train  123k/400k tokens  loss 3.422  tokens/…       42 s"


def test_a_terminal_without_unicode_gets_ascii_icons() -> None:
    lines = text_of(render_rows(snapshot(*rows()), width=100, ascii_only=True)).splitlines()
    assert [line[0] for line in lines] == ["+", "+", ">", ">", "#", ".", "r", "x", "-"]


def test_the_live_view_draws_tables_and_messages_and_closes() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = LiveView(console)
    view.show(snapshot(*rows()))
    view.notify("stopping")
    view.close()
    assert isinstance(console.file, io.StringIO)
    assert "pretrain" in console.file.getvalue()
    assert "stopping" in console.file.getvalue()


def test_plain_lines_show_changes_at_once_and_progress_every_15_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.localtime", lambda seconds=None: __import__("time").gmtime(seconds))
    console = Console(file=io.StringIO(), width=160, color_system=None)
    view = PlainView(console)
    pending = row("base", "pretrain", StageView(StageState.PENDING, waiting_for="stage `corpus`"))
    begun = row("base", "pretrain", StageView(StageState.RUNNING, digest("c"), attempt=1), started=NOW, ranks=2)
    event = ProgressEvent(time=NOW, activity="train", done=1000, total=4000, unit="tokens", metrics={"loss": 3.2})
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
        "22:13:36 base: train  1k/4k tokens  loss 3.2",
        "22:13:51 base: train  1k/4k tokens  loss 3.2",
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
