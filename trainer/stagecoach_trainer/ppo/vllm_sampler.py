"""Answers by vLLM (arXiv 2309.06180) instead of our own decoding, if the image has vLLM installed.

This module is tested only against a fake of vLLM's interface; it has not been run with vLLM itself.

Once per update the policy (for LoRA, only the adapter) is written to a folder, which the engine reloads. vLLM samples
with its own random numbers, seeded per answer, and its kernels may round differently from run to run. Old
log-probabilities still come from the training forward pass, but a resumed run is not guaranteed to be bit-identical.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.generation.sampling import Decoding, Sampled
from stagecoach_trainer.kernels.causal import CausalLoss, causal_model
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError

MEMORY_SHARE = 0.35
"""Share of the GPU's memory that vLLM may use; the rest is left to training."""

TRANSFORMERS_INSTEAD = "use `rollout.engine: transformers`"


class VllmSampler:
    """Answers with a vLLM engine. Raises UserError if vLLM is not installed or does not support the configuration."""

    def __init__(
        self, config: PpoStage, policy: nn.Module, tokenizer: Any, decoding: Decoding, folder: Path, world: World
    ) -> None:
        self._vllm = _import_vllm()
        _check(config, world)
        self._decoding = decoding
        # vLLM draws from all rows of the head, surplus ones too, unless it is restricted.
        self._allowed = sorted(tokenizer.get_vocab().values()) if decoding.missing else None
        self._folder = folder
        self._dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[config.precision.value]
        self._longest = config.sequence_length
        self._lora = config.trainable.lora
        self._refreshes = 0
        self._adapter: Any = None
        self._engine: Any = None
        shutil.rmtree(folder, ignore_errors=True)
        causal_model(policy).save_pretrained(folder / "model") if self._lora is None else _save_base(policy, folder)
        tokenizer.save_pretrained(folder / "model")

    def refresh(self, owner: CausalLoss) -> None:
        """Write the policy's weights and make the engine reload them."""
        policy: Any = owner.model
        self._refreshes += 1
        if self._lora is not None:
            self._reload_adapter(policy)
            return
        policy.save_pretrained(self._folder / "model")
        if self._engine is not None:
            self._engine.collective_rpc("reload_weights")
        else:
            self._start()

    def _reload_adapter(self, policy: Any) -> None:
        folder = self._folder / f"adapter-{self._refreshes}"
        policy.save_pretrained(folder)
        if self._engine is None:
            self._start(enable_lora=True, max_lora_rank=self._lora.rank)  # type: ignore[union-attr]
        request = importlib.import_module("vllm.lora.request").LoRARequest
        if self._adapter is not None:
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        self._adapter = request(f"update-{self._refreshes}", self._refreshes, str(folder))

    def _start(self, **settings: Any) -> None:
        self._engine = self._vllm.LLM(
            model=str(self._folder / "model"),
            dtype=self._dtype,
            max_model_len=self._longest,
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=False,  # cached states would be those of older weights
            **settings,
        )

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        """Return one answer per prompt; `keys` seed the random numbers of each."""
        inputs = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        settings = [self._settings(key) for key in keys]
        outputs = self._engine.generate(inputs, settings, use_tqdm=False, lora_request=self._adapter)
        return [self._sampled(output.outputs[0]) for output in outputs]

    def _settings(self, key: Sequence[int]) -> Any:
        return self._vllm.SamplingParams(
            temperature=self._decoding.temperature,
            top_p=self._decoding.top_p,
            max_tokens=self._decoding.max_new_tokens,
            stop_token_ids=list(self._decoding.ends),
            allowed_token_ids=self._allowed,
            seed=int(np.random.SeedSequence(list(key)).generate_state(1)[0]),
        )

    def _sampled(self, output: Any) -> Sampled:
        ids, ended = [int(token) for token in output.token_ids], output.finish_reason == "stop"
        # vLLM may leave the stop token out of the ids; PPO trains on it as the answer's last token.
        if ended and (not ids or ids[-1] not in self._decoding.ends):
            ids.append(int(output.stop_reason or self._decoding.ends[0]))
        return Sampled(np.array(ids, np.int32), ended)


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"rollout.engine: vllm is not installed in this image; add it to the trainer's image, or "
            f"{TRANSFORMERS_INSTEAD}"
        ) from error


def _check(config: PpoStage, world: World) -> None:
    lora = config.trainable.lora
    if not torch.cuda.is_available():
        raise UserError(f"rollout.engine: vllm needs a GPU here; {TRANSFORMERS_INSTEAD}")
    if world.size > 1:
        raise UserError(f"rollout.engine: vllm supports one rank only, and there are {world.size}; "
                        f"{TRANSFORMERS_INSTEAD}")  # fmt: skip
    if lora is not None and (lora.modules_to_save or lora.new_rows):
        raise UserError(
            "rollout.engine: vllm supports plain adapters only, without `modulesToSave` or `newRows`; "
            f"{TRANSFORMERS_INSTEAD}"
        )
    if config.trainable.embeddings is not None:
        raise UserError(f"rollout.engine: vllm does not support `trainable.embeddings`; {TRANSFORMERS_INSTEAD}")


def _save_base(policy: Any, folder: Path) -> None:
    """Write the model below a new adapter, under the names that its parameters have without the adapter."""
    with torch.no_grad():
        state = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in causal_model(policy).state_dict().items()
            if ".lora_" not in name
        }
    causal_model(policy).save_pretrained(folder / "model", state_dict=state)
