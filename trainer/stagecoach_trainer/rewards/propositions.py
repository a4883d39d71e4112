"""Rule-based rewards (arXiv 2411.01111): statements about an answer that a language model judges true or false.

Each statement has a weight, which is given or fitted to ranked answers by a hinge loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from stagecoach_api.references import NamedSource
from stagecoach_api.rewards import PropositionReward
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Record, as_message
from stagecoach_trainer.rewards.endpoint import Chat, Judge
from stagecoach_trainer.rewards.hinge import Fitted, Matrix, fit_weights
from stagecoach_trainer.rewards.judge_prompts import (
    QUOTED,
    VerdictCounts,
    ask_with_retry,
    chat_of,
    quote,
    read_yes_or_no,
)
from stagecoach_trainer.rewards.term import Completion, Term, prompt_text
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.messages import described

SYSTEM = f"You judge whether a statement on an answer of a language model is true. {QUOTED} Reply with yes or no only."
AGAIN = "Reply with the one word yes or the one word no."


@dataclass(frozen=True)
class _Pair:
    """Two answers to one prompt, by their indices in the list of all answers."""

    better: int
    worse: int


class PropositionsTerm(Term):
    """The sum of the weights of the statements that are true.

    Raises UserError if the key cannot be read; `prepare` raises it if the ranked answers do not determine the weights.
    """

    def __init__(self, config: PropositionReward, where: str, context: StageContext) -> None:
        self._config = config
        self._where = where
        self._context = context
        self._judge = Judge(config.endpoint, f"{where}.endpoint", context.world)
        self._counts = VerdictCounts()
        self._ordered: float | None = None
        self._fixed = [item.weight for item in config.propositions]
        self.weights = np.array([np.nan if weight is None else weight for weight in self._fixed])
        """Weights in the order of the statements [k]; NaN for those still to be fitted."""

    def prepare(self) -> bool:
        source = self._config.fit
        if source is None or np.isfinite(self.weights).all():
            return False
        self._fit(source, self._context)
        return True

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return [float(value) for value in self.features(batch) @ self.weights]

    def features(self, batch: Sequence[Completion]) -> Matrix:
        """Return for each answer and statement 1 if it is true, else 0, [answers, k]. No verdict counts as no."""
        chats = [self._chat(completion, item.text) for completion in batch for item in self._config.propositions]
        verdicts = ask_with_retry(self._judge, chats, read_yes_or_no, AGAIN, self._counts)
        values = np.array([1.0 if verdict else 0.0 for verdict in verdicts])
        return values.reshape(len(batch), len(self._config.propositions))

    @staticmethod
    def _chat(completion: Completion, statement: str) -> Chat:
        return chat_of(
            SYSTEM,
            f"Prompt: {quote(prompt_text(completion.prompt))}\n"
            f"Answer: {quote(completion.answer)}\n"
            f"Statement: {statement}\nIs the statement true of the answer? Reply with yes or no.",
        )

    # -- weights -------------------------------------------------------------------------------------------------------

    def _fit(self, source: NamedSource, context: StageContext) -> None:
        """Fit the weights on rank 0 and broadcast them: a judge may answer two ranks differently."""
        if context.world.is_main:
            fitted = self._fit_here(source, context)
            self.weights, self._ordered = fitted.weights, fitted.ordered
        self.weights, self._ordered = _from_main(context, self.weights, self._ordered)

    def _fit_here(self, source: NamedSource, context: StageContext) -> Fitted:
        context.progress.report("fit reward")
        answers, pairs = ranked_answers(source, context)
        if not pairs:
            raise UserError(
                f"{self._where}.fit: `{source.name}` has no prompt with two answers of different rank; add some"
            )
        with self._judge.for_all_ranks():
            features = self.features(answers)
        differences = np.stack([features[pair.better] - features[pair.worse] for pair in pairs])
        if not differences.any():
            raise UserError(
                f"{self._where}.fit: {self._config.endpoint.model} judges every statement equally for the better and "
                f"the worse answer, in all {len(pairs)} pairs of `{source.name}`; give statements that distinguish them"
            )
        return fit_weights(differences, self._fixed)

    # -- state ---------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        return self._counts.with_requests(self._judge)

    def load_counts(self, counts: Mapping[str, int]) -> None:
        self._counts.load(counts, self._judge)

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights.tolist(), "ordered": self._ordered}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.weights = np.array(state["weights"], np.float64)
        self._ordered = None if state["ordered"] is None else float(state["ordered"])

    def figures(self, counts: Mapping[str, int]) -> dict[str, float]:
        found: dict[str, float] = {"requests": counts["requests"], "unparsable": counts["unparsable"]}
        if self._ordered is not None:
            found["orderedPairs"] = self._ordered
        names = [item.name for item in self._config.propositions]
        return found | {f"weight.{name}": float(weight) for name, weight in zip(names, self.weights, strict=True)}


def ranked_answers(source: NamedSource, context: StageContext) -> tuple[list[Completion], list[_Pair]]:
    """Return all answers of the records, and the pairs of answers with different ranks."""
    answers: list[Completion] = []
    pairs: list[_Pair] = []
    for record in read_records(context, source):
        if not record.answers:
            raise UserError(f"{record.where}: no ranked answers; give `ranked`, `pairs` or `comparison` records")
        first = len(answers)
        answers += [
            Completion(_prompt_of(record), described(as_message(answer.turn)), num_tokens=0, ended=True)
            for answer in record.answers
        ]
        for (left, one), (right, other) in combinations(enumerate(record.answers, first), 2):
            if one.rank is not None and other.rank is not None and one.rank != other.rank:
                pairs.append(_Pair(left, right) if one.rank < other.rank else _Pair(right, left))
    return answers, pairs


def _prompt_of(record: Record) -> tuple[dict[str, Any], ...]:
    return tuple(map(as_message, record.messages))


def _from_main(context: StageContext, weights: Matrix, ordered: float | None) -> tuple[Matrix, float | None]:
    """Return rank 0's values on every rank."""
    if context.world.size == 1:
        return weights, ordered
    import torch
    import torch.distributed as dist

    values = torch.tensor([*weights.tolist(), ordered or 0.0], dtype=torch.float64)
    dist.broadcast(values, 0)
    *fitted, share = values.tolist()
    return np.array(fitted, np.float64), share
