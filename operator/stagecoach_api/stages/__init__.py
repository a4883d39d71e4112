"""The stage kinds. A new kind is one model here, one trainer module, one line in `STAGE_KINDS`, one example."""

from __future__ import annotations

from stagecoach_api.base import Model
from stagecoach_api.stages.data import DataStage
from stagecoach_api.stages.evaluate import EvaluateStage
from stagecoach_api.stages.export import ExportStage
from stagecoach_api.stages.pretrain import PretrainStage
from stagecoach_api.stages.sft import SftStage
from stagecoach_api.stages.tokenizer import TokenizerStage

STAGE_KINDS: dict[str, type[Model]] = {
    "data": DataStage,
    "tokenizer": TokenizerStage,
    "pretrain": PretrainStage,
    "sft": SftStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
}

__all__ = [
    "STAGE_KINDS",
    "DataStage",
    "EvaluateStage",
    "ExportStage",
    "PretrainStage",
    "SftStage",
    "TokenizerStage",
]
