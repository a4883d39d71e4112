"""Rules over stages that learn from preferences or from a reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagecoach_api.kinds import DpoStage, PpoStage, RewardModelStage, SftStage
from stagecoach_api.kinds.ppo import RolloutEngine
from stagecoach_api.problems import suggest
from stagecoach_api.references import PREFERENCE_FORMATS, Format, RecordSource
from stagecoach_api.rules.draft import Draft, DraftStage, Fault, configs
from stagecoach_api.training import MeasuredTraining

PARAMETERS_SHARDED = 3
"""The ZeRO stage that shards parameters too."""

FieldSteps = tuple[str | int, ...]


def _sets(config: MeasuredTraining) -> Iterator[tuple[FieldSteps, RecordSource]]:
    """Yield what a stage trains and measures on, with the steps to its field."""
    yield from _numbered(("data",), config.data)
    yield from _numbered(("heldOut", "sets"), config.held_out.sets)


def _numbered(steps: FieldSteps, sources: Sequence[RecordSource]) -> Iterator[tuple[FieldSteps, RecordSource]]:
    for index, source in enumerate(sources):
        yield (*steps, index), source


def _refused(stage: DraftStage, steps: FieldSteps, source: RecordSource, rule: str, remedy: str) -> Fault:
    return Fault(stage.at(*steps, "format"), str(source.format), rule, remedy)


# -- layouts -----------------------------------------------------------------------------------------------------------


def preferences_are_learned_from_preferences(draft: Draft) -> Iterator[Fault]:
    for kind in (RewardModelStage, DpoStage):
        for stage, config in configs(draft, kind):
            for steps, source in _sets(config):
                if source.format is not Format.AUTO and source.format not in PREFERENCE_FORMATS:
                    yield _refused(
                        stage,
                        steps,
                        source,
                        "these records do not say which answer is preferred",
                        "give preferences (pairs, comparison, ranked), or train on these in an `sft` stage",
                    )


def labels_are_for_kto(draft: Draft) -> Iterator[Fault]:
    for stage, reward_model in configs(draft, RewardModelStage):
        for steps, source in _sets(reward_model):
            if source.format is Format.LABELS:
                yield _refused(
                    stage,
                    steps,
                    source,
                    "a reward model compares answers to one prompt, and labels judge one answer each",
                    "give pairs, comparison or ranked, or train on the labels in a `dpo` stage with `loss: {kto: {}}`",
                )
    for stage, dpo in configs(draft, DpoStage):
        for steps, source in _sets(dpo) if dpo.loss.kto is None else ():
            if source.format is Format.LABELS:
                yield _refused(
                    stage,
                    steps,
                    source,
                    "this loss compares two answers to one prompt, and labels judge one answer each",
                    "set `loss: {kto: {}}`, or give pairs, comparison or ranked",
                )


def ranked_answers_are_fine_tuned_on_in_hindsight(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, SftStage):
        for steps, source in _sets(config):
            if source.format is Format.LABELS:
                yield _refused(
                    stage,
                    steps,
                    source,
                    "labels judge single answers, and `hindsight` needs ranked ones",
                    "train on them in a `dpo` stage with `loss: {kto: {}}`",
                )
            elif source.format in PREFERENCE_FORMATS and config.hindsight is None:
                yield _refused(
                    stage,
                    steps,
                    source,
                    "preferences are no conversations: each has several answers",
                    "add `hindsight: {}`, or train on them in a `rewardModel` or `dpo` stage",
                )


def prompts_are_no_plain_text(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        for steps, source in _numbered(("data",), config.data):
            if source.format is Format.TEXT:
                yield _refused(
                    stage,
                    steps,
                    source,
                    "plain text asks nothing that a policy could answer",
                    "give conversations or preferences, or move it to `pretraining.data`",
                )
        mixed = config.pretraining.data if config.pretraining is not None else ()
        for steps, source in _numbered(("pretraining", "data"), mixed):
            if source.format in PREFERENCE_FORMATS:
                yield _refused(
                    stage,
                    steps,
                    source,
                    "preferences are no text to predict: each has several answers",
                    "give text or conversations",
                )


# -- domains -----------------------------------------------------------------------------------------------------------


def domains_are_told_apart(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, RewardModelStage):
        names = [domain.name for domain in config.domains]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Fault(stage.at("domains", index, "name"), name, "must be unique", "rename one of the two")
        for steps, source in _sets(config):
            domain = getattr(source, "domain", None)
            if names and domain is not None and domain not in names:
                yield Fault(
                    stage.at(*steps, "domain"), domain, "must be the name of one of `domains`", suggest(domain, names)
                )


# -- reinforcement learning --------------------------------------------------------------------------------------------


def an_answer_leaves_room_for_its_prompt(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        if config.rollout.max_new_tokens >= config.sequence_length:
            yield Fault(
                stage.at("rollout", "maxNewTokens"),
                config.rollout.max_new_tokens,
                f"must be below {config.sequence_length:,} (`sequenceLength`), which prompt and answer share",
                "shorten the answers, or raise `sequenceLength`",
            )


def answers_come_from_shards_where_there_are_shards(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        if config.rollout.whole_copy:
            continue
        where = stage.at("rollout", "wholeCopy")
        if config.rollout.engine is RolloutEngine.VLLM:
            yield Fault(where, "false", "vLLM has a copy of its own", "leave it out, or set `engine: transformers`")
        elif config.sharding.zero != PARAMETERS_SHARDED:
            yield Fault(
                where,
                "false",
                "only ZeRO-3 takes the policy apart: here it is whole on every rank, and answers itself",
                f"leave it out, or set `sharding: {{zero: {PARAMETERS_SHARDED}}}`",
            )


def the_policy_learns_after_the_critics_warm_up(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        steps = config.budget.steps
        if steps is not None and config.critic.warmup_updates >= steps:
            yield Fault(
                stage.at("critic", "warmupUpdates"),
                config.critic.warmup_updates,
                f"must be below {steps:,} (`budget.steps`), or the policy never learns",
                "shorten the warm-up or lengthen the budget",
            )


def a_policy_learns_without_dropout(draft: Draft) -> Iterator[Fault]:
    why = (
        "must be 0: PPO compares what the policy says while it learns with what it said when it answered, and dropout "
        "would make them differ before anything is learnt"
    )
    for stage, config in configs(draft, PpoStage):
        if config.attention_dropout > 0.0:
            yield Fault(stage.at("attentionDropout"), config.attention_dropout, why, "leave it out")
        lora = config.trainable.lora
        if lora is not None and lora.dropout > 0.0:
            yield Fault(stage.at("trainable", "lora", "dropout"), lora.dropout, why, "leave it out")


ALIGNMENT_RULES = (
    preferences_are_learned_from_preferences,
    labels_are_for_kto,
    ranked_answers_are_fine_tuned_on_in_hindsight,
    prompts_are_no_plain_text,
    domains_are_told_apart,
    an_answer_leaves_room_for_its_prompt,
    answers_come_from_shards_where_there_are_shards,
    the_policy_learns_after_the_critics_warm_up,
    a_policy_learns_without_dropout,
)
