"""Probes return the problems found, and metrics have Prometheus' text format."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from stagecoach_operator.event_recorder import EventRecorder
from stagecoach_operator.probes import Probes


def get(app: Any, path: str) -> tuple[int, str]:
    async def scenario() -> tuple[int, str]:
        async with TestClient(TestServer(app)) as client:
            answer = await client.get(path)
            return answer.status, await answer.text()

    return asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_liveness_fails_only_if_a_restart_helps(path: str) -> None:
    probes = Probes(live=list, ready=lambda: ["pods may not be listed"], metrics=dict)
    assert get(probes.probe_app(), path) == (200, "ok\n")
    assert get(probes.probe_app(), "/readyz") == (503, "pods may not be listed\n")
    stale = Probes(live=lambda: ["the watch of pods has missed changes for 300 s"], ready=list, metrics=dict)
    assert get(stale.probe_app(), path)[0] == 503


def test_metrics_are_lines_of_name_and_value() -> None:
    values = {"stagecoach_leader": 1.0, 'stagecoach_api_calls_total{verb="get",resource="pods"}': 12.0}
    status, text = get(Probes(list, list, lambda: values).metrics_app(), "/metrics")
    assert status == 200
    assert text == 'stagecoach_leader 1\nstagecoach_api_calls_total{verb="get",resource="pods"} 12\n'


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
