"""Sums over the answers of an update, from which its metrics, guards and whitening are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stagecoach_trainer.generation.sampling import Sampled
from stagecoach_trainer.losses.advantages import Whitening
from stagecoach_trainer.ppo.experience import Experience
from stagecoach_trainer.ppo.guards import UpdateFigures
from stagecoach_trainer.rewards.term import Completion, Score
from stagecoach_trainer.runtime.collectives import max_over_ranks, sum_over_ranks
from stagecoach_trainer.runtime.context import World


@dataclass
class Tally:
    """Sums over answers: of one rank while they are made, of all ranks after `sum_over_world`.

    The fields are stored with a stopped rank's answers (`SavedRollouts`), so their names are part of a file format.
    """

    answers: int = 0
    tokens: int = 0
    """Tokens of answers."""
    model_tokens: int = 0
    """Tokens of prompts and answers."""
    ended: int = 0
    empty: int = 0
    """Answers without any text."""
    longest: int = 0
    reward: float = 0.0
    reward_squares: float = 0.0
    max_abs_reward: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    value_error: float = 0.0
    advantage: float = 0.0
    advantage_squares: float = 0.0
    terms: tuple[float, ...] = ()
    """Sum of each reward term's values."""
    names: tuple[str, ...] = ()

    def count(self, experience: Experience, answer: Sampled, completion: Completion, score: Score) -> None:
        """Add one answer. KL, entropy and value error are added per batch, where they are computed."""
        self.answers += 1
        self.tokens += len(experience.answer)
        self.model_tokens += experience.num_tokens
        self.longest = max(self.longest, experience.num_tokens)
        self.ended += answer.ended
        self.empty += not completion.answer.strip()
        self.reward += score.total
        self.reward_squares += score.total**2
        self.max_abs_reward = max(self.max_abs_reward, abs(score.total))
        # In fp64: the variance is a small difference of these sums.
        self.advantage += float(experience.advantages.astype(np.float64).sum())
        self.advantage_squares += float(np.square(experience.advantages.astype(np.float64)).sum())
        self.terms = tuple(old + score.terms[name] for old, name in zip(self.terms, self.names, strict=True))

    def whitening(self) -> Whitening:
        return Whitening.of(self.tokens, self.advantage, self.advantage_squares)

    def figures(self) -> UpdateFigures:
        mean = self.reward / self.answers
        return UpdateFigures(
            kl=self.kl / self.answers,
            entropy=self.entropy / self.tokens,
            ended_share=self.ended / self.answers,
            length=self.tokens / self.answers,
            max_abs_reward=self.max_abs_reward,
            # Rounding can make the difference of the moments slightly negative.
            reward_deviation=max(0.0, self.reward_squares / self.answers - mean**2) ** 0.5,
            value_loss=self.value_error / self.tokens,
        )

    def report(self) -> dict[str, float]:
        """Return the update's figures by metric name."""
        figures = self.figures()
        terms = {f"reward.{name}": value / self.answers for name, value in zip(self.names, self.terms, strict=True)}
        return {
            "reward": self.reward / self.answers,
            "rewardDeviation": figures.reward_deviation,
            **terms,
            "kl": figures.kl,
            "entropy": figures.entropy,
            "endedShare": figures.ended_share,
            "emptyShare": self.empty / self.answers,
            "answerTokens": figures.length,
        }


def sum_over_world(tally: Tally, world: World) -> Tally:
    """Return the sums over all ranks, on every rank."""
    if world.size == 1:
        return tally
    # One reduction for all sums: each one waits for the slowest rank.
    counts = ("answers", "tokens", "model_tokens", "ended", "empty")
    sums = ("reward", "reward_squares", "kl", "entropy", "value_error", "advantage", "advantage_squares")
    totals = sum_over_ranks([float(getattr(tally, name)) for name in (*counts, *sums)] + list(tally.terms), world)
    longest, extreme = max_over_ranks([float(tally.longest), tally.max_abs_reward], world)
    whole: dict[str, Any] = dict(zip(counts, map(round, totals), strict=False))
    real: dict[str, Any] = dict(zip(sums, totals[len(counts) :], strict=False))
    terms = tuple(totals[len(counts) + len(sums) :])
    return Tally(**whole, **real, longest=round(longest), max_abs_reward=extreme, terms=terms, names=tally.names)
