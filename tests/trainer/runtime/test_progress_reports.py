"""Reports to the operator: their content, and that their failures do not affect training."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagecoach_api.names import ENV_PROGRESS_TOKEN, ENV_PROGRESS_URL
from stagecoach_api.progress import ProgressEvent
from stagecoach_trainer.runtime import progress
from stagecoach_trainer.runtime.progress import Progress, Reporter


class Operator(http.server.ThreadingHTTPServer):
    """Receives reports; responds with the given codes, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.codes: list[int] = []
        self.reports: list[dict[str, object]] = []
        self.tokens: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Operator

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.server.codes.pop(0) if self.server.codes else 200
        if code == 200:
            self.server.tokens.append(self.headers["Authorization"])
            self.server.reports.append(json.loads(body)["trainerStatus"])
        self.send_response(code)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def operator() -> Iterator[Operator]:
    server = Operator()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def reporter_for(operator: Operator, folder: Path) -> Reporter:
    token = folder / "token"
    token.write_text("secret-token\n", encoding="utf-8")
    url = f"http://127.0.0.1:{operator.server_address[1]}/status"
    reporter = Reporter.from_environment({ENV_PROGRESS_URL: url, ENV_PROGRESS_TOKEN: str(token)})
    assert reporter is not None
    return reporter


def wait_for(operator: Operator, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(operator.reports) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(operator.reports) >= count


def test_an_event_is_reported_with_its_token(operator: Operator, tmp_path: Path) -> None:
    reports = Progress(tmp_path / "progress.jsonl", reporter=reporter_for(operator, tmp_path))
    reports.report("train", 25, 100, "tokens", {"loss": 2.5})
    wait_for(operator, 1)
    report = operator.reports[0]
    assert report["progressPercentage"] == 25
    metrics = {item["name"]: item["value"] for item in report["metrics"]}  # type: ignore[attr-defined]
    assert metrics == {"loss": "2.5", "activity": "train", "done": "25.0", "total": "100.0", "unit": "tokens"}
    assert operator.tokens == ["Bearer secret-token"]
    assert (tmp_path / "progress.jsonl").read_text().count("\n") == 1


def test_a_report_to_an_inactive_replica_is_repeated_at_once(operator: Operator, tmp_path: Path) -> None:
    operator.codes = [503, 503]
    reporter_for(operator, tmp_path).offer(ProgressEvent(time=1.0, activity="train"))
    wait_for(operator, 1)


def test_a_missing_operator_does_not_delay_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REPORTS", 0.01)
    reporter = Reporter("http://127.0.0.1:9/status", tmp_path / "no token", None)
    reports = Progress(tmp_path / "progress.jsonl", reporter=reporter)
    begun = time.monotonic()
    for step in range(1000):
        reports.report("train", step, 1000)
    assert time.monotonic() - begun < 2.0
    time.sleep(0.2)
    assert sum("cannot be reported" in record.message for record in caplog.records) == 1


def test_without_an_operator_nothing_is_reported() -> None:
    assert Reporter.from_environment({}) is None
    assert Reporter.from_environment({ENV_PROGRESS_URL: "ftp://x", ENV_PROGRESS_TOKEN: "t"}) is None
