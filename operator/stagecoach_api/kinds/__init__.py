"""The stage kinds. A new kind is one model here, one trainer module, one line in `STAGE_KINDS`, one example."""

from __future__ import annotations

from stagecoach_api.base import Model
from stagecoach_api.kinds.data import DataStage
from stagecoach_api.kinds.dpo import DpoStage
from stagecoach_api.kinds.evaluate import EvaluateStage
from stagecoach_api.kinds.export import ExportStage
from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.kinds.pretrain import PretrainStage
from stagecoach_api.kinds.reward_model import RewardModelStage
from stagecoach_api.kinds.sft import SftStage
from stagecoach_api.kinds.tokenizer import TokenizerStage
from stagecoach_api.training import Training

STAGE_KINDS: dict[str, type[Model]] = {
    "data": DataStage,
    "tokenizer": TokenizerStage,
    "pretrain": PretrainStage,
    "sft": SftStage,
    "rewardModel": RewardModelStage,
    "ppo": PpoStage,
    "dpo": DpoStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
}

TRAINING_KINDS = frozenset(kind for kind, model in STAGE_KINDS.items() if issubclass(model, Training))
"""Kinds that run as several ranks."""

__all__ = [
    "STAGE_KINDS",
    "TRAINING_KINDS",
    "DataStage",
    "DpoStage",
    "EvaluateStage",
    "ExportStage",
    "PpoStage",
    "PretrainStage",
    "RewardModelStage",
    "SftStage",
    "TokenizerStage",
]
