"""The task of the reward-model bench: the model both sides load, and the pairs both train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.llama import VOCABULARY, llama_config

PAIRS, STEPS = 8, 12
SHORTEST, LONGEST = 64, 192
"""Tokens of a sequence, prompt and answer together."""
LEARNING_RATE = 1e-4
PADDING = 0

Pair = tuple[list[int], list[int]]


def make_task(folder: Path) -> None:
    """Write `model` (a Hugging Face folder) and `pairs.json` into `folder`."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = llama_config(LONGEST, num_labels=1, pad_token_id=PADDING)
    folder.mkdir(parents=True, exist_ok=True)
    LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    (folder / "pairs.json").write_text(json.dumps(make_pairs()), encoding="utf-8")


def make_pairs(seed: int = 3) -> list[Pair]:
    """Return all pairs, the better answer first: its tokens are from the lower half of the vocabulary."""
    import numpy as np

    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(PAIRS * STEPS):
        lengths = random.integers(SHORTEST, LONGEST, 2, endpoint=True)
        limits = ((1, VOCABULARY // 2), (VOCABULARY // 2, VOCABULARY))
        better, worse = (
            random.integers(low, high, int(length)).tolist()
            for (low, high), length in zip(limits, lengths, strict=True)
        )
        pairs.append((better, worse))
    return pairs


def read_steps(folder: Path) -> list[list[Pair]]:
    """Return the pairs of every step."""
    pairs = [tuple(pair) for pair in json.loads((folder / "pairs.json").read_text(encoding="utf-8"))]
    return [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]


def tokens_of(pairs: Sequence[Pair]) -> int:
    """Return the number of tokens of both answers, without padding."""
    return sum(len(better) + len(worse) for better, worse in pairs)
