"""What a causal language model computes after its decoder, as the model itself computes it.

Some models scale, cap or transform between the decoder and the logits (Falcon-H1, Gemma 2, ModernBERT), and some add
losses of their own (of routers). Neither is reimplemented: the model's own forward pass runs, with the decoder replaced
or observed.

B rows, T tokens, N places with a token, D width of the model, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stagecoach_trainer.batches.collate import RowBatch
from stagecoach_trainer.batches.rows import IGNORE


class OwnHead:
    """A model's own way from hidden states to logits, as a function of a chunk of states."""

    def __init__(self, causal: Any, decoder: nn.Module) -> None:
        self._causal = causal
        self._decoder: Any = decoder

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits [rows, V] of states [rows, D]."""
        given = _DecoderOutput(states[None])
        before = vars(self._decoder).get("forward")  # an instance attribute, which hides the class's method
        self._decoder.forward = lambda *arguments, **keywords: given
        try:
            with autocast_to(states.dtype, states.device):
                # The ids are read by the decoder alone.
                ids = torch.zeros((1, len(states)), dtype=torch.int64, device=states.device)
                logits: Tensor = self._causal(input_ids=ids, use_cache=False).logits[0]
        finally:
            if before is None:
                del self._decoder.forward
            else:
                self._decoder.forward = before
        return logits


class _DecoderOutput:
    """A decoder's output that has hidden states only, by name or by index."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        outputs = (self.last_hidden_state,)
        return self.last_hidden_state if index in (0, "last_hidden_state") else outputs[index]


def states_and_added_loss(causal: Any, decoder: nn.Module, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Return a decoder's states [B, T, D] and the loss that the model adds to that of the tokens, a scalar.

    The added loss is that of the micro-batch, with the weights of the model's configuration, and padding does not take
    part in it. It is what the model's own loss is if no position has a label.
    """
    states: list[Tensor] = []

    def without_most_states(module: nn.Module, inputs: Any, output: Any) -> Any:
        del module, inputs
        states.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:, :1]  # spares the logits of all positions
        routers = getattr(output, "router_logits", None)
        if routers is not None and batch.filled is not None:
            output.router_logits = tuple(_without_padding(item, batch.filled) for item in routers)
        return output

    hook = decoder.register_forward_hook(without_most_states)
    nothing = torch.full((len(batch.tokens), 1), IGNORE, device=batch.tokens.device)
    positions = {} if batch.positions is None else {"position_ids": batch.positions}
    try:
        found = causal(
            input_ids=batch.tokens,
            attention_mask=None,
            use_cache=False,
            labels=nothing,
            num_items_in_batch=1,  # a mean over no position would be NaN; this makes it a sum
            **positions,
        )
    finally:
        hook.remove()
    return states[0], found.loss.float()


def _without_padding(logits: Tensor, filled: Tensor) -> Tensor:
    """Return a router's logits [B · T, experts] or [B, T, experts] without those of padding: [N, experts]."""
    return logits.reshape(-1, logits.shape[-1]).index_select(0, filled)


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which a model with fp32 parts computes in `dtype`; it does nothing for fp32."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype) if low else nullcontext()
