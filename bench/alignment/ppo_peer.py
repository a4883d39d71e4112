"""The peer's side of the PPO bench: `trl.experimental.ppo`. Runs in the peer's environment, without our packages.

`python -m bench.alignment.ppo_peer TASK SEED PRECISION UPDATES` prints reward, KL and seconds of every update as one
line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.alignment import ppo_task as task


class _Recorder(TrainerCallback):
    """Records when each update ends, its mean reward and its KL."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.rewards: list[float] = []
        self.kl: list[float] = []
        self.worked: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())
        self.worked.append(time.process_time())
        self.rewards.append(state.log_history[-1]["objective/scores"])
        self.kl.append(state.log_history[-1]["objective/kl"])


class _Vocabulary(SimpleNamespace):
    """The attributes that PPOTrainer reads from a tokenizer."""

    pad_token_id = task.PADDING
    eos_token_id = -1

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> None:
        """Save nothing."""


def collate(prompts: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad prompts on the left to the longest of them."""
    longest = max(len(prompt["input_ids"]) for prompt in prompts)
    rows = [[task.PADDING] * (longest - len(prompt["input_ids"])) + prompt["input_ids"] for prompt in prompts]
    return {"input_ids": torch.tensor(rows)}


def settings(folder: str, seed: int, precision: str, updates: int) -> PPOConfig:
    """Return the task as PPOTrainer's settings, with the fastest that it has on a CPU."""
    return PPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=task.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        per_device_train_batch_size=task.SAMPLES,
        gradient_accumulation_steps=1,
        total_episodes=task.SAMPLES * updates,
        num_ppo_epochs=task.EPOCHS,
        num_mini_batches=task.MINI_BATCHES,
        local_rollout_forward_batch_size=task.SAMPLES,
        num_sample_generations=0,
        response_length=task.ANSWER,
        temperature=1.0,
        kl_coef=task.KL,
        cliprange=task.CLIP,
        cliprange_value=task.CLIP,
        vf_coef=task.VALUE_WEIGHT,
        gamma=task.GAMMA,
        lam=task.LAMBDA,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def main() -> None:
    """Train and print the measurements."""
    folder, seed, precision = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(torch.get_num_threads())
    prompts = json.loads((folder / "prompts.json").read_text())
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        trainer = PPOTrainer(
            args=settings(output, seed, precision, int(sys.argv[4])),
            processing_class=_Vocabulary(),
            model=LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
            ref_model=LlamaForCausalLM.from_pretrained(folder / "policy", dtype=dtype),
            reward_model=LlamaForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype),
            value_model=LlamaForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            data_collator=collate,
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    found = {"rewards": recorder.rewards, "kl": recorder.kl}
    print(json.dumps(found | {"seconds": task.gaps(recorder.ended), "cpuSeconds": task.gaps(recorder.worked)}))


if __name__ == "__main__":
    main()
