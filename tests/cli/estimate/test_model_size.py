"""The size of a model: from the run file, from `config.json`, from safetensors headers, never from its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from stagecoach_cli.estimate.model_size import UnknownSize, model_shape, read_shape, shape_of_config
from tests.cli.estimate.test_cost import BODY_7B, EMBEDDING, HEAD_7B, LAYER, plan_of, seven_billion

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


def folder(path: Path, config: dict[str, Any], **tensors: tuple[int, ...]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tensors:
        save_file({name: np.zeros(shape, np.float16) for name, shape in tensors.items()}, path / "model.safetensors")
    return path


def test_an_architecture_has_the_parameters_of_a_llama() -> None:
    shape = model_shape(plan_of(), "base")
    assert shape.parameters == 2 * EMBEDDING + 2 * LAYER
    assert model_shape(plan_of(), "release") == shape
    # 6,738,415,616 with the norms (arXiv 2302.13971).
    assert model_shape(seven_billion(), "base").parameters == BODY_7B + 2 * HEAD_7B == 6_738_149_376
    with pytest.raises(UnknownSize):
        model_shape(plan_of(), "one")


def test_a_folder_is_measured_and_its_name_is_not_read(tmp_path: Path) -> None:
    """A folder called `llama-70b` had 70 billion parameters, whatever was in it."""
    shape = read_shape(folder(tmp_path / "llama-70b", TINY).as_uri())
    assert shape.parameters == 2 * EMBEDDING + 2 * LAYER
    counted = read_shape(folder(tmp_path / "7b", TINY, a=(300, 32), b=(5,)).as_uri())
    assert counted.parameters == 300 * 32 + 5
    assert counted.multiplied == 5


def test_the_headers_of_several_files_are_added(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", TINY)
    for number in (1, 2):
        save_file({f"w{number}": np.zeros((number, 100), np.float16)}, path / f"part-{number}.safetensors")
    index = {"weight_map": {"w1": "part-1.safetensors", "w2": "part-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert read_shape(path.as_uri()).parameters == 300


def test_a_vocabulary_that_grows_adds_rows_to_embedding_and_head(tmp_path: Path) -> None:
    model = {"uri": str(folder(tmp_path / "model", TINY))}
    plan = plan_of(pieces=1000, architecture=None, model=model)
    assert model_shape(plan, "base").parameters == 2 * EMBEDDING + 2 * LAYER + 2 * 700 * 32


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        # Published sizes, of LLaMA's, GPT-2's, Qwen's and Mixtral's configuration files.
        (
            {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "tie_word_embeddings": True},
            0.152,
            0.152,
        ),
        (
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "vocab_size": 32000,
                "tie_word_embeddings": False,
            },
            46.7,
            12.75,
        ),
        ({"text_config": TINY, "tie_word_embeddings": False}, 4.0e-5, 3.0e-5),
    ],
)
def test_config_files_of_other_families_are_read(config: dict[str, Any], billions: float, active: float) -> None:
    shape = shape_of_config(config)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.multiplied / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"hidden_size": 32}'])
def test_a_folder_that_does_not_state_its_shape_is_unknown(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UnknownSize, match="does not state the model's shape"):
        read_shape(tmp_path.as_uri())


def test_a_folder_without_a_configuration_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownSize, match=r"config\.json: No such file"):
        read_shape(tmp_path.as_uri())
