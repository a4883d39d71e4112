"""Metrics of the operator: what is counted, and that no label grows with what users do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stagecoach_api.spec import Storage
from stagecoach_operator.certificate_files import CertificateFiles
from stagecoach_operator.guarded_listener import GuardedListener
from stagecoach_operator.kube import Calls
from stagecoach_operator.metrics import OTHER, Metrics, bounded
from stagecoach_operator.operator_metrics import families_of
from stagecoach_operator.progress_server import ProgressServer
from stagecoach_operator.worker import Workers
from tests.operator.makers import Ends, Operator, World, data_stage, drive


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return the values by name and labels, which are sorted by their names."""
    text = generate_latest(metrics.registry).decode()
    return {
        (item.name, *item.labels.values()): item.value
        for family in text_string_to_metric_families(text)
        for item in family.samples
    }


def test_runs_stages_attempts_and_stores_are_counted(tmp_path: Path) -> None:
    world, metrics = World(tmp_path), Metrics()
    world.input("a.txt")
    world.ends["a"] = [Ends(1, "infrastructure", "the node was lost")]
    world.submit(data_stage("a"))
    world.submit(data_stage("b", uri="s3://elsewhere/x"), name="refused")

    async def scenario() -> None:
        operator = Operator(world)
        operator.reconciler.observe_status = metrics.observe_status
        await drive(world, operator)
        lanes = operator.lookups.lanes
        lanes.of_endpoint(Storage(uri="s3://x/y", endpoint="https://not-allowed.example.com"))
        calls = Calls()
        calls.count("get", "pods")
        calls.answered("GET", "429")
        progress = ProgressServer(operator.cache, operator.reconciler.reports, None, operator.enqueue)  # type: ignore[arg-type]
        progress.answers[401] += 3
        parts: Any = SimpleNamespace(
            settings=world.settings,
            cache=operator.cache,
            kube=SimpleNamespace(calls=calls),
            lease=SimpleNamespace(held=True),
            lanes=lanes,
            workers=Workers(operator.reconciler.reconcile),
            progress=progress,
            listener=GuardedListener(progress.app()),
            certificates=CertificateFiles(world.settings),
        )
        metrics.add(*families_of(parts))
        operator.die()

    asyncio.run(scenario())
    found = samples(metrics)
    assert found["stagecoach_runs", "Complete"] == 1
    assert found["stagecoach_runs", "Rejected"] == 1
    assert found["stagecoach_stages", "Succeeded"] == 1
    assert found["stagecoach_attempts_ended_total", "infrastructure"] == 1
    assert found["stagecoach_attempts_ended_total", "none"] == 1
    assert found["stagecoach_attempt_start_wait_seconds_count",] == 2
    assert found["stagecoach_store_calls_total", "folder"] >= 2
    assert found["stagecoach_store_calls_total", OTHER] == 0
    assert found["stagecoach_api_answers_total", "429", "GET"] == 1
    assert found["stagecoach_reports_total", "401"] == 3
    assert found["stagecoach_leader",] == 1


def test_turns_are_counted_with_their_errors() -> None:
    metrics = Metrics()
    metrics.observe_turn(0.004, "")
    metrics.observe_turn(2.0, "Conflict")
    found = samples(metrics)
    assert found["stagecoach_turn_seconds_count",] == 2
    assert found["stagecoach_turn_errors_total", "Conflict"] == 1


@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 100).map(float), max_size=30))
def test_labels_are_bounded_and_their_sum_is_kept(values: dict[str, float]) -> None:
    found = bounded(values, 5)
    assert len(found) <= 6
    assert sum(found.values()) == sum(values.values())
