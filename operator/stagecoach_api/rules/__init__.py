"""Rules that no schema can express, for stages of any kind. Each is a function of a draft that yields faults.

Rules of one kind are in its module and declaration.
"""

from __future__ import annotations

from stagecoach_api.draft import Rule
from stagecoach_api.rules.graph import GRAPH_RULES
from stagecoach_api.rules.inputs import INPUT_RULES
from stagecoach_api.rules.rewards import REWARD_RULES
from stagecoach_api.rules.training import TRAINING_RULES

SHARED_RULES: tuple[Rule, ...] = (*GRAPH_RULES, *INPUT_RULES, *TRAINING_RULES, *REWARD_RULES)
