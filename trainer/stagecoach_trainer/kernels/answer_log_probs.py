"""Prompts followed by answers: one micro-batch for a language model, and the answers' log-probabilities.

B answers, T tokens of the longest row, M tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagecoach_trainer.batches.collate import PADDING_TOKEN
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.kernels.causal import CausalLoss, causal_model
from stagecoach_trainer.kernels.log_probs import token_log_probs, token_log_probs_through
from stagecoach_trainer.kernels.proof_rows import ProofRows
from stagecoach_trainer.kernels.unpadded import states_at


@dataclass(frozen=True)
class AnswerBatch:
    """Answers with their prompts, padded on the right."""

    tokens: Tensor
    """Token ids [B, T]."""

    at: Tensor
    """Indices into the flattened [B · T] at which the answers' tokens are predicted, ascending [M]."""

    targets: Tensor
    """The answers' tokens [M]."""

    last: Tensor
    """Position of each row's last token [B]."""

    lengths: tuple[int, ...]
    """Tokens of each answer."""

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> AnswerBatch:
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> AnswerBatch:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> AnswerBatch:
        return AnswerBatch(change(self.tokens), change(self.at), change(self.targets), change(self.last), self.lengths)


def collate_answers(pairs: Sequence[tuple[Ids, Ids]], whole: bool = False) -> AnswerBatch:
    """Arrange non-empty prompts and answers, padded on the right. Without any pair: one token and no target.

    `whole`: an answer's last token enters the model too, although no target follows it.
    """
    left_out = 0 if whole else 1
    length = max((len(prompt) + len(answer) - left_out for prompt, answer in pairs), default=1)
    tokens = np.full((max(1, len(pairs)), length), PADDING_TOKEN, np.int64)
    at: list[np.ndarray] = [np.empty(0, np.int64)]
    last = np.zeros(len(tokens), np.int64)
    for row, (prompt, answer) in enumerate(pairs):
        ids = np.concatenate([prompt, answer[: len(answer) - left_out]])
        tokens[row, : len(ids)] = ids
        last[row] = len(ids) - 1
        # The prompt's last token predicts the answer's first, and so on.
        at.append(row * length + len(prompt) - 1 + np.arange(len(answer)))
    targets = np.concatenate([np.empty(0, np.int64), *(answer for _, answer in pairs)])
    return AnswerBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.concatenate(at)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(last),
        tuple(len(answer) for _, answer in pairs),
    )


class AnswerModel(CausalLoss):
    """A language model that returns the log-probabilities of answers."""

    def token_log_probs(
        self, batch: AnswerBatch, temperature: float = 1.0, want_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [M] of the answers' tokens at `temperature` and, with `want_entropy`, the entropies
        [M] at the same positions (else [0]), in nats, fp32."""
        states = states_at(self.decoder, batch.tokens, batch.at, batch.last, self.positions_keyword)
        at = torch.arange(len(states), device=states.device)
        weight = self.head_weight
        if weight is None:
            head, vocabulary = self.head_function, self.vocabulary
            return token_log_probs_through(head, states, at, batch.targets, vocabulary, temperature, want_entropy)
        bias = getattr(self.head, "bias", None)
        return token_log_probs(
            states, weight, at, batch.targets, temperature, bias, want_entropy, scratch=self._scratch
        )

    def computed(self, rows: ProofRows) -> Tensor:
        """Return the log-probability of each predicted token [K], computed in a forward pass of the module."""
        answers = _answers_of(rows).to(next(self.parameters()).device)
        found: Tensor = self(lambda: self.token_log_probs(answers)[0])
        return found

    def expected(self, rows: ProofRows) -> Tensor:
        """Return the log-probabilities [K] by transformers' own logits."""
        device = next(self.parameters()).device
        answers = _answers_of(rows).to(device)
        logits = causal_model(self.model)(
            input_ids=rows.tokens.to(device), attention_mask=rows.mask.to(device), use_cache=False
        ).logits
        at = logits.flatten(0, 1).index_select(0, answers.at).float()
        return torch.log_softmax(at, -1).gather(1, answers.targets[:, None])[:, 0]


def _answers_of(rows: ProofRows) -> AnswerBatch:
    """Return the rows as answers, each to its own first third."""
    prompts = [max(1, len(ids) // 3) for ids in rows.rows]
    return collate_answers(
        [(ids[:first], ids[first:]) for ids, first in zip(rows.rows, prompts, strict=True)], whole=True
    )
