"""Folders of models, judged by their file names and their `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.model_folders import folder_problems, quantization_of, unsupported_base

GOOD = ("config.json", "model.safetensors", "tokenizer.json")


def make_folder(root: Path, names: tuple[str, ...] = GOOD, config: object = None) -> Path:
    folder = root / "model"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "hqq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "unnamed"),
    ],
)
def test_quantised_bases_are_refused_with_the_methods_name(config: dict[str, Any], method: str) -> None:
    """marin#4615, LLaMA-Factory#10374: without the method's library the stage failed only when it loaded the model."""
    assert quantization_of(config) == method
    problem = unsupported_base(config)
    assert problem is not None
    assert f"quantised ({method})" in problem
    assert "save them in bf16" in problem


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {"quant_method": "fp8"}}, {"text_config": {}}]
)
def test_plain_and_fp8_weights_are_accepted(config: dict[str, Any]) -> None:
    assert unsupported_base(config) is None


@pytest.mark.parametrize(
    ("names", "config", "messages"),
    [
        (GOOD, None, []),
        (("config.json", "model.safetensors.index.json", "tokenizer.model"), None, []),
        (("config.json", "pytorch_model.bin", "tokenizer.json"), None, ["pickled weights (pytorch_model.bin)"]),
        (("config.json", "model.Q4.gguf", "tokenizer.json"), None, ["quantised weights (model.Q4.gguf)"]),
        (("config.json", "tokenizer.json"), None, ["model.safetensors is missing"]),
        (("config.json", "model.safetensors"), None, ["no vocabulary"]),
        (("readme.md",), None, ["config.json is missing", "model.safetensors is missing", "no vocabulary"]),
        (("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"), None, ["a PEFT adapter without"]),
        (("adapter_config.json", "adapter_model.safetensors", "stagecoach.json"), None, []),
        (GOOD, [], ["expected a JSON object"]),
        (GOOD, {"auto_map": {"AutoModel": "x.Y"}}, ["`auto_map` requires code"]),
        (GOOD, {"quantization_config": {"quant_method": "gptq"}}, ["quantised (gptq)"]),
    ],
)
def test_all_problems_of_a_folder_are_found_from_its_names(
    tmp_path: Path, names: tuple[str, ...], config: object, messages: list[str]
) -> None:
    problems = folder_problems(make_folder(tmp_path, names, config), needs_vocabulary=True)
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_a_stage_with_its_own_vocabulary_needs_none_in_the_folder(tmp_path: Path) -> None:
    assert folder_problems(make_folder(tmp_path, GOOD[:2]), needs_vocabulary=False) == []


def test_a_file_in_place_of_a_folder_and_an_absent_one_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    assert "this is a file (pickled" in folder_problems(file, needs_vocabulary=True)[0]
    assert folder_problems(tmp_path / "absent", needs_vocabulary=True) == ["there is no such folder"]
