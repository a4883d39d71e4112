"""What both sides of the PPO bench do: the folders both load, and the numbers of the task.

The policy says one of some likely tokens, whatever it is asked; the reward model likes every second token, wherever it
stands. Both are LLaMAs of random weights with a few set by hand, so that there is something to learn in a minute.
Nothing here imports torch at the top: the peer's environment reads the numbers, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.alignment.shape import VOCABULARY, WIDTH, llama_config

PADDING = VOCABULARY
"""An id that no model has, so that no answer can hold it; the peer masks it before it asks a model."""
LIKELY = 64
"""Ids below it are what the policy says at first."""
SHORTEST, LONGEST, ANSWER = 16, 48, 24
"""Tokens of prompts, and of every answer: nothing ends one."""
POSITIONS = 256
SAMPLES, UPDATES = 32, 6
EPOCHS, MINI_BATCHES = 2, 2
LEARNING_RATE = 3e-4
KL = 0.02
CLIP, GAMMA, LAMBDA = 0.2, 1.0, 0.95
VALUE_WEIGHT = 0.1
LAST = 2
"""Updates at the end whose mean reward is the final one."""

COMMON = 6.0
"""Length of what all embeddings of the policy have in common; random parts add some 2 to it, layer by layer."""
MARGIN = 0.65
"""Of a likely token's row in the head, along the direction all states share: some 9 nats."""
REWARD_SCALE = 4.0


def make_task(folder: Path) -> None:
    """Write `policy`, `reward` (Hugging Face folders) and `prompts.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_policy().save_pretrained(folder / "policy")
    make_reward().save_pretrained(folder / "reward")
    (folder / "prompts.json").write_text(json.dumps(make_prompts()), encoding="utf-8")


def gaps(times: Sequence[float]) -> list[float]:
    """Return what lies between one time and the next."""
    return [after - before for before, after in pairwise(times)]


def make_prompts(seed: int = 5) -> list[list[int]]:
    """Return as many prompts as all updates answer."""
    import numpy as np

    random = np.random.default_rng(seed)
    lengths = random.integers(SHORTEST, LONGEST, SAMPLES * UPDATES, endpoint=True)
    return [random.integers(LIKELY, VOCABULARY, int(length)).tolist() for length in lengths]


def make_policy(seed: int = 0) -> Any:
    """Return a language model whose states all point the same way, along which the likely tokens' rows lie."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(llama_config(POSITIONS))
    shared = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    with torch.no_grad():
        model.model.embed_tokens.weight += COMMON * shared
        model.lm_head.weight[:LIKELY] += MARGIN * shared
    return model


def make_reward(seed: int = 1) -> Any:
    """Return a sequence classifier whose first layer averages, with equal attention, whether tokens are liked."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    model: Any = LlamaForSequenceClassification(llama_config(POSITIONS, num_labels=1))
    liking, average = torch.linalg.qr(torch.randn(WIDTH, 2)).Q.T
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[0::2] += liking
        embedding[1::2] -= liking
        attention.q_proj.weight.zero_()
        attention.v_proj.weight[0] = liking / WIDTH**0.5
        attention.o_proj.weight[:, 0] = COMMON * average
        model.score.weight[0] = average * REWARD_SCALE / WIDTH**0.5
    return model
