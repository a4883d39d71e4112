"""Generation against a naive loop: no cache, no batch, no padding."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_api.generation import Generation
from stagecoach_trainer.generation.generation import Prompter, generate, generation_settings, pad_left
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.hindsight import answer_frame, lead_in
from stagecoach_trainer.text.templates import Renderer
from tests.trainer.evaluation.makers import QUESTIONS, chat_tokenizer, lively_model, naive_answer
from tests.trainer.models.makers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return lively_model(len(tokenizer))


def prompts_of(tokenizer: Any) -> list[Any]:
    return [Prompter(tokenizer).encode_question(question) for question in QUESTIONS]


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_answers_in_batches_are_those_of_a_naive_loop(model: Any, tokenizer: Any, batch_rows: int) -> None:
    prompts = prompts_of(tokenizer)
    assert len({len(prompt) for prompt in prompts}) > 2
    answers = generate(model, tokenizer, prompts, Generation(max_new_tokens=12), batch_rows, seed=0)
    expected = [naive_answer(model, prompt, 12, [tokenizer.eos_token_id]) for prompt in prompts]
    assert [answer.num_tokens for answer in answers] == [len(ids) for ids in expected]
    assert [answer.text for answer in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_surplus_rows_are_never_generated(model: Any, tokenizer: Any, temperature: float) -> None:
    """axolotl#577: published models have more rows than tokens, and nothing trains the surplus ones."""
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(len(tokenizer) + 30, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[-30:] = 3 * padded.lm_head.weight[:30]  # else they would be the likeliest
    settings = Generation(max_new_tokens=12, temperature=temperature)
    found, expected = (generate(it, tokenizer, prompts_of(tokenizer), settings, 4, seed=0) for it in (padded, model))
    assert [answer.num_tokens for answer in found] == [answer.num_tokens for answer in expected]
    if temperature == 0:
        assert found == expected


def test_an_answer_ends_at_any_of_the_end_tokens_and_records_whether_it_did(model: Any, tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer)
    own = [tokenizer.eos_token_id]
    said = [naive_answer(model, prompt, 12, own) for prompt in prompts]
    ends = [*own, next(token for token in said[0] if any(token not in other for other in said))]
    model.generation_config.eos_token_id = ends
    try:
        answers = generate(model, tokenizer, prompts, Generation(max_new_tokens=12), 2, seed=0)
    finally:
        model.generation_config.eos_token_id = None
    expected = [len(naive_answer(model, prompt, 12, ends)) for prompt in prompts]
    assert [answer.num_tokens for answer in answers] == expected
    assert [answer.ended for answer in answers] == [length < 12 for length in expected]
    assert {answer.ended for answer in answers} == {True, False}


def test_what_the_model_ships_as_its_own_settings_does_not_count(model: Any, tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer)
    expected = generate(model, tokenizer, prompts, Generation(max_new_tokens=8), 4, seed=0)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    try:
        assert generate(model, tokenizer, prompts, Generation(max_new_tokens=8), 4, seed=0) == expected
    finally:
        model.generation_config.repetition_penalty = None
        model.generation_config.num_beams = None


def test_sampling_draws_from_its_seed_and_leaves_the_random_state_alone(model: Any, tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer)
    settings = Generation(max_new_tokens=12, temperature=2.0)
    state = torch.random.get_rng_state()
    first = generate(model, tokenizer, prompts, settings, 2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(model, tokenizer, prompts, settings, 2, seed=1) == first
    assert generate(model, tokenizer, prompts, settings, 2, seed=2) != first


def test_a_tiny_nucleus_is_greedy(model: Any, tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer)
    sampled = generate(model, tokenizer, prompts, Generation(max_new_tokens=8, temperature=1.0, top_p=1e-6), 4, seed=1)
    assert sampled == generate(model, tokenizer, prompts, Generation(max_new_tokens=8), 4, seed=0)


def test_sampling_does_not_use_transformers_default_of_fifty_tokens() -> None:
    assert generation_settings(Generation(temperature=0.5))["top_k"] == 0


def test_an_answer_is_cut_where_the_models_positions_end(model: Any, tokenizer: Any) -> None:
    positions = model.config.max_position_embeddings
    prompt = np.full(positions - 3, 300, dtype=np.int32)
    (answer,) = generate(model, tokenizer, [prompt], Generation(max_new_tokens=8), 1, seed=0)
    assert answer.num_tokens <= 3
    with pytest.raises(UserError, match=f"a prompt of {positions} tokens leaves no positions"):
        generate(model, tokenizer, [np.full(positions, 300, dtype=np.int32)], Generation(), 1, seed=0)


def test_a_prompt_is_what_the_chat_template_serves(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "what is a fox"}]
    served = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert Prompter(tokenizer).encode_question("what is a fox").tolist() == served


def test_an_answer_can_be_made_to_begin_with_the_words_of_a_chain_of_hindsight(tokenizer: Any) -> None:
    asked = Prompter(tokenizer, Generation(answer_begins_with="A good answer:")).encode_question("what is a fox")
    messages = [{"role": "user", "content": "what is a fox"}]
    served = answer_frame(Renderer(tokenizer), messages, ()).prompt + lead_in("A good answer:")
    assert asked.tolist() == tokenizer(served, add_special_tokens=False)["input_ids"]


def test_without_a_chat_template_a_prompt_is_continued_as_plain_text() -> None:
    plain = make_tokenizer()
    ids = Prompter(plain).encode_question("the fox </s>").tolist()
    assert ids[0] == plain.bos_token_id
    assert plain.eos_token_id not in ids
    assert plain.decode(ids[1:]) == "the fox </s>"


def test_padding_is_on_the_left_and_masked() -> None:
    tokens, mask = pad_left([np.array([5, 6], dtype=np.int32), np.array([7], dtype=np.int32)], 9)
    assert tokens.tolist() == [[5, 6], [9, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]
