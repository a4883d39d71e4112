"""New LLaMA models with random weights."""

from __future__ import annotations

from typing import Any

import torch

from stagecoach_api.kinds.pretrain import Architecture
from stagecoach_trainer.models.resize import num_ids


def build_model(shape: Architecture, tokenizer: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a LLaMA with random weights: a pure function of shape, tokenizer and seed.

    The global random state does not change.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=num_ids(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_epsilon,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype)
