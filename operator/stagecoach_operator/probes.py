"""Our own probe and metrics server: it answers on a stand-by too, and knows what kopf's does not.

/livez (and /healthz)   fails when a watch is deaf or a turn is stuck: a restart helps
/readyz                 fails while the operator cannot work: the Lease cannot be read, a kind may not be listed
/metrics                Prometheus' text format
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

Complaints = Callable[[], list[str]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Metrics = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Probes:
    """What is asked when somebody probes."""

    live: Complaints
    """Returns what only a restart puts right."""
    ready: Complaints
    """Returns why the operator cannot work now."""
    metrics: Metrics
    """Returns figures by their name, labels included."""

    def probe_app(self) -> web.Application:
        app = web.Application()
        for path in ("/livez", "/healthz"):
            app.router.add_get(path, self._answer(self.live))
        app.router.add_get("/readyz", self._answer(self.ready))
        return app

    def metrics_app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._figures)
        return app

    @staticmethod
    def _answer(complaints: Complaints) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            del request
            found = complaints()
            return web.Response(text="\n".join(found) + "\n" if found else "ok\n", status=503 if found else 200)

        return handle

    async def _figures(self, request: web.Request) -> web.Response:
        del request
        lines = [f"{name} {value:g}" for name, value in self.metrics().items()]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


async def serve(app: web.Application, port: int, ssl_context: object = None, host: str = "0.0.0.0") -> web.AppRunner:  # noqa: S104
    """Serve until the runner is cleaned up. Probes come from the node, so every address is listened on."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, host, port, ssl_context=ssl_context).start()  # type: ignore[arg-type]
    return runner
