"""Rules over the fields of one training stage, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stagecoach_api.draft import Draft, DraftStage, Fault, Rule, configs
from stagecoach_api.fields import FieldPath
from stagecoach_api.problems import suggest
from stagecoach_api.references import RecordSource, Reference, Split
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


# -- batch and budget --------------------------------------------------------------------------------------------------


def a_batch_holds_a_whole_row(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        tokens, length = config.batch.tokens, config.sequence_length
        if tokens is not None and tokens < length:
            yield batch_too_small(stage.at("batch", "tokens"), tokens, length)


def batch_too_small(path: FieldPath, tokens: int, length: int) -> Fault:
    """Return the fault of a global batch that is smaller than a row."""
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


def the_budget_covers_one_step(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        for span in config.spans():
            if span.tokens is not None and span.batch_tokens is not None and span.tokens < span.batch_tokens:
                yield Fault(
                    stage.at(*span.path),
                    span.tokens,
                    f"must cover one optimiser step of {span.batch_tokens:,} tokens",
                    "raise it, or make the batch smaller",
                )


# -- schedule ----------------------------------------------------------------------------------------------------------


def the_warm_up_ends_before_training_does(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, Training):
        steps, warmup = config.most_steps(), config.schedule.warmup_steps
        if warmup is not None and steps is not None and warmup > steps:
            yield Fault(
                stage.at("schedule", "warmupSteps"),
                warmup,
                f"must be at most {steps:,}, the steps of the budget",
                "shorten the warm-up or increase the budget",
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
                "`warmupShare` and `decayShare` must add up to at most 1",
                "lower one of them",
            )


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
    """Return what a source reads; files have no parts."""
    return source.key, source.split if source.stage is not None else None


# -- what learns -------------------------------------------------------------------------------------------------------


def new_rows_need_a_larger_vocabulary(draft: Draft) -> Iterator[Fault]:
    """Rows are new if this stage, or one of those its model comes from, has a vocabulary of its own."""
    stages = draft.by_name
    for stage, config in configs(draft, Training):
        path = _new_rows(stage, config)
        if path is None or _vocabulary_may_have_grown(stage, stages):
            continue
        if getattr(config, "model", None) is None:
            yield Fault(
                path,
                "new",
                "there are no new rows: all rows of a model made from `architecture` are new",
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
    """Follow the models back to the first one; a stage that could not be read may have grown the vocabulary."""
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
    """Return the path of the field that asks for new rows only."""
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
                yield Fault(path, module, "is in `targets` too", "remove it from one of the two")
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
            yield Fault(path, True, "a model made from `architecture` is not an adapter", "leave it out")
        elif model.stage in stages and _makes_whole_weights(stages[model.stage]):
            yield Fault(
                path,
                True,
                f"`{model.stage}` makes whole weights, not an adapter",
                "leave it out, or name a stage that trains `lora`",
            )


def _makes_whole_weights(stage: DraftStage) -> bool:
    return isinstance(stage.config, Training) and stage.config.trainable.lora is None


TRAINING_RULES: tuple[Rule, ...] = (
    every_set_has_a_weight_or_none_has,
    some_weight_is_above_zero,
    a_batch_holds_a_whole_row,
    micro_batches_fit_into_the_batch,
    the_budget_covers_one_step,
    the_warm_up_ends_before_training_does,
    warm_up_and_decay_leave_room_for_each_other,
    early_stop_watches_a_held_out_set,
    held_out_text_is_not_trained_on,
    new_rows_need_a_larger_vocabulary,
    lora_layers_have_one_role,
    only_an_adapter_is_continued,
)
