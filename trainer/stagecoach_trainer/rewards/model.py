"""The term of a reward model. It reads text, not tokens, so its vocabulary need not be the policy's: prompt and answer
are rendered by its own chat template and encoded by its own vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from stagecoach_trainer.models.reward import RewardModel
from stagecoach_trainer.rewards.judged import Judged, Term


class ModelTerm(Term):
    """What a reward model says."""

    def __init__(self, model: RewardModel, batch_rows: int) -> None:
        self.model = model
        self._batch_rows = batch_rows

    def values(self, batch: Sequence[Judged]) -> list[float]:
        return self.model.score_texts([(judged.prompt, judged.answer) for judged in batch], self._batch_rows)
