"""Progress of long work: JSON lines in a local file, and reports to the operator on a cluster."""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from stagecoach_api.names import ENV_PROGRESS_CA, ENV_PROGRESS_TOKEN, ENV_PROGRESS_URL
from stagecoach_api.progress import ProgressEvent, trainer_status

log = logging.getLogger(__name__)

MIN_SECONDS_BETWEEN_EVENTS = 0.5
SECONDS_BETWEEN_REPORTS = 5.0
REPORT_TIMEOUT_SECONDS = 5.0
MAX_TRIES = 4
"""The operator's service may route to an inactive replica, which answers 503; a new connection may reach the active
one."""
PAUSE_SECONDS = 0.2


class Progress:
    """Appends `ProgressEvent`s to a file, at most one per half second and activity; the newest line is the heartbeat.

    Only rank 0 gets a path; other ranks write nothing.
    """

    def __init__(
        self, path: Path | None, clock: Callable[[], float] = time.time, reporter: Reporter | None = None
    ) -> None:
        self._path = path
        self._clock = clock
        self._reporter = reporter
        self._last_time = float("-inf")
        self._last_activity = ""

    def report(
        self,
        activity: str,
        done: float = 0.0,
        total: float | None = None,
        unit: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Report the current activity and its progress; cheap enough to call in every step."""
        now = self._clock()
        finished = total is not None and done >= total
        recent = now - self._last_time < MIN_SECONDS_BETWEEN_EVENTS
        if self._path is None or (recent and activity == self._last_activity and not finished):
            return
        event = ProgressEvent(
            time=now, activity=activity, done=done, total=total, unit=unit, metrics=dict(metrics or {})
        )
        with self._path.open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json() + "\n")
        if self._reporter is not None:
            self._reporter.offer(event)
        self._last_time = now
        self._last_activity = activity


class Reporter:
    """Sends the newest event to the operator from a background thread, whose failures do not affect the stage.

    Uses Kubeflow Trainer's protocol (KEP-2779). A failed report is dropped, since the next one supersedes it.
    """

    def __init__(self, url: str, token_file: Path, ca_file: Path | None) -> None:
        self._url = url
        self._token_file = token_file
        self._ca_file = ca_file
        self._newest: ProgressEvent | None = None
        self._first: ProgressEvent | None = None
        self._news = threading.Event()
        self._complained = False
        threading.Thread(target=self._work, name="progress", daemon=True).start()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Reporter | None:
        """Return the reporter that the pod's environment configures; None if it configures none."""
        url, token = environment.get(ENV_PROGRESS_URL), environment.get(ENV_PROGRESS_TOKEN)
        if not url or not token or not url.startswith(("https://", "http://")):
            return None
        ca = environment.get(ENV_PROGRESS_CA)
        return cls(url, Path(token), Path(ca) if ca else None)

    def offer(self, event: ProgressEvent) -> None:
        """Set the newest event, which replaces one that has not been sent yet."""
        first = self._first
        if first is None or (first.activity, first.total) != (event.activity, event.total):
            self._first = event
        self._newest = event
        self._news.set()

    def _work(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            event, first = self._newest, self._first
            try:
                if event is not None:
                    self._send(json.dumps(trainer_status(event, remaining_seconds(first, event))).encode())
            except Exception as error:  # a failed report must not stop training
                self._complain(error)
            time.sleep(SECONDS_BETWEEN_REPORTS)

    def _send(self, body: bytes) -> None:
        for number in range(1, MAX_TRIES + 1):
            token = self._token_file.read_text(encoding="utf-8").strip()  # read each time: the kubelet renews it
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Connection": "close"}
            request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")  # noqa: S310
            try:
                with urllib.request.urlopen(request, timeout=REPORT_TIMEOUT_SECONDS, context=self._tls()):  # noqa: S310
                    return
            except urllib.error.HTTPError as error:
                if error.code != 503 or number == MAX_TRIES:
                    raise
                time.sleep(PAUSE_SECONDS)

    def _tls(self) -> ssl.SSLContext | None:
        if not self._url.startswith("https:"):
            return None
        return ssl.create_default_context(cafile=None if self._ca_file is None else str(self._ca_file))

    def _complain(self, error: Exception) -> None:
        """Log the first failed report. No error's text contains the token."""
        if not self._complained:
            self._complained = True
            log.warning(
                "progress cannot be reported to the operator (%s: %s); the stage continues", type(error).__name__, error
            )


def remaining_seconds(first: ProgressEvent | None, now: ProgressEvent) -> float | None:
    """Return how long an activity will take at its pace since `first`; None if there is no progress to measure yet."""
    if first is None or now.total is None or now.done <= first.done or now.time <= first.time:
        return None
    return (now.total - now.done) * (now.time - first.time) / (now.done - first.done)
