"""Guards: figures of an update that say training goes wrong, each with the reason people know it by.

LESSONS of others: negative KL (trl#417, 3 of 10 seeds), collapse after some thousand steps, answers that never end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagecoach_api.kinds.ppo import Guards


@dataclass(frozen=True)
class UpdateFigures:
    """What the guards look at after the answers of an update are judged."""

    kl: float
    """Mean over answers of the summed log-ratio to the reference, in nats."""

    entropy: float
    """Mean per token, in nats."""

    ended_share: float
    length: float
    """Mean tokens of an answer."""

    max_abs_reward: float
    reward_deviation: float
    value_loss: float
    """Mean per token, of the critic before it learns from these answers."""


@dataclass(frozen=True)
class Watch:
    """How long each sign has lasted, and the length answers had at first."""

    first_length: float | None = None
    lasting: Mapping[str, int] = field(default_factory=dict)
    """Updates in a row, by guard."""

    @property
    def longest(self) -> int:
        """Updates for which the sign that has lasted longest has been there; 0: there is none."""
        return max(self.lasting.values(), default=0)

    def after(self, figures: UpdateFigures, limits: Guards) -> Watch:
        """Return the watch after one more update."""
        first = figures.length if self.first_length is None else self.first_length
        signs = broken(figures, limits, first)
        return Watch(first, {name: self.lasting.get(name, 0) + 1 for name in signs})

    def reasons(self, figures: UpdateFigures, limits: Guards) -> list[str]:
        """Return a sentence for each sign that has lasted as long as `patience`."""
        signs = broken(figures, limits, self.first_length or figures.length)
        return [
            f"{sentence} (`guards.{name}`, for {self.lasting[name]} updates)"
            for name, sentence in signs.items()
            if self.lasting.get(name, 0) >= limits.patience
        ]


def broken(figures: UpdateFigures, limits: Guards, first_length: float) -> dict[str, str]:
    """Return by guard what is wrong with an update, in words."""
    factor = figures.length / first_length if first_length else 1.0
    checks: list[tuple[str, float | None, float, bool, str]] = [
        ("minKl", limits.min_kl, figures.kl, True, "negative KL: the policy's samples are not from the policy"),
        ("maxKl", limits.max_kl, figures.kl, False, "KL explosion: the policy has left the reference"),
        ("minEntropy", limits.min_entropy, figures.entropy, True, "entropy collapse: the policy says one thing only"),
        ("minEndedShare", limits.min_ended_share, figures.ended_share, True, "answers no longer end by themselves"),
        ("maxLengthFactor", limits.max_length_factor, factor, False, "length explosion"),
        ("minLengthFactor", limits.min_length_factor, factor, True, "length collapse"),
        ("maxAbsReward", limits.max_abs_reward, figures.max_abs_reward, False, "reward out of range"),
        ("maxValueLoss", limits.max_value_loss, figures.value_loss, False, "value loss explosion"),
    ]
    found = {}
    for name, limit, value, is_floor, words in checks:
        if limit is not None and (value < limit if is_floor else value > limit):
            found[name] = f"{words}: {value:.4g} is {'below' if is_floor else 'above'} {limit:g}"
    floor = limits.min_reward_deviation
    if floor is not None and figures.reward_deviation <= floor:
        found["minRewardDeviation"] = (
            f"constant reward: a deviation of {figures.reward_deviation:.4g} is not above {floor:g}"
        )
    return found
