"""Answers sampled from a policy as PPO samples them, compared with the same draws without a key-value cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.llama import VOCABULARY
from bench.measuring import Figure, Goal, alternate, compared
from bench.workload import make_model

PROMPTS, SHORTEST, LONGEST, ANSWER = 16, 16, 48, 96
TEMPERATURE = 0.7
Answers = Sequence[Sequence[int]]


def figures() -> list[Figure]:
    """Measure both with the same model, prompts and random numbers; compare their answers, too."""
    import numpy as np
    import torch

    from stagecoach_trainer.generation.sampling import Decoding, sample_answers, uniforms

    model: Any = make_model().eval()
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST, PROMPTS, endpoint=True)
    prompts = [random.integers(0, VOCABULARY, int(length)).astype(np.int32) for length in lengths]
    decoding = Decoding(ANSWER, TEMPERATURE, 1.0, ())
    draws = [uniforms([number], ANSWER) for number in range(PROMPTS)]

    def cached(_: int) -> tuple[float, Answers]:
        return clocked(
            lambda: [row.ids.tolist() for row in sample_answers(model, prompts, draws, decoding, torch.device("cpu"))]
        )

    pairs = alternate(cached, lambda _: clocked(lambda: without_cache(model, prompts, draws, decoding)))
    tokens = PROMPTS * ANSWER
    speeds = [(tokens / ours, tokens / peer) for (ours, _), (peer, _) in pairs]
    same = sum(a == b for a, b in zip(pairs[0][0][1], pairs[0][1][1], strict=True)) / PROMPTS
    return [
        compared("generation, fp32, against a loop without a cache", "tokens/s", speeds, Goal("≥", 5.0)),
        Figure("generation, equal answers", "share", same, None, None, "≥ 1", same >= 1.0),
    ]


def clocked(make: Callable[[], Answers]) -> tuple[float, Answers]:
    """Return the seconds that `make` took, and the answers it made."""
    started = time.perf_counter()
    answers = make()
    return time.perf_counter() - started, answers


def without_cache(model: Any, prompts: Sequence[Any], draws: Sequence[Any], decoding: Any) -> Answers:
    """Return answers generated without a cache: the model reads the whole sequence for every token."""
    import numpy as np
    import torch

    from stagecoach_trainer.generation.generation import pad_left
    from stagecoach_trainer.generation.sampling import draw

    tokens, mask = pad_left(prompts, padding=0)
    numbers = torch.from_numpy(np.stack(draws))
    with torch.inference_mode():
        for step in range(decoding.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            output = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            )
            chosen = draw(output.logits[:, -1], numbers[:, step], decoding)
            tokens = torch.cat([tokens, chosen[:, None]], dim=-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    answers: list[list[int]] = tokens[:, -decoding.max_new_tokens :].tolist()
    return answers
