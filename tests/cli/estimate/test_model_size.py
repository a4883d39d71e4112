"""The size of a model: from the run file, from `config.json`, from safetensors headers, never from its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from stagecoach_api.store import Unreachable, open_store
from stagecoach_cli.estimate.model_files import ModelFiles
from stagecoach_cli.estimate.model_size import UnknownSize, model_shape, shape_of_config
from tests.cli.conftest import BUCKET
from tests.cli.estimate.test_cost import BODY_7B, EMBEDDING, HEAD_7B, LAYER, LIBRARY, plan_of, seven_billion
from tests.s3 import Fault, FaultyFront

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
    shape = model_shape(plan_of(), "base", LIBRARY)
    assert shape.parameters == 2 * EMBEDDING + 2 * LAYER
    assert model_shape(plan_of(), "release", LIBRARY) == shape
    # 6,738,415,616 with the norms (arXiv 2302.13971).
    assert model_shape(seven_billion(), "base", LIBRARY).parameters == BODY_7B + 2 * HEAD_7B == 6_738_149_376
    with pytest.raises(UnknownSize):
        model_shape(plan_of(), "one", LIBRARY)


def test_a_folder_is_measured_and_its_name_is_not_read(tmp_path: Path) -> None:
    """A folder called `llama-70b` had 70 billion parameters, whatever was in it."""
    shape = ModelFiles().shape(folder(tmp_path / "llama-70b", TINY).as_uri())
    assert shape.parameters == 2 * EMBEDDING + 2 * LAYER
    counted = ModelFiles().shape(folder(tmp_path / "7b", TINY, a=(300, 32), b=(5,)).as_uri())
    assert counted.parameters == 300 * 32 + 5
    assert counted.multiplied == 5


def test_the_headers_of_several_files_are_added(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", TINY)
    for number in (1, 2):
        save_file({f"w{number}": np.zeros((number, 100), np.float16)}, path / f"part-{number}.safetensors")
    index = {"weight_map": {"w1": "part-1.safetensors", "w2": "part-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert ModelFiles().shape(path.as_uri()).parameters == 300


def test_a_vocabulary_that_grows_adds_rows_to_embedding_and_head(tmp_path: Path) -> None:
    model = {"uri": str(folder(tmp_path / "model", TINY))}
    plan = plan_of(pieces=1000, architecture=None, model=model)
    assert model_shape(plan, "base", LIBRARY).parameters == 2 * EMBEDDING + 2 * LAYER + 2 * 700 * 32


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
        ModelFiles().shape(tmp_path.as_uri())


def test_a_folder_without_a_configuration_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownSize, match=r"config\.json.* does not exist"):
        ModelFiles().shape(tmp_path.as_uri())


# -- models on S3 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, s3_endpoint: str) -> Iterator[tuple[FaultyFront, str]]:
    """A model of 1.2 MB in two files on S3, served by a proxy, and its URI."""
    path, uri = folder(tmp_path / "model", TINY), f"s3://{BUCKET}/{tmp_path.name}/model"
    for number in (1, 2):
        save_file({f"w{number}": np.zeros((number, 200_000), np.float16)}, path / f"part-{number}.safetensors")
    index = {"weight_map": {"w1": "part-1.safetensors", "w2": "part-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    store = open_store(uri, s3_endpoint)
    for file in path.iterdir():
        store.upload(file, file.name)
    with FaultyFront(s3_endpoint) as front:
        yield front, uri


def test_a_model_on_s3_is_measured_from_the_beginnings_of_its_files(
    remote: tuple[FaultyFront, str], tmp_path: Path
) -> None:
    """A run whose base is on S3 had no estimate of time, GPU-hours or memory."""
    front, uri = remote
    # Only requests with a range are denied: none may ask for a whole file.
    front.faults = [Fault("GET", "answer", ".safetensors", 99, 403, "AccessDenied", header="Range")]
    assert ModelFiles(front.endpoint).shape(uri).counted is None
    front.faults.clear()
    front.requests.clear()
    files = ModelFiles(front.endpoint)
    assert files.shape(uri) == ModelFiles().shape((tmp_path / "model").as_uri())
    assert files.shape(uri).parameters == 600_000
    assert files.num_pieces(uri) == 300
    assert front.seen("GET") == 4, "configuration, index and two files, each once"


def test_what_could_not_be_read_on_s3_is_named_with_the_reason_and_not_tried_again(
    remote: tuple[FaultyFront, str],
) -> None:
    front, uri = remote
    front.faults = [Fault("GET", "answer", "config.json", times=99, status=403, code="AccessDenied")]
    files = ModelFiles(front.endpoint)
    for _ in range(2):
        with pytest.raises(UnknownSize, match=rf"^{uri}/config\.json: access to {uri} is denied .*403 AccessDenied"):
            files.shape(uri)
    assert front.seen("GET") == 1
    with pytest.raises(UnknownSize, match=r"access to .* is denied"):
        files.num_pieces(uri)
    away = ModelFiles("http://127.0.0.1:9", unreachable={uri: Unreachable("x", "it cannot be reached")})
    with pytest.raises(UnknownSize, match=f"^{uri}: it cannot be reached$"):
        away.shape(uri)


def test_a_vocabulary_is_counted_where_there_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{}]}')
    assert ModelFiles().num_pieces(tmp_path.as_uri()) == 3
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnknownSize, match=r"tokenizer\.json does not state the vocabulary"):
        ModelFiles().num_pieces(tmp_path.as_uri())
    assert ModelFiles().num_pieces((tmp_path / "absent").as_uri()) == 0
