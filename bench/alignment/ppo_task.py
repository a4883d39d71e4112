"""The task of both sides of the PPO bench: the model folders both load, and the settings.

The policy answers any prompt with a few likely tokens; the reward model prefers every second token id, at any position.
Both are LLaMAs with random weights of which a few are set by hand, so that there is something to learn in a minute.
torch is imported only where models are made: the peer's environment reads the settings, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.llama import VOCABULARY, WIDTH, llama_config

PADDING = VOCABULARY
"""An id outside every vocabulary, so that no answer contains it; the peer masks it before calling a model."""
LIKELY = 64
"""The policy first answers with ids below this."""
SHORTEST, LONGEST, ANSWER = 16, 48, 24
"""Tokens of prompts (shortest, longest) and of every answer: there is no end token."""
POSITIONS = 256
SAMPLES, UPDATES = 32, 6
EPOCHS, MINI_BATCHES = 2, 2
LEARNING_RATE = 3e-4
KL = 0.02
CLIP, GAMMA, LAMBDA = 0.2, 1.0, 0.95
VALUE_WEIGHT = 0.1
LAST = 2
"""The final reward is the mean of this many last updates."""

COMMON = 6.0
"""Norm of the component that all embeddings of the policy share; the layers' random parts add about 2 to it."""
MARGIN = 0.65
"""Component of a likely token's row in the head along the direction that all states share: about 9 nats."""
REWARD_SCALE = 4.0


def make_task(folder: Path) -> None:
    """Write `policy`, `reward` (Hugging Face folders) and `prompts.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_policy().save_pretrained(folder / "policy")
    make_reward().save_pretrained(folder / "reward")
    (folder / "prompts.json").write_text(json.dumps(make_prompts()), encoding="utf-8")


def gaps(times: Sequence[float]) -> list[float]:
    """Return the differences between consecutive times."""
    return [after - before for before, after in pairwise(times)]


def make_prompts(seed: int = 5) -> list[list[int]]:
    """Return the prompts of all updates."""
    import numpy as np

    random = np.random.default_rng(seed)
    lengths = random.integers(SHORTEST, LONGEST, SAMPLES * UPDATES, endpoint=True)
    return [random.integers(LIKELY, VOCABULARY, int(length)).tolist() for length in lengths]


def make_policy(seed: int = 0) -> Any:
    """Return a language model whose states share a direction, which the likely tokens' rows of the head contain."""
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
    """Return a sequence classifier whose first layer averages, with uniform attention, which tokens are preferred."""
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
