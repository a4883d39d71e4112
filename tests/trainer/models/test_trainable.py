"""Trainable parameters: the chosen ones change, the others keep their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagecoach_api.training import EmbeddingTraining, FullTraining, LoraTraining, Rows, Trainable
from stagecoach_trainer.kernels.causal import CausalLoss, head_weight
from stagecoach_trainer.models.trainable import choose_trainable, count_parameters, join_rows
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_model

NEW = range(90, 100)


def step(model: Any, steps: int = 3) -> None:
    """Make some steps of AdamW with strong weight decay, on ids old and new."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    ids = torch.arange(80, 100).reshape(2, 10)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 100), ids[:, 1:].reshape(-1)).backward()
        optimizer.step()


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("tied", [False, True])
def test_only_new_rows_change_even_under_weight_decay(tied: bool) -> None:
    model, before = (make_model(100, tied=tied) for _ in range(2))
    trainable = Trainable(embeddings=EmbeddingTraining(rows=Rows.NEW))
    prepared = choose_trainable(model, trainable, NEW, seed=1)
    assert count_parameters(model)["trained"] == 10 * 32 * (1 if tied else 2)
    ids = torch.arange(60, 100)[None]
    assert torch.allclose(model(ids).logits, before(ids).logits, atol=1e-6)
    step(prepared.model)
    trained_logits = model(ids).logits
    join_rows(model)
    assert torch.allclose(model(ids).logits, trained_logits, atol=1e-5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert changed(before.state_dict(), model) == {"model.embed_tokens.weight", "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        matrix, original = model.state_dict()[name], before.state_dict()[name]
        assert torch.equal(matrix[:90], original[:90])
        assert bool((matrix[90:] != original[90:]).any(dim=1).all())


@pytest.mark.parametrize("tied", [False, True])
def test_surplus_rows_behind_the_new_ones_keep_their_bits(tied: bool) -> None:
    model, before = (make_model(100, tied=tied) for _ in range(2))
    new = range(85, 95)
    choose_trainable(model, Trainable(embeddings=EmbeddingTraining(rows=Rows.NEW)), new, seed=1)
    ids = torch.arange(80, 100)[None]
    assert torch.allclose(model(ids).logits, before(ids).logits, atol=1e-6)
    step(model)
    join_rows(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        same = (model.state_dict()[name] == before.state_dict()[name]).all(dim=1)
        assert [index for index, unchanged in enumerate(same) if not unchanged] == list(new)


def test_split_rows_give_the_chunked_loss_the_same_gradients_as_whole_matrices() -> None:
    from stagecoach_trainer.batches.collate import RowBatch

    def gradients(rows: Rows) -> list[torch.Tensor]:
        model = make_model(100)
        choose_trainable(model, Trainable(embeddings=EmbeddingTraining(rows=rows)), NEW, seed=1)
        ids = torch.arange(80, 100)[None]
        batch = RowBatch(ids, None, torch.arange(19), ids[0, 1:])
        CausalLoss(model)(batch, 1.0).backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [gradient[-10:] for gradient in found]

    for one, two in zip(gradients(Rows.NEW), gradients(Rows.ALL), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_all_rows_of_embedding_and_head_are_trained() -> None:
    model, before = (make_model(100) for _ in range(2))
    choose_trainable(model, Trainable(embeddings=EmbeddingTraining(rows=Rows.ALL)), range(0), seed=1)
    step(model)
    assert changed(before.state_dict(), model) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_full_training_changes_everything() -> None:
    model, before = (make_model(100) for _ in range(2))
    choose_trainable(model, Trainable(full=FullTraining()), range(0), seed=1)
    step(model)
    assert changed(before.state_dict(), model) == set(before.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_new_rows_does_not_change_the_rest(tied: bool) -> None:
    model, before = (make_model(100, tied=tied) for _ in range(2))
    lora = LoraTraining(targets=("q_proj", "up_proj"), rank=4, new_rows=True)
    prepared = choose_trainable(model, Trainable(lora=lora), NEW, seed=1)
    names = {name for name, parameter in prepared.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in names)
    assert count_parameters(prepared.model)["trained"] == 2 * 4 * (64 + 32 + 64) + 320 * (1 if tied else 2)
    step(prepared.model)
    weight = head_weight(prepared.model.get_base_model().get_output_embeddings())
    assert weight is not None
    merged = prepared.model.merge_and_unload()
    assert torch.equal(weight, merged.lm_head.weight)
    expected = {f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}
    assert changed(before.state_dict(), merged) == expected | {"model.embed_tokens.weight", "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged.state_dict()[name][:90], before.state_dict()[name][:90])
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is tied


def test_modules_to_save_train_all_rows_and_report_it() -> None:
    lora = LoraTraining(targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    model, before = (make_model(100) for _ in range(2))
    prepared = choose_trainable(model, Trainable(lora=lora), NEW, seed=1)
    assert any("every row" in note for note in prepared.notes)
    step(prepared.model)
    merged = prepared.model.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight[:90], before.lm_head.weight[:90])


def test_a_new_adapter_is_a_function_of_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        prepared = choose_trainable(make_model(100), Trainable(lora=LoraTraining()), range(0), seed)
        adapter: torch.Tensor = next(p for name, p in prepared.model.named_parameters() if "lora_A" in name)
        return adapter.detach()

    state = torch.random.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("trainable", "tied", "message"),
    [
        ({"lora": {"targets": ["query"]}}, False, "query; its linear layers are .*q_proj"),
        ({"lora": {"modulesToSave": ["wte"]}}, False, "wte; its layers are .*embed_tokens"),
        ({"lora": {"targets": ["lm_head"], "modulesToSave": ["lm_head"]}}, False, "in both"),
        ({"lora": {"newRows": True, "modulesToSave": ["lm_head"]}}, False, "choose one"),
        ({"lora": {"modulesToSave": ["lm_head"]}}, True, "untie"),
        ({"lora": {"continueAdapter": True}}, False, "not an adapter"),
    ],
)
def test_layers_that_the_model_lacks_are_rejected(trainable: dict[str, Any], tied: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_trainable(make_model(100, tied=tied), Trainable.model_validate(trainable), NEW, seed=1)


@pytest.mark.parametrize("trainable", [{"embeddings": {}}, {"lora": {"newRows": True}}])
def test_training_missing_new_rows_is_rejected(trainable: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no new rows"):
        choose_trainable(make_model(100), Trainable.model_validate(trainable), range(0), seed=1)
