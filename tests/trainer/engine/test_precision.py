"""Dtypes within a model that computes in bf16: what stays in fp32, and what each layer returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stagecoach_api.training import Precision
from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.engine.precision import MixedPrecision, is_norm
from stagecoach_trainer.kernels.causal import CausalLoss
from tests.trainer.loop.makers import row, tiny_model

CPU = torch.device("cpu")


def returned_by(model: nn.Module, names: list[str]) -> dict[str, torch.dtype]:
    """Run a forward pass; return the dtype that each named module returned."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[name] = (output[0] if isinstance(output, tuple) else output).dtype

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name in names
    ]
    CausalLoss(model)(collate([row((9,), 1)]), 1.0)
    for hook in hooks:
        hook.remove()
    return seen


def test_states_between_layers_are_in_fp32_and_layers_compute_in_bf16() -> None:
    model = tiny_model()
    MixedPrecision(model, Precision.BF16).cast(CPU)
    assert returned_by(model, ["model.embed_tokens", "model.layers.0", "model.layers.0.mlp", "model.norm"]) == {
        "model.embed_tokens": torch.float32,
        "model.layers.0": torch.float32,
        "model.layers.0.mlp": torch.bfloat16,
        "model.norm": torch.bfloat16,
    }


def test_norms_compute_with_their_masters() -> None:
    model = tiny_model()
    precision = MixedPrecision(model, Precision.BF16)
    precision.cast(CPU)
    names = [f"{name}.weight" for name, module in model.named_modules() if is_norm(module)]
    assert len(names) == 2 * len(model.model.layers) + 1
    assert all(precision.masters[name] is model.get_parameter(name) for name in names)


def test_frozen_norms_stay_in_fp32() -> None:
    model = tiny_model()
    weight = model.model.norm.weight
    weight.requires_grad_(False).fill_(1.001)
    precision = MixedPrecision(model, Precision.BF16)
    precision.cast(CPU)
    assert torch.equal(weight, torch.full_like(weight, 1.001, dtype=torch.float32))
    assert "model.norm.weight" not in precision.masters


def test_afterwards_the_model_computes_in_fp32_again() -> None:
    model = tiny_model()
    expected = CausalLoss(model)(collate([row((9,), 1)]), 1.0)
    precision = MixedPrecision(model, Precision.BF16)
    precision.cast(CPU)
    precision.restore()
    assert torch.equal(CausalLoss(model)(collate([row((9,), 1)]), 1.0), expected)
