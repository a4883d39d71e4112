"""The peer's side of the reward-model bench: TRL's `RewardTrainer`. Runs in the peer's environment.

`python -m bench.alignment.reward_peer TASK` prints seconds and loss of every step as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from bench.alignment import preference_task as task


class _Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())


def settings(folder: str) -> RewardConfig:
    """Return settings for the same training as ours, with the fastest that RewardTrainer has on a CPU."""
    return RewardConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=task.LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        per_device_train_batch_size=task.PAIRS,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def main() -> None:
    """Train, and print what it came to."""
    folder = Path(sys.argv[1])
    transformers_logging.set_verbosity_error()
    pairs = [pair for step in task.read_steps(folder) for pair in step]
    backend = Tokenizer(models.WordLevel({"<pad>": task.PADDING}, unk_token="<pad>"))  # noqa: S106 - no secret
    clock = _Clock()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        trainer = RewardTrainer(
            model=LlamaForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32),
            args=settings(output),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>"),  # noqa: S106
            train_dataset=Dataset.from_dict(
                {"chosen_ids": [better for better, _ in pairs], "rejected_ids": [worse for _, worse in pairs]}
            ),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [after - before for before, after in zip(clock.ended, clock.ended[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
