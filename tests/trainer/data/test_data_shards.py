from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from stagecoach_trainer.data import shards
from stagecoach_trainer.data.records import Record
from stagecoach_trainer.data.shards import Shard, ShardWriter, ShufflingWriter, split_index


def texts_of(folder: Path, written: list[Shard]) -> list[str]:
    found = []
    for shard in written:
        with zstandard.open(folder / shard.path, "rt", encoding="utf-8") as file:
            found.append([json.loads(line)["text"] for line in file])
    assert [len(part) for part in found] == [shard.records for shard in written]
    return [text for part in found for text in part]


def shuffled(folder: Path, texts: list[str], seed: int, expected_bytes: int) -> list[str]:
    writer = ShardWriter(folder, "train", 1 << 30)
    sink = ShufflingWriter(writer, folder / "spool", seed, expected_bytes)
    for text in texts:
        sink.add(Record(text=text))
    written = sink.close()
    assert not (folder / "spool").exists()
    return texts_of(folder, written)


def test_shards_end_at_their_size_and_the_index_counts_them(tmp_path: Path) -> None:
    texts = [f"床前明月光 {number}" for number in range(100)]
    writer = ShardWriter(tmp_path, "train", 1024)
    for text in texts:
        writer.add(Record(text=text, source="s"))
    written = writer.close()
    assert texts_of(tmp_path, written) == texts
    assert [shard.path for shard in written[:2]] == ["train/part-00000.jsonl.zst", "train/part-00001.jsonl.zst"]
    assert all(1024 <= shard.bytes < 1024 + 64 for shard in written[:-1])
    index = split_index(written)
    assert (index["records"], index["characters"]) == (100, sum(map(len, texts)))
    lines = [f'{{"text":"{text}","source":"s"}}\n' for text in texts]
    assert index["bytes"] == sum(len(line.encode()) for line in lines)


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name, "train", 1 << 20)
        for number in range(2000):
            writer.add(Record(text=f"text {number}"))
        (shard,) = writer.close()
        digests.add(hashlib.sha256((tmp_path / name / shard.path).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_shuffled_order_depends_on_the_seed_and_not_on_the_memory_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "RANGE_BYTES", 1000)
    texts = [str(number) for number in range(500)]
    in_one = shuffled(tmp_path / "a", texts, seed=7, expected_bytes=1)
    in_many = shuffled(tmp_path / "b", texts, seed=7, expected_bytes=37_000)
    other_seed = shuffled(tmp_path / "c", texts, seed=8, expected_bytes=1)
    assert in_one == in_many
    assert sorted(in_one) == sorted(other_seed) == sorted(texts)
    assert len({tuple(in_one), tuple(other_seed), tuple(texts)}) == 3


def test_the_shuffle_moves_records_everywhere(tmp_path: Path) -> None:
    order = [int(text) for text in shuffled(tmp_path, [str(number) for number in range(4000)], 3, 1)]
    mean_of_first_half = sum(order[:2000]) / 2000
    assert abs(mean_of_first_half - 1999.5) < 100  # 4 standard deviations of a uniform permutation
    assert sum(place == number for place, number in enumerate(order)) < 10


def test_equal_texts_are_not_adjacent_after_shuffling(tmp_path: Path) -> None:
    order = shuffled(tmp_path, [str(number) for number in range(300) for _ in range(2)], 3, 1)
    assert sum(left == right for left, right in pairwise(order)) < 15
