"""Special tokens in a model's configurations: what its base states is kept, what the vocabulary adds is added.

Servers read `generation_config.json` (vLLM takes `max_new_tokens` in it as a limit of the server), so it holds the
base's own settings and nothing that a stage used to measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stagecoach_trainer.models.resize import num_rows
from stagecoach_trainer.text.templates import stop_token_ids


def set_token_ids(model: Any, tokenizer: Any, generation: Mapping[str, Any]) -> None:
    """Complete the ids of BOS, EOS and padding in both configurations of `model`, and add the settings `generation`.

    A list of end tokens stays a list, and those of the vocabulary and its chat template are added to it. Padding and
    BOS stay as the base states them, unless it states none or one without a row. `config.json` has no padding if
    transformers would reset its row when it opens the folder.
    """
    if not model.can_generate():  # a classifier has no generation settings
        _set_ids_of_classifier(model.config, tokenizer, num_rows(model))
        return
    ends = end_ids(tokenizer)
    for config in (model.config, model.generation_config):
        _complete(config, tokenizer, num_rows(model))
    if _resets_padding(model):
        _assign(model.config, "pad_token_id", None)
    _set_ends_of_config(model.config, ends, num_rows(model))
    stated = model.generation_config.eos_token_id
    together: Any = _unique([*_listed(stated, num_rows(model)), *ends])
    is_list = isinstance(stated, list) or len(together) > 1
    model.generation_config.eos_token_id = (together or None) if is_list or not together else together[0]
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # transformers refuses to save a temperature without sampling, which some published models have
        model.generation_config.do_sample = True


def end_ids(tokenizer: Any) -> list[int]:
    """Return the ids at which generation must stop: the end token first, then those that the chat template writes."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        # What is no token of the vocabulary has the id of the unknown one.
        ends += [token for token in stop_token_ids(tokenizer) if token != tokenizer.unk_token_id]
    return _unique(ends)


def _set_ids_of_classifier(config: Any, tokenizer: Any, rows: int) -> None:
    """Set the ids of a sequence classifier.

    transformers takes the reward at the last token that is not padding, so padding must differ from the end token.
    """
    _complete(config, tokenizer, rows)
    _set_ends_of_config(config, [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [], rows)
    choices = (tokenizer.pad_token_id, tokenizer.unk_token_id)
    padding = next((token for token in choices if token is not None and token != tokenizer.eos_token_id), None)
    _assign(config, "pad_token_id", padding)


def _complete(config: Any, tokenizer: Any, rows: int) -> None:
    for name in ("bos_token_id", "pad_token_id"):
        stated, known = getattr(config, name, None), getattr(tokenizer, name)
        if name == "bos_token_id" and known is not None:
            stated = known  # the token that the vocabulary puts before a text, and training has seen there
        if not _has_row(stated, rows):
            stated = known
        if stated != getattr(config, name, None):
            _assign(config, name, stated)


def _resets_padding(model: Any) -> bool:
    """Return whether transformers sets the row of the padding id to zero in a folder that it opens.

    Youtu's code does so after the weights are read. Its head is tied to the embedding, so that the row is trained. Only
    the id in `config.json` has this effect; generation takes the one in `generation_config.json`.
    """
    layer: Any = torch.nn.Embedding(2, 1, padding_idx=0, _weight=torch.ones(2, 1))
    layer.weight._is_hf_initialized = True  # as transformers marks weights that it has read
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.base_model._init_weights(layer)
    return not bool((layer.weight == 1).all())


def _set_ends_of_config(config: Any, ends: Sequence[int], rows: int) -> None:
    """Set the end of `config.json`: one id, or a list if the base has one."""
    stated = getattr(config, "eos_token_id", None)
    if isinstance(stated, list):
        _assign(config, "eos_token_id", _unique([*_listed(stated, rows), *ends]))
    elif ends:
        _assign(config, "eos_token_id", ends[0])


def _listed(stated: int | list[int] | None, rows: int) -> list[int]:
    values = [stated] if isinstance(stated, int) else (stated or [])
    return [token for token in values if _has_row(token, rows)]


def _has_row(token: Any, rows: int) -> bool:
    return isinstance(token, int) and 0 <= token < rows


def _unique(values: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _assign(config: Any, name: str, value: Any) -> None:
    """Set a field, unless the architecture's configuration does not allow the value (None, or a list)."""
    from huggingface_hub.errors import StrictDataclassError

    had, before = hasattr(config, name), getattr(config, name, None)
    try:
        setattr(config, name, value)
        config.validate()
    except StrictDataclassError:
        if had:
            setattr(config, name, before)
