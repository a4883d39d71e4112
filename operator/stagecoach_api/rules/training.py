"""Rules over the fields of one training stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from stagecoach_api.fields import FieldPath
from stagecoach_api.kinds import PretrainStage, SftStage
from stagecoach_api.problems import suggest
from stagecoach_api.references import Format, RecordSource, Reference, Split
from stagecoach_api.rules.draft import Draft, DraftStage, Fault, configs
from stagecoach_api.training import MeasuredTraining, Rows, ScheduleName, Training

EMBEDDING_MODULES = frozenset({"embed_tokens", "lm_head"})


# -- data mix ----------------------------------------------------------------------------------------------------------


def every_set_has_a_weight_or_none_has(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        without = [index for index, source in enumerate(config.data) if source.weight is None]
        if without and len(without) < len(config.data):
            for index in without:
                yield Fault(
                    stage.at("data", index),
                    config.data[index].label,
                    "has no weight, and other sets have one",
                    "give every set a `weight`, or none",
                )


def some_weight_is_above_zero(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        if all(source.weight == 0 for source in config.data):
            yield Fault(stage.at("data"), [0] * len(config.data), "all weights are 0", "give one a weight above 0")
    for stage, config in configs(draft, PretrainStage):
        for number, phase in enumerate(config.phases):
            if phase.weights and all(share.weight == 0 for share in phase.weights):
                yield Fault(
                    stage.at("phases", number, "weights"),
                    phase.name,
                    "all weights of the phase are 0",
                    "give one a weight above 0",
                )


def phases_weigh_sets_that_exist(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        known = [source.label for source in config.data]
        for number, phase in enumerate(config.phases):
            seen: set[str] = set()
            for index, share in enumerate(phase.weights):
                path = stage.at("phases", number, "weights", index, "name")
                if share.name not in known:
                    yield Fault(path, share.name, "must be the name of a set in `data`", suggest(share.name, known))
                if share.name in seen:
                    yield Fault(path, share.name, "must be named once in a phase", "remove one of the two weights")
                seen.add(share.name)


def phase_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        seen: set[str] = set()
        for number, phase in enumerate(config.phases):
            if phase.name in seen:
                yield Fault(stage.at("phases", number, "name"), phase.name, "must be unique", "rename one of the two")
            seen.add(phase.name)


def fine_tuning_reads_conversations(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, SftStage):
        for index, source in enumerate(config.data):
            if source.format is Format.TEXT:
                yield Fault(
                    stage.at("data", index, "format"),
                    str(source.format),
                    "plain text has no turns to learn from",
                    "give conversations (alpaca, sharegpt, messages), or train on the text in a `pretrain` stage",
                )


# -- batch and budget --------------------------------------------------------------------------------------------------


def a_batch_holds_a_whole_row(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        tokens, length = config.batch.tokens, config.sequence_length
        if tokens is not None and tokens < length:
            yield _batch_too_small(stage.at("batch", "tokens"), tokens, length)
    for stage, config in configs(draft, PretrainStage):
        for number, phase in enumerate(config.phases):
            if phase.batch_tokens is None and phase.sequence_length is None:
                continue
            tokens = phase.batch_tokens or config.batch.tokens
            length = phase.sequence_length or config.sequence_length
            if tokens is not None and tokens < length:
                field = "batchTokens" if phase.batch_tokens is not None else "sequenceLength"
                yield _batch_too_small(stage.at("phases", number, field), tokens, length)


def _batch_too_small(path: FieldPath, tokens: int, length: int) -> Fault:
    return Fault(
        path,
        tokens,
        f"the global batch of {tokens:,} tokens must hold one row of {length:,} tokens (`sequenceLength`)",
        "make the batch larger or the rows shorter",
    )


def micro_batches_fit_into_the_batch(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        micro, tokens = config.batch.micro_batch_rows, config.batch.tokens
        if micro is None or tokens is None:
            continue
        rows = max(1, tokens // config.sequence_length)
        if micro > rows:
            yield Fault(
                stage.at("batch", "microBatchRows"),
                micro,
                f"must be at most {rows:,}, the rows of the global batch (`tokens` / `sequenceLength`)",
                "lower it, or make the batch larger",
            )


def the_budget_pays_for_one_step(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        batch = config.batch.tokens
        if isinstance(config, PretrainStage) and config.phases:
            for number, phase in enumerate(config.phases):
                size = phase.batch_tokens or batch
                if size is not None and phase.tokens < size:
                    yield _budget_too_small(stage.at("phases", number, "tokens"), phase.tokens, size)
        elif config.budget.tokens is not None and batch is not None and config.budget.tokens < batch:
            yield _budget_too_small(stage.at("budget", "tokens"), config.budget.tokens, batch)


def _budget_too_small(path: FieldPath, tokens: int, batch: int) -> Fault:
    return Fault(
        path, tokens, f"must pay for one optimiser step of {batch:,} tokens", "raise it, or make the batch smaller"
    )


def phases_are_the_budget(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        default = PretrainStage.model_fields["budget"].default
        if not config.phases or config.budget == default:
            continue
        total = sum(phase.tokens for phase in config.phases)
        if config.budget.tokens != total:
            yield Fault(
                stage.at("budget"),
                config.budget.model_dump(exclude_none=True),
                f"the phases are the budget, and they make {total:,} tokens",
                "remove `budget`",
            )


# -- schedule ----------------------------------------------------------------------------------------------------------


def the_warm_up_ends_before_training_does(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        steps, warmup = _most_steps(config), config.schedule.warmup_steps
        if warmup is not None and steps is not None and warmup > steps:
            yield Fault(
                stage.at("schedule", "warmupSteps"),
                warmup,
                f"must be at most {steps:,}, the steps of the budget",
                "shorten the warm-up or lengthen the budget",
            )


def warm_up_and_decay_leave_room_for_each_other(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        schedule = config.schedule
        if schedule.name is not ScheduleName.WSD or schedule.warmup_steps is not None:
            continue
        if schedule.warmup_share + schedule.decay_share > 1.0:
            yield Fault(
                stage.at("schedule"),
                {"warmupShare": schedule.warmup_share, "decayShare": schedule.decay_share},
                "`warmupShare` and `decayShare` must make at most 1 together",
                "lower one of them",
            )


def _most_steps(config: Training) -> int | None:
    """Return the most optimiser steps the budget can mean. None: it depends on the data."""
    if isinstance(config, PretrainStage) and config.phases:
        sizes = [_step_tokens(config, phase.batch_tokens, phase.sequence_length) for phase in config.phases]
        if None in sizes:
            return None
        return sum(ceil(phase.tokens / (size or 1)) for phase, size in zip(config.phases, sizes, strict=True))
    if config.budget.tokens is not None:
        size = _step_tokens(config, None, None)
        return ceil(config.budget.tokens / size) if size is not None else None
    return config.budget.steps


def _step_tokens(config: Training, batch_tokens: int | None, sequence_length: int | None) -> int | None:
    """Tokens of one step, where the batch is counted in tokens."""
    tokens, length = batch_tokens or config.batch.tokens, sequence_length or config.sequence_length
    return max(1, tokens // length) * length if tokens is not None else None


# -- measuring ---------------------------------------------------------------------------------------------------------


def early_stop_watches_a_held_out_set(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, MeasuredTraining):
        if config.early_stop is None:
            continue
        names = [source.name for source in config.held_out.sets]
        watched = config.early_stop.set
        if watched not in names:
            yield Fault(
                stage.at("earlyStop", "set"),
                watched,
                "must be the name of a set in `heldOut.sets`",
                suggest(watched, names),
            )
        if config.held_out.every_steps is None:
            yield Fault(
                stage.at("heldOut", "everySteps"),
                None,
                "`earlyStop` needs measurements during training",
                "give `heldOut.everySteps`",
            )


def held_out_text_is_not_trained_on(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, MeasuredTraining):
        trained = {_part(source) for source in config.data}
        for index, held_out in enumerate(config.held_out.sets):
            if _part(held_out) in trained:
                from_training_part = held_out.stage is not None and held_out.split is Split.TRAIN
                yield Fault(
                    stage.at("heldOut", "sets", index),
                    held_out.name,
                    "is also trained on, so it measures nothing",
                    "write `split: heldout`" if from_training_part else "name records that `data` does not have",
                )


def _part(source: RecordSource) -> tuple[str, Split | None]:
    """What a source reads; files have no parts."""
    return source.key, source.split if source.stage is not None else None


# -- what learns -------------------------------------------------------------------------------------------------------


def new_rows_need_a_larger_vocabulary(draft: Draft) -> Iterator[Fault]:
    """Rows are new where this stage, or one before it on the way from the first model, was given a vocabulary."""
    stages = draft.by_name
    for stage, config in configs(draft, Training):
        path = _new_rows(stage, config)
        if path is None or _vocabulary_may_have_grown(stage, stages):
            continue
        if isinstance(config, PretrainStage) and config.architecture is not None:
            yield Fault(
                path,
                "new",
                "there are no new rows: all rows of a model made from `architecture` are",
                "train `full`, or `embeddings` with `rows: all`",
            )
        else:
            yield Fault(
                path,
                "new",
                "there are no new rows: without `tokenizer` the vocabulary stays the model's own",
                "give the `tokenizer` that grows it, or train other rows",
            )


def _vocabulary_may_have_grown(stage: DraftStage, stages: Mapping[str, DraftStage]) -> bool:
    """Follow the models back to the first one; what could not be read may have grown it."""
    seen: set[str] = set()
    config = stage.config
    while config is not None:
        model: Reference | None = getattr(config, "model", None)
        if model is not None and getattr(config, "tokenizer", None) is not None:
            return True
        if model is None or model.stage is None or model.stage in seen:
            return False
        seen.add(model.stage)
        config = stages[model.stage].config if model.stage in stages else None
    return True


def _new_rows(stage: DraftStage, config: Training) -> FieldPath | None:
    """Path of the field that asks for new rows only."""
    embeddings, lora = config.trainable.embeddings, config.trainable.lora
    if embeddings is not None and embeddings.rows is Rows.NEW:
        return stage.at("trainable", "embeddings", "rows")
    if lora is not None and lora.new_rows:
        return stage.at("trainable", "lora", "newRows")
    return None


def lora_layers_have_one_role(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        lora = config.trainable.lora
        if lora is None:
            continue
        for index, module in enumerate(lora.modules_to_save):
            path = stage.at("trainable", "lora", "modulesToSave", index)
            if module in lora.targets:
                yield Fault(path, module, "is in `targets` too", "take it out of one of the two")
            if lora.new_rows and module in EMBEDDING_MODULES:
                yield Fault(
                    path,
                    module,
                    "`newRows` keeps old rows as they are, and `modulesToSave` trains all rows",
                    "keep one of the two",
                )


def only_an_adapter_is_continued(draft: Draft) -> Iterator[Fault]:
    stages = draft.by_name
    for stage, config in configs(draft, Training):
        lora = config.trainable.lora
        if lora is None or not lora.continue_adapter:
            continue
        path = stage.at("trainable", "lora", "continueAdapter")
        model = getattr(config, "model", None)
        if model is None:
            yield Fault(path, True, "a model made from `architecture` is no adapter", "leave it out")
        elif model.stage in stages and _makes_whole_weights(stages[model.stage]):
            yield Fault(
                path,
                True,
                f"`{model.stage}` makes whole weights, no adapter",
                "leave it out, or name a stage that trains `lora`",
            )


def _makes_whole_weights(stage: DraftStage) -> bool:
    return isinstance(stage.config, Training) and stage.config.trainable.lora is None


def rows_fit_the_context_of_the_architecture(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PretrainStage):
        if config.architecture is None:
            continue
        limit = config.architecture.max_position_embeddings
        lengths = [(stage.at("sequenceLength"), config.sequence_length)]
        lengths += [
            (stage.at("phases", number, "sequenceLength"), phase.sequence_length)
            for number, phase in enumerate(config.phases)
            if phase.sequence_length is not None
        ]
        for path, length in lengths:
            if length > limit:
                yield Fault(
                    path,
                    length,
                    f"must be at most {limit:,}, `architecture.maxPositionEmbeddings`",
                    "shorten the rows, or raise that",
                )


TRAINING_RULES = (
    every_set_has_a_weight_or_none_has,
    some_weight_is_above_zero,
    phases_weigh_sets_that_exist,
    phase_names_are_unique,
    fine_tuning_reads_conversations,
    a_batch_holds_a_whole_row,
    micro_batches_fit_into_the_batch,
    the_budget_pays_for_one_step,
    phases_are_the_budget,
    the_warm_up_ends_before_training_does,
    warm_up_and_decay_leave_room_for_each_other,
    early_stop_watches_a_held_out_set,
    held_out_text_is_not_trained_on,
    new_rows_need_a_larger_vocabulary,
    lora_layers_have_one_role,
    only_an_adapter_is_continued,
    rows_fit_the_context_of_the_architecture,
)
