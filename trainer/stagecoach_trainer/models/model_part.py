"""The part of a model on which saving is tried for all of it: its embedding and head, and its first blocks.

Blocks of the same kind are saved in the same way, so that one of each kind is enough; and a model of 70 billion
parameters then has three that are written and read. What is built is compared with the model, name by name and shape by
shape: if its configuration counts blocks in a way that is not understood here, there is no part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**24
"""Parameters up to which the whole model is tried: 64 MB in fp32, written and read in a tenth of a second."""


def part_of(model: Any) -> Any | None:
    """Return a model of the same class with the first blocks of `model` and the same parameters and buffers in memory.

    A small model, or one without a block to spare, is returned itself. None if it has no such part.
    """
    if sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
        return model
    return first_blocks(model)


def first_blocks(model: Any) -> Any | None:
    """Return `part_of` a model whatever its size."""
    whole: int = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = _lists_of_blocks(model, whole)
    stated = [value for _, value in _lists_in(model.config, whole)]
    count = max((_enough(blocks, stated) for blocks in lists.values()), default=0)
    if not lists or count == whole:
        return model if lists else None
    part = skeleton(model, _shortened(model.config, whole, count))
    left = tuple(f"{name}.{index}." for name in lists for index in range(count, whole))
    if part is None or not _is_part(part, model, left):
        return None
    share_tensors(part, model)
    return part


def skeleton(model: Any, config: Any = None) -> Any | None:
    """Return a model of the same class, without memory, by the same or another configuration; None if that fails."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = type(model)._from_config(copy.deepcopy(config or model.config), dtype=model.dtype)
    except Exception:  # an architecture may compute anything from its configuration, as real numbers too
        return None
    # How transformers renamed and fused what it has read, which is undone when the model is written.
    built._weight_conversions = getattr(model, "_weight_conversions", None)
    built.generation_config = getattr(model, "generation_config", None)  # a classifier has none
    return built


def _lists_of_blocks(model: nn.Module, count: int) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of as many modules, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = name.startswith(tuple(f"{outer}." for outer in found))
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[name] = module
    return found


def _enough(blocks: nn.ModuleList, stated: Sequence[list[Any]]) -> int:
    """Return how many of the first blocks contain one of each kind: by their layers, and by what is stated of each."""
    kinds: dict[Any, int] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault((_kind(block), *(repr(values[index]) for values in stated)), index + 1)
    return max(kinds.values())


def _kind(block: nn.Module) -> tuple[Any, ...]:
    classes = tuple((name, type(module).__name__) for name, module in block.named_modules())
    return classes, tuple((name, tuple(tensor.shape)) for name, tensor in _tensors(block))


def _shortened(config: Any, whole: int, count: int) -> Any:
    """Return the configuration with fewer blocks: lists with an entry for each block become shorter too."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in _lists_in(config, whole):
        setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


def _lists_in(config: Any, length: int) -> list[tuple[str, list[Any]]]:
    """Return the settings with an entry for each block, such as `layer_types`."""
    fields = vars(config.get_text_config()).items()
    return [(name, value) for name, value in fields if isinstance(value, list) and len(value) == length]


def _is_part(part: nn.Module, model: nn.Module, left: tuple[str, ...]) -> bool:
    """Return whether the part has exactly the tensors of the model without those whose names start with `left`."""
    expected = {name: tensor.shape for name, tensor in _tensors(model) if not name.startswith(left)}
    return expected == {name: tensor.shape for name, tensor in _tensors(part)}


def share_tensors(part: Any, model: nn.Module) -> None:
    """Put the model's parameters and buffers in place of the part's; tied ones stay tied."""
    for name, module in part.named_modules():
        source = model.get_submodule(name)
        for own, others in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            own.update({key: others[key] for key in own})
    part.train(model.training)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers, also those that are not saved."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
