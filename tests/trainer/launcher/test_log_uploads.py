"""Logs are stored while they grow; a store that denies, fails or does not respond is reported and delays nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stagecoach_api.artifacts import attempt_logs_prefix
from stagecoach_api.store import FolderStore, Store, open_store
from stagecoach_trainer.launcher.log_uploads import LogUploads
from stagecoach_trainer.launcher.rank_logs import LogFile
from tests.s3 import SECRET_KEY, Fault, FaultyFront, S3Server, make_bucket
from tests.trainer.makers import DIGEST, make_attempt

NAME = "rank-00000.20261122T095244.125Z.log"
KEY = f"{attempt_logs_prefix(DIGEST, '0001')}/{NAME}"


def stage_of(folder: Path, uri: str | None = None, endpoint: str | None = None) -> bytes:
    """Return a stage file's content, with its store in `folder` or at `uri`."""
    told = json.loads((make_attempt(folder, "").work / "stage.json").read_bytes())
    return json.dumps(told | ({} if uri is None else {"storageUri": uri, "storageEndpoint": endpoint})).encode()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    return LogFile(tmp_path / NAME)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_log_that_grows_is_stored_again(
    tmp_path: Path, log: LogFile, kind: str, request: pytest.FixtureRequest
) -> None:
    uri, endpoint = str(tmp_path / "store"), None
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        make_bucket(server.endpoint, "logs-that-grow")
        uri, endpoint = "s3://logs-that-grow/here", server.endpoint
    store: Store = open_store(uri, endpoint=endpoint)
    said: list[str] = []
    uploads = LogUploads(stage_of(tmp_path, uri, endpoint), [log], said.append, 0.05, 0.05)
    log.append(b"one\n")
    wait_until(lambda: store.exists(KEY) and store.read(KEY) == b"one\n")
    log.append(b"two\n")
    wait_until(lambda: store.read(KEY) == b"one\ntwo\n")
    uploads.finish(10)
    assert said == []


def test_a_log_that_does_not_grow_is_stored_once(tmp_path: Path, log: LogFile, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(FolderStore, "write", lambda self, key, data: written.append(data))
    uploads = LogUploads(stage_of(tmp_path), [log], lambda line: None, 0.01, 0.01)
    wait_until(lambda: bool(written))
    time.sleep(0.2)
    log.append(b"last")
    uploads.finish(10)
    assert written == [b"", b"last"]


def test_output_since_the_last_upload_is_stored_at_the_end(tmp_path: Path, log: LogFile) -> None:
    uploads = LogUploads(stage_of(tmp_path), [log], lambda line: None)
    log.append(b"all of a short stage\n")
    uploads.finish(10)
    assert (tmp_path / "store" / KEY).read_bytes() == b"all of a short stage\n"


def test_a_store_that_denies_access_is_reported_once(tmp_path: Path, log: LogFile, s3_server: S3Server) -> None:
    make_bucket(s3_server.endpoint, "logs-refused")
    said: list[str] = []
    with FaultyFront(s3_server.endpoint, [Fault("PUT", "answer", times=99, status=403, code="AccessDenied")]) as front:
        stage = stage_of(tmp_path, "s3://logs-refused", front.endpoint)
        uploads = LogUploads(stage, [log], said.append, 0.01, 0.01)
        wait_until(lambda: front.seen("PUT") >= 3)
        uploads.finish(10)
    assert len(said) == 1
    assert said[0].startswith("the logs of this node could not be stored: ")
    assert SECRET_KEY not in said[0]


def test_a_store_that_recovers_gets_the_whole_log(tmp_path: Path, log: LogFile, s3_server: S3Server) -> None:
    make_bucket(s3_server.endpoint, "logs-away")
    said: list[str] = []
    with FaultyFront(s3_server.endpoint, [Fault("PUT", "reset", times=6)]) as front:
        stage = stage_of(tmp_path, "s3://logs-away", front.endpoint)
        uploads = LogUploads(stage, [log], said.append, 0.01, 0.01)
        log.append(b"patience\n")
        wait_until(lambda: front.seen("PUT") >= 7)
        uploads.finish(30)
    assert open_store("s3://logs-away", endpoint=s3_server.endpoint).read(KEY) == b"patience\n"


def test_the_end_does_not_wait_for_a_store_that_does_not_respond(
    tmp_path: Path, log: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(FolderStore, "write", lambda self, key, data: answer.wait(60))
    said: list[str] = []
    uploads = LogUploads(stage_of(tmp_path), [log], said.append)
    began = time.monotonic()
    uploads.finish(0.3)
    assert time.monotonic() - began < 3
    assert said == ["the end of this node's logs could not be stored within 0 s"]
    answer.set()


def test_an_invalid_stage_file_is_left_to_the_workers(log: LogFile) -> None:
    said: list[str] = []
    LogUploads(b'{"stage": "sft"}', [log], said.append).finish(10)
    assert len(said) == 1
    assert len(said[0]) < 400
