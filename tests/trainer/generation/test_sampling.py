"""Decoding: which tokens are drawn, independent of the other rows of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.generation import sampling
from stagecoach_trainer.generation.sampling import Decoding, Sampled, draw, sample_answers, uniforms
from stagecoach_trainer.kernels.attention import short_attention
from tests.trainer.models.makers import FAMILIES, family_config
from tests.trainer.ppo.makers import END, digit_model, digit_prompts

PLAIN = Decoding(max_new_tokens=12, temperature=1.0, top_p=1.0, ends=(END,))
CPU = torch.device("cpu")
MODEL = digit_model(seed=4, layers=2).eval()
PROMPTS = [prompt.ids for prompt in digit_prompts(24)]
LARGEST_UNIFORM = np.nextafter(1.0, 0.0)


def answers(prompts: list[Ids], decoding: Decoding = PLAIN, first: int = 0, model: Any = MODEL) -> list[Sampled]:
    draws = [uniforms((7, first + number), decoding.max_new_tokens) for number in range(len(prompts))]
    return sample_answers(model, prompts, draws, decoding, CPU)


def family_model(family: str) -> Any:
    """Return a model of digits of another family, sharp enough that no two tokens are nearly as likely."""
    torch.manual_seed(2)
    config = family_config(family, rows=MODEL.config.vocab_size)
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config).eval()


def said(found: list[Sampled]) -> list[tuple[list[int], bool]]:
    return [(item.ids.tolist(), item.ended) for item in found]


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_at_a_vanishing_temperature_the_answers_are_those_of_greedy_generation(family: str) -> None:
    model = MODEL if family == "llama" else family_model(family)
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=END)
    expected = []
    for ids in PROMPTS:
        tokens = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
        expected.append(output[0, len(ids) :].tolist())
    found = answers(PROMPTS, replace(PLAIN, temperature=1e-4), model=model)
    assert [item.ids.tolist() for item in found] == expected
    assert [item.ended for item in found] == [ids[-1] == END for ids in expected]


def test_ids_without_a_token_are_never_drawn() -> None:
    likely = sorted({token for found in answers(PROMPTS) for token in found.ids.tolist()} - {END})[:4]
    found = answers(PROMPTS, replace(PLAIN, missing=tuple(likely)))
    assert not {token for item in found for token in item.ids.tolist()} & set(likely)
    logits = torch.zeros(1, 4).index_fill(-1, torch.tensor([0, 3]), -torch.inf)
    numbers = torch.tensor([0.0, 0.25, 0.75, LARGEST_UNIFORM])
    assert draw(logits.expand(4, 4), numbers, PLAIN).tolist() == [1, 1, 2, 2]


def test_an_answer_is_the_same_alone_and_in_a_batch_of_any_lengths() -> None:
    together = said(answers(PROMPTS))
    alone = [said(answers([ids], first=number))[0] for number, ids in enumerate(PROMPTS)]
    assert together == alone
    assert len({len(ids) for ids, _ in together}) > 3  # some end early, so rows are taken out
    assert {len(ids) for ids in PROMPTS} == {3, 4, 5}  # and padding is there to be hidden


def test_padding_is_hidden_from_the_attention_of_the_training_loop_too() -> None:
    plain = said(answers(PROMPTS))
    with short_attention(MODEL):
        assert said(answers(PROMPTS)) == plain


def test_taking_finished_rows_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compacted = said(answers(PROMPTS))
    monkeypatch.setattr(sampling, "COMPACT_BELOW", 0.0)
    assert said(answers(PROMPTS)) == compacted


def test_an_answer_ends_at_its_first_end_token_or_is_cut() -> None:
    found = answers(PROMPTS)
    assert {item.ended for item in found} == {True, False}
    for item in found:
        assert END not in item.ids[:-1]
        assert item.ended == (item.ids[-1] == END)
        assert item.ended or len(item.ids) == PLAIN.max_new_tokens


def test_each_key_has_random_numbers_of_its_own() -> None:
    first = uniforms((1, 2), 50)
    assert (uniforms((1, 2), 50) == first).all()
    assert (uniforms((1, 2), 30) == first[:30]).all()
    assert not set(uniforms((1, 3), 50)) & set(first)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion_to_their_probability(temperature: float) -> None:
    count = 40_000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.3, -4.0])
    numbers = torch.from_numpy(np.random.default_rng(5).random(count))
    chosen = draw(logits.expand(count, -1), numbers, replace(PLAIN, temperature=temperature))
    seen = np.bincount(chosen.numpy(), minlength=6)
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * count
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand is above


def test_only_the_nucleus_is_drawn_from_in_proportion() -> None:
    p = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
    numbers = torch.from_numpy(np.random.default_rng(6).random(30_000))
    logits = torch.from_numpy(np.log(p)).float().expand(len(numbers), -1)
    chosen = draw(logits, numbers, replace(PLAIN, top_p=0.8)).numpy()
    seen = np.bincount(chosen, minlength=5) / len(numbers)
    nucleus = np.array([0.0, 0.4, 0.15, 0.3, 0.0]) / 0.85  # 0.4 + 0.3 are less than 0.8, so a third one is in it
    assert seen == pytest.approx(nucleus, abs=0.01)
    assert seen[0] == seen[4] == 0.0


@pytest.mark.parametrize("number", [0.0, LARGEST_UNIFORM])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9])
def test_extreme_random_numbers_stay_in_the_nucleus(top_p: float, number: float) -> None:
    random = np.random.default_rng(8)
    logits = torch.from_numpy(random.normal(0, 3, (400, 50))).float()
    chosen = draw(logits, torch.full((400,), number, dtype=torch.float64), replace(PLAIN, top_p=top_p)).numpy()
    p = torch.softmax(logits.double(), -1).numpy()
    for row, token in zip(p, chosen, strict=True):
        likelier = row[row > row[token]].sum()
        assert likelier < top_p + 1e-9
