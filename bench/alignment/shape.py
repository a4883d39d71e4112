"""The shape of the models that the benches beside TRL compare. No torch at the top."""

from __future__ import annotations

from typing import Any

VOCABULARY = 8192
WIDTH, LAYERS, HEADS, FEED_FORWARD = 256, 4, 4, 688
"""7.4M parameters with a head of their own."""


def llama_config(
    positions: int,
    width: int = WIDTH,
    layers: int = LAYERS,
    heads: int = HEADS,
    feed_forward: int = FEED_FORWARD,
    **settings: Any,
) -> Any:
    """Return a LLaMA's configuration: no grouped heads, no tied embeddings, no special tokens unless `settings` say."""
    from transformers import LlamaConfig

    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        **special | settings,
    )
