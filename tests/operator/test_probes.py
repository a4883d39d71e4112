"""Probes return the problems found, and metrics have Prometheus' text format."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from stagecoach_operator.event_recorder import EventRecorder
from stagecoach_operator.metrics import Family, Metrics
from stagecoach_operator.probes import Probes


def get(app: Any, path: str) -> tuple[int, str]:
    async def scenario() -> tuple[int, str]:
        async with TestClient(TestServer(app)) as client:
            answer = await client.get(path)
            return answer.status, await answer.text()

    return asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_liveness_fails_only_if_a_restart_helps(path: str) -> None:
    probes = Probes(live=list, ready=lambda: ["pods may not be listed"], metrics=CollectorRegistry())
    assert get(probes.probe_app(), path) == (200, "ok\n")
    assert get(probes.probe_app(), "/readyz") == (503, "pods may not be listed\n")
    stale = Probes(
        live=lambda: ["the watch of pods has missed changes for 300 s"], ready=list, metrics=CollectorRegistry()
    )
    assert get(stale.probe_app(), path)[0] == 503


def test_metrics_are_served_with_their_type_and_exact_numbers() -> None:
    """1,234,567 was printed as 1.23457e+06, so that `rate()` was wrong."""
    metrics = Metrics()
    values: dict[tuple[str, ...], float] = {("get", "pods"): 1_234_567.0, ("list", "pods"): 123_456_789_012.0}
    metrics.add(Family("stagecoach_api_calls", "Requests.", lambda: values, ("verb", "resource"), is_counter=True))
    status, text = get(Probes(list, list, metrics.registry).metrics_app(), "/metrics")
    assert status == 200
    assert "# HELP stagecoach_api_calls_total Requests." in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["stagecoach_api_calls"].type == "counter"
    read = {
        (item.labels["verb"], item.labels["resource"]): item.value for item in families["stagecoach_api_calls"].samples
    }
    assert read == values
    assert {"process_resident_memory_bytes", "python_gc_collections"} <= set(families)


def test_events_are_posted_once_in_the_background() -> None:
    from stagecoach_operator.events import EventReason, RunEvent
    from stagecoach_operator.kube import Unavailable
    from stagecoach_operator.object_views import run_view

    posted: list[str] = []

    class Api:
        async def create(self, resource: Any, body: Any) -> Any:
            posted.append(body["message"])
            raise Unavailable("500")  # a failure must not propagate

    async def scenario() -> None:
        recorder = EventRecorder(Api())  # type: ignore[arg-type]
        run = run_view({"metadata": {"name": "demo", "namespace": "team", "uid": "u", "generation": 1}})
        for _ in range(3):
            recorder.record(run, [RunEvent(EventReason.COMPLETE, "done"), RunEvent(EventReason.ACCEPTED, "valid")])
        await recorder.close()

    asyncio.run(scenario())
    assert posted == ["done", "valid"]
