"""Low-rank adapters: which layers get one, decided by what the model consists of, and how much of it they reach.

A block is a repeated part of the decoder. Its linear layers are found by their class, and fused experts by their shape:
one parameter [E, ·, ·] for E experts, which no layer's name covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from stagecoach_api.training import ALL_LINEAR, Experts, LoraTraining
from stagecoach_trainer.models.adapter_rehearsal import lost_adapter_weights
from stagecoach_trainer.models.merging import rehearse_merge
from stagecoach_trainer.models.resize import is_tied, require_new_rows, row_modules
from stagecoach_trainer.runtime.errors import UserError

ADAPTER = "default"

IN_FILES = "base_model.model."
"""What PEFT puts before the names of an adapter's weights in its files."""


def add_adapter(model: Any, lora: LoraTraining, new_rows: range, seed: int) -> tuple[Any, tuple[str, ...]]:
    """Return the model with new adapters, a pure function of the seed, and descriptions of what is trained.

    Raises UserError for targets that the model lacks, layers that cannot be merged again, and experts that are neither
    adapted nor frozen by name.
    """
    from peft import LoraConfig, get_peft_model

    blocks = Blocks.of(model)
    _check_names(model, lora)
    experts = _expert_targets(lora, blocks)
    targets = _targets(model, lora, blocks)
    _refuse_shared(model, targets, lora)
    targets = _mergeable(model, lora, targets, experts, blocks)
    classifies = model.get_output_embeddings() is None
    rows = _rows_to_train(model, lora, new_rows)
    config = LoraConfig(
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",  # for classifiers, PEFT also trains and saves the head
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=experts or None,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=rows,
        bias="none",
    )
    targets = _readable(model, lora, targets, config)
    reached = ", ".join(blocks.short(targets + experts))
    notes = [f"adapters of rank {lora.rank} on {reached}", blocks.reach(targets, experts)]
    if rows is not None:
        notes.append(f"{len(new_rows)} new rows of {', '.join(rows)}")
    if lora.modules_to_save:
        notes.append(f"{', '.join(lora.modules_to_save)} in full: every row is trained, old ones too")
    if classifies:
        notes.append("the reward head in full")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"trainable.lora: PEFT cannot add the adapters: {error}") from error
    return adapted, tuple(notes)


def _rows_to_train(model: Any, lora: LoraTraining, new_rows: range) -> dict[str, list[int]] | None:
    if not lora.new_rows:
        return None
    require_new_rows(new_rows, "trainable.lora.newRows", "all rows by `modulesToSave`")
    # Without a tied head, which PEFT handles itself.
    return {name.rsplit(".", 1)[-1]: list(new_rows) for name in _names_of(model, row_modules(model))}


# -- what the model consists of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The repeated parts of a decoder, by name."""

    prefixes: tuple[str, ...]
    """Names of the blocks, such as `model.layers.0`."""

    linear: Mapping[str, nn.Module]
    """Their linear layers."""

    experts: Mapping[str, nn.Parameter]
    """Their fused experts."""

    num_parameters: int
    """All their parameters."""

    @classmethod
    def of(cls, model: nn.Module) -> Blocks:
        prefixes = tuple(_block_names(model))
        inside = tuple(f"{prefix}." for prefix in prefixes)
        linear = {name: layer for name, layer in model.named_modules() if _is_linear(layer) and name.startswith(inside)}
        parameters = {name: item for name, item in model.named_parameters() if name.startswith(inside)}
        experts = {name: item for name, item in parameters.items() if _is_fused(model, name, item)}
        return cls(prefixes, linear, experts, sum(item.numel() for item in parameters.values()))

    def first_of_each_kind(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that lie in the first block of each kind, or in none."""
        parts: dict[str, list[str]] = {}
        for name in (*self.linear, *self.experts):
            within = self.within(name)
            parts.setdefault(name.removesuffix(within), []).append(within)
        kinds: dict[tuple[str, ...], str] = {}
        for block, layers in parts.items():
            kinds.setdefault(tuple(layers), block)
        chosen = {*kinds.values(), ""}
        return [name for name in names if name.removesuffix(self.within(name)) in chosen]

    def within(self, name: str) -> str:
        """Return a name as it is within its block; other names are returned unchanged."""
        prefix = next((prefix for prefix in self.prefixes if name.startswith(f"{prefix}.")), None)
        return name if prefix is None else name[len(prefix) + 1 :]

    def short(self, names: Sequence[str]) -> list[str]:
        """Return each name as it is within its block, once."""
        return list(dict.fromkeys(self.within(name) for name in names))

    def reach(self, targets: Sequence[str], experts: Sequence[str]) -> str:
        """Return how many layers and which share of the blocks' parameters adapters reach."""
        layers = {name for name in self.linear if _matches(name, targets)}
        fused = {name for name in self.experts if _matches(name, experts)}
        reached = sum(_weight(self.linear[name]).numel() for name in layers)
        reached += sum(self.experts[name].numel() for name in fused)
        left = self.short([name for name in [*self.linear, *self.experts] if name not in layers | fused])
        share = reached / self.num_parameters if self.num_parameters else 0.0
        missed = f"; not: {', '.join(left)}" if left else ""
        return (
            f"they reach {len(layers)} of {len(self.linear)} linear layers of the blocks, {share:.1%} of the blocks' "
            f"parameters{missed}"
        )


def _block_names(model: nn.Module) -> Iterator[str]:
    """Yield the names of the blocks: members of the outermost lists of modules that have linear layers or experts."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{prefix}." for prefix in found)):
            # A list of single layers is not one of blocks.
            found += [f"{name}.{index}" for index, child in enumerate(module) if any(True for _ in child.children())]
    yield from found


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    return isinstance(module, (nn.Linear, Conv1D))


def _is_fused(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if parameter.ndim != 3 or min(parameter.shape) < 2:
        return False
    return not isinstance(model.get_submodule(name.rsplit(".", 1)[0]), _ConvNd)


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    return weight


def _matches(name: str, targets: Sequence[str]) -> bool:
    """Return whether PEFT adapts the layer `name`: the last parts of its name are one of the targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


# -- targets -----------------------------------------------------------------------------------------------------------


def _targets(model: Any, lora: LoraTraining, blocks: Blocks) -> list[str]:
    """Return the names of target modules for PEFT, `all-linear` resolved to those of this model."""
    named = [name for name in lora.targets if name != ALL_LINEAR]
    replaced = [name for name in named if not _is_read_as_written(model, name)]
    if replaced:
        raise UserError(
            f"trainable.lora.targets: PEFT reads {', '.join(replaced)} as the fused experts of {type(model).__name__}, "
            "not as layers; leave them out, and set `experts: adapt` to adapt the experts"
        )
    if ALL_LINEAR not in lora.targets:
        return named
    shared = _shared_weights(model)
    chosen = [
        name
        for name, layer in blocks.linear.items()
        if id(_weight(layer)) not in shared and not _matches(name, lora.modules_to_save) and _adapts(model, name)
    ]
    if not chosen and not named:
        raise UserError(
            f"trainable.lora.targets: {type(model).__name__} has no linear layers in its blocks; train `full` or "
            "`embeddings`"
        )
    return _shortest(model, chosen) + named


def _mergeable(model: Any, lora: LoraTraining, targets: list[str], experts: list[str], blocks: Blocks) -> list[str]:
    """Return the targets whose adapters can be merged exactly, which one block of each kind proves.

    Other layers are left out of `all-linear`. Raises UserError for layers that the stage names.
    """
    layers = [name for name, layer in model.named_modules() if _is_linear(layer) and _matches(name, targets)]
    fused = blocks.first_of_each_kind([name for name in blocks.experts if _matches(name, experts)])
    tried = blocks.first_of_each_kind(layers)
    if rehearse_merge(model, tried, fused) is None:
        return targets
    by_name: dict[str, list[str]] = {}
    for name in tried:
        by_name.setdefault(blocks.within(name), []).append(name)
    reasons = {name: rehearse_merge(model, layers, []) for name, layers in by_name.items()}
    wrong = {name: reason for name, reason in reasons.items() if reason is not None}
    named = [name for name in wrong if _matches(name, [item for item in lora.targets if item != ALL_LINEAR])]
    if named:
        raise UserError(
            f"trainable.lora.targets: an adapter on {named[0]} cannot be merged again ({wrong[named[0]]}): the model "
            "uses this layer in another way; leave it out"
        )
    left = [name for name in layers if blocks.within(name) not in wrong]
    reason = rehearse_merge(model, blocks.first_of_each_kind(left), fused)
    if reason is not None or not left:
        reason = reason or next(iter(wrong.values()))
        raise UserError(
            f"trainable.lora: adapters of {type(model).__name__} cannot be merged again ({reason}); name other "
            "`targets`, or train `full`"
        )
    return _shortest(model, left)


def _readable(model: Any, lora: LoraTraining, targets: list[str], config: Any) -> list[str]:
    """Return the targets whose adapters plain PEFT reads back from their files; set them in `config` too.

    Other layers are left out of `all-linear`. Raises UserError for what the stage names.
    """
    lost = lost_adapter_weights(model, config)
    if not lost:
        return targets
    layers = [name for name, layer in model.named_modules() if _is_linear(layer) and _matches(name, targets)]
    left = [name for name in layers if not any(item.startswith(f"{IN_FILES}{name}.") for item in lost)]
    named = [target for target in lora.targets if target != ALL_LINEAR]
    lost_by_name = any(_matches(name, named) for name in set(layers).difference(left))
    config.target_modules = set(_shortest(model, left))
    if lost_by_name or not left or lost_adapter_weights(model, config):
        raise UserError(
            f"trainable.lora: PEFT does not read {len(lost)} weights of this adapter back from its files "
            f"({', '.join(name.removeprefix(IN_FILES) for name in lost[:3])}); name other `targets`, or train `full`"
        )
    return _shortest(model, left)


def _adapts(model: Any, name: str) -> bool:
    """Return whether PEFT can adapt a layer: not those whose weights Mamba's kernels read past the layer, and not those
    whose names it takes for experts."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rsplit(".", 1)[-1])
    except ValueError:
        return False
    return _is_read_as_written(model, name)


def _is_read_as_written(model: Any, name: str) -> bool:
    """Return whether PEFT keeps a target as it is.

    In mixtures whose experts transformers 5 stores as one parameter, it reads the experts' earlier names (`gate_proj`)
    as that parameter, although dense layers and shared experts still have layers of these names.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a part of what was fused into one parameter
        return False
    return set(config.target_modules or ()) == {name}


def _shortest(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """Return the last parts of the names where they mean chosen layers only, as in `q_proj`, and else whole names."""
    others: dict[str, int] = {}
    for name, _ in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        others[last] = others.get(last, 0) + 1
    for name in chosen:
        others[name.rsplit(".", 1)[-1]] -= 1
    lasts = {name: name.rsplit(".", 1)[-1] for name in chosen}
    # A bare number is the name of a block as well as of a layer in a list.
    return list(dict.fromkeys(name if others[last] or last.isdigit() else last for name, last in lasts.items()))


def _expert_targets(lora: LoraTraining, blocks: Blocks) -> list[str]:
    """Return the names of target parameters for PEFT."""
    names = blocks.short(list(blocks.experts))
    if lora.experts is Experts.ADAPT:
        if not names:
            raise UserError("trainable.lora.experts: the model has no fused experts; remove the field")
        if lora.dropout:
            raise UserError(
                f"trainable.lora.dropout: {lora.dropout:g}, but adapters of fused experts have none; set it to 0"
            )
        return names
    if names and lora.experts is None and ALL_LINEAR in lora.targets:
        share = sum(item.numel() for item in blocks.experts.values()) / blocks.num_parameters
        raise UserError(
            f"trainable.lora.experts: the model's experts ({', '.join(names)}) are no linear layers, and hold "
            f"{share:.0%} of the blocks' parameters; set `experts: adapt` to give them adapters too, or "
            "`experts: freeze` to leave them as they are"
        )
    return []


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights that occur under several names: a merge into one of them changes them all."""
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _refuse_shared(model: nn.Module, targets: Sequence[str], lora: LoraTraining) -> None:
    """Raise UserError if an adapter is to change a weight that several layers share."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for sharing in names.values():
        for field, wanted in (("targets", targets), ("modulesToSave", lora.modules_to_save)):
            hit = next((name for name in sharing if _matches(name, wanted)), None)
            if len(sharing) > 1 and hit is not None:
                raise UserError(
                    f"trainable.lora.{field}: {' and '.join(sharing)} share one matrix, and an adapter changes "
                    f"{hit} alone, so that merging it would change the model or untie them; leave it out, and use "
                    "`newRows: true`, or `trainable.embeddings`"
                )


def _names_of(model: Any, modules: Sequence[Any]) -> list[str]:
    wanted = {id(module) for module in modules}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _check_names(model: Any, lora: LoraTraining) -> None:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)}
    _require_known("trainable.lora.targets", lora.targets, linear | {ALL_LINEAR}, "linear layers")
    rows = _names_of(model, [model.get_input_embeddings(), model.get_output_embeddings()])
    embeddings = {name.rsplit(".", 1)[-1] for name in rows}
    layers = linear | embeddings | {name.rsplit(".", 1)[-1] for name, _ in _norms(model)}
    _require_known("trainable.lora.modulesToSave", lora.modules_to_save, layers, "layers")
    twice = set(lora.targets) & set(lora.modules_to_save)
    if twice:
        raise UserError(f"trainable.lora: {sorted(twice)} are in both `targets` and `modulesToSave`; choose one")
    saved = set(lora.modules_to_save) & embeddings
    if lora.new_rows and saved:
        raise UserError(
            f"trainable.lora: `newRows` trains only new rows, `modulesToSave` all rows of {sorted(saved)}; choose one"
        )
    if saved and is_tied(model):
        raise UserError(
            f"trainable.lora.modulesToSave: the model's head shares the embedding's matrix, and an adapter with a "
            f"trained copy of {sorted(saved)} would untie them; use `newRows: true`, or `trainable.embeddings`"
        )


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if "norm" in type(module).__name__.lower())


def _require_known(where: str, names: Sequence[str], known: set[str], kind: str) -> None:
    unknown = [name for name in names if name.rsplit(".", 1)[-1] not in known]
    if unknown:
        raise UserError(f"{where}: the model has no {', '.join(unknown)}; its {kind} are {', '.join(sorted(known))}")
