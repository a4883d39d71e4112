"""Probe and metrics server. kopf's own does not run on a standby and does not detect stale watches.

/livez (and /healthz)   fails if a watch is stale or the event loop is late: a restart helps. Never for a tenant's store
/readyz                 fails while the operator cannot work: the Lease cannot be read, or a kind may not be listed
/metrics                metrics in Prometheus' text format or OpenMetrics
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

Problems = Callable[[], list[str]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Probes:
    """The checks served by the endpoints."""

    live: Problems
    """Returns problems that only a restart solves."""
    ready: Problems
    """Returns problems that keep the operator from working."""
    metrics: CollectorRegistry
    """The metrics."""

    def probe_app(self) -> web.Application:
        app = web.Application()
        for path in ("/livez", "/healthz"):
            app.router.add_get(path, self._health(self.live))
        app.router.add_get("/readyz", self._health(self.ready))
        return app

    def metrics_app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics_text)
        return app

    @staticmethod
    def _health(check: Problems) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            del request
            problems = check()
            text = "\n".join(problems) + "\n" if problems else "ok\n"
            return web.Response(text=text, status=503 if problems else 200)

        return handle

    async def _metrics_text(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self.metrics), headers={"Content-Type": content_type})


async def serve(app: web.Application, port: int, host: str = "0.0.0.0") -> web.AppRunner:  # noqa: S104
    """Serve until the runner is cleaned up. Listens on all addresses: the kubelet probes the pod's IP."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
