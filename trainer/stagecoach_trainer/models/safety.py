"""Checks before a model's folder is loaded: safetensors weights only, no code, no pickles. Does not import torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stagecoach_api.model_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    REMOTE_CODE,
    WEIGHTS,
    WEIGHTS_INDEX,
    missing_weights,
    needs_code,
    not_a_folder,
    unsupported_base,
)
from stagecoach_trainer.runtime.errors import UserError

CONFIGS = (CONFIG, "tokenizer_config.json", "generation_config.json", "processor_config.json", ADAPTER_CONFIG)

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
}


def check_model_folder(path: Path) -> list[Path]:
    """Return the weight files of a whole model.

    Raises UserError unless `path` is a folder with a `config.json` and intact safetensors weights, not quantised to
    integers, and without code.
    """
    require_folder(path)
    refuse_code(path)
    problem = unsupported_base(read_json(path / CONFIG))
    if problem is not None:
        raise UserError(f"{path / CONFIG}: {problem}")
    if (path / WEIGHTS_INDEX).is_file():
        files = _indexed_files(path)
    elif (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    else:
        raise UserError(_no_weights(path, WEIGHTS))
    for file in files:
        check_safetensors(file)
    return files


def check_adapter_folder(path: Path) -> Path:
    """Return the weight file of a PEFT adapter. Raises UserError unless it is an intact safetensors file."""
    require_folder(path)
    refuse_code(path)
    read_json(path / ADAPTER_CONFIG)
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise UserError(_no_weights(path, ADAPTER_WEIGHTS))
    check_safetensors(path / ADAPTER_WEIGHTS)
    return path / ADAPTER_WEIGHTS


def require_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: {not_a_folder(path)}")


def refuse_code(path: Path) -> None:
    """Raise UserError if a configuration requires code from the folder."""
    for name in CONFIGS:
        if (path / name).is_file():
            config = read_json(path / name)
            keys = [key for key in REMOTE_CODE if config.get(key)]
            if keys:
                raise UserError(f"{path / name}: {needs_code(keys[0])}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: {path.name} is missing; a Hugging Face folder has one") from error
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _no_weights(path: Path, wanted: str) -> str:
    return f"{path}: {missing_weights([item.name for item in path.iterdir()], wanted)}"


def _indexed_files(path: Path) -> list[Path]:
    names = read_json(path / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path / WEIGHTS_INDEX}: `weight_map` is missing or empty")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path / WEIGHTS_INDEX}: {name!r} is not a safetensors file in this folder; no other file is read"
            )
        if not (path / name).is_file():
            raise UserError(f"{path}: {WEIGHTS_INDEX} lists {name}, which is missing")
    return [path / name for name in files]


def check_safetensors(path: Path) -> None:
    """Raise UserError unless `path` is an intact safetensors file. Reads the header only.

    Its tensors must be contiguous, end at the end of the file and have the sizes that follow from their shapes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        # Format: 8 bytes with the header's length N (little-endian), N bytes of JSON, then the tensors
        # (github.com/huggingface/safetensors, "Format").
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(_unsound(path, "its first eight bytes are not a header length: it may be a renamed pickle"))
        header = file.read(length)
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise UserError(_unsound(path, f"its header is not JSON ({error})")) from error
    if not isinstance(entries, dict):
        raise UserError(_unsound(path, "its header is not a JSON object"))
    try:
        spans = sorted(_spans(entries))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(_unsound(path, f"its header is malformed ({error!r})")) from error
    # Gaps could hide other data, and overlaps could make a small file expand to much memory.
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise UserError(_unsound(path, f"the bytes of {name!r} overlap others or leave a gap"))
        position = end
    if position != size - 8 - length:
        raise UserError(_unsound(path, f"it should have {position} bytes of tensors and has {size - 8 - length}"))


def _spans(entries: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        bits = DTYPE_BITS[entry["dtype"]]
        for dimension in entry["shape"]:
            if not isinstance(dimension, int) or dimension < 0:
                raise ValueError(f"{name}: shape {entry['shape']}")
            bits *= dimension
        if not 0 <= begin <= end or bits != 8 * (end - begin):
            raise ValueError(f"{name}: {end - begin} bytes for shape {entry['shape']} of {entry['dtype']}")
        yield begin, end, name


def _unsound(path: Path, why: str) -> str:
    return f"{path}: not an intact safetensors file, {why}; nothing of it was loaded"
