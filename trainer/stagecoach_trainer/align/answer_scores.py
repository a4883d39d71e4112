"""Log-probabilities of many answers under one model, computed by all ranks together.

Answers are split into batches first and the batches distributed to ranks, so results do not depend on the number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagecoach_api.kinds.dpo import DpoStage
from stagecoach_trainer.align.direct_objective import AnswerLoss, collate_sequences
from stagecoach_trainer.align.reference_table import Scorer
from stagecoach_trainer.engine.precision import MixedPrecision
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.causal import causal_model, output_layer
from stagecoach_trainer.loop.job import Report
from stagecoach_trainer.loop.loop import training_device
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.samples.groups import TokenSequence


def answers_per_batch(micro_batch_rows: int | None) -> int:
    """Return how many answers one forward pass scores: as many as a micro-batch of pairs has."""
    return 2 * (micro_batch_rows or 1)


def score_answers(
    module: Any,
    sequences: Sequence[TokenSequence],
    batch_size: int,
    device: torch.device,
    world: World,
    report: Report = lambda done, total: None,
) -> Tensor:
    """Return log π(answer | prompt) of each sequence, in nats, fp64 [N]; the same on every rank.

    `module`: an `AnswerLoss`, evaluated without dropout. All ranks make the same number of forward passes, because
    under ZeRO-3 each pass gathers parameters from all of them; a rank without work left runs an empty batch.
    """
    # Longest first: batches hold answers of similar length, and running out of memory shows at once.
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world.size)
    mine = batches[world.rank :: world.size]
    scores = torch.zeros(len(sequences), dtype=torch.float64)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for index in range(rounds):
                batch = mine[index] if index < len(mine) else []
                answers = collate_sequences([sequences[row] for row in batch]).to(device)
                scores[batch] = module(answers).cpu()
                report(index + 1, rounds)
    finally:
        module.train(was_training)
    if world.size > 1:
        dist.all_reduce(scores)  # each score is 0 on all ranks but one
    return scores


@contextmanager
def scorer_of(model: nn.Module, config: DpoStage, world: World) -> Iterator[Scorer]:
    """Yield a scorer that computes with `model` on this rank's device, in the number formats of training.

    Equal formats make the policy's initial log-ratios 0. On exit the model is restored, on the CPU.
    """
    device = training_device(world)
    flags = {name: item.requires_grad for name, item in model.named_parameters()}
    # `MixedPrecision` keeps fp32 masters of trained parameters. Nothing is trained here, so only those that training
    # also computes with in fp32 stay marked as trained.
    exact = {id(item) for layer in _fp32_layers(model) for item in layer.parameters()}
    for item in model.parameters():
        item.requires_grad_(item.requires_grad and id(item) in exact)
    precision = MixedPrecision(model, config.precision)
    precision.cast(device)
    module = AnswerLoss(model, config.loss)
    size = answers_per_batch(config.batch.micro_batch_rows)
    try:
        with accelerate(module, device, precision.dtype):
            yield lambda sequences: score_answers(module, sequences, size, device, world)
    finally:
        precision.restore()
        for name, item in model.named_parameters():
            item.requires_grad_(flags[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _fp32_layers(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the layers whose weights training computes with in fp32, if they are trained."""
    return causal_model(model).get_input_embeddings(), output_layer(model)
