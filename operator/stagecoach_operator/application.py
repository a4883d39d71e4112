"""Everything put together: servers that always answer, the Lease, and, while it is held, watches and turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

from aiohttp import web

from stagecoach_operator.artifact_lookup import Lookups
from stagecoach_operator.audit import AUDIT_SECONDS, Audit
from stagecoach_operator.cluster import Cluster
from stagecoach_operator.event_recorder import Poster
from stagecoach_operator.events import RunEvent
from stagecoach_operator.kube import ApiServer
from stagecoach_operator.lease import Lease
from stagecoach_operator.probes import Probes, serve
from stagecoach_operator.progress_reports import Board
from stagecoach_operator.progress_server import ProgressServer
from stagecoach_operator.reconcile import Reconciler
from stagecoach_operator.settings import Settings
from stagecoach_operator.token_review import TokenVerifier
from stagecoach_operator.watched import Cache, RunView, newest_runs
from stagecoach_operator.worker import Workers

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STUCK_SECONDS = 300.0
"""A turn that takes longer than this is stuck: a call to the API server ends after a tenth of it."""
DEAF_SECONDS = 4 * AUDIT_SECONDS
CLOSING_SECONDS = 10.0
LOST_LEASE = 3
"""Exit code: the container starts anew as a stand-by."""


class Application:
    """The operator's process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache = Cache()
        self.board = Board()
        self.stop = asyncio.Event()
        self.exit_code = 0

    async def run(self) -> int:
        """Run until told to stop; return the exit code."""
        self.kube = await ApiServer.connect(self.settings.api_timeout_seconds)
        self.lease = Lease(
            self.kube,
            self.settings.pod_namespace,
            self.settings.lease_name,
            self.settings.pod_name,
            self.settings.lease_seconds,
        )
        self.lookups = Lookups(self.settings.store_threads)
        self.poster = Poster(self.kube)
        self.workers = Workers(self._turn)
        self.audit = Audit(self.kube, self.cache, self.settings.namespace, self.workers.wake)
        self.reconciler = Reconciler(
            cluster=Cluster(self.kube, self.cache, self.settings),
            lookups=self.lookups,
            board=self.board,
            wake=self.workers.wake,
            announce=self._announce,
        )
        servers = await self._serve()
        try:
            await self._lead()
        finally:
            await self.workers.close(CLOSING_SECONDS)
            await self.poster.close()
            await self.lease.release()
            for server in servers:
                await server.cleanup()
            self.lookups.close()
            await self.kube.close()
        return self.exit_code

    # -- while the Lease is held ---------------------------------------------------------------------------------------

    async def _lead(self) -> None:
        """Wait for the Lease, then work until it is lost or somebody asks to stop."""
        with self._signals():
            if not await self._until_stop(self.lease.acquire()):
                return
        keeping = asyncio.create_task(self._keep(), name="lease")
        await self.audit.cold_start()
        for run in newest_runs(self.cache.runs.values()):
            self.workers.wake(run.meta.uid)
        log.info("%d runs", len(self.cache.runs))
        auditing = asyncio.create_task(self._audit(), name="audit")
        try:
            await self._watch()
        finally:
            for task in (auditing, keeping):
                task.cancel()
            await asyncio.gather(auditing, keeping, return_exceptions=True)

    async def _watch(self) -> None:
        """Watch until told to stop."""
        import kopf

        from stagecoach_operator.handlers import make_registry, make_settings

        namespace = self.settings.namespace
        identity: Any = self.lease.identity  # kopf would ask for the user's name, and the image need not know one
        ready = asyncio.Event()
        taking_over = asyncio.create_task(self._take_signals(ready), name="signals")
        try:
            await kopf.operator(
                registry=make_registry(self.cache, self.workers.wake),
                settings=make_settings(),
                identity=identity,
                standalone=True,
                clusterwide=namespace is None,
                namespaces=[] if namespace is None else [namespace],
                stop_flag=self.stop,
                ready_flag=ready,
            )
        finally:
            taking_over.cancel()

    async def _take_signals(self, ready: asyncio.Event) -> None:
        """Let turns under way end before kopf stops: it would cancel them, as it does with every task it finds."""
        await ready.wait()
        asked = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        await asked.wait()
        log.info("asked to stop")
        await self.workers.close(CLOSING_SECONDS)
        await self.poster.close()
        self.stop.set()

    async def _keep(self) -> None:
        await self.lease.keep()
        self.exit_code = LOST_LEASE
        self.stop.set()

    async def _audit(self) -> None:
        while True:
            await asyncio.sleep(AUDIT_SECONDS)
            await self.audit.check()
            if self.audit.appeared:
                self.stop.set()

    async def _turn(self, uid: str) -> float | None:
        """Do a turn of a run, unless another operator may be at work by now."""
        if not self.lease.held:
            return None
        return await self.reconciler.reconcile(uid)

    def _announce(self, run: RunView, events: Sequence[RunEvent]) -> None:
        for event in events:
            log.info("%s/%s: %s: %s", run.meta.namespace, run.meta.name, event.reason, event.message)
        self.poster.post(run, events)

    # -- always --------------------------------------------------------------------------------------------------------

    async def _serve(self) -> list[web.AppRunner]:
        probes = Probes(self._not_live, self._not_ready, self._metrics)
        progress = ProgressServer(
            self.cache, self.board, TokenVerifier(self.kube), self.workers.wake, is_active=lambda: self.lease.held
        )
        settings = self.settings
        return [
            await serve(probes.probe_app(), settings.probe_port),
            await serve(probes.metrics_app(), settings.metrics_port),
            await serve(progress.app(), settings.progress_port, tls_context(settings)),
        ]

    def _not_live(self) -> list[str]:
        found = self.audit.complaints(DEAF_SECONDS) if self.lease.held else []
        stuck = self.workers.oldest_turn_seconds()
        if stuck > STUCK_SECONDS:
            found.append(f"a turn has been under way for {stuck:.0f} s")
        return found

    def _not_ready(self) -> list[str]:
        silent = self.lease.clock() - self.lease.answered_at
        if silent > 2 * self.settings.lease_seconds:
            return ["the API server does not answer about the Lease"]
        return self.audit.complaints(DEAF_SECONDS) if self.lease.held else []

    def _metrics(self) -> dict[str, float]:
        figures: dict[str, float] = {
            "stagecoach_leader": float(self.lease.held),
            "stagecoach_runs": float(len(self.cache.runs)),
            "stagecoach_watched_objects": float(len(self.cache.children)),
            "stagecoach_oldest_turn_seconds": self.workers.oldest_turn_seconds(),
        }
        for (verb, plural), count in sorted(self.kube.calls.counts.items()):
            figures[f'stagecoach_api_calls_total{{verb="{verb}",resource="{plural}"}}'] = float(count)
        return figures

    # -- stopping ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take the wish to stop while kopf does not."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop.set)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    async def _until_stop(self, work: object) -> bool:
        """Do something unless somebody asks to stop first; return whether it was done."""
        doing = asyncio.ensure_future(work)  # type: ignore[call-overload]
        stopping = asyncio.ensure_future(self.stop.wait())
        done, pending = await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if doing in done:
            doing.result()
        return doing in done


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the progress server's TLS. None: it serves plain HTTP."""
    if settings.progress_cert_file is None or settings.progress_key_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.progress_cert_file, settings.progress_key_file)
    return context
