"""Log-probabilities of many answers under one model, shared out over the ranks.

Batches are cut before they are dealt to ranks: the numbers do not depend on how many ranks there are.
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


def answers_at_once(micro_batch_rows: int | None) -> int:
    """Return how many answers are scored at once: as many as a micro-batch of pairs has."""
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

    `module`: an `AnswerLoss`, computed without dropout. Every rank makes as many forward passes, as ZeRO-3 needs it.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world.size)
    mine = batches[world.rank :: world.size]
    found = torch.zeros(len(sequences), dtype=torch.float64)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for index in range(rounds):
                batch = mine[index] if index < len(mine) else []
                answers = collate_sequences([sequences[place] for place in batch]).to(device)
                found[batch] = module(answers).cpu()
                report(index + 1, rounds)
    finally:
        module.train(was_training)
    if world.size > 1:
        dist.all_reduce(found)
    return found


@contextmanager
def scoring(model: nn.Module, config: DpoStage, world: World) -> Iterator[Scorer]:
    """Put a model on this rank's device, in the number formats that training computes in, for as long as the block
    lasts; afterwards it is as it was, on the CPU.

    Only what training would keep in fp32 is kept so: nothing is trained here, and there are no other masters.
    """
    device = training_device(world)
    flags = {name: item.requires_grad for name, item in model.named_parameters()}
    exact = {id(item) for layer in _kept_exact(model) for item in layer.parameters()}
    for item in model.parameters():
        item.requires_grad_(item.requires_grad and id(item) in exact)
    precision = MixedPrecision(model, config.precision)
    precision.cast(device)
    module = AnswerLoss(model, config.loss)
    size = answers_at_once(config.batch.micro_batch_rows)
    try:
        with accelerate(module, device, precision.dtype):
            yield lambda sequences: score_answers(module, sequences, size, device, world)
    finally:
        precision.restore()
        for name, item in model.named_parameters():
            item.requires_grad_(flags[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _kept_exact(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the layers that training computes with in fp32 where they are trained."""
    return causal_model(model).get_input_embeddings(), output_layer(model)
