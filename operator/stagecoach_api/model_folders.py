"""Folders in Hugging Face layout: what their file names and `config.json` show about them.

The trainer checks a folder before it loads it; `validate` checks local ones before anything runs. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import CARD

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FOLDER = "base"
"""Folder in an adapter's folder with the base that it was trained on."""
UNNAMED_BASE = f"./{BASE_FOLDER}"
"""`base_model_name_or_path` of an adapter whose base has no public name. It cannot be taken for a name on a hub."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
"""A folder with one of these files has a vocabulary."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
QUANTIZED_FILES = (".gguf",)
REMOTE_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
"""Entries of a configuration that ask for code from the folder."""

DEQUANTIZED = ("fp8",)
"""Methods whose weights transformers turns back into plain ones while it loads them, on any machine and without another
library. All other methods keep packed integers, which can be neither trained nor merged into."""


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a model's weights are quantised, as its `config.json` names it; None if they are not.

    A method without a name is "unnamed", as in folders of MLX.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        # `compression_config` is the older name of compressed-tensors, `quantization` that of MLX.
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key)
            if isinstance(found, Mapping) and found:
                if found.get("load_in_4bit") or found.get("load_in_8bit"):
                    return "bitsandbytes"
                return str(found.get("quant_method") or found.get("format") or "unnamed")
    return None


def unsupported_base(config: Mapping[str, Any]) -> str | None:
    """Return why no stage can start from a model with this `config.json`, and what to do; None if nothing is against
    it."""
    code = [key for key in REMOTE_CODE if config.get(key)]
    if code:
        return needs_code(code[0])
    method = quantization_of(config)
    if method is None or method.lower() in DEQUANTIZED:
        return None
    return (
        f"its weights are quantised ({method}), and quantised weights can be neither trained nor merged into; give the "
        "model they were made from, or save them in bf16 first (transformers: `model.dequantize()`, then "
        f"`save_pretrained`). Dequantised while loading: {', '.join(DEQUANTIZED)}"
    )


def needs_code(key: str) -> str:
    """Return why a configuration with this entry is refused."""
    return (
        f"`{key}` requires code from the model's folder (trust_remote_code), which is never run; use an architecture "
        "of transformers, and remove the entry if this is one"
    )


def not_a_folder(path: Path) -> str:
    """Return why a file in place of a model is refused."""
    suggestion = " (pickled weights are never loaded)" if path.suffix in PICKLED else ""
    return f"a model is a folder in Hugging Face layout, this is a file{suggestion}"


def missing_weights(names: Collection[str], wanted: str) -> str:
    """Return what is wrong with a folder that has the files `names` and not the weights `wanted`, and what to do."""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        return (
            f"pickled weights ({', '.join(pickled[:3])}), which can execute any code and are never loaded; convert "
            f"them to {wanted} in a disposable environment (transformers: `save_pretrained`)"
        )
    quantized = sorted(name for name in names if name.endswith(QUANTIZED_FILES))
    if quantized:
        return (
            f"quantised weights ({', '.join(quantized[:3])}), which can be neither trained nor merged into; give the "
            f"model they were made from, with {wanted}"
        )
    return f"{wanted} is missing"


def folder_problems(path: Path, needs_vocabulary: bool) -> list[str]:
    """Return everything that is wrong with a local folder as a stage's `model`; empty if nothing is.

    Reads file names and `config.json` alone, so it takes no time. `needs_vocabulary`: whether the stage names no
    other `tokenizer`. Artifacts of other stages pass as well.
    """
    if not path.is_dir():
        return [not_a_folder(path) if path.exists() else "there is no such folder"]
    names = {item.name for item in path.iterdir()}
    if CARD in names and ADAPTER_CONFIG in names:
        return [] if ADAPTER_WEIGHTS in names else [missing_weights(names, ADAPTER_WEIGHTS)]
    problems = []
    if CONFIG in names:
        problems += _problems_of_config(path / CONFIG)
    elif ADAPTER_CONFIG in names:
        problems.append(
            f"a PEFT adapter without {CARD}, so its base is unknown; merge it into its base with PEFT first"
        )
    else:
        problems.append(f"{CONFIG} is missing; a Hugging Face folder has one")
    if ADAPTER_CONFIG not in names and not names & {WEIGHTS, WEIGHTS_INDEX}:
        problems.append(missing_weights(names, WEIGHTS))
    if needs_vocabulary and not names & set(VOCABULARIES):
        problems.append(
            f"it has no vocabulary ({' or '.join(VOCABULARIES)}); add one, or name one as the stage's `tokenizer`"
        )
    return problems


def _problems_of_config(path: Path) -> list[str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path.name}: malformed JSON: {error}"]
    if not isinstance(config, dict):
        return [f"{path.name}: expected a JSON object, got {type(config).__name__}"]
    problem = unsupported_base(config)
    return [] if problem is None else [problem]
