"""Progress of long work: JSON lines in a local file, and reports to the operator on a cluster."""

from __future__ import annotations

import contextlib
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


class Reporter:
    """Sends the newest event to the operator from a background thread, whose failures do not affect the stage.

    Uses Kubeflow Trainer's protocol (KEP-2779). A failed report is dropped, since the next one supersedes it.
    """

    def __init__(self, url: str, token_file: Path, ca_file: Path | None) -> None:
        self._url = url
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
