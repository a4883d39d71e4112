"""The objective of DPO, IPO and KTO: from groups of answers to a summed loss.

B sequences of prompt and answer, P pairs, M mismatched sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stagecoach_api.kinds.dpo import DirectLoss, SigmoidLoss
from stagecoach_trainer.align.groups import pair_rows, sequences_of
from stagecoach_trainer.align.mismatched import PointedUnit
from stagecoach_trainer.align.reference_table import ReferenceTable
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.objective import NUM_PROVED, UnpackedObjective
from stagecoach_trainer.kernels.answer_log_probs import AnswerBatch, AnswerModel, collate_answers
from stagecoach_trainer.kernels.causal import DecoderLoss
from stagecoach_trainer.losses.direct import ipo_losses, kto_losses, log_ratios, reference_point, sigmoid_losses
from stagecoach_trainer.samples.groups import Counting, TokenSequence
from stagecoach_trainer.samples.preferences import Grouping


def grouping_of(loss: DirectLoss) -> Grouping:
    """Return the unit of training: a single answer for KTO, else a pair."""
    return Grouping.PAIRS if loss.kto is None else Grouping.ANSWERS


def counting_of(loss: DirectLoss) -> Counting:
    """Return the unit over which the loss is averaged: answers for KTO, else pairs."""
    return Counting.PAIRS if loss.kto is None else Counting.ANSWERS


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferencePointBatch:
    """The sequences from which KTO's reference point of one step is estimated."""

    step: int
    parts: tuple[AnswerBatch, ...]
    """The mismatched sequences, one batch per forward pass."""

    reference: Tensor
    """Log-probability of each under the reference, in nats, fp64 [M]."""


@dataclass(frozen=True)
class DirectBatch:
    """Whole groups as one micro-batch."""

    answers: AnswerBatch
    reference: Tensor
    """Log-probability of each answer under the reference, in nats, fp64 [B]."""

    better: Tensor
    """Row of each pair's better answer [P]."""

    worse: Tensor
    """Row of each pair's worse answer [P]."""

    liked: Tensor
    """Whether each single answer is liked [B], bool; empty for pairs."""

    num_targets: int
    """This micro-batch's share of the loss's divisor: its number of pairs or answers."""

    point: ReferencePointBatch | None = None
    """None if the loss has no reference point or the micro-batch is empty."""

    @property
    def tokens(self) -> Tensor:
        return self.answers.tokens

    def to(self, device: torch.device) -> DirectBatch:
        if device.type == "cpu":
            return self
        # Copies from page-locked memory (`pinned`) do not block, so they overlap with the CPU's work.
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), lambda answers: answers.to(device))

    def pinned(self) -> DirectBatch:
        return self._each(lambda tensor: tensor.pin_memory(), lambda answers: answers.pinned())

    def _each(self, tensor: Callable[[Tensor], Tensor], answers: Callable[[AnswerBatch], AnswerBatch]) -> DirectBatch:
        point = self.point
        if point is not None:
            parts = tuple(answers(part) for part in point.parts)
            point = ReferencePointBatch(point.step, parts, tensor(point.reference))
        return DirectBatch(
            answers(self.answers),
            tensor(self.reference),
            tensor(self.better),
            tensor(self.worse),
            tensor(self.liked),
            self.num_targets,
            point,
        )


def prompt_and_answer(sequence: TokenSequence) -> tuple[Ids, Ids]:
    """Return the tokens that are only read and those that are predicted.

    Of a sequence without a prompt, the first token has no context to be predicted from, so it is only read.
    """
    first = max(1, sequence.num_prompt)
    return sequence.ids[:first], sequence.ids[first:]


def collate_sequences(sequences: Sequence[TokenSequence]) -> AnswerBatch:
    """Collate prompts with their answers. All tokens enter the model, as `Group.num_tokens` counts them."""
    return collate_answers([prompt_and_answer(sequence) for sequence in sequences], whole=True)


# -- the loss ----------------------------------------------------------------------------------------------------------


class AnswerLoss(AnswerModel):
    """Owns a policy; its forward pass returns the loss of a micro-batch of answers."""

    def __init__(self, model: nn.Module, loss: DirectLoss) -> None:
        super().__init__(model)
        self._loss = loss
        self._point: tuple[int, Tensor] | None = None
        """Step of the cached reference point, and the point."""

    def log_probs(self, answers: AnswerBatch) -> Tensor:
        """Return log π(answer | prompt) of each sequence, in nats, fp64 [B]."""
        found, _ = self.token_log_probs(answers)
        # fp64: log-ratios are small differences of two sums over hundreds of tokens.
        each = found.double()
        parts = torch.split(each, list(answers.lengths)) if answers.lengths else ()
        # `stack` rejects an empty list; `each`, empty too, connects the loss to the parameters for the backward pass.
        return torch.stack([part.sum() for part in parts]) if parts else each

    def forward(  # type: ignore[override]
        self, batch: DirectBatch | AnswerBatch | Callable[[], Tensor], scale: float = 1.0
    ) -> Tensor:
        """Return `scale` · the summed loss of the pairs, or of the answers for KTO, an fp32 scalar.

        For an `AnswerBatch` return the log-probabilities instead, fp64 [B]; for a function, its result. ZeRO-3 gathers
        the head's weights only in a forward pass of the module.
        """
        if callable(batch):
            return batch()
        if isinstance(batch, AnswerBatch):
            return self.log_probs(batch)
        point = self._point_of(batch.point) if batch.point is not None else batch.reference.new_zeros(())
        ratios = log_ratios(self.log_probs(batch.answers), batch.reference)
        lengths = torch.tensor(batch.answers.lengths, dtype=ratios.dtype, device=ratios.device)
        losses = direct_losses(self._loss, ratios, lengths, batch.better, batch.worse, batch.liked, point)
        return (scale * losses.sum()).float()

    def _point_of(self, point: ReferencePointBatch) -> Tensor:
        """Return z₀ of a step, computed in the step's first micro-batch: weights change only between steps."""
        if self._point is None or self._point[0] != point.step:
            was_training = self.training
            # Without dropout, whose random numbers differ between ranks: all ranks must compute the same z₀.
            self.eval()
            with torch.no_grad():
                found = [self.log_probs(part) for part in point.parts]
            self.train(was_training)
            # Without mismatched sequences z₀ is 0; the mean of none would be NaN.
            ratios = log_ratios(torch.cat(found), point.reference) if found else point.reference.new_zeros(1)
            self._point = point.step, reference_point(ratios)
        return self._point[1]


def direct_losses(
    loss: DirectLoss, ratios: Tensor, lengths: Tensor, better: Tensor, worse: Tensor, liked: Tensor, point: Tensor
) -> Tensor:
    """Return the loss of each pair [P], or of each answer [B] for KTO.

    Args:
        loss: The stage's `loss`.
        ratios: Log-ratios of the answers, in nats [B].
        lengths: Tokens of the answers [B]; only IPO uses them.
        better: Row of each pair's better answer [P].
        worse: Row of each pair's worse answer [P].
        liked: Whether each answer is liked [B], bool; only KTO uses it.
        point: KTO's z₀, a scalar.
    """
    if loss.kto is not None:
        kto = loss.kto
        return kto_losses(ratios, liked, point, kto.beta, kto.desirable_weight, kto.undesirable_weight)
    if loss.ipo is not None:
        return ipo_losses(ratios[better], ratios[worse], lengths[better], lengths[worse], loss.ipo.beta)
    sigmoid = loss.sigmoid or SigmoidLoss()
    return sigmoid_losses(ratios[better], ratios[worse], sigmoid.beta, sigmoid.label_smoothing)


# -- the objective -----------------------------------------------------------------------------------------------------


class DirectObjective(UnpackedObjective):
    """The training loop's objective for a stage's `loss` over log-ratios."""

    def __init__(self, loss: DirectLoss, references: ReferenceTable, point_rows: int = 1) -> None:
        """`references`: log-probabilities of every sequence that training will use. `point_rows`: mismatched sequences
        per forward pass."""
        self._loss = loss
        self._references = references
        self._point_rows = point_rows

    def module(self, model: nn.Module) -> DecoderLoss:
        return AnswerLoss(model, self._loss)

    def collate(self, units: Sequence[Any]) -> DirectBatch:
        """Collate groups (for KTO: answers with their step's mismatched sequences) as one micro-batch."""
        groups = [group for unit in units for group in (unit.groups if isinstance(unit, PointedUnit) else (unit,))]
        sequences = sequences_of(groups)
        better, worse = pair_rows(groups)
        liked = [group.liked for group in groups if group.liked is not None]
        # All units of a step have the same mismatched sequences, so any of them will do.
        pointed = next((unit for unit in units if isinstance(unit, PointedUnit)), None)
        return DirectBatch(
            collate_sequences(sequences),
            self._references.of(sequences),
            better,
            worse,
            # The empty array is for pairs, which have no `liked`: `concatenate` rejects an empty list.
            torch.from_numpy(np.concatenate([np.empty(0, np.bool_), *liked])),
            sum(group.num_targets for group in groups),
            None if pointed is None else self._collate_point(pointed),
        )

    def samples(self, units: Sequence[Any]) -> Sequence[Ids]:
        groups = [group for unit in units for group in (unit.groups if isinstance(unit, PointedUnit) else (unit,))]
        return [sequence.ids for sequence in sequences_of(groups[:NUM_PROVED])]

    def _collate_point(self, unit: PointedUnit) -> ReferencePointBatch:
        sequences, size = unit.sequences, self._point_rows
        parts = tuple(collate_sequences(sequences[at : at + size]) for at in range(0, len(sequences), size))
        return ReferencePointBatch(unit.step, parts, self._references.of(sequences))
