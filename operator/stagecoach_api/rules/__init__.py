"""Rules that no schema can hold. Each is a function of a draft that yields faults; a new one is added to its tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stagecoach_api.rules.alignment import ALIGNMENT_RULES
from stagecoach_api.rules.draft import Draft, Fault
from stagecoach_api.rules.graph import GRAPH_RULES
from stagecoach_api.rules.inputs import INPUT_RULES
from stagecoach_api.rules.rewards import REWARD_RULES
from stagecoach_api.rules.training import TRAINING_RULES

Rule = Callable[[Draft], Iterator[Fault]]

RULES: tuple[Rule, ...] = (*GRAPH_RULES, *INPUT_RULES, *TRAINING_RULES, *ALIGNMENT_RULES, *REWARD_RULES)

__all__ = ["RULES", "Draft", "Fault", "Rule"]
