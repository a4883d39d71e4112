"""External inputs: how relative URIs are resolved, and a cache of hashes that is never stale."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from stagecoach_api.reading.loading import load_run
from stagecoach_local.inputs import HashCache, find_external_inputs, input_root
from stagecoach_local.workspace import Workspace
from tests.cli.makers import Bench, data_stage

LATER = 4e9


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_inputs_are_relative_to_the_run_file_or_to_storage_inputs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write([data_stage("one")])
    loaded = load_run(bench.file)
    found = find_external_inputs(loaded.run, loaded.folder, lambda path: "x").found
    assert [item.uri for item in found.values()] == [f"file://{tmp_path}/data/one.txt"]
    bench.write([data_stage("one")], storage={"inputs": "elsewhere"})
    loaded = load_run(bench.file)
    assert input_root(loaded.run, loaded.folder) == f"file://{tmp_path}/elsewhere"
    assert [
        error.key for error in find_external_inputs(loaded.run, loaded.folder, lambda path: "x").failures.values()
    ] == [f"file://{tmp_path}/elsewhere/data/one.txt"]


def test_a_cached_hash_is_used_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one", encoding="utf-8")
    memory = HashCache(cache, clock=lambda: LATER)
    assert memory.sha256(file) == sha256("one")
    memory.save()
    stat = file.stat()
    file.write_text("two", encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert HashCache(cache).sha256(file) == sha256("one"), "same size, time and inode: a cache hit"
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert HashCache(cache).sha256(file) == sha256("two")


def test_the_hash_of_a_file_that_has_just_changed_is_not_cached(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one", encoding="utf-8")
    memory = HashCache(cache, clock=lambda: file.stat().st_mtime + 1.0)
    assert memory.sha256(file) == sha256("one")
    memory.save()
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": 1}'])
def test_a_damaged_cache_is_ignored(damage: str, tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one", encoding="utf-8")
    cache.write_text(damage, encoding="utf-8")
    assert HashCache(cache).sha256(file) == sha256("one")


def test_the_hash_cache_is_in_the_workspace_and_avoids_a_second_read(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write([data_stage("one")])
    file = tmp_path / "data" / "one.txt"
    os.utime(file, (1.0, 1.0))
    first = bench.prepare().plan.stages["one"].externals
    text = (Workspace(tmp_path / ".stagecoach").cache / "hashes.json").read_text(encoding="utf-8")
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert bench.prepare().plan.stages["one"].externals == first
