"""The adapter to vLLM against a fake with vLLM's calls: vLLM itself needs a GPU and is not tested."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_trainer.generation.sampling import Decoding
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.ppo.vllm_sampler import VllmSampler
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.ppo.makers import END, configuration, digit_model, digit_tokenizer, with_adapter

DECODING = Decoding(max_new_tokens=6, temperature=0.7, top_p=0.9, ends=(END,))
PROMPTS = [np.array([1, 5, 6], np.int32), np.array([1, 7], np.int32)]


@dataclass
class Output:
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None = None


@dataclass
class StandIn:
    """A fake `vllm.LLM` that records its requests and the content of the model's folder whenever it reads it."""

    settings: dict[str, Any]
    heads: list[torch.Tensor] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    def read(self) -> None:
        self.heads.append(load_file(Path(self.settings["model"]) / "model.safetensors")["lm_head.weight"])

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        self.read()

    def generate(self, prompts: Any, params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.asked.append((prompts, params, lora_request))
        assert not use_tqdm
        return [types.SimpleNamespace(outputs=[output]) for output in self.outputs]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    made: list[StandIn] = []

    def start(**settings: Any) -> StandIn:
        made.append(StandIn(settings))
        made[-1].read()
        return made[-1]

    vllm: Any = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = start, lambda **values: values
    request: Any = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: types.SimpleNamespace(name=name, number=number, lora_path=path)
    for name, module in (("vllm", vllm), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return made


def sampler(folder: Path, policy: Any, config: PpoStage | None = None, world: World | None = None) -> VllmSampler:
    return VllmSampler(config or configuration(), policy, digit_tokenizer(), DECODING, folder, world or World())


def test_the_engine_reads_the_policys_weights_again_with_every_update(tmp_path: Path, engines: list[StandIn]) -> None:
    policy = digit_model()
    found = sampler(tmp_path, policy)
    found.refresh(CausalLoss(policy))
    first = policy.lm_head.weight.detach().clone()
    with torch.no_grad():
        policy.lm_head.weight += 1.0
    found.refresh(CausalLoss(policy))
    (engine,) = engines
    assert [torch.equal(head, wanted) for head, wanted in zip(engine.heads, (first, first + 1), strict=True)] == [
        True,
        True,
    ]
    assert engine.settings["dtype"] == "float32"
    assert engine.settings["max_model_len"] == 16


def test_of_a_lora_policy_only_the_adapter_is_handed_over(tmp_path: Path, engines: list[StandIn]) -> None:
    plain = digit_model()
    policy = with_adapter(digit_model())
    found = sampler(tmp_path, policy, configuration(trainable={"lora": {"rank": 4}}))
    found.refresh(CausalLoss(policy))
    found.refresh(CausalLoss(policy))
    (engine,) = engines
    engine.outputs = []
    found.answer([], [])
    assert len(engine.heads) == 1
    assert (engine.settings["enable_lora"], engine.settings["max_lora_rank"]) == (True, 4)
    base = load_file(tmp_path / "model" / "model.safetensors")
    expected = plain.state_dict()
    assert base.keys() == expected.keys()
    assert all(torch.equal(base[name], expected[name]) for name in base)
    adapter = engine.asked[0][2]
    assert (adapter.number, Path(adapter.lora_path).name) == (2, "adapter-2")
    assert (tmp_path / "adapter-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter-1").exists()


def test_answers_come_back_with_their_end_and_each_has_a_seed_of_its_own(
    tmp_path: Path, engines: list[StandIn]
) -> None:
    policy = digit_model()
    found = sampler(tmp_path, policy)
    found.refresh(CausalLoss(policy))
    (engine,) = engines
    engine.outputs = [Output([5, END], "stop", END), Output([6] * 6, "length")]
    answers = found.answer(PROMPTS, [(1, 2), (1, 3)])
    assert [(item.ids.tolist(), item.ended) for item in answers] == [([5, END], True), ([6] * 6, False)]
    engine.outputs = [Output([], "stop", None), Output([7], "stop", END)]  # a version that leaves the end token out
    answers = found.answer(PROMPTS, [(1, 2), (1, 3)])
    assert [(item.ids.tolist(), item.ended) for item in answers] == [([END], True), ([7, END], True)]
    prompts, params, adapter = engine.asked[0]
    assert prompts == [{"prompt_token_ids": [1, 5, 6]}, {"prompt_token_ids": [1, 7]}]
    assert adapter is None
    assert [item["stop_token_ids"] for item in params] == [[END], [END]]
    assert (params[0]["temperature"], params[0]["top_p"], params[0]["max_tokens"]) == (0.7, 0.9, 6)
    assert params[0]["seed"] != params[1]["seed"]
    assert [item["seed"] for item in engine.asked[1][1]] == [item["seed"] for item in params]


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({}, World(size=2), "one rank only, and there are 2"),
        ({"trainable": {"lora": {"modulesToSave": ["lm_head"]}}}, World(), "plain adapters only"),
        ({"trainable": {"embeddings": {}}}, World(), "does not support `trainable.embeddings`"),
    ],
)
def test_unsupported_configurations_are_rejected(
    tmp_path: Path, changes: dict[str, Any], world: World, message: str
) -> None:
    with pytest.raises(UserError, match=f"rollout.engine: vllm .*{message}.*use `rollout.engine: transformers`"):
        sampler(tmp_path, digit_model(), configuration(**changes), world)


def test_where_it_is_not_installed_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not installed in this image; add it .*or use `rollout.engine"):
        sampler(tmp_path, digit_model())
