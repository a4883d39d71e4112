"""What an answer is worth: the terms of a reward and their weighted sum."""

from stagecoach_trainer.rewards.term import Completion, Score
from stagecoach_trainer.rewards.total import RewardSum

__all__ = ["Completion", "RewardSum", "Score"]
