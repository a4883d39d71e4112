"""The loss on every architecture of transformers is transformers' own, or the model is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.engine.packing_check import TOLERANCES, leak_of
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.architectures import VOCABULARY, model_types, tiny, tiny_config

CPU = torch.device("cpu")
LENGTHS = (19, 13)
ENCODERS = {"bert-generation", "big_bird", "camembert", "electra", "ernie", "roberta", "roformer", "xlm", "xlnet"}
"""Some of the types that read both directions."""
SEQUENCE_TO_SEQUENCE = {"bart", "marian", "mbart", "pegasus", "trocr", "whisper", "prophetnet"}
"""Some of the types whose own loss does not shift the labels: they predict the token at the same position."""


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    refused: str | None = None
    expected: float = 0.0
    """transformers' loss in nats per token, routers' losses included."""
    got: float = 0.0
    packed: float | None = None
    """Ours over the same samples packed in one row; None if packing is refused."""
    expected_packed: float = 0.0


def samples() -> list[Row]:
    random = np.random.default_rng(5)
    rows = []
    for length in LENGTHS:
        tokens = random.integers(4, VOCABULARY, length, dtype=np.int32)
        rows.append(Row(tokens, np.append(tokens[1:], IGNORE).astype(np.int32), (length,)))
    return rows


def packed(rows: list[Row]) -> Row:
    return Row(
        np.concatenate([row.tokens for row in rows]), np.concatenate([row.labels for row in rows]), tuple(LENGTHS)
    )


def losses_of_transformers(model: torch.nn.Module, rows: list[Row]) -> tuple[float, float]:
    """Return the loss of padded rows, and the loss of their tokens alone, computed from the logits."""
    length = max(LENGTHS)
    tokens = torch.tensor([[*row.tokens, *[3] * (length - row.num_tokens)] for row in rows])
    mask = torch.tensor([[1] * row.num_tokens + [0] * (length - row.num_tokens) for row in rows])
    labels = tokens.masked_fill(mask == 0, IGNORE)
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False)
    alone = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return float(found.loss), float(alone)


@cache
def outcome_of(model_type: str) -> Outcome:
    routed = {"output_router_logits": True} if hasattr(tiny_config(model_type), "output_router_logits") else {}
    model, rows = tiny(model_type, **routed), samples()
    try:
        loss = CausalLoss(model).eval()
        with accelerate(loss, CPU, torch.float32, [row.tokens for row in rows]), torch.no_grad():
            batch = collate(rows)
            got = float(loss(batch, 1.0 / batch.num_targets, whole=True))
            leak = leak_of(loss, [packed(rows)], CPU)
            separate = leak is not None and leak <= TOLERANCES[torch.float32]
            together = float(loss(collate([packed(rows)]), 1.0 / batch.num_targets)) if separate else None
    except UserError as error:
        return Outcome(refused=str(error))
    expected, tokens_alone = losses_of_transformers(model, rows)
    return Outcome(None, expected, got, together, tokens_alone)


@pytest.mark.parametrize("model_type", model_types())
def test_the_loss_is_that_of_transformers_or_the_model_is_refused_by_name(model_type: str) -> None:
    """Liger-Kernel#1477, unsloth-zoo#930: logits scaled after the head; trl#7222, transformers#44586: routers."""
    found = outcome_of(model_type)
    if found.refused is not None:
        assert found.refused.split()[0].rstrip(":").endswith(("CausalLM", "HeadModel", "Decoder", "Generation"))
        assert "docs/models.md" in found.refused
        return
    assert found.got == pytest.approx(found.expected, rel=1e-5)
    if found.packed is not None:
        assert found.packed == pytest.approx(found.expected_packed, rel=1e-5)


def test_decoders_are_trained_and_encoders_are_refused() -> None:
    outcomes = {model_type: outcome_of(model_type) for model_type in model_types()}
    refused = {name: found.refused for name, found in outcomes.items() if found.refused is not None}
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    assert len(outcomes) - len(refused) >= 125
    assert sum(found.packed is not None for found in outcomes.values()) >= 90
    assert refused.keys() >= ENCODERS | SEQUENCE_TO_SEQUENCE
    assert all("not causal" in str(refused[name]) for name in ENCODERS)
    assert all("its own loss is" in str(refused[name]) for name in SEQUENCE_TO_SEQUENCE)
