"""Receives progress reports of stages over the wire protocol of Kubeflow Trainer's KEP-2779, which the trainers of
Hugging Face transformers and TRL implement.

POST /apis/stagecoach.dev/v1alpha1/namespaces/<namespace>/attempts/<attempt>/status
{"trainerStatus": {"progressPercentage": 42, "estimatedRemainingSeconds": 90, "metrics": [{"name": …, "value": …}], …}}

A pod may report only for its own attempt, and only while that is live. Reports are kept in memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from stagecoach_api.names import API_GROUP_VERSION, progress_audience
from stagecoach_api.progress import METRIC_ACTIVITY, METRIC_DONE, METRIC_TOTAL, METRIC_UNIT
from stagecoach_operator.object_cache import Cache
from stagecoach_operator.object_views import JobSetView, PodView
from stagecoach_operator.progress_reports import ProgressReport, ProgressReports, ReportKey
from stagecoach_operator.token_review import InvalidToken, TokenVerifier

# 64 KiB and 256 metrics are the limits of KEP-2779.
MAX_BODY_BYTES = 64 * 1024
MAX_METRICS = 256
MAX_METRIC_CHARACTERS = 256
SECONDS_PER_REPORT = 1.0
"""An attempt may report once in this time on average, and BURST times at once; others get 429."""
BURST = 5.0
ROUTE = f"/apis/{API_GROUP_VERSION}/namespaces/{{namespace}}/attempts/{{attempt}}/status"


class BadReport(ValueError):
    """The body is not a progress report."""


@dataclass
class Allowance:
    """Number of reports an attempt may still send; a token bucket."""

    left: float
    at: float


@dataclass
class ProgressServer:
    """Receives reports of attempts."""

    cache: Cache
    reports: ProgressReports
    verifier: TokenVerifier
    enqueue: Callable[[str], None]
    is_active: Callable[[], bool] = lambda: True
    """Returns whether this replica is the active one."""
    clock: Callable[[], float] = time.time
    _allowances: dict[str, Allowance] = field(default_factory=dict)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(ROUTE, self.post)
        return app

    async def post(self, request: web.Request) -> web.Response:
        """Handle a report."""
        if not self.is_active():
            # The Service selects all replicas; a retry over a new connection may reach the active one.
            return _failure(503, "this replica is a standby; try again", {"Retry-After": "1", "Connection": "close"})
        namespace, attempt = request.match_info["namespace"], request.match_info["attempt"]
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        try:
            bearer = await self.verifier.verify(token, progress_audience(namespace, attempt))
        except InvalidToken as error:
            return _failure(401, f"token: {error}")
        # Verified offline, a token is valid until it expires, even if its pod is gone: the pod must still be live.
        key = self._attempt_of(bearer.pod_uid, namespace, attempt)
        if key is None or bearer.namespace != namespace:
            return _failure(403, "the pod does not belong to a live attempt of this name")
        # After the authentication, so that no one else can use up the attempt's allowance.
        if not self._may_report(attempt):
            return _failure(429, "too many reports", {"Retry-After": "5"})
        try:
            # By our own clock: the heartbeat is compared with it, and a node's clock may be wrong.
            report = report_of(await request.read(), bearer.pod_uid, self.clock())
        except BadReport as error:
            return _failure(400, str(error))
        self.reports.record(key, report)
        self.enqueue(key[0])
        return web.json_response({"kind": "Status", "status": "Success"})

    def _attempt_of(self, pod_uid: str, namespace: str, attempt: str) -> ReportKey | None:
        """Return the live attempt of this name that a pod belongs to, or None if it does not belong to one."""
        pod = self.cache.children.get(pod_uid)
        if not isinstance(pod, PodView) or pod.meta.namespace != namespace or pod.has_ended:
            return None
        own = self.cache.of_run(pod.run_uid).jobsets
        alive = any(item.meta.name == attempt and _is_of(item, pod) for item in own)
        return (pod.run_uid, pod.stage, pod.number) if alive else None

    def _may_report(self, attempt: str) -> bool:
        now = self.clock()
        before = self._allowances.get(attempt, Allowance(BURST, now))
        left = min(BURST, before.left + (now - before.at) / SECONDS_PER_REPORT)
        # A rejected report is free: a client that retries too early does not prolong its own exclusion.
        self._allowances[attempt] = Allowance(max(0.0, left - 1.0) if left >= 1.0 else left, now)
        if len(self._allowances) > 10_000:
            # A bucket is full again after 5 s (BURST at one per second), so an idle one need not be stored.
            self._allowances = {name: item for name, item in self._allowances.items() if now - item.at < 60.0}
        return left >= 1.0


def _is_of(jobset: JobSetView, pod: PodView) -> bool:
    return (jobset.stage, jobset.number) == (pod.stage, pod.number)


def _failure(status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": status, "message": text}
    return web.json_response(body, status=status, headers=headers)


def report_of(body: bytes, pod_uid: str, now: float) -> ProgressReport:
    """Parse the body of a report. Raises BadReport."""
    try:
        status = json.loads(body)["trainerStatus"]
        metrics = _metrics(status.get("metrics", []))
        remaining = status.get("estimatedRemainingSeconds")
        percentage = status.get("progressPercentage")
        return ProgressReport(
            pod_uid=pod_uid,
            time=now,
            activity=metrics.pop(METRIC_ACTIVITY, "")[:64],
            done=float(metrics.pop(METRIC_DONE, 0.0)),
            total=_float(metrics.pop(METRIC_TOTAL, None)),
            unit=metrics.pop(METRIC_UNIT, "")[:32],
            percentage=None if percentage is None else max(0, min(100, int(percentage))),
            remaining_seconds=None if remaining is None else max(0, min(10**9, int(remaining))),
            metrics=metrics,
        )
    # OverflowError: `int` of Infinity, which `json` accepts. RecursionError: deeply nested JSON.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadReport(f"`trainerStatus` as in KEP-2779 is expected: {type(error).__name__}") from error


def _metrics(items: Any) -> dict[str, str]:
    if not isinstance(items, list) or len(items) > MAX_METRICS:
        raise BadReport(f"`metrics` must be a list of at most {MAX_METRICS}")
    return {str(item["name"])[:MAX_METRIC_CHARACTERS]: str(item["value"])[:MAX_METRIC_CHARACTERS] for item in items}


def _float(text: str | None) -> float | None:
    number = None if text is None else float(text)
    # Also drops NaN, for which every comparison is false.
    return number if number is None or 0.0 <= number <= 1e15 else None
