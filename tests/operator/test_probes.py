"""Probes say what is wrong, and metrics are what Prometheus reads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from stagecoach_operator.event_recorder import Poster
from stagecoach_operator.probes import Probes


def get(app: Any, path: str) -> tuple[int, str]:
    async def scenario() -> tuple[int, str]:
        async with TestClient(TestServer(app)) as client:
            answer = await client.get(path)
            return answer.status, await answer.text()

    return asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_only_what_a_restart_puts_right_fails_liveness(path: str) -> None:
    probes = Probes(live=list, ready=lambda: ["pods may not be listed"], metrics=dict)
    assert get(probes.probe_app(), path) == (200, "ok\n")
    assert get(probes.probe_app(), "/readyz") == (503, "pods may not be listed\n")
    deaf = Probes(live=lambda: ["the watch of pods has been deaf for 300 s"], ready=list, metrics=dict)
    assert get(deaf.probe_app(), path)[0] == 503


def test_metrics_are_lines_of_name_and_value() -> None:
    figures = {"stagecoach_leader": 1.0, 'stagecoach_api_calls_total{verb="get",resource="pods"}': 12.0}
    status, text = get(Probes(list, list, lambda: figures).metrics_app(), "/metrics")
    assert status == 200
    assert text == 'stagecoach_leader 1\nstagecoach_api_calls_total{verb="get",resource="pods"} 12\n'


def test_nothing_waits_for_events_and_each_is_posted_once() -> None:
    from stagecoach_operator.events import EventReason, RunEvent
    from stagecoach_operator.kube import Unavailable
    from stagecoach_operator.watched import run_view

    posted: list[str] = []

    class Api:
        async def create(self, resource: Any, body: Any) -> Any:
            posted.append(body["message"])
            raise Unavailable("500")  # an event that does not get through fails nothing

    async def scenario() -> None:
        poster = Poster(Api())  # type: ignore[arg-type]
        run = run_view({"metadata": {"name": "demo", "namespace": "team", "uid": "u", "generation": 1}})
        for _ in range(3):
            poster.post(run, [RunEvent(EventReason.COMPLETE, "done"), RunEvent(EventReason.ACCEPTED, "valid")])
        await poster.close()

    asyncio.run(scenario())
    assert posted == ["done", "valid"]
