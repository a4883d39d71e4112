"""Reward models: a decoder with a linear head of one label on the last token of a conversation.

On disk they are transformers' sequence classifiers (`LlamaForSequenceClassification`) or PEFT adapters with a trained
`score`; what those formats have no place for, the bias and the domains' system prompts, stands in the model card.

B sequences, T tokens of the longest, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stagecoach_api.artifacts import ModelCard, ResolvedInput
from stagecoach_api.references import Reference
from stagecoach_trainer.kernels.causal import causal_model
from stagecoach_trainer.kernels.unpadded import states_at
from stagecoach_trainer.models.load import (
    Head,
    apply_adapter,
    load_folder,
    load_model,
    locate_base,
    own_tokenizer,
    read_card,
)
from stagecoach_trainer.models.placement import place
from stagecoach_trainer.models.resize import check_sizes, num_rows
from stagecoach_trainer.models.safety import ADAPTER_CONFIG, CONFIG, check_adapter_folder, read_json, require_folder
from stagecoach_trainer.runtime.collectives import max_over_ranks
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.errors import UserError

HEAD = "score"
"""Name of the linear head, as transformers has it."""

PADDING = 0
"""Stands behind the end of short sequences, where causal attention never looks. Any id would do."""

# -- the network -------------------------------------------------------------------------------------------------------


def make_reward_model(causal: Any, seed: int) -> Any:
    """Return a sequence classifier of one label with the body of a language model, which it shares, and a new head:
    normal with deviation 1/√(D + 1) (as arXiv 2009.01325), a pure function of the seed.

    Raises UserError for an architecture that transformers has no such classifier of.
    """
    from transformers import AutoModelForSequenceClassification

    maker: Any = AutoModelForSequenceClassification
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: Any = maker.from_config(config)
    except ValueError as error:
        raise UserError(f"{type(causal).__name__}: transformers has no sequence classifier of this kind") from error
    prefix = model.base_model_prefix
    if not isinstance(getattr(model, HEAD, None), nn.Linear) or not hasattr(causal, prefix):
        raise UserError(f"{type(causal).__name__}: only decoders such as LLaMA can become reward models")
    setattr(model, prefix, getattr(causal, prefix))
    model.score = _new_head(int(config.hidden_size), seed, causal.dtype)
    return model.train(causal.training)


def _new_head(width: int, seed: int, dtype: torch.dtype) -> nn.Linear:
    head = nn.Linear(width, 1, bias=False, device="meta")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, width, generator=generator) / math.sqrt(width + 1)
    head.weight = nn.Parameter(weight.to(dtype))
    return head


def last_rewards(model: nn.Module, tokens: Tensor, last: Tensor, keyword: str | None = None) -> Tensor:
    """Return what the head says at position `last` [B] of each row of `tokens` [B, T], padded on the right: fp32 [B].

    `model`: a reward model, or a PEFT model around one; `keyword` as `states_at` takes it.
    """
    return score_states(model, last_states(decoder_of(model), tokens, last, keyword))


def last_states(decoder: nn.Module, tokens: Tensor, last: Tensor, keyword: str | None = None) -> Tensor:
    """Return a decoder's states [B, D] at the places `last_rewards` looks at."""
    at = torch.arange(len(last), device=last.device) * tokens.shape[1] + last
    return states_at(decoder, tokens, at, last, keyword)


def decoder_of(model: nn.Module) -> nn.Module:
    """Return what lies below the head of a reward model, or of a PEFT model around one."""
    classifier = causal_model(model)
    decoder: nn.Module = getattr(classifier, classifier.base_model_prefix)
    return decoder


def score_states(model: nn.Module, states: Tensor) -> Tensor:
    """Return what the head says of hidden states [B, D]: fp32 [B]."""
    head: nn.Module = causal_model(model).score
    dtype = next(head.parameters()).dtype
    with torch.autocast(states.device.type, enabled=False):
        rewards: Tensor = head(states.to(dtype)).float().squeeze(-1)
    return rewards


def pad_right(sequences: Sequence[npt.NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Return token ids [B, T], padded on the right, and the position of each sequence's last token [B]."""
    tokens = np.full((len(sequences), max(len(ids) for ids in sequences)), PADDING, np.int64)
    for index, ids in enumerate(sequences):
        tokens[index, : len(ids)] = ids
    last = np.array([len(ids) - 1 for ids in sequences], np.int64)
    return torch.from_numpy(tokens), torch.from_numpy(last)


# -- scoring -----------------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A reward model without its head, which is small and stays in fp32: what ranks can share out among them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder_of(model)

    def forward(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Return the states [B, D] at position `last` [B] of each row of `tokens` [B, T]."""
        return last_states(self.decoder, tokens, last)


@dataclass(frozen=True)
class RewardModel:
    """A reward model that is ready to score."""

    model: Any
    """The sequence classifier, on its device."""

    tokenizer: Any
    """Its vocabulary, with the chat template it was trained with."""

    bias: float = 0.0
    """Added to every reward."""

    domains: Mapping[str, str] = field(default_factory=dict)
    """System prompt by domain."""

    body: Body | None = None
    """Set where the ranks of `world` share the body's parameters: all of them call it at the same time."""

    world: World = field(default_factory=World)

    def sharded(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> RewardModel:
        """Return this model, computing on `device`, after `shard` has shared the parameters of its body out over the
        ranks. From then on scoring waits for all ranks, whatever each has to score."""
        body = Body(self.model).eval()
        shard(body)
        causal_model(self.model).score.to(device)
        return replace(self, body=body, world=world)

    def score_ids(self, sequences: Sequence[npt.NDArray[np.int32]], batch_rows: int) -> list[float]:
        """Return the reward of each sequence of this model's token ids: prompt, answer and end token.

        Raises UserError for an empty sequence, and for ids the model does not have.
        """
        self._check_ids(sequences)
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        rewards = [0.0] * len(sequences)
        starts = range(0, len(order), batch_rows)
        calls = int(max_over_ranks([float(len(starts))], self.world)[0])
        with torch.no_grad():  # not inference mode: ZeRO-3 keeps some of what it gathers
            for start in starts:
                chosen = order[start : start + batch_rows]
                found = self._ask([sequences[index] for index in chosen]).double().cpu()
                for index, reward in zip(chosen, found.tolist(), strict=True):
                    rewards[index] = reward + self.bias
            for _ in range(calls - len(starts)):  # other ranks have more to ask
                self._ask([np.array([PADDING], np.int32)])
        return rewards

    def _ask(self, sequences: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Return the head's rewards [B] of some sequences, fp32."""
        device = next(causal_model(self.model).score.parameters()).device
        tokens, last = (item.to(device) for item in pad_right(sequences))
        if self.body is None:
            return last_rewards(self.model, tokens, last)
        return score_states(self.model, self.body(tokens, last))

    def _check_ids(self, sequences: Sequence[npt.NDArray[np.int32]]) -> None:
        rows = num_rows(self.model)
        for index, ids in enumerate(sequences):
            if len(ids) == 0:
                raise UserError(f"sequence {index} to be scored has no tokens")
            if int(np.max(ids)) >= rows or int(np.min(ids)) < 0:
                raise UserError(
                    f"sequence {index} to be scored has token {int(np.max(ids))}, and the reward model has {rows} "
                    "rows: it has another vocabulary; score texts, not tokens"
                )

    def system_prompt(self, domain: str | None) -> str | None:
        """Return the system prompt of a domain; None for no domain. Raises UserError for an unknown one."""
        if domain is None:
            return None
        if domain not in self.domains:
            known = ", ".join(sorted(self.domains)) or "none"
            raise UserError(f"the reward model knows no domain {domain!r}; its domains are: {known}")
        return self.domains[domain]


# -- loading -----------------------------------------------------------------------------------------------------------


def load_reward_model(
    context: StageContext,
    source: Reference | ResolvedInput,
    dtype: torch.dtype,
    device: torch.device,
    merge: bool = True,
) -> RewardModel:
    """Load a `rewardModel` artifact, or a Hugging Face folder with a sequence classifier of one label. The body is in
    `dtype`, the head in fp32. `merge`: an adapter is merged into its base; else it stays on it, and the base can be
    shared with other adapters over it.

    Raises UserError for anything else (a language model, several labels, no vocabulary), and as `load_model` does.
    """
    found = context.input(source) if isinstance(source, Reference) else source
    path = context.fetch_resolved(found)
    require_folder(path)
    card = read_card(path)
    model = _load_adapter(context, found, path, card, merge) if card.adapter else _load_whole(path)
    tokenizer = own_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{path}: the reward model's folder has no vocabulary, so no text can be scored; put it there")
    check_sizes(model, tokenizer, str(path))
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: the reward model's vocabulary has no chat template, so no conversation can be scored")
    place(model, dtype, device, exact=model.score)
    if card.reward is None:
        return RewardModel(model, tokenizer)
    return RewardModel(model, tokenizer, card.reward.bias, card.reward.domains)


def _load_whole(path: Path) -> Any:
    if not (path / CONFIG).is_file() and (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path}: a PEFT adapter without a card, so its base is unknown here; merge it first (PEFT)")
    config = read_json(path / CONFIG)
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{path}: {', '.join(kinds) or 'a model of no stated architecture'} is no reward model; a `rewardModel` "
            "stage makes one, or give a sequence classifier of one label"
        )
    model = load_folder(path, head=Head.CLASSIFIER)
    labels = int(model.config.num_labels)
    if labels != 1:
        raise UserError(f"{path}: a classifier of {labels} labels; a reward model has one")
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise UserError(f"{path}: {', '.join(kinds)} has no linear head `{HEAD}` on a decoder, as LLaMA's has")
    return model


def _load_adapter(context: StageContext, found: ResolvedInput, path: Path, card: ModelCard, merge: bool) -> Any:
    """Return the base with a new head, and on it the adapter, which brings the head it was trained with."""
    weights = check_adapter_folder(path)
    if card.reward is None or card.base is None:
        raise UserError(f"{path}: an adapter of a language model is no reward model; a `rewardModel` stage makes one")
    base = load_model(context, locate_base(card.base, found, context.resolved.storage_uri))
    model = apply_adapter(make_reward_model(base.model, seed=0), path, weights, trainable=False)
    return model.merge_and_unload(safe_merge=True) if merge else model
