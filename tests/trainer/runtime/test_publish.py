"""Publishing: all files of the output, the manifest last; the first attempt counts."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import (
    Manifest,
    attempt_id,
    attempt_logs_prefix,
    attempt_prefix,
    checkpoint_name,
    checkpoints_prefix,
    content_digest,
    manifest_key,
    rank_log_name,
)
from stagecoach_api.store import Store
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.runtime.publish import processor, publish, upload_attempt
from tests.trainer.loop.makers import context


@pytest.fixture
def stage(tmp_path: Path) -> StageContext:
    """A stage that has written two files."""
    here = context(tmp_path)
    (here.output / "sub").mkdir()
    (here.output / "report.json").write_text("{}")
    (here.output / "sub" / "part-00000").write_bytes(b"\0\1")
    return here


def read_manifest(here: StageContext) -> Manifest:
    return Manifest.model_validate_json(here.store.read(manifest_key(here.resolved.digest)))


def test_the_manifest_names_every_file_with_its_checksum(stage: StageContext) -> None:
    digest = publish(stage, StageOutcome(7, {"loss": 2.0}), time.time() - 5).content_digest
    manifest = read_manifest(stage)
    assert [item.path for item in manifest.objects] == ["report.json", "sub/part-00000"]
    assert digest == manifest.content_digest == content_digest(manifest.objects)
    assert (manifest.tokens, manifest.metrics, manifest.seed) == (7, {"loss": 2.0}, 7)
    assert manifest.seconds >= 5
    assert {"ranks", "threads", "processor", "python", "torch", "safetensors"} <= manifest.environment.keys()


def test_equal_output_has_equal_content_whenever_it_is_made(stage: StageContext, tmp_path: Path) -> None:
    first = publish(stage, StageOutcome(), time.time())
    other = context(tmp_path / "other")
    (other.output / "sub").mkdir()
    (other.output / "sub" / "part-00000").write_bytes(b"\0\1")
    (other.output / "report.json").write_text("{}")
    assert publish(other, StageOutcome(), time.time() - 99).content_digest == first.content_digest


def test_an_empty_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrote nothing"):
        publish(context(tmp_path), StageOutcome(), time.time())


def test_the_second_attempt_keeps_the_first_ones_artifact(
    stage: StageContext, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = publish(stage, StageOutcome(), time.time())
    before = read_manifest(stage)
    (stage.output / "report.json").write_text('{"changed": true}')
    assert publish(stage, StageOutcome(), time.time()) == theirs
    assert read_manifest(stage) == before
    # Both looked before either committed.
    monkeypatch.setattr("stagecoach_trainer.runtime.publish.find_manifest", lambda store, digest: None)
    assert publish(stage, StageOutcome(), time.time()) == theirs
    assert "published by another attempt with different content" in caplog.text


def test_checkpoints_of_a_published_stage_are_deleted(stage: StageContext) -> None:
    key = f"{checkpoints_prefix(stage.resolved.digest)}/{checkpoint_name(4)}/manifest.json"
    stage.store.write(key, b"{}")
    publish(stage, StageOutcome(), time.time())
    assert not stage.store.exists(key)


def test_seconds_of_earlier_attempts_count(stage: StageContext) -> None:
    now = time.time()
    upload_attempt(stage, now - 100)
    second = replace(stage, resolved=stage.resolved.model_copy(update={"attempt": 2}))
    publish(second, StageOutcome(), now - 10)
    assert read_manifest(stage).seconds == pytest.approx(110, abs=5)


def test_logs_are_stored_with_the_attempt_not_in_the_artifact(stage: StageContext) -> None:
    (stage.work / "logs").mkdir()
    (stage.work / "logs" / "metrics.jsonl").write_text("{}\n")
    upload_attempt(stage, time.time())
    publish(stage, StageOutcome(), time.time())
    prefix = attempt_prefix(stage.resolved.digest, "0001")
    assert stage.store.read(f"{prefix}/logs/metrics.jsonl") == b"{}\n"
    assert json.loads(stage.store.read(f"{prefix}/attempt.json"))["attempt"] == 1
    assert all("metrics" not in item.path for item in read_manifest(stage).objects)


def test_output_of_the_ranks_is_left_to_the_launcher(stage: StageContext) -> None:
    (stage.work / "logs" / "tensorboard").mkdir(parents=True)
    (stage.work / "logs" / rank_log_name(0, time.time())).write_text("half a line")
    (stage.work / "logs" / "tensorboard" / "events").write_bytes(b"\0")
    upload_attempt(stage, time.time())
    logs = attempt_logs_prefix(stage.resolved.digest, "0001")
    assert [entry.key for entry in stage.store.list(logs)] == [f"{logs}/tensorboard/events"]


def test_the_processor_is_named_with_family_and_stepping(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: AMD EPYC 9354\ncpu family\t: 25\nmodel\t\t: 17\nstepping\t: 1\n")
    assert processor(cpuinfo) == "AMD EPYC 9354 (family 25, model 17, stepping 1)"


def test_objects_are_stored_in_a_folder_of_the_attempt_that_the_manifest_names(stage: StageContext) -> None:
    publish(stage, StageOutcome(), time.time())
    folder, root = read_manifest(stage).folder, f"artifacts/{stage.resolved.digest}"
    assert re.fullmatch(rf"{root}/attempts/0001/[0-9a-f]{{8}}/output", folder)
    keys = [entry.key for entry in stage.store.list(root)]
    assert keys == [f"{folder}/report.json", f"{folder}/sub/part-00000", f"{root}/manifest.json"]


def of_run(here: StageContext, uid: str) -> StageContext:
    """Return the context of the same work in another run."""
    return replace(here, resolved=here.resolved.model_copy(update={"run_uid": uid}))


class Watched:
    """A store that calls a function before each commit."""

    def __init__(self, store: Store, before_commit: Callable[[], object]) -> None:
        self._store = store
        self._before_commit = before_commit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, key: str, data: bytes) -> bool:
        self._before_commit()
        return self._store.commit(key, data)


def test_two_runs_that_finish_together_never_touch_what_the_other_committed(
    stage: StageContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second deleted the first one's published output and uploaded over it."""
    first = of_run(stage, "one")
    other = context(tmp_path / "other")
    (other.output / "report.json").write_text('{"ranks": 8}')
    second = replace(of_run(other, "two"), store=Watched(stage.store, lambda: publish(first, StageOutcome(), 0.0)))
    counts = publish(second, StageOutcome(), time.time())
    assert counts == read_manifest(stage)
    assert counts.folder.startswith(f"artifacts/{stage.resolved.digest}/attempts/one-")
    for item in counts.objects:
        stored = stage.store.read(f"{counts.folder}/{item.path}")
        assert hashlib.sha256(stored).hexdigest() == item.sha256
    assert "different content" in caplog.text
    outputs = [entry.key for entry in stage.store.list("artifacts") if "/output/" in entry.key]
    assert all(key.startswith(counts.folder) for key in outputs), "the second one's uploads stay"


def test_a_manifest_whose_creation_was_answered_with_no_is_recognised_by_its_folder(stage: StageContext) -> None:
    class Denies(Watched):
        def commit(self, key: str, data: bytes) -> bool:
            return super().commit(key, data) and False  # it was created, and the answer was that it existed

    made = publish(replace(stage, store=Denies(stage.store, lambda: None)), StageOutcome(), time.time())
    assert made == read_manifest(stage)
    assert all(stage.store.exists(f"{made.folder}/{item.path}") for item in made.objects)


def test_two_runs_of_one_digest_keep_logs_and_durations_of_their_own(stage: StageContext) -> None:
    for uid, text in (("one", "1"), ("two", "2")):
        (stage.work / "logs").mkdir(exist_ok=True)
        (stage.work / "logs" / "metrics.jsonl").write_text(text)
        upload_attempt(of_run(stage, uid), time.time())
    for uid, data in (("one", b"1"), ("two", b"2")):
        prefix = attempt_prefix(stage.resolved.digest, attempt_id(uid, stage.resolved.stage, 1))
        assert stage.store.read(f"{prefix}/logs/metrics.jsonl") == data
        assert stage.store.exists(f"{prefix}/attempt.json")


def test_a_manifest_cannot_name_a_folder_of_another_artifact(stage: StageContext) -> None:
    publish(stage, StageOutcome(), time.time())
    told = json.loads(stage.store.read(manifest_key(stage.resolved.digest)))
    for prefix in ("artifacts/" + "e" * 64, "../secrets", "runs"):
        with pytest.raises(ValueError, match="not a folder of the artifact"):
            Manifest.model_validate(told | {"prefix": prefix})
