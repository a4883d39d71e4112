"""The critic: its initial weights, and which of them are trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_api.model_folders import CONFIG
from stagecoach_api.references import Reference
from stagecoach_api.training import Rows
from stagecoach_trainer.models.load import load_model, read_card
from stagecoach_trainer.models.lora import ADAPTER
from stagecoach_trainer.models.reward import load_reward_model, make_reward_model
from stagecoach_trainer.models.safety import read_json, require_folder
from stagecoach_trainer.models.starting_point import StartingPoint
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.models.vocabularies import require_same_vocabulary
from stagecoach_trainer.runtime.context import StageContext

CLASSIFIER = "ForSequenceClassification"
"""Suffix of the names of architectures that are reward models."""


@dataclass(frozen=True)
class NewCritic:
    """A critic before training."""

    model: Any
    """A reward model with the policy's vocabulary, `requires_grad` set."""

    bias: float = 0.0
    """Added to its output: the reward model's bias, so that the initial values are that model's rewards."""


def make_critic(config: PpoStage, context: StageContext, start: StartingPoint) -> NewCritic:
    """Return the critic, with `requires_grad` set by the policy's `trainable`; its head is always trained.

    Under LoRA, a reward model that is itself an adapter continues with that adapter over its own base.
    Raises UserError if the vocabulary differs from the policy's.
    """
    from peft import PeftModel

    critic = _initial_critic(config, context, start)
    if isinstance(critic.model, PeftModel):
        critic.model.set_adapter(ADAPTER)  # makes the loaded adapter trainable again
        return critic
    return NewCritic(_choose_trained(critic.model, config, context, start), critic.bias)


def _initial_critic(config: PpoStage, context: StageContext, start: StartingPoint) -> NewCritic:
    source = config.critic.model
    if source is not None and not _is_reward_model(context, source):
        return NewCritic(_from_language_model(context, source, start))
    source = source or _first_reward_model(config)
    if source is None:
        return NewCritic(make_reward_model(copy.deepcopy(start.model), context.seed))
    whole = config.trainable.lora is None
    loaded = load_reward_model(context, source, torch.float32, torch.device("cpu"), merge=whole)
    _require_same(
        start.tokenizer,
        loaded.tokenizer,
        "rewards: the reward model" if config.critic.model is None else "critic.model: the reward model",
    )
    return NewCritic(loaded.model, loaded.bias)


def _from_language_model(context: StageContext, source: Reference, start: StartingPoint) -> Any:
    loaded = load_model(context, source)
    _require_same(start.tokenizer, loaded.require_tokenizer(), "critic.model: it")
    return make_reward_model(loaded.model, context.seed)


def _first_reward_model(config: PpoStage) -> Reference | None:
    return next((term.model for term in config.rewards if term.model is not None), None)


def _is_reward_model(context: StageContext, source: Reference) -> bool:
    path = context.fetch_resolved(context.input(source))
    require_folder(path)
    card = read_card(path)
    if card.adapter or card.reward is not None or not (path / CONFIG).is_file():
        return card.reward is not None
    kinds = read_json(path / CONFIG).get("architectures") or ()
    return any(str(kind).endswith(CLASSIFIER) for kind in kinds)


def _require_same(policy_tokenizer: Any, critic_tokenizer: Any, whose: str) -> None:
    remedy = (
        "the critic reads the policy's tokens, so set `critic.model` to a model with the policy's vocabulary: a reward "
        "model, or a language model such as `model` itself"
    )
    require_same_vocabulary(policy_tokenizer, critic_tokenizer, whose, remedy)


def _choose_trained(model: Any, config: PpoStage, context: StageContext, start: StartingPoint) -> Any:
    """Return the critic with `requires_grad` set. If only the policy's embedding is trained, then so are the critic's
    embedding and its head."""
    trainable = config.trainable
    if trainable.embeddings is not None:
        model.requires_grad_(False)
        if trainable.embeddings.rows is Rows.ALL or start.new_rows:
            model = choose_trainable(model, trainable, start.new_rows, context.seed).model
        model.score.requires_grad_(True)
        return model
    if trainable.lora is not None:
        lora = trainable.lora.model_copy(update={"modules_to_save": (), "new_rows": False})
        trainable = trainable.model_copy(update={"lora": lora})
    return choose_trainable(model, trainable, range(0), context.seed).model
