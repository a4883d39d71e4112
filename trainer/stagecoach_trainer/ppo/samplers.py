"""Samplers: generate answers to prompts with the current policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stagecoach_api.kinds.ppo import Rollout, RolloutEngine
from stagecoach_trainer.batches.collate import PADDING_TOKEN
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.sharded import PARAMETERS_SHARDED, gathered
from stagecoach_trainer.generation.generation import end_ids
from stagecoach_trainer.generation.sampling import Decoding, ModelCalls, Sampled, sample_answers, uniforms
from stagecoach_trainer.kernels.causal import CausalLoss, causal_model
from stagecoach_trainer.models.placement import place
from stagecoach_trainer.models.resize import ids_without_token
from stagecoach_trainer.ppo.job import PpoJob
from stagecoach_trainer.runtime.collectives import max_over_ranks
from stagecoach_trainer.runtime.context import StageContext, World


class Sampler(Protocol):
    """Answers prompts with the current policy."""

    def refresh(self, owner: CausalLoss) -> None:
        """Take over the policy's weights; called once before the answers of an update. `owner`: the trained module."""

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        """Return one answer per prompt. `keys` seed the random numbers of each answer.

        All ranks call it equally often; a rank without prompts left passes none.
        """


def make_sampler(job: PpoJob, context: StageContext, device: torch.device, dtype: torch.dtype) -> Sampler:
    """Return the sampler that the configuration selects.

    By default the policy itself answers, or, if ZeRO-3 shards its parameters, a copy of it: decoding through ZeRO-3's
    hooks is about six times slower (docs/ppo.md).
    """
    policy = causal_model(job.policy)
    missing = ids_without_token(policy, job.tokenizer)
    decoding = _decoding_of(job.config.rollout, end_ids(policy, job.tokenizer), missing)
    if job.config.rollout.engine is RolloutEngine.VLLM:
        from stagecoach_trainer.ppo.vllm_sampler import VllmSampler

        return VllmSampler(job.config, job.policy, job.tokenizer, decoding, context.work / "vllm", context.world)
    if not job.config.rollout.whole_copy:
        return ShardedSampler(decoding, device, context.world)
    if job.config.sharding.zero == PARAMETERS_SHARDED:
        return CopySampler(job.policy, decoding, device, dtype)
    return OwnSampler(decoding, device)


def _decoding_of(rollout: Rollout, ends: Sequence[int], missing: Sequence[int]) -> Decoding:
    return Decoding(rollout.max_new_tokens, rollout.temperature, rollout.top_p, tuple(ends), tuple(missing))


class OwnSampler:
    """Answers with the policy's own weights."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._decoding = decoding
        self._device = device
        self._model: Any = None

    def refresh(self, owner: CausalLoss) -> None:
        self._model = causal_model(owner.model)

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        if not prompts:
            return []
        draws = [uniforms(key, self._decoding.max_new_tokens) for key in keys]
        return sample_answers(self._model, prompts, draws, self._decoding, self._device)


class CopySampler(OwnSampler):
    """Answers with a copy in the compute format. Frozen weights are copied once, trained ones before every update."""

    def __init__(self, policy: nn.Module, decoding: Decoding, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(decoding, device)
        self._copy = place(copy.deepcopy(policy), dtype, device)

    def refresh(self, owner: CausalLoss) -> None:
        copies = dict(self._copy.named_parameters())
        for name, parameter in owner.model.named_parameters():
            if parameter.requires_grad:
                # One parameter at a time: the policy never has to fit into memory a second time in fp32.
                with gathered(parameter, PARAMETERS_SHARDED), torch.no_grad():
                    copies[name].copy_(parameter)
        self._model = causal_model(self._copy)


class ShardedSampler(OwnSampler):
    """Answers with the policy as ZeRO-3 shards it.

    Each forward pass gathers parameters from all ranks, so all of them continue until the last one has finished. A rank
    without prompts answers a single padding token and drops the result.
    """

    def __init__(self, decoding: Decoding, device: torch.device, world: World) -> None:
        super().__init__(decoding, device)
        self._world = world
        self._owner: CausalLoss | None = None

    def refresh(self, owner: CausalLoss) -> None:
        super().refresh(owner)
        self._owner = owner

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        inputs = prompts or [np.array([PADDING_TOKEN], np.int32)]
        # The draws of a padding row are never used, so any key will do.
        draws = [uniforms(key, self._decoding.max_new_tokens) for key in keys or [(0,)]]
        calls = _CollectiveCalls(self._owner, self._world)  # type: ignore[arg-type]
        answers = sample_answers(self._model, inputs, draws, self._decoding, self._device, calls)
        return answers[: len(prompts)]


class _CollectiveCalls(ModelCalls):
    """Calls that all ranks make at the same time, through the module whose hooks gather the parameters."""

    def __init__(self, owner: CausalLoss, world: World) -> None:
        self._owner = owner
        self._world = world

    def mode(self) -> AbstractContextManager[Any]:
        # Not inference mode: some gathered parameters persist, and training cannot use inference tensors.
        return torch.no_grad()

    def should_continue(self, pending: bool) -> bool:
        return max_over_ranks([float(pending)], self._world)[0] > 0

    def logits(self, compute: Callable[[], Tensor]) -> Tensor:
        logits: Tensor = self._owner(compute)
        return logits
