"""Save a model or an adapter in the layout that other programs open, and verify it by reading it back.

Equal models give equal bytes: no times, no paths, lists in a fixed order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stagecoach_api.artifacts import CARD, ModelCard
from stagecoach_api.model_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, UNNAMED_BASE, WEIGHTS_INDEX
from stagecoach_trainer.models.safety import (
    check_adapter_folder,
    check_model_folder,
)
from stagecoach_trainer.models.save_vocabulary import save_vocabulary
from stagecoach_trainer.models.token_ids import set_token_ids
from stagecoach_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SHARD_BYTES = 5 * 10**9
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
"""Files that go with a model wherever it goes. A README describes the base, not what was made of it, and is left."""


def save_model(
    model: PreTrainedModel,
    tokenizer: Any,
    vocabulary: Path,
    output: Path,
    card: ModelCard,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> None:
    """Save whole weights in Hugging Face layout, with the vocabulary from the folder `vocabulary`.

    `dtype`: number format of the files, that of the weights by default; the model in memory does not change.
    `generation`: settings for `generation_config.json`, in addition to the model's own and the special tokens' ids.
    `base`: folder of the model it was made from, whose licence files are copied.
    Raises UserError for a value that is NaN or infinite, a matrix that is all zero, and files whose names, shapes or
    values differ from the model's when they are read back.
    """
    set_token_ids(model, tokenizer, generation or {})
    state = _state_to_write(model, dtype)
    _require_sound(state, "the trained model")
    files = write_weights(state, output, max_shard_bytes)
    write_configs(model, dtype or model.dtype, output)
    save_vocabulary(tokenizer, vocabulary, output)
    copy_licences(base, output)
    write_card(card, output)
    check_model_folder(output)
    _compare(files, state)


def copy_licences(base: Path | None, output: Path) -> None:
    """Copy the licence files of the model in `base`."""
    for pattern in LICENCES if base is not None else ():
        for path in sorted(base.glob(pattern)):  # type: ignore[union-attr]
            if path.is_file():
                shutil.copyfile(path, output / path.name)


def save_adapter(
    model: Any, tokenizer: Any, vocabulary: Path, output: Path, card: ModelCard, base_name: str | None = None
) -> None:
    """Save a PEFT adapter (`adapter_model.safetensors`, `adapter_config.json`), with its vocabulary.

    `base_name`: the base's public name or path; None if it has none, which is written as `./base`.
    Raises UserError for an adapter that is empty, all zero or not finite, or differs when it is read back.
    """
    from peft import get_peft_model_state_dict

    parts = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = adapter_config(model, base_name or UNNAMED_BASE)
    write_adapter(parts, config, output)
    save_vocabulary(tokenizer, vocabulary, output)
    write_card(card, output)


def write_adapter(parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], output: Path) -> None:
    """Write the two files of a PEFT adapter, weights and configuration, and compare the weights when read back."""
    from safetensors.torch import save_file

    # Clones, because safetensors rejects tensors that share memory.
    state = {name: parts[name].detach().cpu().contiguous().clone() for name in sorted(parts)}
    if not state:
        raise UserError("the adapter is empty: it has weights for no layer; check `trainable.lora.targets`")
    _require_sound({name: tensor for name, tensor in state.items() if "lora_B" not in name}, "the adapter")
    # Second matrices (B) start as zeros (arXiv 2106.09685, section 4.1), so some may stay zero, but not all.
    learnt = [tensor for name, tensor in state.items() if "lora_B" in name]
    if learnt and not any(bool(tensor.any()) for tensor in learnt):
        raise UserError("the adapter learnt nothing: all its second matrices are zero; is the learning rate 0?")
    _require_finite(state, "the adapter")
    save_file(state, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(config, output / ADAPTER_CONFIG)
    _compare([check_adapter_folder(output)], state)


def adapter_config(model: Any, base: str) -> dict[str, Any]:
    """Return the content of `adapter_config.json`: PEFT's, with sets as sorted lists so that equal ones are equal."""
    config: dict[str, Any] = model.peft_config[model.active_adapter].to_dict()
    config["base_model_name_or_path"] = base
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}


def write_card(card: ModelCard, output: Path) -> None:
    write_json(card.model_dump(mode="json", exclude_none=True), output / CARD)


def write_json(value: Any, path: Path) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


# -- weights -----------------------------------------------------------------------------------------------------------


def _state_to_write(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    state = as_stored(model, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    return {name: state[name].to(dtype or state[name].dtype).contiguous() for name in sorted(state)}


def as_stored(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights by their names in files, tied matrices once.

    transformers may fuse or rename weights when it loads a model; it undoes that here.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, without_tied(model, state))
    return stored


def without_tied(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each weight once: a head that is the embedding is stored as that, and tied again when it is loaded."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    others = _other_names(model)
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in others and not (tied and name.endswith("lm_head.weight"))
    }


def _other_names(model: PreTrainedModel) -> set[str]:
    """Return the further names of parameters that the model has under several; the embedding keeps that of its layer.

    Families call a head differently (`decoder`, `output_projection`), so it is known by its matrix.
    """
    embedding = model.get_input_embeddings()
    own = {f"{name}.weight" for name, module in model.named_modules() if module is embedding}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    kept = {next((name for name in group if name in own), group[0]) for group in names.values()}
    return {name for group in names.values() for name in group} - kept


def write_weights(
    state: dict[str, torch.Tensor], output: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[Path]:
    """Write safetensors files, and an index if there are several; return the files.

    transformers' own `save_pretrained` would import DeepSpeed, which takes seconds.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, output / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, output / WEIGHTS_INDEX)
    return [output / filename for filename in split.filename_to_tensors]


def write_configs(model: PreTrainedModel, dtype: torch.dtype, output: Path) -> None:
    """Write `config.json` and, of a model that generates, `generation_config.json`. `dtype`: that of the weights."""
    # The files may have another number format than the model in memory, whose configuration must not change.
    before = model.config.dtype
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    try:
        model.config.save_pretrained(output)
    finally:
        model.config.dtype = before
    if model.can_generate():
        model.generation_config.save_pretrained(output)


def _require_sound(state: Mapping[str, torch.Tensor], what: str) -> None:
    _require_finite(state, what)
    for name, tensor in state.items():
        # Tables and biases of some architectures begin as zeros; a weight of a layer never does.
        if tensor.ndim >= 2 and name.endswith(".weight") and not bool(tensor.any()):
            raise UserError(f"{what}: {name} {tuple(tensor.shape)} is all zero, so the model is not saved")


def _require_finite(state: Mapping[str, torch.Tensor], what: str) -> None:
    for name, tensor in state.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{what}: {name} {tuple(tensor.shape)} is empty or not finite, so the model is not saved")


def _compare(files: list[Path], state: Mapping[str, torch.Tensor]) -> None:
    """Read saved weights back and compare every value. Raises UserError naming a weight that differs."""
    from safetensors import safe_open

    seen: set[str] = set()
    for path in files:
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                # Exact comparison: `_require_sound` has excluded NaN, which differs from itself.
                stored = file.get_tensor(name)
                if name not in state or stored.dtype != state[name].dtype or not torch.equal(stored, state[name]):
                    raise UserError(f"{path}: {name} differs from what was written")
                seen.add(name)
    missing = sorted(set(state) - seen)
    if missing:
        raise UserError(f"{files[0].parent}: {len(missing)} weights were not written ({', '.join(missing[:3])})")
