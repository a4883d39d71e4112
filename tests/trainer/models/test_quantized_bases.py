"""Quantised bases: dequantised while loading where transformers can, refused by name before any work otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.stages.makers import Workshop

BLOCK = 16


def quantize(folder: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Store the linear layers of a model in FP8, a scale for each block; return the represented values."""
    stored, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = weight.to(torch.bfloat16)
            expected[name] = stored[name].float()
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448  # the largest number of this format
        small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = small.reshape(rows, columns), scale
        expected[name] = (small.float() * scale[:, None, :, None]).reshape(rows, columns)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    add_settings(folder, settings)
    return expected


def add_settings(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def test_fp8_weights_become_the_numbers_that_they_represent(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", make_tokenizer())
    expected = quantize(folder, FP8)
    model = load_folder(folder)
    found = model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert model.dtype == torch.float32


def test_an_adapter_over_fp8_is_merged_trained_on_and_saved_in_plain_weights(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    quantize(workshop.inputs["base"], FP8)
    workshop.sft("tuned", trainable={"lora": {"rank": 2}}, budget={"steps": 1})
    _, output = workshop.sft("merged", model={"uri": "tuned"}, budget={"steps": 1})
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_other_methods_are_refused_before_anything_is_loaded(tmp_path: Path, method: str) -> None:
    """marin#4615, LLaMA-Factory#10374: a missing library ended the attempt as a fault of the infrastructure."""
    folder = save_base(tmp_path / "base", make_tokenizer())
    add_settings(folder, {"quant_method": method})
    with pytest.raises(UserError, match=rf"config\.json: its weights are quantised \({method}\)"):
        load_folder(folder)
