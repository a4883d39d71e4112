"""Makers for the tests of evaluation and export: a base with a chat template, adapters over it, naive generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stagecoach_api.artifacts import ModelCard
from stagecoach_api.conversation import Template, TemplateName
from stagecoach_api.references import Reference
from stagecoach_api.training import LoraTraining, NewRows, Trainable
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.models.load import load_model
from stagecoach_trainer.models.resize import grow
from stagecoach_trainer.models.save import save_adapter
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.text.templates import apply_template
from tests.trainer.models.makers import make_context, make_model, make_tokenizer, outside, save_base

ALPACA = Template(name=TemplateName.ALPACA)
QUESTIONS = ("what is a fox", "白日依山尽", "what is the next word in front of the lazy dog", "床前")


def chat_tokenizer() -> Any:
    """A small vocabulary with Alpaca's chat template."""
    tokenizer = make_tokenizer()
    apply_template(tokenizer, ALPACA)
    return tokenizer


def save_chat_base(folder: Path, seed: int = 0, tied: bool = False) -> Path:
    """Write a base model that has a chat template."""
    return save_base(folder, chat_tokenizer(), seed, tied)


def lively_model(rows: int, seed: int = 0) -> Any:
    """A model whose next token is not uniformly random: its weights are larger than a fresh one's."""
    model = make_model(rows, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12.0)
    return model.eval()


def save_chat_adapter(root: Path, base: Path, output: Path, grown: bool = True, size: float = 0.1) -> Path:
    """Write a LoRA with random weights over `base`, which it grows by two pieces; return its folder."""
    output.mkdir(parents=True)
    loaded = load_model(make_context(root / "making", inputs={"base": base}), Reference(uri="base"))
    tokenizer = make_tokenizer(extra=("龘", "靐")) if grown else loaded.require_tokenizer()
    apply_template(tokenizer, ALPACA)
    rows = grow(loaded.model, loaded.tokenizer, tokenizer, NewRows.RANDOM, seed=5) if grown else range(0)
    model = choose_trainable(loaded.model, Trainable(lora=LoraTraining(new_rows=grown)), rows, seed=1).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    vocabulary = root / "making" / "vocabulary"
    tokenizer.save_pretrained(vocabulary)
    card = ModelCard(
        adapter=True,
        base=outside(base),
        new_rows="random" if grown else None,
        resize_seed=5 if grown else None,
    )
    save_adapter(model, tokenizer, vocabulary, output, card)
    return output


def naive_answer(model: Any, prompt: Sequence[int] | Ids, num_tokens: int, ends: Sequence[int] = ()) -> list[int]:
    """Greedy generation without cache, batch or padding; the end token is left out."""
    tokens = [int(token) for token in prompt]
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        following = int(logits.argmax())
        if following in ends:
            break
        tokens.append(following)
    return tokens[len(prompt) :]
