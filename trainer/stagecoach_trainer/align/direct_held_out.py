"""Held-out preferences for DPO, IPO and KTO: does the policy imply the rewards that people do?

N answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stagecoach_api.kinds.dpo import DirectLoss
from stagecoach_trainer.align.answer_scores import answers_at_once, score_answers
from stagecoach_trainer.align.direct import kl_point, log_ratios
from stagecoach_trainer.align.direct_objective import direct_losses, prompt_and_answer, sequences_of
from stagecoach_trainer.align.held_out import pair_places
from stagecoach_trainer.align.mismatched import mismatched
from stagecoach_trainer.align.reference_table import ReferenceTable, windows
from stagecoach_trainer.loop.job import Report
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.samples.groups import Group, TokenSequence


class DirectSet:
    """Held-out preferences with the name their figures get (a `Measurable`)."""

    def __init__(
        self, name: str, groups: Sequence[Group], loss: DirectLoss, capacity: int, references: ReferenceTable
    ) -> None:
        """`capacity`: tokens that prompt and answer may have. `references`: has all of `sequences` once measuring
        begins."""
        self.name = name
        self.groups = tuple(groups)
        self._loss = loss
        self._references = references
        self._answers = sequences_of(groups)
        self._mismatched = [] if loss.kto is None else mismatched(self._answers, capacity)

    @property
    def sequences(self) -> Iterator[TokenSequence]:
        """What the reference must have scored."""
        yield from self._answers
        yield from self._mismatched

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `loss`, `accuracy` and `margin`, as `direct_figures` says."""
        policy = ReferenceTable()
        size = answers_at_once(micro_batch_rows)
        for window in windows(self.sequences):  # the reference's own batches: at the start the ratios are exactly 0
            policy.put(window, score_answers(module, window, size, device, world, report))
        ratios = self._ratios(policy, self._answers)
        point = kl_point(self._ratios(policy, self._mismatched)) if self._mismatched else ratios.new_zeros(())
        return direct_figures(self._loss, self.groups, ratios, point)

    def _ratios(self, policy: ReferenceTable, sequences: Sequence[TokenSequence]) -> Tensor:
        return log_ratios(policy.of(sequences), self._references.of(sequences))


def direct_figures(loss: DirectLoss, groups: Sequence[Group], ratios: Tensor, point: Tensor) -> dict[str, float]:
    """Return the figures of groups whose answers have the log-ratios `ratios` [N], one after the other.

    An answer's reward is beta times its log-ratio; for IPO, times its mean log-ratio per token. `loss` is the mean.
    Of pairs, `accuracy` is the share whose better answer has the greater reward (an equal pair is half right), and
    `margin` the mean difference. Of single answers (KTO), `accuracy` is the share of liked ones with a log-ratio above
    `point` and of others below it (at it is half right), and `margin` is the difference of the mean rewards of both,
    left out where there is one kind only; `point` is the reference point.
    """
    better, worse = pair_places(groups)
    lengths = torch.tensor([len(prompt_and_answer(item)[1]) for item in sequences_of(groups)], dtype=ratios.dtype)
    liked = torch.tensor([bool(value) for group in groups if group.liked is not None for value in group.liked])
    losses = direct_losses(loss, ratios, lengths, better, worse, liked, point)
    figures = {"loss": float(losses.mean())}
    if loss.kto is not None:
        lead = torch.where(liked, ratios - point, point - ratios)
        figures |= {"accuracy": _share_above_zero(lead), "point": float(point)}
        if bool(liked.any()) and not bool(liked.all()):
            figures["margin"] = loss.kto.beta * float(ratios[liked].mean() - ratios[~liked].mean())
        return figures
    rewards = _beta(loss) * (ratios if loss.ipo is None else ratios / lengths)
    lead = rewards[better] - rewards[worse]
    return figures | {"accuracy": _share_above_zero(lead), "margin": float(lead.mean())}


def _beta(loss: DirectLoss) -> float:
    chosen = loss.sigmoid or loss.ipo or loss.kto
    return 0.0 if chosen is None else chosen.beta


def _share_above_zero(lead: Tensor) -> float:
    return float(((lead.sign() + 1.0) / 2.0).mean())
