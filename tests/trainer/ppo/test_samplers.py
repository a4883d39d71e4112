"""Samplers of a policy with more rows than tokens: a row without a token is never drawn, by whichever engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_trainer.generation.sampling import draw
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.ppo.samplers import OwnSampler, make_sampler
from stagecoach_trainer.ppo.vllm_sampler import VllmSampler
from tests.trainer.loop.makers import context
from tests.trainer.ppo.makers import configuration, digit_model, digit_prompts, digit_tokenizer, ppo_job
from tests.trainer.ppo.test_vllm_sampler import Output, StandIn, engines

__all__ = ["engines"]

SURPLUS = 7
CPU = torch.device("cpu")
PROMPTS = [prompt.ids for prompt in digit_prompts(24)]
KEYS = [(5, number) for number in range(len(PROMPTS))]


def padded(model: Any) -> Any:
    """Return the model with surplus rows, as published ones have, which are the likeliest at every position."""
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(model.config.vocab_size + SURPLUS, mean_resizing=False)
    with torch.no_grad():
        wide.lm_head.weight[-SURPLUS:] = 5 * model.lm_head.weight[:SURPLUS]
    return wide


def own_answers(folder: Path, model: Any) -> list[tuple[list[int], bool]]:
    job = ppo_job(configuration(rollout={"maxNewTokens": 8, "batchRows": 8}), model=model, reference=False)
    sampler = make_sampler(job, context(folder), CPU, torch.float32)
    assert isinstance(sampler, OwnSampler)
    sampler.refresh(CausalLoss(model))
    with torch.no_grad():
        return [(item.ids.tolist(), item.ended) for item in sampler.answer(PROMPTS, KEYS)]


def test_surplus_rows_change_no_answer_of_a_policy(tmp_path: Path) -> None:
    """axolotl#577: phi-2 has 50,295 tokens and 51,200 rows. The oracle is the policy without surplus rows."""
    model = digit_model(seed=4, layers=2).eval()
    assert own_answers(tmp_path / "wide", padded(model)) == own_answers(tmp_path / "plain", model)


class Restricted(StandIn):
    """Draws as vLLM documents `allowed_token_ids`: only the logits of these ids are retained."""

    policy: Any
    decoding: Any

    def generate(self, prompts: Any, params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.outputs = []
        for prompt, settings in zip(prompts, params, strict=True):
            ids = list(prompt["prompt_token_ids"])
            numbers = np.random.default_rng(settings["seed"])
            for _ in range(settings["max_tokens"]):
                with torch.no_grad():
                    logits = self.policy(torch.tensor([ids])).logits[:, -1]
                if settings["allowed_token_ids"] is not None:
                    kept = torch.full_like(logits, -torch.inf)
                    allowed = torch.tensor(settings["allowed_token_ids"])
                    logits = kept.index_copy(-1, allowed, logits.index_select(-1, allowed))
                ids.append(int(draw(logits, torch.tensor([numbers.random()]).double(), self.decoding)))
            self.outputs.append(Output(ids[len(prompt["prompt_token_ids"]) :], "length"))
        return super().generate(prompts, params, use_tqdm, lora_request)


def vllm_answers(folder: Path, model: Any, engines: list[StandIn]) -> tuple[list[list[int]], list[dict[str, Any]]]:
    config = configuration(rollout={"maxNewTokens": 6, "engine": "vllm"})
    job = ppo_job(config, model=model, reference=False)
    sampler = make_sampler(job, replace(context(folder)), CPU, torch.float32)
    assert isinstance(sampler, VllmSampler)
    sampler.refresh(CausalLoss(model))
    engine = engines[-1]
    engine.__class__ = Restricted
    engine.policy, engine.decoding = model.eval(), sampler._decoding  # type: ignore[attr-defined]
    answers = [item.ids.tolist() for item in sampler.answer(PROMPTS[:4], KEYS[:4])]
    return answers, engine.asked[-1][1]


def test_vllm_may_draw_tokens_alone(tmp_path: Path, engines: list[StandIn]) -> None:
    """vLLM draws from all rows of a head; every request is restricted to the ids of tokens."""
    model = digit_model(seed=4, layers=2)
    ids = sorted(digit_tokenizer().get_vocab().values())
    answers, requests = vllm_answers(tmp_path / "wide", padded(model), engines)
    assert [request["allowed_token_ids"] for request in requests] == [ids] * 4
    plain, unrestricted = vllm_answers(tmp_path / "plain", model, engines)
    assert [request["allowed_token_ids"] for request in unrestricted] == [None] * 4, "no work without surplus rows"
    assert answers == plain


def test_a_gap_in_the_vocabulary_is_no_token_either(
    tmp_path: Path, engines: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = digit_model(seed=4), digit_tokenizer()
    vocabulary = {word: number for word, number in tokenizer.get_vocab().items() if word != "7"}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
    answers, requests = vllm_answers(tmp_path, model, engines)
    assert requests[0]["allowed_token_ids"] == sorted(vocabulary.values())
    assert all(set(ids) <= set(vocabulary.values()) for ids in answers)
