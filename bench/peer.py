"""The peer: transformers' Trainer with its own best settings (bf16, fused AdamW) and little logging."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from bench.workload import LEARNING_RATE, Batch, Run, Sample
from stagecoach_trainer.batches.rows import IGNORE


class _Clock(TrainerCallback):
    """Records when each optimiser step ends."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())


class _Samples(Dataset[Sample]):
    """The samples in order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.samples = [sample for batch in batches for sample in batch]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@dataclass(frozen=True)
class Collator:
    """Pads samples to the longest of them, or to `pad_to`."""

    pad_to: int | None = None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        longest = self.pad_to or max(len(sample.tokens) for sample in samples)
        tokens = np.zeros((len(samples), longest), dtype=np.int64)
        labels = np.full((len(samples), longest), IGNORE, dtype=np.int64)
        mask = np.zeros((len(samples), longest), dtype=np.int64)
        for row, sample in enumerate(samples):
            length = len(sample.tokens)
            tokens[row, :length] = sample.tokens
            labels[row, sample.prompt : length] = sample.tokens[sample.prompt :]
            mask[row, :length] = 1
        batch = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if mask.all():
            return batch  # without padding, the Trainer's attention is fastest without a mask
        return {**batch, "attention_mask": torch.from_numpy(mask)}


def train_peer(
    model: LlamaForCausalLM,
    batches: Sequence[Batch],
    folder: Path,
    bf16: bool,
    micro_batch: int,
    pad_to: int | None = None,
) -> Run:
    """Train one epoch over `batches`, `micro_batch` samples at a time; return times and losses."""
    transformers_logging.set_verbosity_error()
    clock = _Clock()
    trainer = Trainer(
        model=model,
        args=arguments(folder, bf16, micro_batch, len(batches[0]) // micro_batch),
        train_dataset=_Samples(batches),
        data_collator=Collator(pad_to),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(np.diff(clock.ended).tolist(), losses)


def arguments(folder: Path, bf16: bool, micro_batch: int, accumulation: int) -> TrainingArguments:
    """Return the Trainer's settings: the same training as ours, with the fastest optimiser it has on a CPU."""
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
