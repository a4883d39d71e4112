"""Guards: limits on figures of an update that indicate known failures of PPO.

A clearly negative mean KL means that the samples do not follow the policy whose log-probabilities are compared: 3 of 10
seeds of TRL's sentiment example failed this way (github.com/huggingface/trl/issues/417). The other guards detect
collapse of entropy, length or reward, and answers that never end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagecoach_api.kinds.ppo import Guards


@dataclass(frozen=True)
class UpdateFigures:
    """The figures that the guards check, once the answers of an update are scored."""

    kl: float
    """Mean over answers of the summed log-ratio to the reference, in nats. An estimate: it can be negative."""

    entropy: float
    """Mean per token, in nats."""

    ended_share: float
    length: float
    """Mean tokens of an answer."""

    max_abs_reward: float
    reward_deviation: float
    value_loss: float
    """Mean per token, of the critic before it is trained on these answers."""


@dataclass(frozen=True)
class Watch:
    """How long each guard has been violated, and the mean length of the first update's answers."""

    first_length: float | None = None
    lasting: Mapping[str, int] = field(default_factory=dict)
    """Consecutive updates of violation, by guard."""

    @property
    def longest(self) -> int:
        """Consecutive updates of the longest current violation; 0 if there is none."""
        return max(self.lasting.values(), default=0)

    def after(self, figures: UpdateFigures, limits: Guards) -> Watch:
        """Return the watch after one more update."""
        # Length limits are relative to the first update, because typical lengths differ between tasks.
        first = figures.length if self.first_length is None else self.first_length
        violations = violated_guards(figures, limits, first)
        return Watch(first, {name: self.lasting.get(name, 0) + 1 for name in violations})

    def reasons(self, figures: UpdateFigures, limits: Guards) -> list[str]:
        """Return a sentence for each guard that has been violated for `patience` updates."""
        violations = violated_guards(figures, limits, self.first_length or figures.length)
        return [
            f"{sentence} (`guards.{name}`, for {self.lasting[name]} updates)"
            for name, sentence in violations.items()
            if self.lasting.get(name, 0) >= limits.patience
        ]


def violated_guards(figures: UpdateFigures, limits: Guards, first_length: float) -> dict[str, str]:
    """Return a description of each violated guard, by the guard's field name."""
    factor = figures.length / first_length if first_length else 1.0
    checks: list[tuple[str, float | None, float, bool, str]] = [
        ("minKl", limits.min_kl, figures.kl, True, "negative KL: the policy's samples are not from the policy"),
        ("maxKl", limits.max_kl, figures.kl, False, "KL explosion: the policy has left the reference"),
        (
            "minEntropy",
            limits.min_entropy,
            figures.entropy,
            True,
            "entropy collapse: answers no longer vary",
        ),
        (
            "minEndedShare",
            limits.min_ended_share,
            figures.ended_share,
            True,
            "answers no longer end: they are truncated",
        ),
        ("maxLengthFactor", limits.max_length_factor, factor, False, "length explosion"),
        ("minLengthFactor", limits.min_length_factor, factor, True, "length collapse"),
        ("maxAbsReward", limits.max_abs_reward, figures.max_abs_reward, False, "reward out of range"),
        ("maxValueLoss", limits.max_value_loss, figures.value_loss, False, "value loss explosion"),
    ]
    violations = {}
    for name, limit, value, is_floor, description in checks:
        if limit is not None and (value < limit if is_floor else value > limit):
            violations[name] = f"{description}: {value:.4g} is {'below' if is_floor else 'above'} {limit:g}"
    # Not strictly below: the default limit is 0, and a deviation of 0 violates it.
    floor = limits.min_reward_deviation
    if floor is not None and figures.reward_deviation <= floor:
        violations["minRewardDeviation"] = (
            f"constant reward: a deviation of {figures.reward_deviation:.4g} is not above {floor:g}"
        )
    return violations
