"""Names of attempts: valid for JobSet, and different for different stages."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_core.manifests.naming import MAX_CHARACTERS, attempt_name, pod_host

RFC_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)
FREE_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=253)
"""Also names that no API server accepts: dots, capitals, signs, other scripts."""
UIDS = st.uuids(version=4).map(str)
ATTEMPTS = st.integers(1, 999_999)


@given(FREE_NAMES | NAMES, FREE_NAMES | NAMES, UIDS, ATTEMPTS)
def test_every_name_is_a_label_with_room_for_job_index_and_suffix(run: str, stage: str, uid: str, attempt: int) -> None:
    name = attempt_name(run, stage, uid, attempt)
    assert RFC_1035.fullmatch(name)
    assert len(name) <= MAX_CHARACTERS
    assert len(f"{name}-w-0-999-abcde") <= 63
    assert len(pod_host(name, 999).split(".")[0]) <= 63


@given(st.sets(st.tuples(NAMES, NAMES, UIDS), min_size=2, max_size=20))
def test_different_stages_have_different_names(stages: set[tuple[str, str, str]]) -> None:
    assert len({attempt_name(*stage, 1) for stage in stages}) == len(stages)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(("a-b", "c", "u1", 1), ("a", "b-c", "u2", 1), id="two runs whose names and stages join alike"),
        pytest.param(("demo", "sft", "u1", 1), ("demo", "sft", "u2", 1), id="a run and its recreated successor"),
        pytest.param(("demo", "sft", "u1", 1), ("demo", "sft", "u1", 11), id="two attempts"),
        pytest.param(("demo", "sft-1", "u1", 1), ("demo", "sft", "u1", 11), id="a stage that ends like an attempt"),
        pytest.param(
            ("demo", "evaluate-after-sft", "u1", 1), ("demo", "evaluate-after-ppo", "u1", 1), id="stages cut alike"
        ),
        pytest.param(("a" * 18 + "x", "s", "u1", 1), ("a" * 18 + "y", "s", "u2", 1), id="runs cut alike"),
    ],
)
def test_similar_names_are_distinguished(one: tuple[str, str, str, int], other: tuple[str, str, str, int]) -> None:
    assert attempt_name(*one) != attempt_name(*other)


def test_a_dash_at_the_end_of_a_shortened_name_is_dropped() -> None:
    name = attempt_name("seventeen-letters-run", "thirteen-lett-stage", "uid", 2)
    assert re.fullmatch(r"r-seventeen-letters-thirteen-lett-[0-9a-f]{6}-2", name)


def test_a_name_never_changes() -> None:
    assert attempt_name("chinese-alpaca", "pretrain", "6f1d3c1e-8a51-4c0e-9d53-0d6a1b1c2d3e", 1) == (
        "r-chinese-alpaca-pretrain-d2e62b-1"
    )
