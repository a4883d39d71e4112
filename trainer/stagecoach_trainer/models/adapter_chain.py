"""An adapter with everything it is based on: adapters of adapters, down to a folder of whole weights.

R rank of an adapter, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagecoach_api.artifacts import ModelCard, ResolvedInput
from stagecoach_api.model_folders import ADAPTER_CONFIG, CONFIG, WEIGHTS_INDEX
from stagecoach_trainer.models.load import locate_base, read_card, shipped_base
from stagecoach_trainer.models.safety import (
    check_adapter_folder,
    check_model_folder,
    read_json,
)
from stagecoach_trainer.models.save import copy_licences, write_json
from stagecoach_trainer.models.save_vocabulary import VOCABULARY_FILES
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError

GENERATION = "generation_config.json"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")

A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class ChainedAdapter:
    """One adapter of a chain."""

    path: Path
    card: ModelCard


@dataclass(frozen=True)
class AdapterChain:
    """An adapter and what it is based on."""

    adapters: tuple[ChainedAdapter, ...]
    """The adapters, the newest first."""

    root: Path
    """Folder of the whole weights below them."""

    root_input: ResolvedInput | None
    """Where the whole weights come from; None if they lie in the adapter's own folder."""

    @property
    def is_grown(self) -> bool:
        """Whether rows were added to the whole weights before an adapter was trained."""
        return any(link.card.new_rows is not None for link in self.adapters)


def chain_of(context: StageContext, source: ResolvedInput) -> AdapterChain:
    """Return the chain that begins with the adapter in `source`. Raises UserError as `load_model` does."""
    links: list[ChainedAdapter] = []
    while True:
        path = context.fetch_resolved(source)
        card = read_card(path)
        if not card.adapter:
            return AdapterChain(tuple(links), path, source)
        links.append(ChainedAdapter(path, card))
        inside = shipped_base(path)
        if inside is not None:
            return AdapterChain(tuple(links), inside, None)
        if card.base is None:
            raise UserError(f"{path}: the adapter's card names no base; the file is corrupt")
        source = locate_base(card.base, source, context.resolved.storage_uri)


# -- one adapter of several --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainLora:
    """A LoRA of linear layers alone, by PEFT's names: ΔW = scaling · B A, A [R, I], B [O, R]."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scaling(self) -> float:
        return float(self.config["lora_alpha"]) / self.rank

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(A) for name in self.weights if name.endswith(A)]


def read_plain_lora(path: Path) -> PlainLora | None:
    """Return the adapter in a folder, or None if it is more than a LoRA of one rank on named linear layers."""
    from safetensors.torch import load_file

    config = read_json(path / ADAPTER_CONFIG)
    extras = ("modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern", "target_parameters")
    others = ("use_dora", "use_rslora", "fan_in_fan_out", "layers_to_transform", "lora_bias", "exclude_modules")
    special = [name for name in (*extras, *others) if config.get(name)]
    if config.get("peft_type") != "LORA" or special or not isinstance(config.get("target_modules"), list):
        return None
    weights = load_file(check_adapter_folder(path))
    names = {name.removesuffix(A).removesuffix(B) for name in weights}
    if config.get("bias") != "none" or set(weights) != {name + part for name in names for part in (A, B)}:
        return None
    return PlainLora(config, weights)


def concatenated(adapters: Sequence[PlainLora]) -> PlainLora:
    """Return one adapter that changes every layer by the sum of what `adapters` change.

    A is the concatenation of their A, B of their scaling · B. A layer that an adapter does not have gets zeros for it.
    """
    rank = sum(adapter.rank for adapter in adapters)
    weights: dict[str, Tensor] = {}
    for layer in sorted({layer for adapter in adapters for layer in adapter.layers}):
        like = next(adapter.weights for adapter in adapters if layer + A in adapter.weights)
        parts = [_scaled(adapter, layer, like[layer + A], like[layer + B]) for adapter in adapters]
        weights[layer + A] = torch.cat([first for first, _ in parts])
        weights[layer + B] = torch.cat([second for _, second in parts], dim=1)
    targets = sorted({name for adapter in adapters for name in adapter.config["target_modules"]})
    return PlainLora({**adapters[0].config, "r": rank, "lora_alpha": rank, "target_modules": targets}, weights)


def _scaled(adapter: PlainLora, layer: str, like_a: Tensor, like_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and scaling · B [O, R] of a layer, zeros in the shapes of another adapter's if it has none."""
    if layer + A in adapter.weights:
        return adapter.weights[layer + A].float(), adapter.scaling * adapter.weights[layer + B].float()
    return torch.zeros(adapter.rank, like_a.shape[1]), torch.zeros(like_b.shape[0], adapter.rank)


# -- the base in a release ---------------------------------------------------------------------------------------------


def copy_base(root: Path, output: Path, ends: Sequence[int]) -> None:
    """Copy the files of a whole model that transformers opens, and its licence.

    `ends`: end tokens of the adapter's vocabulary and template, added to those at which generation ends.
    """
    output.mkdir()
    names = [CONFIG, GENERATION, WEIGHTS_INDEX, *VOCABULARY_FILES]
    found = [*(root / name for name in names), *check_model_folder(root)]
    found += [path for pattern in TEMPLATES for path in sorted(root.glob(pattern))]
    for path in found:
        if path.is_file():
            target = output / path.relative_to(root)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    copy_licences(root, output)
    for end in ends:
        _add_end(output, end)


def _add_end(folder: Path, end: int) -> None:
    file = folder / GENERATION
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    stated = read_json(folder / CONFIG)
    # Without the file, transformers takes the ids of config.json.
    settings = read_json(file) if file.is_file() else {name: stated[name] for name in ids if name in stated}
    ends = settings.get("eos_token_id")
    known = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if end not in known:
        together = [*known, end]
        write_json(settings | {"eos_token_id": together if known else end}, file)
