"""Tiny vocabularies, models and stage contexts for the tests of models, samples and training stages."""

# ruff: noqa: S106 - tokens of a vocabulary are not passwords
from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from stagecoach_api.artifacts import REPORT, ResolvedInput
from stagecoach_trainer.runtime.context import StageContext, World
from tests.trainer.contexts import resolved_stage, stage_context

SENTENCES = (
    "the quick brown fox jumps over the lazy dog and the dog sleeps",
    "a model learns what the next word is from the words in front of it",
    "below is an instruction that describes a task write a response",
    "白日依山尽 黄河入海流 欲穷千里目 更上一层楼",
    "床前明月光 疑是地上霜 举头望明月 低头思故乡",
)
torch.set_num_threads(1)  # the models are so small that several threads only wait for each other

SPECIAL = ("<unk>", "<s>", "</s>")


def make_tokenizer(vocab_size: int = 400, extra: tuple[str, ...] = (), special: tuple[str, ...] = ()) -> Any:
    """Return a LLaMA-like BPE vocabulary with byte fallback: `vocab_size` tokens at most, then `extra` pieces, then
    `special` tokens. Equal arguments give equal vocabularies, and more `extra` moves no id."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *byte_pieces], show_progress=False, initial_alphabet=["▁"]
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for piece in extra:
        vocabulary[piece] = len(vocabulary)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    rebuilt = Tokenizer.from_str(json.dumps(state))
    rebuilt.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_model(rows: int, seed: int = 0, tied: bool = False, hidden: int = 32) -> LlamaForCausalLM:
    """Return a LLaMA of two layers with `rows` rows."""
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# -- other families ----------------------------------------------------------------------------------------------------

CONTEXT = 256
_SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}
_CONTEXT: dict[str, Any] = {"max_position_embeddings": CONTEXT}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "gpt2": partial(GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, embd_pdrop=0.0, resid_pdrop=0.0),
    "opt": partial(OPTConfig, **_SIZES, **_CONTEXT, dropout=0.0, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": partial(BloomConfig, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neox": partial(GPTNeoXConfig, **_SIZES, **_CONTEXT, intermediate_size=64),
    "qwen2": partial(Qwen2Config, **_SIZES, **_CONTEXT, intermediate_size=64, num_key_value_heads=2),
}
"""Small models of families other than LLaMA, without dropout. GPT-2 and OPT have learned positions for `CONTEXT`
tokens, BLOOM has ALiBi, the others have rotary positions."""


def family_config(family: str, rows: int) -> PreTrainedConfig:
    """Return the configuration of a model of the family with `rows` rows."""
    return FAMILIES[family](vocab_size=rows, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def save_family(folder: Path, family: str, tokenizer: Any) -> Path:
    """Write a model of the family with its vocabulary in Hugging Face layout; return the folder."""
    tokenizer.save_pretrained(folder)
    family_config(family, len(tokenizer)).save_pretrained(folder)
    rows = len(AutoTokenizer.from_pretrained(folder))  # Qwen2's class adds a token for padding
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(family_config(family, rows)).save_pretrained(folder)
    return folder


# -- models on disk ----------------------------------------------------------------------------------------------------


def weights_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return a model's weights by name, a tied head left out."""
    tied = bool(model.config.tie_word_embeddings)
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def save_base(folder: Path, tokenizer: Any, seed: int = 0, tied: bool = False) -> Path:
    """Write a base model with its vocabulary in Hugging Face layout; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(len(tokenizer), seed, tied)
    model.config.save_pretrained(folder)
    save_file(weights_of(model), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def outside(path: Path) -> ResolvedInput:
    """Return an input outside the store, resolved as the planner does."""
    from stagecoach_api.store import external_digest, list_external

    return ResolvedInput(uri=str(path), digest=external_digest(list_external(str(path))[1]))


def make_context(
    root: Path, kind: str = "pretrain", inputs: dict[str, Path] | None = None, seed: int = 7, world: World | None = None
) -> StageContext:
    """Return a context below `root` whose inputs are `uri:NAME` for each given NAME."""
    store = root / "store"
    store.mkdir(parents=True, exist_ok=True)
    found = {f"uri:{name}": outside(path) for name, path in (inputs or {}).items()}
    resolved = resolved_stage(store, stage=kind, kind=kind, inputs=found, seed=seed, code="test")
    context = stage_context(resolved, root / "work", root / "cache", world)
    (context.work / "logs").mkdir(exist_ok=True)
    context.cache.mkdir(exist_ok=True)
    return context


def report_of(context: StageContext) -> dict[str, Any]:
    """Return the report that a stage has written."""
    found: dict[str, Any] = json.loads((context.output / REPORT).read_text(encoding="utf-8"))
    return found


def content_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a flat folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
