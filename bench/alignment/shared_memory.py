"""Peak memory of PPO under LoRA: policy, reference, critic and reward model share one base, compared with four models.

Both sides run the same updates of the same loop. Ours loads and shares weights as the `ppo` stage does; the other side
keeps a separate base for each model, and its reference is a separate model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.llama import VOCABULARY, llama_config
from bench.measuring import Figure, Goal, alternate, compared, peak_bytes, run_child

SHAPE = {"width": 1280, "layers": 14, "heads": 20, "feed_forward": 3456}
"""299M parameters, 1.1 GiB in fp32: large compared with the memory of Python and PyTorch."""
RANK, SAMPLES, UPDATES, PROMPT, ANSWER, POSITIONS = 8, 2, 1, 8, 4, 64
SHARED, SEPARATE = "shared", "separate"
MIB = 2**20
ROUNDS = 5
Report = Mapping[str, Any]


def figures() -> list[Figure]:
    """Measure both, each in processes of its own."""
    with tempfile.TemporaryDirectory() as name:
        make_base(Path(name))

        def run(mode: str) -> Report:
            return run_child(["-m", "bench.alignment.shared_memory", mode, name], {"HF_HUB_OFFLINE": "1"}).report

        pairs = alternate(lambda _: run(SHARED), lambda _: run(SEPARATE), ROUNDS)
    peaks = [(ours["peakBytes"] / MIB, peer["peakBytes"] / MIB) for ours, peer in pairs]
    weights = [(ours["weightBytes"] / MIB, peer["weightBytes"] / MIB) for ours, peer in pairs]
    same = all(ours["rewards"] == peer["rewards"] for ours, peer in pairs)
    return [
        compared("PPO under LoRA, peak resident memory", "MiB", peaks, Goal("≤", 0.6)),
        compared("PPO under LoRA, weights", "MiB", weights, Goal("≤", 0.6)),
        Figure("PPO under LoRA, equal rewards", "share", float(same), None, None, "≥ 1", same),
    ]


def make_base(folder: Path) -> None:
    """Write the language model that all models start from."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(POSITIONS, **SHAPE)).save_pretrained(folder)


def configuration() -> Any:
    """Return the configuration of a PPO stage under LoRA."""
    from bench.ours import NEVER
    from stagecoach_api.kinds.ppo import PpoStage

    return PpoStage.model_validate(
        {
            "model": {"uri": "unused"},
            "data": [{"uri": "unused.jsonl"}],
            "rewards": [{"name": "model", "model": {"uri": "unused"}}],
            "sequenceLength": PROMPT + ANSWER,
            "batch": {"samples": SAMPLES, "microBatchRows": SAMPLES},
            "budget": {"steps": UPDATES},
            "optimizer": {"learningRate": 1e-4},
            "precision": "fp32",
            "trainable": {"lora": {"rank": RANK}},
            "rollout": {"maxNewTokens": ANSWER, "batchRows": SAMPLES},
            "guards": {"minEndedShare": None, "minKl": None},
            "checkpoints": {"everySteps": NEVER},
        }
    )


def make_job(folder: Path, shared: bool) -> Any:
    """Return the job, its models loaded one after the other."""
    import numpy as np

    from bench.alignment.ppo_ours import IdTokenizer, ModelReward
    from stagecoach_trainer.batches.mixing import Mix, Stream
    from stagecoach_trainer.models.load import load_folder
    from stagecoach_trainer.models.reward import RewardModel, make_reward_model
    from stagecoach_trainer.models.trainable import choose_trainable
    from stagecoach_trainer.ppo.job import PpoJob
    from stagecoach_trainer.ppo.prompt_plan import PromptPlan
    from stagecoach_trainer.ppo.shared_weights import share_frozen
    from stagecoach_trainer.samples.prompts import Prompt

    config = configuration()
    random = np.random.default_rng(0)
    rows = random.integers(0, VOCABULARY, (SAMPLES * UPDATES, PROMPT)).astype(np.int32)
    prompts = [Prompt(row, ({"role": "user", "content": " ".join(map(str, row))},), (), "prompts") for row in rows]
    policy = choose_trainable(load_folder(folder), config.trainable, range(0), 0).model
    made = [policy]
    for seed in (1, 1):  # the reward model, and the critic that starts from it
        model = choose_trainable(make_reward_model(load_folder(folder), seed), config.trainable, range(0), seed).model
        made.append(model)
        if shared:
            share_frozen(made)
    _, reward, critic = made
    return PpoJob(
        config=config,
        policy=policy,
        critic=critic,
        reference=None if shared else load_folder(folder),
        tokenizer=IdTokenizer(),
        rewards=ModelReward(RewardModel(reward.requires_grad_(False).eval(), None)),
        prompts=PromptPlan((prompts,), Mix([Stream(len(prompts), 5)], [1.0], len(prompts), 6, [0]), SAMPLES, UPDATES),
        text=None,
        inference_only=[reward] if shared else [],
    )


def main() -> None:
    """Train and print the process's peak memory, the bytes of all weights and the rewards."""
    from bench.ours import resolve
    from stagecoach_trainer.ppo import shared_weights
    from stagecoach_trainer.ppo.loop import train_policy
    from stagecoach_trainer.run_stage import AttemptSettings, build_context
    from stagecoach_trainer.runtime.context import World
    from tests.trainer.ppo.makers import parameter_bytes

    mode, base = sys.argv[1], Path(sys.argv[2])
    if mode == SEPARATE:
        shared_weights.share_frozen = lambda models: 0
    job = make_job(base, mode == SHARED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = resolve("ppo", job.config.model_dump(mode="json"), [], folder)
        attempt = AttemptSettings(stage, job.config, folder / "work", folder / "cache", None, World(), time.time())
        result = train_policy(job, build_context(attempt, threading.Event()))
    reference = [] if job.reference is None else [job.reference]
    weights = parameter_bytes([job.policy, job.critic, job.rewards.model.model, *reference])
    rewards = [point["reward"] for point in result.history if "reward" in point]
    print(json.dumps({"peakBytes": peak_bytes(), "weightBytes": weights, "rewards": rewards}))


if __name__ == "__main__":
    main()
