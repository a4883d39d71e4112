"""Masked input tokens: which, how many, and the same again after a resume."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.references import WeightedSource
from stagecoach_api.training import Batch, Budget, Optimizer, Training
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.plan import MixedPlan, Planner, phase_settings
from stagecoach_trainer.samples.token_cache import TokenShard
from stagecoach_trainer.samples.token_masking import TokenMasking, filler_token, mask_phases, masked_share

FILLER = 3
MASK = (1 << 64) - 1


def make_row(lengths: list[int]) -> Row:
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    labels = np.append(tokens[1:], np.int32(IGNORE)).astype(np.int32)
    return Row(tokens, labels, tuple(lengths))


def splitmix(value: int) -> int:
    """SplitMix64's finaliser in plain Python."""
    mixed = (value + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def key_of(*parts: int) -> int:
    key = 0
    for part in parts:
        key = splitmix(key ^ splitmix(part))
    return key


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.floats(0, 1),
    st.tuples(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 500)),
)
def test_masked_tokens_match_an_independent_computation(
    lengths: list[int], share: float, position: tuple[int, int, int]
) -> None:
    seed, step, number = position
    key = key_of(seed, int.from_bytes(b"HIDE"), step, number)
    uniform = [(splitmix(index ^ key) >> 11) / 2**53 for index in range(1 + sum(lengths))]
    expected = [value < uniform[0] * share for value in uniform[1:]]
    firsts = {sum(lengths[:index]) for index in range(len(lengths))}
    row = make_row(lengths)
    found = TokenMasking(share, FILLER, seed).apply(row, step, number)
    for index, token in enumerate(found.tokens.tolist()):
        masked = expected[index] and index not in firsts
        assert token == (FILLER if masked else row.tokens[index])
    assert np.array_equal(found.labels, row.labels)
    assert found.lengths == row.lengths
    assert found.tokens.dtype == np.int32


def test_the_masked_share_of_rows_is_uniform_from_0_to_the_largest() -> None:
    masking = TokenMasking(0.1, FILLER, 7)
    shares = np.array([masking.mask([4000], step, number).mean() for step in range(50) for number in range(8)])
    assert shares.max() < 0.12
    assert shares.mean() == pytest.approx(0.05, abs=0.006)
    assert np.quantile(shares, [0.25, 0.75]) == pytest.approx([0.025, 0.075], abs=0.012)
    assert not np.array_equal(masking.mask([4000], 3, 0), masking.mask([4000], 3, 1))
    assert not np.array_equal(masking.mask([4000], 3, 0), masking.mask([4000], 4, 0))
    assert not TokenMasking(0.0, FILLER, 7).mask([4000], 0, 0).any()


def make_plan(masking: TokenMasking | None) -> MixedPlan:
    lengths = [9, 14, 30, 5, 22, 17, 11, 30]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shard = TokenShard(np.arange(100, 100 + offsets[-1], dtype=np.int32), None, offsets, {})
    config = Training(
        data=(WeightedSource(uri="a"),),
        sequence_length=32,
        batch=Batch(tokens=64),
        budget=Budget(epochs=6),
        optimizer=Optimizer(learning_rate=1.0),
    )
    plan = Planner({"a": shard}, 3).plan(phase_settings(config, ["a"]))
    return plan if masking is None else MixedPlan(mask_phases(plan.phases, masking))


def test_a_plan_masks_the_same_tokens_at_a_step_whatever_came_before() -> None:
    masking = TokenMasking(0.5, FILLER, 11)
    plain_plan, whole = make_plan(None), make_plan(masking)
    assert whole.num_steps == plain_plan.num_steps > 6
    num_masked, tokens = 0, 0
    for step in range(whole.num_steps):
        again = make_plan(masking).rows(step)
        for number, (row, plain) in enumerate(zip(whole.rows(step), plain_plan.rows(step), strict=True)):
            assert np.array_equal(row.tokens, again[number].tokens)
            assert np.array_equal(row.tokens, masking.apply(plain, step, number).tokens)
            assert np.array_equal(row.labels, plain.labels)
            num_masked += int((row.tokens == FILLER).sum())
            tokens += row.num_tokens
    assert masked_share(plain_plan, masking) == pytest.approx(num_masked / tokens)
    assert 0.1 < num_masked / tokens < 0.4


def test_the_filler_is_the_unknown_token_or_the_next_best() -> None:
    def tokenizer(unk: int | None, pad: int | None, eos: int | None) -> SimpleNamespace:
        return SimpleNamespace(unk_token_id=unk, pad_token_id=pad, eos_token_id=eos)

    assert [filler_token(tokenizer(*ids)) for ids in ((0, 1, 2), (None, 1, 2), (None, None, 2))] == [0, 1, 2]
    with pytest.raises(UserError, match="no unknown, padding or end token"):
        filler_token(tokenizer(None, None, None))
