"""Publishing: all files of the output, the manifest last; the first attempt counts."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stagecoach_api.artifacts import (
    Manifest,
    StoredObject,
    attempt_logs_prefix,
    attempt_prefix,
    checkpoint_name,
    checkpoints_prefix,
    content_digest,
    manifest_key,
    rank_log_name,
)
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
    digest = publish(stage, StageOutcome(7, {"loss": 2.0}), time.time() - 5)
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
    assert publish(other, StageOutcome(), time.time() - 99) == first


def test_an_empty_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrote nothing"):
        publish(context(tmp_path), StageOutcome(), time.time())


def test_files_of_an_interrupted_upload_are_not_part_of_the_artifact(stage: StageContext) -> None:
    left = f"artifacts/{stage.resolved.digest}/output/stale"
    stage.store.write(left, b"old")
    publish(stage, StageOutcome(), time.time())
    assert not stage.store.exists(left)


def test_the_second_attempt_keeps_the_first_ones_artifact(
    stage: StageContext, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = publish(stage, StageOutcome(), time.time())
    before = read_manifest(stage)
    (stage.output / "report.json").write_text('{"changed": true}')
    assert publish(stage, StageOutcome(), time.time()) == theirs
    assert read_manifest(stage) == before
    monkeypatch.setattr(type(stage.store), "exists", lambda self, key: False)  # both looked before either committed
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
    prefix = attempt_prefix(stage.resolved.digest, 1)
    assert stage.store.read(f"{prefix}/logs/metrics.jsonl") == b"{}\n"
    assert json.loads(stage.store.read(f"{prefix}/attempt.json"))["attempt"] == 1
    assert all("metrics" not in item.path for item in read_manifest(stage).objects)


def test_output_of_the_ranks_is_left_to_the_launcher(stage: StageContext) -> None:
    (stage.work / "logs" / "tensorboard").mkdir(parents=True)
    (stage.work / "logs" / rank_log_name(0, time.time())).write_text("half a line")
    (stage.work / "logs" / "tensorboard" / "events").write_bytes(b"\0")
    upload_attempt(stage, time.time())
    logs = attempt_logs_prefix(stage.resolved.digest, 1)
    assert [entry.key for entry in stage.store.list(logs)] == [f"{logs}/tensorboard/events"]


def test_the_processor_is_named_with_family_and_stepping(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: AMD EPYC 9354\ncpu family\t: 25\nmodel\t\t: 17\nstepping\t: 1\n")
    assert processor(cpuinfo) == "AMD EPYC 9354 (family 25, model 17, stepping 1)"


def test_objects_are_stored_below_the_output_folder(stage: StageContext) -> None:
    publish(stage, StageOutcome(), time.time())
    keys = [entry.key for entry in stage.store.list(f"artifacts/{stage.resolved.digest}")]
    assert keys == [
        f"artifacts/{stage.resolved.digest}/manifest.json",
        f"artifacts/{stage.resolved.digest}/output/report.json",
        f"artifacts/{stage.resolved.digest}/output/sub/part-00000",
    ]
    assert isinstance(read_manifest(stage).objects[0], StoredObject)
