"""Names of rank logs: they are parsed as written, and sort by time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.artifacts import attempt_logs_prefix, parse_rank_log_name, rank_log_name


def test_a_ranks_log_is_named_by_rank_and_start() -> None:
    assert rank_log_name(3, 1795341164.125) == "rank-00003.20261122T095244.125Z.log"
    assert attempt_logs_prefix("d" * 64, "0002") == f"artifacts/{'d' * 64}/attempts/0002/logs"


@given(rank=st.integers(0, 200_000), started=st.floats(0, 4e9))
def test_a_name_is_parsed_to_the_millisecond(rank: int, started: float) -> None:
    found = parse_rank_log_name(rank_log_name(rank, started))
    assert found is not None
    assert found.rank == rank
    assert found.started == pytest.approx(started, abs=0.0006)


@given(first=st.integers(0, 4 * 10**12), second=st.integers(0, 4 * 10**12))
def test_names_of_one_rank_sort_by_start(first: int, second: int) -> None:
    names = [rank_log_name(7, milliseconds / 1000) for milliseconds in (first, second)]
    assert (names[0] < names[1]) == (first < second)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "rank-00001.log", "rank-1.20261122T095244.125Z.log", "rank-00001.20261322T095244.125Z.log", ""],
)
def test_other_files_are_not_rank_logs(name: str) -> None:
    assert parse_rank_log_name(name) is None
