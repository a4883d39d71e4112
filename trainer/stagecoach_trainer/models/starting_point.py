"""The starting point of a training stage: a model, its vocabulary, and the rows that are new in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecoach_api.kinds.pretrain import Architecture, RopeScaling, RopeScalingName
from stagecoach_api.references import Reference
from stagecoach_api.training import NewRows, TextTraining
from stagecoach_trainer.models.load import ConfigChange, LoadedModel, load_model, positions_of
from stagecoach_trainer.models.new_model import build_model
from stagecoach_trainer.models.resize import check_old_ids, first_new_id, grow, num_ids, num_rows
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.vocabulary import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class StartingPoint:
    """A model whose trainable parameters are not chosen yet."""

    model: Any
    tokenizer: Any
    vocabulary: Path
    """Folder from which the vocabulary's files are copied."""

    new_rows: range
    """Ids of the rows that the vocabulary's growth added, in this stage or an earlier one."""

    loaded: LoadedModel | None
    """The loaded model. None for a new model."""

    grown: NewRows | None
    """How this stage initialised new rows. None if it added none."""

    seed: int

    num_rows: int
    """Rows of the embedding, of which the vocabulary may use fewer."""

    @property
    def warnings(self) -> list[str]:
        """Warnings for the report that concern the vocabulary."""
        tokens = num_ids(self.tokenizer)
        if tokens >= self.num_rows:
            return []
        return [
            f"the model has {self.num_rows:,} rows for the {tokens:,} ids of its vocabulary: the surplus rows are kept "
            "and never sampled"
        ]


def start_from_scratch(context: StageContext, shape: Architecture, tokenizer: Reference) -> StartingPoint:
    """Return a new model with random weights for the vocabulary that `tokenizer` names."""
    path = context.fetch(tokenizer)
    vocabulary = load_tokenizer(path)
    context.progress.report("build model")
    model = build_model(shape, vocabulary, context.seed)
    return StartingPoint(model, vocabulary, path, range(0), None, None, context.seed, num_rows(model))


def start_from_model(
    context: StageContext, config: TextTraining, model: Reference, change_config: ConfigChange | None = None
) -> StartingPoint:
    """Return the model that `model` names, grown if the stage's `tokenizer`, or else its own, is larger.

    Raises UserError for a vocabulary that is smaller or changes old ids, and for growing a model whose adapter is
    continued.
    """
    continued = config.trainable.lora is not None and config.trainable.lora.continue_adapter
    loaded = load_model(context, model, merge=not continued, change_config=change_config, grows=True)
    if config.tokenizer is None:
        path, tokenizer = loaded.path, loaded.require_tokenizer()
        first = num_rows(loaded.model)  # only rows that are missing are new
    else:
        path = context.fetch(config.tokenizer)
        tokenizer = load_tokenizer(path)
        if loaded.tokenizer is not None:
            check_old_ids(loaded.tokenizer, tokenizer, str(path))
        first = first_new_id(loaded.model, loaded.tokenizer)
    if num_ids(tokenizer) <= first:
        return _start(context, loaded, tokenizer, path, None)
    if continued and loaded.card.adapter:
        raise UserError(
            f"tokenizer: it has {num_ids(tokenizer)} tokens, {num_ids(tokenizer) - first} of them new; the base of a "
            "continued adapter (`continueAdapter`) cannot grow; start a new adapter, or merge this one first"
        )
    how = config.resize.new_rows
    rows = grow(loaded.model, loaded.tokenizer, tokenizer, how, context.seed, first)
    return StartingPoint(loaded.model, tokenizer, path, rows, loaded, how, context.seed, num_rows(loaded.model))


def start_unchanged(
    context: StageContext, model: Reference, change_config: ConfigChange | None = None, merge: bool = True
) -> StartingPoint:
    """Return the model that `model` names with its own vocabulary. `merge` merges an adapter into its base."""
    loaded = load_model(context, model, merge=merge, change_config=change_config)
    return _start(context, loaded, loaded.require_tokenizer(), loaded.path, None)


def _start(
    context: StageContext, loaded: LoadedModel, tokenizer: Any, path: Path, grown: NewRows | None
) -> StartingPoint:
    old = loaded.card.old_rows
    rows = range(0) if old is None else range(old, num_ids(tokenizer))
    return StartingPoint(loaded.model, tokenizer, path, rows, loaded, grown, context.seed, num_rows(loaded.model))


# -- positions ---------------------------------------------------------------------------------------------------------


def position_change(
    longest: int,
    theta: float | None = None,
    scaling: RopeScaling | None = None,
    must_rotate: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> ConfigChange:
    """Return a function that edits a configuration's positions: base, scaling, and a context of at least `longest`.

    Positions that are not rotary do not change: the number of learned ones (GPT-2, OPT) is fixed, and ALiBi (BLOOM) has
    no limit. The function raises UserError if they cannot fulfil what is required; `must_rotate`: whether a later phase
    changes the base. It calls `warn` if rows are longer than the model's context
    and nothing prepares the model for that.
    """

    def change(config: PreTrainedConfig) -> None:
        rotary = getattr(config, "rope_parameters", None)
        if rotary is None or positions_of(config) is None:
            _require_no_change(config, longest, must_rotate or theta is not None or scaling is not None)
            return
        rope = dict(rotary)
        stated = int(config.max_position_embeddings)
        if theta is not None:
            rope["rope_theta"] = theta
        if scaling is not None:
            rope.update(rope_type=scaling.name.value, factor=scaling.factor)
            # Dynamic scaling grows from the unscaled context at run time; the other kinds state the scaled context, and
            # YaRN also needs the original one.
            if scaling.name is RopeScalingName.YARN:
                rope["original_max_position_embeddings"] = stated
            if scaling.name is not RopeScalingName.DYNAMIC:
                stated = int(stated * scaling.factor)
        config.rope_parameters = rope
        dynamic = rope.get("rope_type") == RopeScalingName.DYNAMIC.value  # scales beyond this context at run time
        if longest > stated and theta is None:
            warn(
                f"rows of {longest:,} tokens are longer than the model's context of {stated:,} (`sequenceLength`); "
                "positions beyond it are new to the model: lower `sequenceLength`, or set `ropeScaling` in `pretrain`"
            )
        config.max_position_embeddings = stated if dynamic else max(stated, longest)

    return change


def _require_no_change(config: PreTrainedConfig, longest: int, must_rotate: bool) -> None:
    if must_rotate:
        raise UserError(f"ropeTheta, ropeScaling: {config.model_type} has no rotary positions; remove these fields")
    learned = positions_of(config)
    if learned is not None and longest > learned:
        raise UserError(
            f"sequenceLength: {longest} tokens, but the {config.model_type} has learned positions for {learned}; "
            f"set at most {learned}"
        )
