"""A base with a list of named chat templates: trained from, and saved with all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stagecoach_trainer.stages import dpo, reward_model
from tests.trainer.models.makers import make_tokenizer, save_base
from tests.trainer.stages import test_dpo_stage, test_reward_model_stage
from tests.trainer.stages.makers import Workshop

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
NAMED = {"default": TURNS + "{% if add_generation_prompt %}assistant: {% endif %}", "rag": "Documents. " + TURNS}


def named_base(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NAMED
    return save_base(folder, tokenizer)


def run_pretrain(root: Path) -> Path:
    workshop = Workshop(root)
    workshop.inputs["base"] = named_base(root / "named")
    return workshop.pretrain(budget={"steps": 1})[1]


def run_dpo(root: Path) -> Path:
    context = test_dpo_stage.context_for(root, base=named_base(root / "named"))
    dpo.run(test_dpo_stage.stage(template=None, budget={"steps": 1}), context)
    return context.output


def run_reward_model(root: Path) -> Path:
    context = test_reward_model_stage.context_for(root, base=named_base(root / "named"))
    reward_model.run(test_reward_model_stage.stage(template=None, budget={"steps": 1}), context)
    return context.output


@pytest.mark.parametrize("run", [run_pretrain, run_dpo, run_reward_model])
def test_all_named_templates_are_saved(tmp_path: Path, run: Callable[[Path], Path]) -> None:
    """NeMo Automodel#1696, llama.cpp#6484: the stage did all its work, and then failed when it saved the vocabulary."""
    saved: Any = AutoTokenizer.from_pretrained(run(tmp_path))
    assert saved.chat_template == NAMED
