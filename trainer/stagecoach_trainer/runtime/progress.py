"""Progress of long work: JSON lines in a local file, and reports to the operator on a cluster."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from stagecoach_api.names import ENV_PROGRESS_CA, ENV_PROGRESS_TOKEN, ENV_PROGRESS_URL
from stagecoach_api.progress import Pace, ProgressEvent, trainer_status
from stagecoach_trainer.runtime.progress_log import ProgressLog

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
    Some of them become lines of the log.

    Only rank 0 gets paths; other ranks write nothing. `warnings_file`: gets each warning as a line of JSON, from which
    the launcher adds them to the attempt's result.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[], float] = time.time,
        reporter: Reporter | None = None,
        warnings_file: Path | None = None,
    ) -> None:
        self._path = path
        self._clock = clock
        self._reporter = reporter
        self._warnings_file = warnings_file
        self._last = ProgressEvent(time=0.0, activity="start")
        self._log = ProgressLog()
        self._notes: set[str] = set()
        self.warnings: list[str] = []
        """Warnings that arose while the stage was running, each once."""

    def report(
        self,
        activity: str,
        done: float = 0.0,
        total: float | None = None,
        unit: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Report the current activity and its progress; cheap enough to call in every step."""
        if self._path is None:
            return
        now, last = self._clock(), self._last
        event = ProgressEvent(
            time=now, activity=activity, done=done, total=total, unit=unit, metrics=dict(metrics or {})
        )
        for line in self._log.lines(event):
            log.info("%s", line)
        finished = total is not None and done >= total > 0 and done != last.done
        recent = now - last.time < MIN_SECONDS_BETWEEN_EVENTS
        if recent and activity == last.activity and not finished:
            return
        self._write(event)

    def note(self, text: str) -> None:
        """Log a line, unless it has been logged already."""
        if text not in self._notes:
            self._notes.add(text)
            log.info("%s", text)

    def warn(self, text: str) -> None:
        """Report what users have to know although the stage continues: in the log, to the driver, and in the report."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        log.info("warning: %s", text)  # not at the level WARNING, at which every rank would print it
        if self._warnings_file is not None:
            with contextlib.suppress(OSError), self._warnings_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")
        if self._path is not None:
            activity = self._last.activity
            self._write(self._last.model_copy(update={"time": self._clock(), "activity": activity, "warning": text}))

    def _write(self, event: ProgressEvent) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json(exclude_defaults=True) + "\n")
        if self._reporter is not None:
            self._reporter.offer(event)
        self._last = event.model_copy(update={"warning": ""})


class ReportRefused(Exception):
    """The operator does not accept the report."""


class Reporter:
    """Sends the newest event to the operator from a background thread, whose failures do not affect the stage.

    Uses Kubeflow Trainer's protocol (KEP-2779). A failed report is dropped, since the next one supersedes it.
    """

    def __init__(self, url: str, token_file: Path, ca_file: Path | None) -> None:
        parts = urlsplit(url)
        self._is_https, self._host = parts.scheme == "https", parts.netloc
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._connection: http.client.HTTPConnection | None = None
        self._token_file = token_file
        self._ca_file = ca_file
        self._newest: ProgressEvent | None = None
        self._end: float | None = None
        """When its activity will have ended."""
        self._pace = Pace()
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
        self._pace.add(event)
        self._newest, self._end = event, self._pace.end()
        self._news.set()

    def _work(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            event, end = self._newest, self._end
            try:
                if event is not None:
                    self._send(json.dumps(trainer_status(event, None if end is None else end - event.time)).encode())
            except Exception as error:  # a failed report must not stop training
                self._complain(error)
            time.sleep(SECONDS_BETWEEN_REPORTS)

    def _send(self, body: bytes) -> None:
        """Send a report over the connection of the last one: a new one costs the operator ten times as much."""
        for number in range(1, MAX_TRIES + 1):
            is_new = self._connection is None
            try:
                status = self._post(body)
            except (OSError, http.client.HTTPException):
                self._close()
                if is_new or number == MAX_TRIES:
                    raise
                continue  # the operator has closed an idle connection, or another one has taken over
            if status < 400:
                return
            self._close()
            if status != 503 or number == MAX_TRIES:
                raise ReportRefused(f"status {status}")
            time.sleep(PAUSE_SECONDS)

    def _post(self, body: bytes) -> int:
        """Send one request; return the status of the response."""
        token = self._token_file.read_text(encoding="utf-8").strip()  # read each time: the kubelet renews it
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection = self._connection = self._connection or self._connect()
        connection.request("POST", self._path, body, headers)
        response = connection.getresponse()
        response.read()
        if response.will_close:
            self._close()
        return response.status

    def _connect(self) -> http.client.HTTPConnection:
        if not self._is_https:
            return http.client.HTTPConnection(self._host, timeout=REPORT_TIMEOUT_SECONDS)
        # Read each time: the bundle may have been replaced with that of the next authority.
        context = ssl.create_default_context(cafile=None if self._ca_file is None else str(self._ca_file))
        return http.client.HTTPSConnection(self._host, timeout=REPORT_TIMEOUT_SECONDS, context=context)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _complain(self, error: Exception) -> None:
        """Log the first failed report. No error's text contains the token."""
        if not self._complained:
            self._complained = True
            log.warning(
                "progress cannot be reported to the operator (%s: %s); the stage continues", type(error).__name__, error
            )
