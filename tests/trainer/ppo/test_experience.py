"""The pool of an update's answers: in memory, on disk, on a full disk; and answers kept over a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagecoach_trainer.ppo.experience import PER_TOKEN, Experience, Pool, write_chunk
from stagecoach_trainer.ppo.saved_rollouts import SavedRollouts, name_of
from stagecoach_trainer.runtime.context import World
from tests.trainer.loop.makers import context, disk_full_beyond

ALL = ("prompt", "answer", *PER_TOKEN)


def experiences(count: int, seed: int) -> list[Experience]:
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = (random.integers(0, 99, int(random.integers(1, 9))).astype(np.int32) for _ in range(2))
        made.append(Experience(prompt, answer, *(random.random(len(answer), np.float32) for _ in PER_TOKEN)))
    return made


def assert_equal(left: Experience, right: Experience) -> None:
    for name in ALL:
        found, expected = getattr(left, name), getattr(right, name)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected), name


def filled(folder: Path, max_bytes: int) -> Pool:
    pool = Pool(folder, max_bytes)
    for seed, count in enumerate((3, 1, 5, 2)):
        pool.add(experiences(count, seed))
    return pool


def test_a_spilled_pool_holds_what_one_in_memory_does(tmp_path: Path) -> None:
    in_memory, spilled, half = (filled(tmp_path / str(size), size) for size in (1 << 30, 0, 700))
    assert (in_memory.num_spilled, spilled.num_spilled) == (0, 11)
    assert 0 < half.num_spilled < 11
    for pool in (spilled, half):
        assert len(pool) == len(in_memory) == 11
        for index in (0, 2, 3, 4, 8, 9, 10):
            assert_equal(pool[index], in_memory[index])
        for left, right in zip(pool, in_memory, strict=True):
            assert_equal(left, right)


def test_a_pool_of_more_than_a_hundred_thousand_answers_stays_within_its_memory(tmp_path: Path) -> None:
    chunk = experiences(1024, 5)
    size = sum(item.num_bytes for item in chunk)
    pool = Pool(tmp_path / "pool", 3 * size)
    for _ in range(100):
        pool.add(chunk)
    assert (len(pool), pool.num_spilled) == (102_400, 97 * 1024)
    for index in np.random.default_rng(0).integers(0, len(pool), 200):
        assert_equal(pool[int(index)], chunk[index % 1024])


def test_a_discarded_pool_leaves_nothing_on_disk(tmp_path: Path) -> None:
    pool = filled(tmp_path / "pool", 0)
    assert len(list((tmp_path / "pool").iterdir())) == 4
    pool.discard()
    assert not (tmp_path / "pool").exists()


def test_an_experience_counts_the_tokens_that_enter_the_model_and_those_that_are_predicted() -> None:
    one = experiences(1, 3)[0]
    assert one.num_tokens == len(one.prompt) + len(one.answer) - 1
    assert one.num_targets == len(one.answer)
    assert one.num_bytes == 4 * (len(one.prompt) + 5 * len(one.answer))


def test_a_full_disk_is_an_os_error_that_names_the_file_and_leaves_the_pool_as_it_was(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 0)
    small, large = experiences(2, 1), experiences(60, 2)
    pool.add(small)
    with disk_full_beyond(2048), pytest.raises(OSError, match="File too large") as caught:
        pool.add(large)
    assert caught.value.filename == str(tmp_path / "chunk-000001.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["chunk-000000.safetensors"]
    assert len(pool) == 2
    assert_equal(pool[1], small[1])
    pool.add(experiences(1, 3))  # once there is room again
    assert len(pool) == 3


# -- saved when stopped -----------------------------------------------------------------------------------------------

NAME = name_of(7, 0, World(rank=1, size=2))


def test_saved_answers_are_loaded_under_their_name_only_and_deleted_once_used(tmp_path: Path) -> None:
    made = experiences(4, 9)
    SavedRollouts(context(tmp_path)).save(NAME, made, 3, {"kl": 0.1, "terms": (0.5, 1 / 3)})
    saved = SavedRollouts(context(tmp_path))
    for other in (name_of(8, 0, World(1, size=2)), name_of(7, 1, World(1, size=2)), name_of(7, 0, World(1, size=4))):
        assert saved.load(other) is None
    found = saved.load(NAME)
    assert found is not None
    assert (found.done, found.sums) == (3, {"kl": 0.1, "terms": [0.5, 1 / 3]})
    for left, right in zip(found.experiences, made, strict=True):
        assert_equal(left, right)
    saved.discard_loaded()
    assert SavedRollouts(context(tmp_path)).load(NAME) is None


def test_damaged_saved_answers_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = context(tmp_path)
    SavedRollouts(here).save(NAME, experiences(4, 9), 3, {})
    path = next((tmp_path / "store").rglob(f"{NAME}.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert SavedRollouts(here).load(NAME) is None
    assert "cannot be used (size or SHA-256 differs from what was written); they are made again" in caplog.text


def test_half_a_file_without_its_second_does_not_count(tmp_path: Path) -> None:
    here = context(tmp_path)
    SavedRollouts(here).save(NAME, experiences(4, 9), 3, {})
    next((tmp_path / "store").rglob(f"{NAME}.json")).unlink()
    assert SavedRollouts(here).load(NAME) is None


def test_a_chunk_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_chunk(tmp_path / "missing" / "chunk.safetensors", experiences(1, 1))
    assert not (tmp_path / "missing").exists()
