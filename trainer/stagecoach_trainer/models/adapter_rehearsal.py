"""Try, before the work, whether an adapter's weights come back when plain PEFT opens its files on the base.

PEFT renames and fuses an adapter's weights as transformers does with those of the base, but cannot undo it; a name that
one of its patterns fits by accident is left out without an error (`mlp.shared_experts` of Laguna). It is tried on a
model of the same class without memory, with an adapter of rank 2 of random numbers.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_api.model_folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, UNNAMED_BASE
from stagecoach_trainer.models.model_part import skeleton
from stagecoach_trainer.models.safety import read_json
from stagecoach_trainer.models.save import adapter_config, write_json

RANK = 2

MANY = 2**22
"""Numbers above which a tensor is filled with one: drawing them would take longer than writing them."""


def lost_adapter_weights(model: Any, config: Any) -> list[str]:
    """Return the names of an adapter's weights that PEFT does not read back from its files as they were written.

    `model`: the base, which does not change; `config`: PEFT's configuration of the adapter. Empty if all come back, or
    if this base cannot be built without memory; then the files are compared after the work alone.
    """
    base, other = skeleton(model), skeleton(model)
    if base is None or other is None:
        return []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # PEFT warns of what this function returns
        torch.manual_seed(0)
        try:
            written = _write(_with_memory(base), config, Path(folder))
        except Exception:  # a model may do anything when it is built in another way than by its files
            return []
        try:
            found = _read(_with_memory(other, _saved_modules(Path(folder))), Path(folder))
        except (KeyError, RuntimeError, ValueError):
            return sorted(written)
    lost = {name for name in written if name not in found or not torch.equal(found[name], written[name])}
    return sorted(lost | (found.keys() - written.keys()))


def _write(base: Any, config: Any, folder: Path) -> dict[str, Tensor]:
    """Write an adapter of random numbers; return its weights by their names in the file."""
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(config)
    config.r, config.init_lora_weights = RANK, True
    adapted = get_peft_model(base, config, autocast_adapter_dtype=False)
    shapes = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = {name: _numbers(tensor.shape, index) for index, (name, tensor) in enumerate(shapes.items())}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(adapter_config(adapted, UNNAMED_BASE), folder / ADAPTER_CONFIG)
    return weights


def _numbers(shape: torch.Size, index: int) -> Tensor:
    """Return numbers that differ from those of other tensors and, unless there are many, from one another."""
    return torch.randn(shape) if shape.numel() <= MANY else torch.full(shape, float(index))


def _read(base: Any, folder: Path) -> dict[str, Tensor]:
    from peft import PeftModel, get_peft_model_state_dict

    opened = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False, torch_device="cpu")
    found = get_peft_model_state_dict(opened, save_embedding_layers=False)
    return {name: tensor.to(torch.float32) for name, tensor in found.items()}


def _saved_modules(folder: Path) -> tuple[str, ...]:
    """Return the names of the modules of which the adapter in `folder` has a copy."""
    return tuple(read_json(folder / ADAPTER_CONFIG).get("modules_to_save") or ())


def _with_memory(base: nn.Module, copied: tuple[str, ...] = ()) -> nn.Module:
    """Put zeros in place of parameters without memory: one for each whole matrix, except in modules to be written to.

    `copied`: the last parts of the names of these modules.
    """
    for name, module in base.named_modules():
        shared = not name.endswith(copied) if copied else True
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    zeros = torch.zeros(() if shared else tensor.shape, dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[key] = nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
    return base
