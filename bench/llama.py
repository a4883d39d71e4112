"""The LLaMA models that the benches train, on both sides. Imports torch and transformers only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

VOCABULARY = 8192
WIDTH, LAYERS, HEADS, FEED_FORWARD = 256, 4, 4, 688
"""7.4M parameters with an output head of its own."""


def llama_config(
    positions: int,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    layers: int = LAYERS,
    heads: int = HEADS,
    feed_forward: int = FEED_FORWARD,
    **settings: Any,
) -> LlamaConfig:
    """Return a LLaMA's configuration, with neither grouped heads nor tied embeddings.

    It has no special tokens unless `settings` name them.
    """
    from transformers import LlamaConfig

    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        **special | settings,
    )
