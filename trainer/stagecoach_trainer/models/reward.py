"""Reward models: a decoder with a linear head of one label on the last token of a conversation.

On disk they are transformers' sequence classifiers (`LlamaForSequenceClassification`) or PEFT adapters with a trained
`score`; the bias and the domains' system prompts, which those formats cannot express, are in the model card.

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
from stagecoach_api.model_folders import ADAPTER_CONFIG, CONFIG
from stagecoach_api.references import Reference
from stagecoach_trainer.kernels.causal import DecoderLoss, causal_model
from stagecoach_trainer.kernels.proof_rows import ProofRows
from stagecoach_trainer.kernels.unpadded import states_at
from stagecoach_trainer.models.load import (
    Head,
    apply_adapter,
    load_base,
    load_folder,
    own_tokenizer,
    read_card,
)
from stagecoach_trainer.models.merging import merge_adapter
from stagecoach_trainer.models.placement import place
from stagecoach_trainer.models.resize import check_sizes, num_rows
from stagecoach_trainer.models.safety import check_adapter_folder, read_json, require_folder
from stagecoach_trainer.runtime.collectives import max_over_ranks
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.errors import UserError

HEAD = "score"
"""Name that transformers gives the linear head."""

PADDING = 0
"""Fills short sequences after their end, where causal attention never looks. Any id would do."""

# -- the network -------------------------------------------------------------------------------------------------------


def make_reward_model(causal: Any, seed: int) -> Any:
    """Return a sequence classifier of one label that shares the body of a language model and has a new head.

    The head is normal with standard deviation 1/√(D + 1) (as in arXiv 2009.01325), a pure function of the seed.
    Raises UserError if transformers has no such classifier for the architecture.
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
    # The classifier was made on the meta device, without memory; its body is replaced with the language model's.
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
    """Return the rewards at position `last` [B] of each row of `tokens` [B, T], padded on the right: fp32 [B].

    `model`: a reward model, or a PEFT model that wraps one; `keyword` as `states_at` takes it.
    """
    return score_states(model, last_states(decoder_of(model), tokens, last, keyword))


def last_states(decoder: nn.Module, tokens: Tensor, last: Tensor, keyword: str | None = None) -> Tensor:
    """Return a decoder's states [B, D] at the positions that `last_rewards` scores."""
    at = torch.arange(len(last), device=last.device) * tokens.shape[1] + last
    return states_at(decoder, tokens, at, last, keyword)


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder below the head of a reward model, or of a PEFT model that wraps one."""
    classifier = causal_model(model)
    decoder: nn.Module = getattr(classifier, classifier.base_model_prefix)
    return decoder


def score_states(model: nn.Module, states: Tensor) -> Tensor:
    """Return the rewards of hidden states [B, D]: fp32 [B]."""
    head: nn.Module = causal_model(model).score
    dtype = next(head.parameters()).dtype
    # Autocast would compute the head in bf16, whose 8 bits are too few to compare rewards of similar answers.
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


class RewardModule(DecoderLoss):
    """Base of the loss modules around a reward model."""

    @property
    def decoder(self) -> nn.Module:
        return decoder_of(self.model)

    def computed(self, rows: ProofRows) -> Tensor:
        """Return the reward of each row [B]."""
        tokens, last = pad_right(self._ended(rows))
        device = next(self.parameters()).device
        return last_rewards(self.model, tokens.to(device), last.to(device), self.positions_keyword)

    def expected(self, rows: ProofRows) -> Tensor:
        """Return the rewards [B] of transformers' sequence classifier."""
        classifier, device = causal_model(self.model), next(self.parameters()).device
        # One row at a time: the classifier finds the last token of padded rows by an id, which it may not have.
        each = (torch.from_numpy(ids.astype(np.int64))[None].to(device) for ids in self._ended(rows))
        return torch.cat([classifier(input_ids=row, use_cache=False).logits[0] for row in each])

    def _ended(self, rows: ProofRows) -> list[npt.NDArray[np.int32]]:
        """Return the rows without padding ids at the end, at which the classifier would not look."""
        padding = causal_model(self.model).config.get_text_config().pad_token_id
        return [ids[: max(1, 1 + np.flatnonzero(ids != padding).max(initial=0))] for ids in rows.rows]


# -- scoring -----------------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A reward model without its head: the part that can be sharded. The head is small and stays in fp32."""

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
    """Its vocabulary, with the chat template used in training."""

    bias: float = 0.0
    """Added to every reward."""

    domains: Mapping[str, str] = field(default_factory=dict)
    """System prompt by domain."""

    body: Body | None = None
    """The body, if the ranks of `world` share its parameters; then all of them must call it at the same time."""

    world: World = field(default_factory=World)

    def sharded(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> RewardModel:
        """Return this model on `device`, its body's parameters sharded across ranks by `shard`.

        From then on, scoring is a collective operation, even for a rank that has nothing to score.
        """
        body = Body(self.model).eval()
        shard(body)
        causal_model(self.model).score.to(device)
        return replace(self, body=body, world=world)

    def score_ids(self, sequences: Sequence[npt.NDArray[np.int32]], batch_rows: int) -> list[float]:
        """Return the reward of each sequence of this model's token ids: prompt, answer and end token.

        Raises UserError for an empty sequence, and for ids the model does not have.
        """
        self._check_ids(sequences)
        # Batches of similar lengths, the longest first: little padding, and a lack of memory shows at once.
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        rewards = [0.0] * len(sequences)
        starts = range(0, len(order), batch_rows)
        calls = int(max_over_ranks([float(len(starts))], self.world)[0])
        with torch.no_grad():  # not inference mode: ZeRO-3 keeps some of the tensors that it gathers
            for start in starts:
                chosen = order[start : start + batch_rows]
                scored = self._score_batch([sequences[index] for index in chosen]).double().cpu()
                for index, reward in zip(chosen, scored.tolist(), strict=True):
                    rewards[index] = reward + self.bias
            for _ in range(calls - len(starts)):  # take part in the collective calls of ranks with more batches
                self._score_batch([np.array([PADDING], np.int32)])
        return rewards

    def _score_batch(self, sequences: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """Return the head's rewards of B sequences: fp32 [B], without the bias."""
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
                    "rows: its vocabulary is another one; encode the text with the reward model's tokenizer"
                )

    def system_prompt(self, domain: str | None) -> str | None:
        """Return the system prompt of a domain; None for no domain. Raises UserError for an unknown one."""
        if domain is None:
            return None
        if domain not in self.domains:
            known = ", ".join(sorted(self.domains)) or "none"
            raise UserError(f"the reward model has no domain {domain!r}; its domains are: {known}")
        return self.domains[domain]


# -- loading -----------------------------------------------------------------------------------------------------------


def load_reward_model(
    context: StageContext,
    source: Reference | ResolvedInput,
    dtype: torch.dtype,
    device: torch.device,
    merge: bool = True,
) -> RewardModel:
    """Load a `rewardModel` artifact, or a Hugging Face folder with a sequence classifier of one label.

    The body is in `dtype`, the head in fp32. `merge` merges an adapter into its base; otherwise it stays separate, and
    several adapters can share the base.
    Raises UserError for anything else (a language model, several labels, no vocabulary), and as `load_model` does.
    """
    resolved = context.input(source) if isinstance(source, Reference) else source
    path = context.fetch_resolved(resolved)
    require_folder(path)
    card = read_card(path)
    if card.adapter:
        adapted = load_reward_adapter(context, resolved, path, card)
        model = merge_adapter(adapted, str(path), context.world) if merge else adapted
    else:
        model = _load_whole(path)
    tokenizer = own_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{path}: the reward model's folder has no vocabulary, so no text can be scored; add it there")
    check_sizes(model, tokenizer, str(path))
    if tokenizer.chat_template is None:
        raise UserError(
            f"{path}: the reward model's vocabulary has no chat template, so no conversation can be scored; add one"
        )
    place(model, dtype, device, exact=model.score)
    if card.reward is None:
        return RewardModel(model, tokenizer)
    return RewardModel(model, tokenizer, card.reward.bias, card.reward.domains)


def _load_whole(path: Path) -> Any:
    if not (path / CONFIG).is_file() and (path / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path}: a PEFT adapter without a card, so its base is unknown; merge it with PEFT first")
    config = read_json(path / CONFIG)
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{path}: {', '.join(kinds) or 'a model without `architectures`'} is not a reward model; give the output "
            "of a `rewardModel` stage, or a sequence classifier of one label"
        )
    model = load_folder(path, head=Head.CLASSIFIER)
    labels = int(model.config.num_labels)
    if labels != 1:
        raise UserError(f"{path}: a classifier of {labels} labels; give one with a single label")
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise UserError(f"{path}: {', '.join(kinds)} has no linear head `{HEAD}` on a decoder, as LLaMA's has")
    return model


def load_reward_adapter(context: StageContext, source: ResolvedInput, path: Path, card: ModelCard) -> Any:
    """Return the base with a new head and the adapter in `path` applied, which replaces the head with the trained one.

    `source`: where the folder `path` is from.
    """
    weights = check_adapter_folder(path)
    if card.reward is None:
        raise UserError(f"{path}: an adapter of a language model is not a reward model; use a `rewardModel` stage")
    base = load_base(context, source, path, card)
    return apply_adapter(make_reward_model(base.model, seed=0), path, weights, trainable=False)
