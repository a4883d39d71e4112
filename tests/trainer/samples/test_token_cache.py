"""The token cache: what is read is what was written, whatever happened to its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples import token_cache
from stagecoach_trainer.samples.token_cache import INDEX, TOKENS, TokenShard, TokenShardWriter, token_shard
from tests.trainer.models.makers import make_context

BYTES = st.integers(1, 255)
SAMPLES = [np.arange(start, start + 7, dtype=np.int32) for start in range(0, 700, 7)]


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return make_context(tmp_path, "sft")


def shard_of(context: StageContext, builds: list[int]) -> TokenShard:
    def build(writer: TokenShardWriter) -> Mapping[str, int]:
        builds.append(1)
        for sample in SAMPLES:
            writer.add(sample, sample % 2 == 0)
        return {"records": len(SAMPLES), "tokens": 700}

    return token_shard(context, {"kind": "test"}, "tokenise", build)


def require_original(shard: TokenShard) -> None:
    assert shard.trained is not None
    np.testing.assert_array_equal(shard.tokens, np.concatenate(SAMPLES))
    np.testing.assert_array_equal(shard.trained, np.concatenate(SAMPLES) % 2 == 0)
    np.testing.assert_array_equal(shard.offsets, np.arange(0, 707, 7))
    assert shard.counts == {"records": 100, "tokens": 700}


def folder_of(context: StageContext) -> Path:
    (folder,) = (path for path in (context.cache / "tokens").iterdir() if path.is_dir())
    return folder


def test_ids_overwritten_in_the_cache_are_not_trained_on(
    context: StageContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Half the ids of a shard were overwritten, and the artifact had the digest of honest ones."""
    builds: list[int] = []
    shard_of(context, builds)
    path = folder_of(context) / TOKENS
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with caplog.at_level(logging.WARNING):
        require_original(shard_of(context, builds))
    assert len(builds) == 2
    assert "made again" in caplog.text
    assert path.read_bytes() == content
    require_original(shard_of(context, builds))
    assert len(builds) == 2


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.integers(0, 3), position=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans()
)
def test_any_changed_byte_or_lost_end_of_any_file_is_noticed(
    context: StageContext, file: int, position: float, change: int, cut: bool
) -> None:
    builds: list[int] = []
    shard_of(context, builds)
    path = sorted(folder_of(context).iterdir())[file]
    content = bytearray(path.read_bytes())
    at = int(position * len(content))
    content[at] ^= change
    path.write_bytes(content[:at] if cut else content)
    before = len(builds)
    require_original(shard_of(context, builds))
    assert len(builds) == before + 1


def test_a_shard_of_an_earlier_version_without_digests_is_built_again(context: StageContext) -> None:
    builds: list[int] = []
    shard_of(context, builds)
    index = folder_of(context) / INDEX
    old = {key: value for key, value in json.loads(index.read_text()).items() if key not in ("sha256", "digest")}
    index.write_text(json.dumps(old))
    require_original(shard_of(context, builds))
    assert len(builds) == 2


def test_a_disk_that_damages_what_is_built_again_fails_the_stage(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_of(context, [])
    make = token_cache._make

    def make_and_damage(context: StageContext, folder: Path, *rest: object) -> None:
        make(context, folder, *rest)  # type: ignore[arg-type]
        (folder / TOKENS).write_bytes(b"\0" * 2800)

    monkeypatch.setattr(token_cache, "_make", make_and_damage)
    (folder_of(context) / TOKENS).write_bytes(b"")
    with pytest.raises(UserError, match="damaged again: replace the disk"):
        shard_of(context, [])
