"""Growing a vocabulary: old rows keep their bits, new rows are initialised as configured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stagecoach_api.kinds.pretrain import Architecture
from stagecoach_api.training import NewRows
from stagecoach_trainer.models.new_model import build_model
from stagecoach_trainer.models.resize import check_old_ids, check_sizes, grow, ids_without_token, num_ids
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_model, make_tokenizer

EXTRA = ("龘", "▁龘靐", "<|new|>")


def grown_tokenizer() -> Any:
    return make_tokenizer(extra=EXTRA[:2], special=EXTRA[2:])


def embeddings(model: LlamaForCausalLM) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", list(NewRows))
def test_old_rows_stay_bit_for_bit_and_new_ones_are_appended(how: NewRows, tied: bool) -> None:
    old_tokenizer, new_tokenizer = make_tokenizer(), grown_tokenizer()
    model, before = (make_model(len(old_tokenizer), seed=2, tied=tied) for _ in range(2))
    rows = grow(model, old_tokenizer, new_tokenizer, how, seed=11)
    assert rows == range(len(old_tokenizer), len(old_tokenizer) + 3)
    assert model.config.vocab_size == len(new_tokenizer)
    assert (model.lm_head.weight is embeddings(model)) is tied
    matrices: list[tuple[torch.Tensor, torch.Tensor]] = [
        (embeddings(model), embeddings(before)),
        (model.lm_head.weight, before.lm_head.weight),
    ]
    for matrix, original in matrices:
        assert matrix.shape == (len(new_tokenizer), 32)
        assert torch.equal(matrix[: rows.start], original)
        if how is NewRows.ZERO:
            assert not matrix[rows.start :].any()
        if how is NewRows.RANDOM:
            assert 0.01 < float(matrix[rows.start :].detach().std()) < 0.03
        if how is NewRows.MEAN:
            for index, text in zip(rows, ("龘", " 龘靐", "<|new|>"), strict=True):
                pieces = old_tokenizer.convert_tokens_to_ids(_pieces(old_tokenizer, text))
                assert torch.equal(matrix[index], original[pieces].mean(dim=0))


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """Return the old pieces of a text, without the prepended space if the text has none."""
    pieces: list[str] = tokenizer.tokenize("\n" + text)
    return pieces[pieces.index("<0x0A>") + 1 :]


def test_random_rows_depend_on_the_seed_alone() -> None:
    def rows(seed: int) -> torch.Tensor:
        torch.manual_seed(seed * 100)
        model = make_model(len(make_tokenizer()))
        new = grow(model, None, grown_tokenizer(), NewRows.RANDOM, seed=seed)
        head: torch.Tensor = model.lm_head.weight
        return head[new.start :].detach()

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_mean_needs_the_old_vocabulary() -> None:
    with pytest.raises(UserError, match="`random` or `zero`"):
        grow(make_model(300), None, make_tokenizer(), NewRows.MEAN)


def test_a_vocabulary_that_is_not_larger_cannot_be_grown_to() -> None:
    with pytest.raises(UserError, match="give a larger vocabulary"):
        grow(make_model(400), None, make_tokenizer(), NewRows.ZERO)


def test_changed_ids_are_rejected() -> None:
    old, other = make_tokenizer(extra=("龘", "靐")), make_tokenizer(extra=("靐", "龘"))
    with pytest.raises(UserError, match="2 moved"):
        check_old_ids(old, other, "new")
    with pytest.raises(UserError, match="1 missing"):
        check_old_ids(old, make_tokenizer(extra=("龘",)), "new")
    check_old_ids(make_tokenizer(), old, "new")


@pytest.mark.parametrize("rows", [400, 401, 448, 1000])
def test_any_number_of_surplus_rows_is_accepted(rows: int) -> None:
    """axolotl#577, peft#2415: phi-2 has 50,295 tokens and 51,200 rows."""
    check_sizes(make_model(rows, hidden=8), make_tokenizer(), "model")


def test_a_token_without_a_row_is_named() -> None:
    with pytest.raises(UserError, match=r"model: the vocabulary has 403 ids and the model 401 rows, so 2 tokens have"):
        check_sizes(make_model(401, hidden=8), grown_tokenizer(), "model")


@pytest.mark.parametrize("how", list(NewRows))
@pytest.mark.parametrize("rows", [401, 403, 500])
def test_new_tokens_take_surplus_rows_first(rows: int, how: NewRows) -> None:
    old_tokenizer, new_tokenizer = make_tokenizer(), grown_tokenizer()
    padded, before = (make_model(rows, seed=2, hidden=8) for _ in range(2))
    exact = make_model(400, hidden=8)
    with torch.no_grad():
        embeddings(exact).copy_(embeddings(padded)[:400])
        exact.lm_head.weight.copy_(padded.lm_head.weight[:400])
    new = grow(padded, old_tokenizer, new_tokenizer, how, seed=11)
    assert new == grow(exact, old_tokenizer, new_tokenizer, how, seed=11) == range(400, 403)
    assert padded.config.vocab_size == max(rows, 403)
    for matrix, expected, original in (
        (embeddings(padded), embeddings(exact), embeddings(before)),
        (padded.lm_head.weight, exact.lm_head.weight, before.lm_head.weight),
    ):
        assert torch.equal(matrix[:403], expected)
        assert torch.equal(matrix[403:], original[403:])


def test_a_vocabulary_with_gaps_needs_rows_up_to_its_highest_id() -> None:
    tokenizer = make_tokenizer(extra=("龘",))
    assert num_ids(tokenizer) == len(tokenizer) == 401
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {piece: index for piece, index in state["model"]["vocab"].items() if index != 300}
    state["model"]["merges"] = []
    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert (len(gapped), num_ids(gapped)) == (400, 401)
    assert ids_without_token(make_model(403, hidden=8), gapped) == [300, 401, 402]
    with pytest.raises(UserError, match="401 ids and the model 400 rows, so 1 tokens"):
        check_sizes(make_model(400, hidden=8), gapped, "model")


def test_a_new_model_is_a_function_of_shape_and_seed() -> None:
    shape = Architecture(
        hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_key_value_heads=2, rope_theta=5e4
    )
    tokenizer = make_tokenizer()
    state = torch.random.get_rng_state()
    one, two, other = (build_model(shape, tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in two.state_dict().items())
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.shape == (len(tokenizer), 32)
    assert one.config.rope_parameters["rope_theta"] == 5e4
    assert one.config.eos_token_id == tokenizer.eos_token_id
