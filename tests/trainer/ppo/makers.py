"""Makers for tests of PPO: digits that answer digits, by a tiny LLaMA, and rewards whose optimum is known."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stagecoach_api.artifacts import ModelCard, RewardCard
from stagecoach_api.conversation import Template, TemplateName
from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.rewards import RewardTerm
from stagecoach_api.training import LoraTraining, Sharding, Trainable
from stagecoach_trainer.batches.mixing import Mix, Stream
from stagecoach_trainer.models.load import load_folder
from stagecoach_trainer.models.reward import RewardModel, make_reward_model
from stagecoach_trainer.models.save import save_adapter
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.ppo.job import PpoJob
from stagecoach_trainer.ppo.loop import train_policy
from stagecoach_trainer.ppo.prompt_plan import PromptPlan
from stagecoach_trainer.rewards.model import ModelTerm
from stagecoach_trainer.rewards.term import Completion, Term
from stagecoach_trainer.rewards.total import RewardSum, _WeightedTerm
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.samples.prompts import Prompt
from stagecoach_trainer.text.templates import apply_template
from tests.trainer.models.makers import make_tokenizer, outside

SPECIAL = ("<unk>", "<s>", "</s>")
HUMAN_BOT = Template(name=TemplateName.HUMAN_BOT)
"""Template of the tests' policies and reward models."""
DIGITS = tuple("0123456789")
END = 2
FIRST_DIGIT = len(SPECIAL)


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of ten digits and three special tokens."""
    words = {word: number for number, word in enumerate((*SPECIAL, *DIGITS))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )


def digit_model(seed: int = 0, layers: int = 1, width: int = 32) -> LlamaForCausalLM:
    """An untrained LLaMA with the vocabulary of digits, in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=FIRST_DIGIT + len(DIGITS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=END,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


@dataclass
class FunctionTerm(Term):
    """A term that is a function of prompt and answer; it counts its answers, across resumes too."""

    function: Callable[[str, str], float]
    asked: list[Completion] = field(default_factory=list)
    asked_before: int = 0

    def values(self, batch: Sequence[Completion]) -> list[float]:
        self.asked += batch
        return [self.function(str(item.prompt[-1]["content"]), item.answer) for item in batch]

    def state(self) -> dict[str, Any]:
        return {"asked": self.asked_before + len(self.asked)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.asked_before, self.asked = state["asked"], []


def reward_of(*terms: tuple[str, Term, float]) -> RewardSum:
    """A reward of terms with their names and weights."""
    return RewardSum(
        [
            _WeightedTerm(RewardTerm(name=name, expression="0", weight=weight), term, f"rewards[{index}]")
            for index, (name, term, weight) in enumerate(terms)
        ]
    )


def digit_judge(dtype: torch.dtype = torch.float32) -> RewardModel:
    """A reward model of digits in `dtype`, its head in fp32. Most of its matrices are large enough for ZeRO-3, which
    keeps those below 100,000 elements whole."""
    tokenizer = digit_tokenizer()
    apply_template(tokenizer, HUMAN_BOT)
    model = make_reward_model(digit_model(seed=8, width=320), seed=9).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.startswith("score") else dtype)
    return RewardModel(model, tokenizer, bias=0.25)


def echoes(prompt: str, answer: str) -> float:
    """The share of the answer's four places that hold the prompt's last digit; 1 is the optimum."""
    return sum(character == prompt[-1] for character in answer[:4]) / 4


def configuration(**settings: Any) -> PpoStage:
    """A PPO stage in fp32: 32 answers an update, of at most 4 tokens."""
    values: dict[str, Any] = {
        "model": {"uri": "unused"},
        "data": [{"uri": "unused.jsonl"}],
        "rewards": [{"name": "only", "expression": "0"}],
        "sequenceLength": 16,
        "batch": {"samples": 32, "microBatchRows": 32},
        "budget": {"steps": 6},
        "optimizer": {"learningRate": 1e-2},
        "schedule": {"name": "constant"},
        "precision": "fp32",
        "rollout": {"maxNewTokens": 4, "batchRows": 32},
        "policy": {"innerEpochs": 2, "miniBatchSamples": 16},
        "kl": {"coefficient": 0.0},
        "guards": {"minEndedShare": None, "minEntropy": None},
        "checkpoints": {"everySteps": 2},
    }
    return PpoStage.model_validate(values | settings)


def parameter_bytes(models: Iterable[nn.Module]) -> int:
    """The bytes that the models' parameters take, shared ones counted once."""
    storages = (parameter.data.untyped_storage() for model in models for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def with_adapter(model: Any, seed: int = 0) -> Any:
    """The model with a new LoRA adapter, which is what learns."""
    return choose_trainable(model, Trainable(lora=LoraTraining(rank=4)), range(0), seed).model


def digit_prompts(count: int = 40, seed: int = 3) -> tuple[Prompt, ...]:
    """Prompts of two to four digits."""
    random = np.random.default_rng(seed)
    prompts = []
    for number in range(count):
        digits = random.integers(0, 10, int(random.integers(2, 5)))
        text = "".join(map(str, digits))
        ids = np.array([1, *(FIRST_DIGIT + digits)], np.int32)
        prompts.append(Prompt(ids, ({"role": "user", "content": text},), (), f"prompt {number}"))
    return tuple(prompts)


def ppo_job(
    config: PpoStage | None = None,
    reward: Callable[[str, str], float] | RewardSum = echoes,
    seed: int = 0,
    model: Any = None,
    reference: bool = True,
    text: Any = None,
    kind: type[PpoJob] = PpoJob,
) -> PpoJob:
    """A PPO stage over digits, ready to start."""
    config = config or configuration()
    policy: Any = digit_model(seed) if model is None else model
    start = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    prompts = digit_prompts()
    samples, updates = config.batch.samples or 1, config.budget.steps or 1
    plan = PromptPlan((prompts,), Mix([Stream(len(prompts), 5)], [1.0], samples * updates, 6, [0]), samples, updates)
    return kind(
        config=config,
        policy=policy,
        critic=make_reward_model(digit_model(seed), seed),
        reference=copy.deepcopy(start) if reference else None,
        tokenizer=digit_tokenizer(),
        rewards=reward if isinstance(reward, RewardSum) else reward_of(("only", FunctionTerm(reward), 1.0)),
        prompts=plan,
        text=text,
    )


def ranks_configuration(case: str, **settings: Any) -> PpoStage:
    """A stage for two ranks; `case`: ZeRO stage and precision, such as 2-fp32. Five answers a rank, in rounds of 3 and
    2; mini-batches of 2 answers, of which a rank has now and then none."""
    stage, precision = case.split("-")
    values: dict[str, Any] = {
        "batch": {"samples": 10, "microBatchRows": 1},
        "budget": {"steps": 3},
        "rollout": {"maxNewTokens": 4, "batchRows": 3},
        "policy": {"innerEpochs": 2, "miniBatchSamples": 2, "averageDecay": 0.5},
        "critic": {"warmupUpdates": 1},
        "kl": {"coefficient": 0.05, "target": 0.5, "horizon": 100},
        "checkpoints": {"everySteps": 1},
        "precision": precision,
    }
    return configuration(**values | settings).model_copy(update={"sharding": Sharding(zero=int(stage))})


def uneven_configuration(stage: int, **settings: Any) -> PpoStage:
    """A stage for two ranks in fp32. Of nine answers the second rank has four, in rounds of at most four: none in the
    last round."""
    return ranks_configuration(
        f"{stage}-fp32",
        **{
            "batch": {"samples": 9, "microBatchRows": 1},
            "rollout": {"maxNewTokens": 4, "batchRows": 4},
            "policy": {"miniBatchSamples": 3},
            **settings,
        },
    )


def run_judged(here: StageContext, stage: int) -> list[Mapping[str, float]]:
    """Train on two ranks with a reward model; return the history."""
    config = uneven_configuration(stage)
    rewards = reward_of(("judge", ModelTerm(digit_judge(), batch_rows=3), 1.0))
    return list(train_policy(ppo_job(config, rewards), here).history)


def run_to_end(
    here: StageContext, config: PpoStage, stop_after: int | None = None, policy: Any = None
) -> dict[str, Any]:
    """Train to the end; return the history and digests of the final weights."""

    def judged(prompt: str, answer: str) -> float:
        if stop_after is not None and len(term.asked) >= stop_after:
            here.stop.set()
        return echoes(prompt, answer)

    term = FunctionTerm(judged)
    job = ppo_job(config, reward_of(("only", term, 1.0)), model=policy)
    result = train_policy(job, here)
    found = {}
    for side, model in (("policy", job.policy), ("critic", job.critic)):
        named = model.named_parameters() if here.world.is_main else ()  # the others' are of no use any more
        found[side] = {
            name: hashlib.sha256(item.detach().float().numpy().tobytes()).hexdigest() for name, item in named
        }
    return {"history": list(result.history), **found}


def adapter_stage(**changes: Any) -> PpoStage:
    """A stage under LoRA whose reward model `save_adapted_reward` makes over the base."""
    values: dict[str, Any] = {
        "model": {"uri": "base"},
        "template": {"name": "humanBot"},
        "data": [{"uri": "prompts"}],
        "rewards": [{"name": "helpful", "model": {"uri": "reward"}}],
        "trainable": {"lora": {"rank": 2}},
        "sequenceLength": 96,
        "batch": {"samples": 4, "microBatchRows": 2},
        "budget": {"steps": 2},
        "optimizer": {"learningRate": 1e-2},
        "rollout": {"maxNewTokens": 8, "batchRows": 4},
        "guards": {"minEndedShare": None},
        "precision": "fp32",
    }
    return PpoStage.model_validate(values | changes)


def save_adapted_reward(root: Path, base: Path) -> Path:
    """Write a reward model that is an adapter over `base` and whose rewards differ from the base's."""
    tokenizer = make_tokenizer()
    apply_template(tokenizer, HUMAN_BOT)
    lora = Trainable(lora=LoraTraining(rank=2))
    model = choose_trainable(make_reward_model(load_folder(base), seed=3), lora, range(0), seed=1).model
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    vocabulary, output = root / "vocabulary", root / "reward"
    tokenizer.save_pretrained(vocabulary)
    output.mkdir()
    save_adapter(
        model, tokenizer, vocabulary, output, ModelCard(adapter=True, base=outside(base), reward=RewardCard(bias=0.5))
    )
    return output
