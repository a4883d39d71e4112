"""The size of a stage's model: from the run file, or from the model's own files (`model_files`). Pure.

A model's name is no evidence of its size and is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stagecoach_api.kinds.pretrain import Architecture, PretrainStage
from stagecoach_api.references import Reference
from stagecoach_core.values import Plan


class UnknownSize(Exception):
    """A model's size is not known; the message is the reason."""


@dataclass(frozen=True)
class ModelShape:
    """What FLOPs and memory of a decoder depend on."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    kv_share: float = 1.0
    """Key and value heads as a share of all heads."""
    tied: bool = False
    """Whether the head is the input embedding."""
    experts: int = 0
    """Experts of each layer; 0 for a dense model."""
    active_experts: int = 0
    counted: float | None = None
    """Number of parameters in the weights' own headers. None to compute it from the shape."""

    @property
    def embedding(self) -> float:
        """Parameters of the input embedding."""
        return float(self.vocabulary * self.hidden)

    @property
    def parameters(self) -> float:
        """All parameters. Computed ones are those of a LLaMA's matrices."""
        if self.counted is not None:
            return self.counted
        attention = self.hidden**2 * (2 + 2 * self.kv_share)
        feed_forward = 3 * self.hidden * self.intermediate * max(1, self.experts)
        return self.layers * (attention + feed_forward) + self.embedding * (1 if self.tied else 2)

    @property
    def multiplied(self) -> float:
        """Parameters that each token is multiplied with: not the looked-up embedding, and only the active experts."""
        idle = max(0, self.experts - self.active_experts) * 3 * self.hidden * self.intermediate * self.layers
        return self.parameters - (0.0 if self.tied else self.embedding) - idle

    def grown_to(self, vocabulary: int) -> ModelShape:
        """Return the shape with at least this many rows in embedding and head."""
        rows = max(0, vocabulary - self.vocabulary)
        more = rows * self.hidden * (1 if self.tied else 2)
        counted = None if self.counted is None else self.counted + more
        return replace(self, vocabulary=self.vocabulary + rows, counted=counted)

    def lora_parameters(self, targets: tuple[str, ...], rank: int) -> float:
        """Return the parameters of adapters on these linear layers of every block; unknown names count as square."""
        kv, wide = self.kv_share * self.hidden, float(self.intermediate)
        sizes = {
            "k_proj": self.hidden + kv,
            "v_proj": self.hidden + kv,
            "gate_proj": self.hidden + wide,
            "up_proj": self.hidden + wide,
            "down_proj": self.hidden + wide,
        }
        blocks = [sizes.get(name, 2.0 * self.hidden) for name in targets]
        if targets == ("all-linear",):
            blocks = [2.0 * self.hidden, 2.0 * self.hidden, *sizes.values()]
        return rank * self.layers * sum(blocks)


# -- of a stage --------------------------------------------------------------------------------------------------------


class ModelLibrary(Protocol):
    """Looks up the sizes of models."""

    def shape(self, uri: str) -> ModelShape:
        """Return the shape of the model at a URI. Raises UnknownSize."""

    def num_pieces(self, uri: str) -> int:
        """Return the number of tokens of the vocabulary at a URI; 0 if it has no file that states it.

        Raises UnknownSize if that file cannot be read.
        """


def model_shape(plan: Plan, name: str, library: ModelLibrary) -> ModelShape:
    """Return the shape of a stage's model, after its vocabulary has grown. Raises UnknownSize."""
    config = plan.stages[name].stage.config
    vocabulary = _vocabulary_size(plan, name, getattr(config, "tokenizer", None), library)
    if isinstance(config, PretrainStage) and config.architecture is not None:
        return shape_of_architecture(config.architecture, vocabulary)
    model: Reference | None = getattr(config, "model", None)
    if model is None:
        raise UnknownSize("it has no model")
    if model.stage is not None:
        return model_shape(plan, model.stage, library).grown_to(vocabulary)
    return library.shape(_location(plan, name, model)).grown_to(vocabulary)


def shape_of_architecture(shape: Architecture, vocabulary: int) -> ModelShape:
    return ModelShape(
        hidden=shape.hidden_size,
        layers=shape.num_layers,
        intermediate=shape.intermediate_size,
        vocabulary=vocabulary,
        kv_share=(shape.num_key_value_heads or shape.num_heads) / shape.num_heads,
        tied=shape.tie_embeddings,
    )


def _vocabulary_size(plan: Plan, stage: str, tokenizer: Reference | None, library: ModelLibrary) -> int:
    """Return the largest possible size of a vocabulary; 0 if it is the model's own or unknown."""
    if tokenizer is None:
        return 0
    if tokenizer.stage is None:
        return library.num_pieces(_location(plan, stage, tokenizer))
    config = plan.stages[tokenizer.stage].stage.config
    base: Reference | None = getattr(config, "base", None)
    return config.new_vocabulary_size() + _vocabulary_size(plan, tokenizer.stage, base, library)


def _location(plan: Plan, stage: str, reference: Reference) -> str:
    return plan.stages[stage].externals[reference.key].uri


# -- of a `config.json` ------------------------------------------------------------------------------------------------


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a `config.json` states, under the names that transformers' models use."""
    part = config["text_config"] if isinstance(config.get("text_config"), dict) else config

    def first(*names: str, default: int | None = None) -> int:
        found = next((part[name] for name in names if part.get(name) is not None), default)
        if found is None:
            raise KeyError(f"no `{names[0]}`")
        return int(found)

    hidden = first("hidden_size", "n_embd", "d_model", "dim")
    heads = first("num_attention_heads", "n_head", "n_heads")
    experts = first("num_local_experts", "num_experts", "n_routed_experts", default=0)
    widths = ["moe_intermediate_size"] if experts else []
    return ModelShape(
        hidden=hidden,
        layers=first("num_hidden_layers", "n_layer", "n_layers"),
        intermediate=first(*widths, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        vocabulary=first("vocab_size"),
        kv_share=first("num_key_value_heads", default=heads) / heads,
        tied=bool(config.get("tie_word_embeddings", part.get("tie_word_embeddings", True))),
        experts=experts,
        active_experts=first("num_experts_per_tok", default=0) if experts else 0,
    )
