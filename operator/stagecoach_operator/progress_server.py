"""Receives progress reports of stages over the wire protocol of Kubeflow Trainer's KEP-2779, which the trainers of
Hugging Face transformers and TRL implement.

POST /apis/stagecoach.dev/v1alpha1/namespaces/<namespace>/attempts/<attempt>/status
{"trainerStatus": {"progressPercentage": 42, "estimatedRemainingSeconds": 90, "metrics": [{"name": …, "value": …}], …}}

A pod may report only for its own attempt, and only while that is live. Reports are kept in memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
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
BODY_SECONDS = 5.0
"""Limit of receiving a body."""
MAX_NUMBER = 1e15
"""Numbers beyond it do not fit into a status."""
ROUTE = f"/apis/{API_GROUP_VERSION}/namespaces/{{namespace}}/attempts/{{attempt}}/status"


class BadReport(ValueError):
    """The body is not a progress report."""


class Refusal(Exception):
    """A request that is not accepted. The connection is closed: only an accepted one may stay."""

    def __init__(self, status: int, text: str, retry_after: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = {"Connection": "close"} | ({} if retry_after is None else {"Retry-After": str(retry_after)})

    def response(self) -> web.Response:
        body = {"kind": "Status", "status": "Failure", "code": self.status, "message": str(self)}
        return web.json_response(body, status=self.status, headers=self.headers)


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
    answers: Counter[int] = field(default_factory=Counter)
    """Number of requests by status code."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of values that were dropped from reports, by field."""
    _allowances: dict[ReportKey, Allowance] = field(default_factory=dict)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(ROUTE, self.post)
        return app

    async def post(self, request: web.Request) -> web.Response:
        """Handle a report."""
        try:
            key, pod_uid = await self._authenticated(request)
            # By our own clock: the heartbeat is compared with it, and a node's clock may be wrong.
            report = report_of(await _body(request), pod_uid, self.clock(), self.dropped)
        except Refusal as refusal:
            response = refusal.response()
        except BadReport as error:
            response = Refusal(400, str(error)).response()
        else:
            self.reports.record(key, report)
            self.enqueue(key[0])
            response = web.json_response({"kind": "Status", "status": "Success"})
        self.answers[response.status] += 1
        return response

    async def _authenticated(self, request: web.Request) -> tuple[ReportKey, str]:
        """Return the live attempt that may report now, and its pod's UID. Raises Refusal."""
        if not self.is_active():
            # The Service selects all replicas; a retry over a new connection may reach the active one.
            raise Refusal(503, "this replica is a standby; try again", retry_after=1)
        namespace, attempt = request.match_info["namespace"], request.match_info["attempt"]
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        try:
            bearer = await self.verifier.verify(token, progress_audience(namespace, attempt))
        except InvalidToken as error:
            raise Refusal(401, f"token: {error}") from None
        # Verified offline, a token is valid until it expires, even if its pod is gone: the pod must still be live.
        key = self._attempt_of(bearer.pod_uid, namespace, attempt)
        if key is None or bearer.namespace != namespace:
            raise Refusal(403, "the pod does not belong to a live attempt of this name")
        # After the authentication, so that no one else can use up the attempt's allowance.
        if not self._may_report(key):
            raise Refusal(429, "too many reports", retry_after=5)
        return key, bearer.pod_uid

    def _attempt_of(self, pod_uid: str, namespace: str, attempt: str) -> ReportKey | None:
        """Return the live attempt of this name that a pod belongs to, or None if it does not belong to one."""
        pod = self.cache.children.get(pod_uid)
        if not isinstance(pod, PodView) or pod.meta.namespace != namespace or pod.has_ended:
            return None
        own = self.cache.of_run(pod.run_uid).jobsets
        alive = any(item.meta.name == attempt and _is_of(item, pod) for item in own)
        return (pod.run_uid, pod.stage, pod.number) if alive else None

    def _may_report(self, attempt: ReportKey) -> bool:
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


async def _body(request: web.Request) -> bytes:
    """Return the body. Raises Refusal if it is too large or too late."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise Refusal(408, f"the body has not arrived within {BODY_SECONDS:.0f} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise Refusal(413, f"a report has at most {MAX_BODY_BYTES:,} bytes") from None


def report_of(body: bytes, pod_uid: str, now: float, dropped: Counter[str] | None = None) -> ProgressReport:
    """Parse the body of a report. Raises BadReport.

    A value that does not fit into a status is dropped and counted in `dropped`: the report is a heartbeat all the same.
    """
    drops: Counter[str] = Counter() if dropped is None else dropped
    try:
        status = json.loads(body)["trainerStatus"]
        metrics = _metrics(status.get("metrics", []))
        remaining = status.get("estimatedRemainingSeconds")
        percentage = status.get("progressPercentage")
        return ProgressReport(
            pod_uid=pod_uid,
            time=now,
            activity=metrics.pop(METRIC_ACTIVITY, "")[:64],
            done=_amount(METRIC_DONE, metrics.pop(METRIC_DONE, None), drops) or 0.0,
            total=_amount(METRIC_TOTAL, metrics.pop(METRIC_TOTAL, None), drops),
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
    return {_text(item["name"]): _text(item["value"]) for item in items}


def _text(value: Any) -> str:
    """Return a value as a text that the API server accepts: JSON may contain halves of characters and control codes."""
    if isinstance(value, dict | list):
        raise BadReport("a metric has a name and a value")
    text = str(value)[:MAX_METRIC_CHARACTERS].encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _amount(name: str, text: str | None, dropped: Counter[str]) -> float | None:
    if text is None:
        return None
    number = float(text)
    # Written so that NaN, for which every comparison is false, is dropped too.
    if 0.0 <= number <= MAX_NUMBER:
        return number
    dropped[name] += 1
    return None
