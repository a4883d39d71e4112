"""The registry of stage modules: each has `run(config, context) -> StageOutcome`. Imported by name, when needed."""

from __future__ import annotations

STAGE_MODULES: dict[str, str] = {
    "data": "stagecoach_trainer.stages.data",
    "tokenizer": "stagecoach_trainer.stages.tokenizer",
    "pretrain": "stagecoach_trainer.stages.pretrain",
    "sft": "stagecoach_trainer.stages.sft",
    "ppo": "stagecoach_trainer.stages.ppo",
    "rewardModel": "stagecoach_trainer.stages.reward_model",
    "dpo": "stagecoach_trainer.stages.dpo",
    "evaluate": "stagecoach_trainer.stages.evaluate",
    "export": "stagecoach_trainer.stages.export",
}
