"""Try, before the work, all that saving whole weights needs after it: names, configurations, vocabulary and weights.

The weights are those of the model itself or, if it is large, of its first blocks (`model_part`). They go through the
files and through transformers' own loading, and are compared one by one: transformers renames, fuses, ties and
initialises weights when it loads them, and what it does not undo would show only when the training is paid for.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagecoach_trainer.models.load import Head, load_folder
from stagecoach_trainer.models.merging import Probe
from stagecoach_trainer.models.model_part import part_of, share_tensors
from stagecoach_trainer.models.save import as_stored, without_tied, write_configs, write_weights
from stagecoach_trainer.models.save_vocabulary import save_vocabulary
from stagecoach_trainer.models.token_ids import set_token_ids
from stagecoach_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHOWN = 3
"""Names in a message."""

BOOKKEEPING = ("_name_or_path", "dtype", "transformers_version")
"""Settings of a model's history, not of what it computes."""


def rehearse_saving(
    model: PreTrainedModel, tokenizer: Any, vocabulary: Path, weights: bool = True, root: Path | None = None
) -> None:
    """Write configurations and vocabulary to a temporary folder in `root`, as `save_model` does after the work.

    `weights`: write the model's own weights too, or those of its first blocks, and open them by transformers.
    Raises UserError if they cannot be written, or open as something else than what is used here.
    """
    if weights:
        _rehearse_names(model)
    with tempfile.TemporaryDirectory(dir=root) as name:
        folder = Path(name)
        set_token_ids(model, tokenizer, {})
        write_configs(model, model.dtype, folder)
        save_vocabulary(tokenizer, vocabulary, folder)
        if weights:
            (folder / "weights").mkdir()
            _rehearse_weights(model, folder / "weights", _changed_settings(model, folder))


def _rehearse_names(model: PreTrainedModel) -> None:
    shapes = {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()}
    kept = sum(tensor.numel() for tensor in without_tied(model, shapes).values())
    try:
        stored = sum(tensor.numel() for tensor in as_stored(model, shapes).values())
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"transformers loads {type(model).__name__} from this folder and cannot write it again: {error!r}; save "
            "the model with transformers (`save_pretrained`) in plain weights first"
        ) from error
    if stored != kept:
        raise UserError(
            f"{type(model).__name__} has {kept:,} numbers, and transformers would write {stored:,} of them; save the "
            "model with transformers (`save_pretrained`) in plain weights first"
        )


# -- weights -----------------------------------------------------------------------------------------------------------


def _rehearse_weights(model: PreTrainedModel, folder: Path, changed_settings: list[str]) -> None:
    part = part_of(model)
    if part is None:
        log.info(
            "%s: too large to be written before the work, and it cannot be shortened; its weights are compared when "
            "they are saved",
            type(model).__name__,
        )
        return
    written = _trained(part)
    stored = as_stored(part, written)
    write_weights({name: stored[name].contiguous() for name in sorted(stored)}, folder)
    write_configs(part, part.dtype, folder)
    opened = _open(part, folder)
    lost = changed_tensors(written, _unsaved(part), opened)
    if lost:
        raise _refusal(model, f"{len(lost)} of its weights come back changed: {_shown(lost)}")
    if changed_settings:
        _require_same_outputs(model, part, opened, changed_settings)


def _open(part: PreTrainedModel, folder: Path) -> Any:
    head = Head.CLASSIFIER if part.get_output_embeddings() is None else Head.LANGUAGE_MODEL
    try:
        with torch.random.fork_rng(devices=[]):
            return load_folder(folder, part.dtype, head=head)
    except UserError as error:
        raise _refusal(part, str(error).removeprefix(f"{folder}: ")) from error


def _refusal(model: PreTrainedModel, what: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be saved exactly: written as it is after the work, and opened by "
        f"transformers, {what}; train an adapter (`trainable.lora`), or use a model family listed in docs/models.md"
    )


def _trained(part: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights by name, each parameter moved by another number, as training would move it.

    Fresh norms are all ones, and would hide that two of them change places; and what transformers resets when it loads
    a model has, until it is trained, the values to which it is reset. Buffers stay, since they are not trained.
    """
    seen: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in part.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            here = tensor.detach().cpu()  # an export has its model on the GPU
            is_trained = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
            seen[id(tensor)] = here + (len(seen) % 64 + 1) / 64 if is_trained else here
        found[name] = seen[id(tensor)]
    return found


def _unsaved(part: PreTrainedModel) -> dict[str, Tensor]:
    """Return the buffers that are computed from the configuration, such as frequencies of rotary positions."""
    saved = part.state_dict().keys()
    return {name: buffer.cpu() for name, buffer in part.named_buffers() if name not in saved}


def changed_tensors(written: Mapping[str, Tensor], unsaved: Mapping[str, Tensor], opened: torch.nn.Module) -> list[str]:
    """Return the names of tensors that a model lacks, has in addition, or has with other values or other ties.

    `written`: parameters and saved buffers; `unsaved`: other buffers.
    """
    found: dict[str, Tensor] = opened.state_dict(keep_vars=True)
    others = {name: buffer for name, buffer in opened.named_buffers() if name not in found}
    pairs = ((written, found), (unsaved, others))
    names = [name for one, other in pairs for name in one.keys() ^ other.keys()]
    names += [
        name
        for one, other in pairs
        for name in one.keys() & other.keys()
        if not _same(one[name], other[name].to(one[name].dtype))
    ]
    ties, ties_found = _ties(written), _ties(found)
    names += [name for name in written.keys() & found.keys() if ties[name] & found.keys() != ties_found[name]]
    return sorted(set(names))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same, NaN included, which damaged weights and masks of attention have."""
    return torch.equal(one, other) or bool(
        one.shape == other.shape and ((one == other) | (one.isnan() & other.isnan())).all()
    )


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Return the names under which the memory of each tensor is known, by name."""
    names: dict[tuple[int, torch.Size], set[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault((tensor.data_ptr(), tensor.shape), set()).add(name)
    return {name: names[(tensor.data_ptr(), tensor.shape)] for name, tensor in tensors.items()}


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")


# -- settings ----------------------------------------------------------------------------------------------------------


def _changed_settings(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return the names of settings that `config.json` in `folder` gives another value."""
    from transformers import AutoConfig

    opened = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    before, after = (json.loads(json.dumps(config.to_dict(), default=str)) for config in (model.config, opened))
    names = sorted((before.keys() | after.keys()).difference(BOOKKEEPING))
    return [name for name in names if before.get(name) != after.get(name)]


def _require_same_outputs(model: PreTrainedModel, part: Any, opened: Any, settings: list[str]) -> None:
    """Compare outputs: a setting that changes may mean nothing, such as one that is absent where it has its default."""
    share_tensors(opened, part)
    try:
        probe = Probe(part)
    except Exception:  # the proof of the loss refuses such a model
        return
    change = probe.change(opened)
    if change is not None:
        raise _refusal(model, f"its settings come back changed ({_shown(settings)}), and {change}")
