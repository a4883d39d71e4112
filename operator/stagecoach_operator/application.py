"""The operator's process: servers that always run, the Lease, and, while it is held, watches and reconciliations."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from stagecoach_operator.artifact_lookup import ArtifactLookups
from stagecoach_operator.attempt_client import AttemptClient
from stagecoach_operator.audit import AUDIT_SECONDS, Audit
from stagecoach_operator.certificate_files import CHECK_SECONDS, CertificateFiles
from stagecoach_operator.event_recorder import EventRecorder
from stagecoach_operator.events import RunEvent
from stagecoach_operator.guarded_listener import GuardedListener
from stagecoach_operator.kube import ApiServer
from stagecoach_operator.lease import Lease
from stagecoach_operator.loop_lag import LoopLag
from stagecoach_operator.metrics import Metrics
from stagecoach_operator.object_cache import Cache, oldest_first
from stagecoach_operator.object_views import RunView
from stagecoach_operator.operator_metrics import families_of
from stagecoach_operator.plan_maker import PlanMaker
from stagecoach_operator.probes import Probes, serve
from stagecoach_operator.progress_reports import ProgressReports
from stagecoach_operator.progress_server import ProgressServer
from stagecoach_operator.reconcile import Reconciler
from stagecoach_operator.self_check import keep_checking
from stagecoach_operator.settings import Settings
from stagecoach_operator.store_lanes import StoreLanes
from stagecoach_operator.token_review import TokenVerifier
from stagecoach_operator.worker import Workers

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LATE_SECONDS = 60.0
"""An event loop that is later than this makes the liveness probe fail."""
STALE_SECONDS = 4 * AUDIT_SECONDS
"""A watch that has missed changes for longer makes the liveness probe fail."""
CLOSING_SECONDS = 10.0
ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - the pods' reports arrive at the pod's address
LOST_LEASE = 3
"""Exit code: the container restarts as a standby."""


class Application:
    """The parts of the operator and their order of start and stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache = Cache()
        self.reports = ProgressReports()
        self.stop = asyncio.Event()
        self.exit_code = 0
        self.metrics = Metrics()
        self.loop_lag = LoopLag(observe=self.metrics.loop_lag.observe)
        self.certificates = CertificateFiles(settings)

    async def run(self) -> int:
        """Run until a signal arrives or the Lease is lost; return the exit code."""
        self.kube = await ApiServer.connect(self.settings.api_timeout_seconds)
        self.lease = Lease(
            self.kube,
            self.settings.pod_namespace,
            self.settings.lease_name,
            self.settings.pod_name,
            self.settings.lease_seconds,
        )
        self.lanes = StoreLanes(self.settings)
        self.lookups = ArtifactLookups(self.lanes)
        self.event_recorder = EventRecorder(self.kube)
        self.workers = Workers(self._reconcile, observe=self.metrics.observe_turn)
        self.audit = Audit(self.kube, self.cache, self.settings.namespaces, self.workers.enqueue)
        self.planner = PlanMaker(self.lanes, self.settings, self.workers.enqueue)
        self.reconciler = Reconciler(
            client=AttemptClient(self.kube, self.cache, self.settings),
            lookups=self.lookups,
            planner=self.planner,
            reports=self.reports,
            enqueue=self.workers.enqueue,
            record_events=self._record_events,
            observe_status=self.metrics.observe_status,
        )
        servers = await self._serve()
        background = (
            asyncio.create_task(self.loop_lag.measure(), name="loop lag"),
            asyncio.create_task(self._reload(), name="certificates"),
        )
        try:
            await self._lead()
        finally:
            for task in background:
                task.cancel()
            await self.workers.close(CLOSING_SECONDS)
            await self.event_recorder.close()
            await self.lease.release()
            for server in servers:
                await server.cleanup()
            self.planner.close()
            self.lookups.close()
            await self.kube.close()
        return self.exit_code

    # -- while the Lease is held ---------------------------------------------------------------------------------------

    async def _lead(self) -> None:
        """Wait for the Lease, then work until it is lost or a signal arrives."""
        with self._signals():
            if not await self._until_stop(self.lease.acquire()):
                return
        keeping = asyncio.create_task(self._keep(), name="lease")
        self.reports.start(time.time(), checked=self.settings.progress_url is not None)
        # Everything is listed before the first decision: a JobSet missing from the cache would count as deleted.
        await self.audit.cold_start()
        for run in oldest_first(self.cache.runs.values()):
            self.workers.enqueue(run.meta.uid)
        log.info("reconciling %d existing runs", len(self.cache.runs))
        auditing = asyncio.create_task(self._audit(), name="audit")
        checking = asyncio.create_task(
            keep_checking(self.settings, self.reports, lambda: self.certificates.authorities), name="self-check"
        )
        try:
            await self._watch()
        finally:
            tasks = (checking, auditing, keeping)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Watch until `stop` is set."""
        import kopf

        from stagecoach_operator.handlers import make_registry, make_settings

        namespaces = self.audit.reachable
        identity: Any = self.lease.identity  # kopf would look up the user's name, which the image need not have
        ready = asyncio.Event()
        taking_over = asyncio.create_task(self._take_signals(ready), name="signals")
        try:
            await kopf.operator(
                registry=make_registry(self.cache, self.workers.enqueue),
                settings=make_settings(),
                identity=identity,
                standalone=True,
                clusterwide=namespaces is None,
                namespaces=namespaces or (),
                stop_flag=self.stop,
                ready_flag=ready,
            )
        finally:
            taking_over.cancel()

    async def _take_signals(self, ready: asyncio.Event) -> None:
        """Let running reconciliations end before kopf stops: on exit it cancels every task in the event loop."""
        await ready.wait()
        stopping = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await stopping.wait()
        log.info("stopping")
        await self.workers.close(CLOSING_SECONDS)
        await self.event_recorder.close()
        self.stop.set()

    async def _keep(self) -> None:
        await self.lease.keep()
        self.exit_code = LOST_LEASE
        self.stop.set()

    async def _audit(self) -> None:
        while True:
            await asyncio.sleep(AUDIT_SECONDS)
            await self.audit.check()
            # With scanning disabled, kopf resolves kinds only at the start: exit, and watch after the restart.
            if self.audit.appeared:
                self.stop.set()

    async def _reconcile(self, uid: str) -> float | None:
        """Reconcile a run, unless another replica may be active by now."""
        if not self.lease.held:
            return None
        return await self.reconciler.reconcile(uid)

    def _record_events(self, run: RunView, events: Sequence[RunEvent]) -> None:
        for event in events:
            log.info("%s/%s: %s: %s", run.meta.namespace, run.meta.name, event.reason, event.message)
        self.event_recorder.record(run, events)

    # -- always --------------------------------------------------------------------------------------------------------

    async def _serve(self) -> list[web.AppRunner | GuardedListener]:
        probes = Probes(self._not_live, self._not_ready, self.metrics.registry)
        self.progress = ProgressServer(
            self.cache, self.reports, TokenVerifier(self.kube), self.workers.enqueue, is_active=lambda: self.lease.held
        )
        self.listener = GuardedListener(self.progress.app(), lambda: self.certificates.context)
        self.metrics.add(*families_of(self))
        await self.listener.start(ANY_ADDRESS, self.settings.progress_port)
        return [
            await serve(probes.probe_app(), self.settings.probe_port),
            await serve(probes.metrics_app(), self.settings.metrics_port),
            self.listener,
        ]

    async def _reload(self) -> None:
        """Take over certificates that change, for new connections and for new pods."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self.certificates.refresh():
                client = self.reconciler.client
                settings = client.settings.model_copy(update={"progress_ca": self.certificates.authorities})
                self.reconciler.client = replace(client, settings=settings)

    def _not_live(self) -> list[str]:
        found = self.audit.problems(STALE_SECONDS) if self.lease.held else []
        late = self.loop_lag.seconds()
        if late > LATE_SECONDS:
            found.append(f"the event loop is {late:.0f} s late")
        return found

    def _not_ready(self) -> list[str]:
        silence = self.lease.clock() - self.lease.answered_at
        if silence > 2 * self.settings.lease_seconds:
            return ["the Lease cannot be read from the API server"]
        return self.audit.problems(STALE_SECONDS) if self.lease.held else []

    # -- stopping ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals until kopf does."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop.set)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    async def _until_stop(self, work: object) -> bool:
        """Await something unless a signal arrives first; return whether it was completed."""
        doing = asyncio.ensure_future(work)  # type: ignore[call-overload]
        stopping = asyncio.ensure_future(self.stop.wait())
        done, pending = await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if doing in done:
            doing.result()
        return doing in done
