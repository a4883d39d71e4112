"""DPO, IPO and KTO as the training loop takes them: answers in, a summed loss out.

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
from stagecoach_trainer.align.direct import ipo_losses, kl_point, kto_losses, log_ratios, sigmoid_losses
from stagecoach_trainer.align.mismatched import PointedUnit
from stagecoach_trainer.align.reference_table import ReferenceTable
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.objective import UnpackedObjective
from stagecoach_trainer.kernels.answer_log_probs import AnswerBatch, AnswerModel, collate_answers
from stagecoach_trainer.kernels.causal import DecoderLoss
from stagecoach_trainer.samples.groups import Counting, Group, TokenSequence
from stagecoach_trainer.samples.preferences import Grouping


def grouping_of(loss: DirectLoss) -> Grouping:
    """Return what a unit of training is: one answer for KTO, else a pair."""
    return Grouping.PAIRS if loss.kto is None else Grouping.ANSWERS


def counting_of(loss: DirectLoss) -> Counting:
    """Return what the loss is averaged over."""
    return Counting.PAIRS if loss.kto is None else Counting.ANSWERS


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What KTO's reference point of one step is estimated from."""

    step: int
    parts: tuple[AnswerBatch, ...]
    """The mismatched sequences, as many at once as fit."""

    reference: Tensor
    """Log-probability of each under the reference, fp64 [M]."""


@dataclass(frozen=True)
class DirectBatch:
    """Whole groups as one micro-batch."""

    answers: AnswerBatch
    reference: Tensor
    """Log-probability of each answer under the reference, in nats, fp64 [B]."""

    better: Tensor
    """Row of each pair's better answer [P]."""

    worse: Tensor
    """Row of each pair's other answer [P]."""

    liked: Tensor
    """Whether a single answer is a good one [B], bool; empty where answers come in pairs."""

    num_targets: int
    """What the summed loss is divided by, as far as it lies here: pairs or answers."""

    point: Point | None = None
    """None: the loss has none, or no unit is here."""

    @property
    def tokens(self) -> Tensor:
        return self.answers.tokens

    def to(self, device: torch.device) -> DirectBatch:
        if device.type == "cpu":
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), lambda answers: answers.to(device))

    def pinned(self) -> DirectBatch:
        return self._each(lambda tensor: tensor.pin_memory(), lambda answers: answers.pinned())

    def _each(self, tensor: Callable[[Tensor], Tensor], answers: Callable[[AnswerBatch], AnswerBatch]) -> DirectBatch:
        point = self.point
        if point is not None:
            parts = tuple(answers(part) for part in point.parts)
            point = Point(point.step, parts, tensor(point.reference))
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
    """Return the tokens that nothing is asked of, and those that are predicted: of a sequence without a prompt all but
    the first, which has nothing in front."""
    first = max(1, sequence.num_prompt)
    return sequence.ids[:first], sequence.ids[first:]


def collate_sequences(sequences: Sequence[TokenSequence]) -> AnswerBatch:
    """Lay out prompts with their answers; all tokens enter the model, as groups count them."""
    return collate_answers([prompt_and_answer(sequence) for sequence in sequences], whole=True)


# -- the loss ----------------------------------------------------------------------------------------------------------


class AnswerLoss(AnswerModel):
    """Owns a policy; its forward pass is the loss of a micro-batch of answers."""

    def __init__(self, model: nn.Module, loss: DirectLoss) -> None:
        super().__init__(model)
        self._loss = loss
        self._point: tuple[int, Tensor] | None = None
        """The step that the reference point was found for, and the point."""

    def log_probs(self, answers: AnswerBatch) -> Tensor:
        """Return log π(answer | prompt) of each sequence, in nats, fp64 [B]."""
        found, _ = self.token_log_probs(answers)
        each = found.double()  # a sum of hundreds of tokens, of which a like sum is taken away
        parts = torch.split(each, list(answers.lengths)) if answers.lengths else ()
        return torch.stack([part.sum() for part in parts]) if parts else each

    def forward(self, batch: DirectBatch | AnswerBatch, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        """Return `scale` · the summed loss of the pairs, or of the answers for KTO, an fp32 scalar.

        Of `AnswerBatch` return their log-probabilities, fp64 [B]: only a forward pass makes ZeRO-3 gather the head.
        """
        if isinstance(batch, AnswerBatch):
            return self.log_probs(batch)
        point = self._point_of(batch.point) if batch.point is not None else batch.reference.new_zeros(())
        ratios = log_ratios(self.log_probs(batch.answers), batch.reference)
        lengths = torch.tensor(batch.answers.lengths, dtype=ratios.dtype, device=ratios.device)
        losses = direct_losses(self._loss, ratios, lengths, batch.better, batch.worse, batch.liked, point)
        return (scale * losses.sum()).float()

    def _point_of(self, point: Point) -> Tensor:
        """Return z₀ of a step; weights change between steps only, so that it is found in the first micro-batch."""
        if self._point is None or self._point[0] != point.step:
            was_training = self.training
            self.eval()
            with torch.no_grad():
                found = [self.log_probs(part) for part in point.parts]
            self.train(was_training)
            ratios = log_ratios(torch.cat(found), point.reference) if found else point.reference.new_zeros(1)
            self._point = point.step, kl_point(ratios)
        return self._point[1]


def direct_losses(
    loss: DirectLoss, ratios: Tensor, lengths: Tensor, better: Tensor, worse: Tensor, liked: Tensor, point: Tensor
) -> Tensor:
    """Return the loss of each pair [P], or of each answer [B] for KTO, of log-ratios [B] and answers' lengths [B]."""
    if loss.kto is not None:
        kto = loss.kto
        return kto_losses(ratios, liked, point, kto.beta, kto.desirable_weight, kto.undesirable_weight)
    if loss.ipo is not None:
        return ipo_losses(ratios[better], ratios[worse], lengths[better], lengths[worse], loss.ipo.beta)
    sigmoid = loss.sigmoid or SigmoidLoss()
    return sigmoid_losses(ratios[better], ratios[worse], sigmoid.beta, sigmoid.label_smoothing)


# -- the objective -----------------------------------------------------------------------------------------------------


class DirectObjective(UnpackedObjective):
    """Preferences as a loss over log-ratios, by the stage's `loss`."""

    def __init__(self, loss: DirectLoss, references: ReferenceTable, point_rows: int = 1) -> None:
        """`references`: of every sequence that will be seen. `point_rows`: mismatched sequences computed at once."""
        self._loss = loss
        self._references = references
        self._point_rows = point_rows

    def module(self, model: nn.Module) -> DecoderLoss:
        return AnswerLoss(model, self._loss)

    def collate(self, units: Sequence[Any]) -> DirectBatch:
        """Lay out groups, or for KTO units of answers with the step's mismatched sequences, as one micro-batch."""
        groups = [group for unit in units for group in (unit.groups if isinstance(unit, PointedUnit) else (unit,))]
        sequences = [sequence for group in groups for sequence in group.sequences]
        firsts = np.cumsum([0, *(len(group.sequences) for group in groups)])
        better = [group.better + first for group, first in zip(groups, firsts[:-1], strict=True)]
        worse = [group.worse + first for group, first in zip(groups, firsts[:-1], strict=True)]
        liked = [group.liked for group in groups if group.liked is not None]
        pointed = next((unit for unit in units if isinstance(unit, PointedUnit)), None)
        return DirectBatch(
            collate_sequences(sequences),
            self._references.of(sequences),
            _joined(better, np.int64),
            _joined(worse, np.int64),
            _joined(liked, np.bool_),
            sum(group.num_targets for group in groups),
            None if pointed is None else self._collate_point(pointed),
        )

    def _collate_point(self, unit: PointedUnit) -> Point:
        sequences, size = unit.sequences, self._point_rows
        parts = tuple(collate_sequences(sequences[at : at + size]) for at in range(0, len(sequences), size))
        return Point(unit.step, parts, self._references.of(sequences))


def _joined(parts: Sequence[Any], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]))


def sequences_of(groups: Sequence[Group]) -> list[TokenSequence]:
    """Return the answers of all groups, one after the other."""
    return [sequence for group in groups for sequence in group.sequences]
