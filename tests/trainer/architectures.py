"""Tiny, randomly initialised models of every architecture of transformers that predicts the next token.

`tiny(model_type)` returns a model that computes in milliseconds: the architecture's own default configuration, its
sizes shrunk by the names of their fields. What makes an architecture special stays: each kind of its layers occurs, and
so do its scales, caps, windows and routers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 128
WIDTH = 32
HEADS = 4
HEAD_WIDTH = WIDTH // HEADS
EXPERTS = 4
LARGEST = 4_000_000
"""Parameters above which a model is not tiny: a field of its configuration is missing from RULES."""
SPREAD = 0.2
"""Standard deviation of the weights of matrices."""

RULES: Sequence[tuple[str, int]] = (
    (r"\w*(?<!num_)vocab_size\w*|ngram_vocab_size_base", VOCABULARY),
    (r"\w*max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 128),
    (r"hidden_size_per_layer_input|router_hidden_size|ple_embed_dim|laurel_rank|dim_model_base", 8),
    (r"attention_head_dim", 2 * HEAD_WIDTH),
    (r"attention_hidden_size", WIDTH),
    (r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|n_inner|dff|d_inner|dim_ff|feed_forward_size", 2 * WIDTH),
    (r"\w*hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|embedding_dim|lru_width|emb_dim", WIDTH),
    (r"(?:input|output)_embedding_size", WIDTH),
    (r"\w*key_value_heads|num_kv_heads|num_query_groups|linear_num_key_heads", HEADS // 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 2 * HEADS),
    (r"\w*attention_heads|n_heads?|num_heads|linear_num_value_heads|linear_num_heads|index_n_heads", HEADS),
    (r"qk_head_dim|mamba_headdim", 2 * HEAD_WIDTH),
    (r"image_size|num_channels|temporal_patch_size", 16),
    (r"rotary_dim", HEAD_WIDTH // 2),
    (r"\w*head_dim|d_head|dim_head|mamba_d_head|kv_channels|attention_head_size|query_pre_attn_scalar", HEAD_WIDTH),
    (r"num_experts_per_tok(?:en)?|moe_k|moe_topk|top_k", 2),
    (r"\w*num_experts|n_routed_experts|num_local_experts|zero_expert_num|centroid_intermediate_top_k", EXPERTS),
    (r"n_group|num_expert_group|topk_group|mamba_n_groups|n_shared_experts|o_groups", 1),
    (r"\w*_rank|hc_lowrank|\w*d_state|\w*state_size|num_centroids", 8),
    (r"n_groups", 1),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"\w*window\w*|local_attention|index_topk|rel_extent", 16),
    (r"\w*chunk_size|\w*chunk_length|block_size|index_block_size|\w*chunksize", 8),
    (r"n_layers_per_attn_res_block|layer_group_size|attn_layer_period|num_layers_per_stack", 2),
    (r"first_k_dense_replace|num_kv_shared_layers", 1),
)
"""Pattern of a field's whole name, and its value. The first that matches decides."""

LAYER_COUNTS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(?:num_)?(?:de|en)coder_layers|num_blocks|max_window_layers|depth"
)
LAYER_KINDS = ("layer_types", "layers_block_type")
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 2 * HEADS},
    "ministral": {"head_dim": HEAD_WIDTH},
    "nemotron": {"num_key_value_heads": HEADS // 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
}
"""Fields of types whose default configuration cannot be shrunk by names alone, or is not that of a decoder."""


NOT_TINY: Mapping[str, str] = {
    "blt": "its parts have configurations that cannot be shrunk by name",
    "cohere_compass_text": "its default configuration cannot be built",
    "dots3_note": "its default configuration lists layers by number",
    "dots3_note_text": "its default configuration lists layers by number",
    "gemma3n": "its vision part needs the library timm",
    "gemma4_assistant": "its default configuration cannot be built",
    "gemma4_unified_assistant": "its default configuration cannot be built",
    "hrm_text": "its layers are counted by several fields that must agree",
    "musicgen": "its default configuration is that of the whole model, not of the decoder",
    "musicgen_melody": "its default configuration is that of the whole model, not of the decoder",
    "qwen4_exp": "its default configuration cannot be built",
    "qwen4_exp_text": "its default configuration cannot be built",
    "reformer": "its positions are axes whose product is the sequence length",
    "zamba": "its shared layers need more layers than are tiny",
}
"""Types that have no tiny model, with the reason."""


def model_types() -> list[str]:
    """Return the types that transformers maps to a causal language model, except NOT_TINY."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING)
    return sorted(known - set(NOT_TINY))


def tiny(model_type: str, seed: int = 0, **settings: Any) -> Any:
    """Return a model of a type, in fp32 on the CPU, in evaluation mode.

    Raises ValueError for a type that cannot be made tiny, and what transformers raises for one that it cannot make.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **settings)
    with torch.device("meta"):
        size = sum(item.numel() for item in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type}: {size} parameters; its fields are missing from RULES")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            _enlarge(parameter.data)
    return model


def _enlarge(weight: Tensor) -> None:
    """Make a fresh weight large enough that every part of the model shows in its output.

    Fresh logits are near 0, whatever scales them, and fresh biases are 0, as are some routers.
    """
    if weight.ndim > 1 and not weight.any():
        weight += torch.randn_like(weight) * SPREAD
    elif weight.ndim > 1:
        weight *= max(1.0, SPREAD / max(float(weight.std()), 1e-3))
    else:
        weight += torch.randn_like(weight) * SPREAD / 2


def tiny_config(model_type: str, **settings: Any) -> Any:
    """Return the default configuration of a type with small sizes; `settings` change it further."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**{**dict(_changes(kind())), **SETTINGS.get(model_type, {}), **settings})


def _changes(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration to change, with their values."""
    fields = vars(config)
    kinds = next((list(dict.fromkeys(fields[name])) for name in LAYER_KINDS if fields.get(name)), [])
    layers = max(2, len(kinds))
    for name, value in fields.items():
        if name in LAYER_KINDS and value:
            yield name, (kinds * layers)[:layers]
        elif name in config.sub_configs and value is not None:
            yield name, {"model_type": value.model_type, **dict(_changes(value))}
        elif name in IDS:
            yield name, IDS[name]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif LAYER_COUNTS.fullmatch(name):
            yield name, layers
        elif name.endswith(("token_id", "token_index")):
            yield name, 3
        elif "key_value_heads" in name and value == fields.get("num_attention_heads"):
            yield name, HEADS
        elif (small := _small(name)) is not None:
            yield name, min(value, small)


def _small(name: str) -> int | None:
    return next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)
