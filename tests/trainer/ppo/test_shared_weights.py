"""Frozen weights that policy, critic and reward model have in common are stored once, without changing outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from stagecoach_trainer.models.reward import last_rewards, make_reward_model
from stagecoach_trainer.ppo.shared_weights import share_frozen, unwrapped_name
from tests.trainer.ppo.makers import digit_model, parameter_bytes

TOKENS = torch.tensor([[1, 4, 5, 6], [1, 9, 8, 7]])
LAST = torch.tensor([3, 2])


def adapted(model: Any, kind: str = "CAUSAL_LM") -> Any:
    """The model with an adapter that changes its output."""
    targets = ["q_proj", "v_proj"]
    found = get_peft_model(model, LoraConfig(task_type=kind, r=2, target_modules=targets, init_lora_weights=False))
    return found.eval()


def policy_critic_and_reward_model() -> tuple[Any, Any, Any]:
    """Three adapters, each over its own copy of the same weights, as they are loaded."""
    torch.manual_seed(1)
    base = digit_model(layers=2)
    bodies = [copy.deepcopy(base) for _ in range(3)]
    policy = adapted(bodies[0])
    critic, reward = (adapted(make_reward_model(body, seed=0), "SEQ_CLS") for body in bodies[1:])
    return policy, critic, reward.requires_grad_(False)


def outputs(policy: Any, critic: Any, reward: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [policy(TOKENS).logits, last_rewards(critic, TOKENS, LAST), last_rewards(reward, TOKENS, LAST)]


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_sharing_leaves_outputs_bit_identical() -> None:
    models = policy_critic_and_reward_model()
    before = outputs(*models)

    share_frozen(models)

    assert all(torch.equal(old, new) for old, new in zip(before, outputs(*models), strict=True))


def test_the_body_is_stored_once() -> None:
    models = policy_critic_and_reward_model()
    before = parameter_bytes(models)
    body = sum(p.numel() * 4 for p in digit_model(layers=2).model.parameters())

    freed = share_frozen(models)

    assert freed >= 2 * body
    assert parameter_bytes(models) == before - freed
    assert share_frozen(models) == 0


def test_training_one_model_does_not_change_the_shared_weights() -> None:
    policy, critic, reward = policy_critic_and_reward_model()
    share_frozen((policy, critic, reward))
    weights, before = frozen(policy), outputs(policy, critic, reward)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)

    policy(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()

    after = frozen(policy)
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    now = outputs(policy, critic, reward)
    assert not torch.equal(before[0], now[0])
    assert torch.equal(before[1], now[1])
    assert torch.equal(before[2], now[2])


def test_trained_and_different_weights_are_not_shared() -> None:
    torch.manual_seed(2)
    whole, other = digit_model(), digit_model(seed=1).requires_grad_(False)

    freed = share_frozen((whole, digit_model().requires_grad_(False), other))

    norms = sum(p.numel() * 4 for name, p in other.named_parameters() if "norm" in name)
    assert freed == norms  # all of them are 1, in both of the frozen models


def test_formats_that_differ_are_not_shared() -> None:
    model = digit_model().requires_grad_(False)

    assert share_frozen((model, copy.deepcopy(model).bfloat16())) == 0


def test_names_do_not_depend_on_wrappers() -> None:
    assert (
        unwrapped_name("model.layers.0.self_attn.q_proj.base_layer.weight", "model")
        == "layers.0.self_attn.q_proj.weight"
    )
    assert unwrapped_name("score.original_module.weight", "model") == "score.weight"
