"""Rewards: the terms that score an answer, and their weighted sum.

`term` defines what a term is; each other module implements one kind of term or part of one, and `total` builds a sum
from the configuration. Terms score text, not tokens, so they do not depend on the policy's vocabulary. This package
may import `models`, `samples`, `data`, `text` and everything below them.
"""

from stagecoach_trainer.rewards.term import Completion, Score
from stagecoach_trainer.rewards.total import RewardSum

__all__ = ["Completion", "RewardSum", "Score"]
