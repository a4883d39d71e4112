"""What saving needs is tried before the first step, in every stage that trains."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from stagecoach_api.training import Checkpoints
from stagecoach_trainer.loop import loop
from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.models.rehearsal import rehearse_saving
from stagecoach_trainer.models.save_check import TrainingLength
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.stages import dpo, ppo, reward_model
from tests.trainer.architectures import tiny
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.models.test_quantized_bases import FP8, quantize
from tests.trainer.stages import test_dpo_stage, test_ppo_stage, test_reward_model_stage
from tests.trainer.stages.makers import Workshop

LORA: dict[str, Any] = {"lora": {"rank": 2}}


def run_pretrain(root: Path) -> None:
    Workshop(root).pretrain(trainable=LORA)


def run_sft(root: Path) -> None:
    Workshop(root).sft(trainable=LORA)


def run_dpo(root: Path) -> None:
    dpo.run(test_dpo_stage.stage(trainable=LORA), test_dpo_stage.context_for(root))


def run_reward_model(root: Path) -> None:
    config = test_reward_model_stage.stage(trainable=LORA)
    reward_model.run(config, test_reward_model_stage.context_for(root))


def run_ppo(root: Path) -> None:
    ppo.run(test_ppo_stage.stage(trainable=LORA), test_ppo_stage.context_for(root))


@pytest.mark.parametrize("run", [run_pretrain, run_sft, run_dpo, run_reward_model, run_ppo])
def test_every_stage_compares_the_free_disk_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Path], None]
) -> None:
    def must_not_train(*arguments: Any) -> None:
        raise AssertionError("a step was made")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    monkeypatch.setattr(loop, "train", must_not_train)
    message = r"checkpoints of [\d,]+ trained parameters and the trained model need .* GB are free; .*keepLast"
    with pytest.raises(UserError, match=message):
        run(tmp_path)


@pytest.mark.parametrize(
    ("checkpoints", "steps", "most"),
    [
        ({}, 100, 3),
        ({"keepLast": 1}, 100, 2),
        ({"everySteps": 60}, 100, 2),
        ({"everySteps": 1000}, 100, 1),
        ({"keepEverySteps": 20}, 100, 8),
    ],
)
def test_room_is_needed_for_the_checkpoints_that_exist_at_a_time(
    checkpoints: dict[str, Any], steps: int, most: int
) -> None:
    assert TrainingLength(Checkpoints.model_validate(checkpoints), steps, 1).most_checkpoints == most


def test_a_model_that_transformers_cannot_write_again_is_refused(tmp_path: Path) -> None:
    """A model dequantised from FP8 was trained to the end, and then could not be saved."""
    tokenizer = make_tokenizer()
    folder = save_base(tmp_path / "base", tokenizer)
    quantize(folder, FP8)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    plain = AutoModelForCausalLM.from_pretrained(folder, config=config)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has 44,192 numbers, and transformers would write 44,364"):
        rehearse_saving(plain, tokenizer, folder)
    rehearse_saving(load_folder(folder), tokenizer, folder)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "phi3", "gemma2"])
def test_fused_and_tied_weights_keep_all_their_numbers(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    rehearse_saving(tiny(kind), tokenizer, tmp_path)
