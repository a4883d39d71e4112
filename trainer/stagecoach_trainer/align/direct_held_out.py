"""Held-out measurements of DPO, IPO and KTO: do the rewards that the policy implies rank answers as people did?

N answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stagecoach_api.kinds.dpo import DirectLoss
from stagecoach_trainer.align.answer_scores import answers_per_batch, score_answers
from stagecoach_trainer.align.direct_objective import direct_losses, prompt_and_answer
from stagecoach_trainer.align.groups import pair_rows, sequences_of
from stagecoach_trainer.align.mismatched import mismatched
from stagecoach_trainer.align.reference_table import ReferenceTable, windows
from stagecoach_trainer.loop.job import Report
from stagecoach_trainer.losses.direct import log_ratios, reference_point
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.samples.groups import Group, TokenSequence


class DirectPreferenceSet:
    """A named set of held-out preferences (a `Measurable`)."""

    def __init__(
        self, name: str, groups: Sequence[Group], loss: DirectLoss, capacity: int, references: ReferenceTable
    ) -> None:
        """`capacity`: maximum tokens of prompt and answer. `references`: must contain all of `sequences` before the
        first measurement."""
        self.name = name
        self.groups = tuple(groups)
        self._loss = loss
        self._references = references
        self._answers = sequences_of(groups)
        self._mismatched = [] if loss.kto is None else mismatched(self._answers, capacity)

    @property
    def sequences(self) -> Iterator[TokenSequence]:
        """The sequences that the reference must have scored."""
        yield from self._answers
        yield from self._mismatched

    def measure(
        self, module: Any, micro_batch_rows: int, device: torch.device, world: World, report: Report
    ) -> Mapping[str, float]:
        """Return `loss`, `accuracy` and `margin`; see `direct_figures`."""
        policy = ReferenceTable()
        size = answers_per_batch(micro_batch_rows)
        # The windows that the reference was scored in: equal batches round equally, so the initial ratios are exactly
        # 0.
        for window in windows(self.sequences):
            policy.put(window, score_answers(module, window, size, device, world, report))
        ratios = self._ratios(policy, self._answers)
        # A set has its own z₀, from its own prompts: figures then do not depend on the training batch.
        point = reference_point(self._ratios(policy, self._mismatched)) if self._mismatched else ratios.new_zeros(())
        return direct_figures(self._loss, self.groups, ratios, point)

    def _ratios(self, policy: ReferenceTable, sequences: Sequence[TokenSequence]) -> Tensor:
        return log_ratios(policy.of(sequences), self._references.of(sequences))


def direct_figures(loss: DirectLoss, groups: Sequence[Group], ratios: Tensor, point: Tensor) -> dict[str, float]:
    """Return the figures of groups whose answers, in row order, have the log-ratios `ratios` [N].

    An answer's reward is beta times its log-ratio; for IPO, beta times its mean log-ratio per token. `loss` is the mean
    loss. For pairs, `accuracy` is the share whose better answer has the higher reward, and `margin` the mean
    difference. For single answers (KTO), `accuracy` is the share of liked answers with a log-ratio above `point` and
    of others with one below it; `margin` is the mean reward of liked answers minus that of the others, omitted if one
    kind is missing; `point` is the reference point. Ties count ½.
    """
    better, worse = pair_rows(groups)
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
