"""Makers for the tests of stages that learn from preferences: records, configurations, contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from stagecoach_trainer.models.reward import RewardModel
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Interrupted
from stagecoach_trainer.samples.scoring import AnsweredConversation, encode_answered
from tests.trainer.data.makers import write_jsonl
from tests.trainer.models.makers import make_context, make_tokenizer, save_base

Config = TypeVar("Config")

WORDS = ("dog", "fox", "word", "task", "model", "quick", "lazy", "next", "brown", "over")
GOOD, BAD = "the dog sleeps", "a fox jumps"

LEARNS: dict[str, Any] = {
    "model": {"uri": "base"},
    "data": [{"uri": "train"}],
    "heldOut": {"sets": [{"name": "toy", "uri": "test"}]},
    "template": {"name": "humanBot"},
    "sequenceLength": 128,
    "batch": {"samples": 8, "microBatchRows": 4},
    "optimizer": {"learningRate": 3e-3},
    "precision": "fp32",
}
"""Settings that the configurations of these stages have in common."""


def some_words(random: np.random.Generator, count: int) -> str:
    """Return random text."""
    return " ".join(random.choice(WORDS, count))


def stop_and_resume(
    run: Callable[[Config, StageContext], object], config: Config, context: StageContext, at: int
) -> None:
    """Run a stage until it is interrupted after step `at`, then run it to its end."""
    report = context.progress.report

    def stop_in_the_middle(activity: str, done: float = 0.0, *rest: Any, **more: Any) -> None:
        report(activity, done, *rest, **more)
        if activity == "train" and done >= at:
            context.stop.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context.progress, "report", stop_in_the_middle)
        with pytest.raises(Interrupted, match="after step"):
            run(config, context)
    context.stop.clear()
    run(config, context)


def write_pairs(path: Path, count: int, seed: int, good: str = GOOD, bad: str = BAD) -> Path:
    """Write pairs in which the answer that contains `good` is preferred; both answers also contain random text."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        prompt, one, two = (some_words(random, 3) for _ in range(3))
        lines.append({"prompt": prompt, "chosen": f"{one} {good}", "rejected": f"{two} {bad}"})
    return write_jsonl(path, lines)


def write_labels(path: Path, count: int, seed: int) -> Path:
    """Write single answers, of which every third is a bad one."""
    random = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        prompt, words = (some_words(random, 3) for _ in range(2))
        good = number % 3 != 0
        lines.append({"prompt": prompt, "completion": f"{words} {GOOD if good else BAD}", "label": good})
    return write_jsonl(path, lines)


def write_rankings(path: Path, count: int, seed: int) -> Path:
    """Write prompts with two to four answers each, the best first."""
    random = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        answers = [some_words(random, 2 + place) for place in range(2 + number % 3)]
        lines.append({"prompt": some_words(random, 2), "answers": answers})
    return write_jsonl(path, lines)


def preference_context(root: Path, kind: str, pairs: tuple[int, int], **inputs: Path) -> StageContext:
    """Return a context with a base model, and so many training and held-out pairs, where `inputs` has no others."""
    root.mkdir(parents=True, exist_ok=True)
    found = {
        "base": inputs.get("base") or save_base(root / "base", make_tokenizer()),
        "train": inputs.get("train") or write_pairs(root / "train.jsonl", pairs[0], seed=1),
        "test": inputs.get("test") or write_pairs(root / "test.jsonl", pairs[1], seed=2),
    }
    return make_context(root, kind, found | inputs)


def rewards_of(
    model: RewardModel, conversations: Sequence[AnsweredConversation], batch_rows: int = 2, domain: str | None = None
) -> list[float]:
    """Return the reward of each answer."""
    ids = encode_answered(model.tokenizer, conversations, model.system_prompt(domain))
    return model.score_ids(ids, batch_rows)
