"""`ppo`: reinforcement learning from a reward (arXiv 1707.06347, 2203.02155), with guards."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from stagecoach_api.base import Count, Fraction, Model, NonNegativeCount
from stagecoach_api.constraints import Constraint, given, missing
from stagecoach_api.conversation import Template
from stagecoach_api.draft import Draft, Fault, configs
from stagecoach_api.references import PREFERENCE_FORMATS, Artifact, Format, Reference, WeightedSource
from stagecoach_api.rewards import PromptSource, RewardTerms
from stagecoach_api.rules.formats import numbered, wrong_format
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES, MetricTable
from stagecoach_api.training import Optimizer, Training


class RolloutEngine(StrEnum):
    """Who generates the answers."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Rollout(Model):
    """How the policy answers while it learns."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    """Longest answer, in tokens. Prompt and answer together must fit `sequenceLength`. Default: 128."""

    temperature: Annotated[float, Field(ge=0.001, le=10.0)] = 1.0
    """Sampling temperature; log-probabilities are those at this temperature. Default: 1."""

    top_p: Annotated[float, Field(ge=0.001, le=1.0)] = 1.0
    """Share of probability mass that is sampled from. Default: 1."""

    engine: RolloutEngine = RolloutEngine.TRANSFORMERS
    """`transformers`: batched generation with a key-value cache; `vllm`: vLLM, where the image has it. Default:
    transformers."""

    whole_copy: bool = True
    """Under ZeRO-3 a whole copy of the policy, in the compute format and refreshed once an update, answers on every
    rank. False: the shared-out policy itself answers, gathered layer by layer for every token: for a policy whose copy
    does not fit, as it is some six times slower. Default: true."""

    batch_rows: Annotated[int, Field(ge=1, le=65536)] = 64
    """Answers generated at once on a rank. Default: 64."""

    missing_end_reward: float | None = None
    """Reward of an answer that did not end by itself, in place of all terms. If unset: it is judged like any other."""


class Critic(Model):
    """The model that predicts how the reward will come out."""

    model: Reference | None = None
    """What it starts from: a reward model of the policy's vocabulary, or a language model of it, which gets a new head.
    If unset: the first reward model among `rewards`, else the policy's own weights with a new head. Under LoRA a reward
    model that is an adapter is trained on, its rank and targets kept, over the base that the policy's adapter sits
    on."""

    warmup_updates: NonNegativeCount = 0
    """First updates in which only the critic learns and the policy is frozen (COOL: 50). Default: 0."""

    optimizer: Optimizer | None = None
    """AdamW's settings. If unset: the policy's."""

    clip: Annotated[float, Field(ge=1e-6, le=1e6)] | None = 0.2
    """By how much a prediction may move in one update before its loss stops falling. Default: 0.2. If unset: any
    distance (COOL)."""


class KlControl(Model):
    """The price of leaving the reference: `coefficient` · log(policy / reference) is taken off the reward of every
    token."""

    coefficient: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.02
    """The price, at the beginning where it is adaptive. Default: 0.02 (InstructGPT)."""

    target: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """KL per answer, in nats, that the coefficient is steered to (arXiv 1909.08593). If unset: the coefficient is
    fixed."""

    horizon: Count = 10000
    """Answers over which the steering works. Default: 10,000."""


class PolicyLoss(Model):
    """The clipped objective and its advantages."""

    clip: Annotated[float, Field(ge=1e-6, le=10.0)] = 0.2
    """By how much a token's probability ratio may leave 1 before it stops counting. Default: 0.2."""

    gamma: Fraction = 1.0
    """Discount per token. Default: 1 (InstructGPT: none)."""

    gae_lambda: Fraction = 0.95
    """Generalised advantage estimation (arXiv 1506.02438). Default: 0.95. COOL: 0.99."""

    inner_epochs: Annotated[int, Field(ge=1, le=100)] = 1
    """Passes over the answers of one update. Default: 1."""

    mini_batch_samples: Count | None = None
    """Answers of one optimiser step. If unset: all of the update."""

    normalize_advantages: bool = True
    """Shift and scale the update's advantages to mean 0 and deviation 1. Default: true. COOL: false."""

    entropy_weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Bonus per nat of entropy. Default: 0."""

    average_decay: Annotated[float, Field(ge=0.0, le=0.999999)] | None = None
    """Decay per update of a moving average of the policy's weights, which then is the stage's output (InstructGPT:
    0.992); answers are still made with the weights themselves. If unset: the last weights are the output."""


class PretrainingMix(Model):
    """PPO-ptx: next-token training beside the reward, against forgetting."""

    data: Annotated[tuple[WeightedSource, ...], Field(min_length=1, max_length=64)]
    """Text, or conversations, of which the assistant's words count."""

    weight: Annotated[float, Field(ge=0.0, le=1e6)]
    """Weight of the mean loss per token (InstructGPT: 27.8; COOL: 0.5)."""

    rows_per_step: Count = 8
    """Rows of `sequenceLength` tokens beside each optimiser step. Default: 8."""


class GuardAction(StrEnum):
    """What happens when a guard is broken."""

    STOP = "stop"
    ROLL_BACK = "rollBack"


class Guards(Model):
    """Signs that training goes wrong. Each None switches the guard off. A reward that is no number stops the stage
    always."""

    min_kl: float | None = -1.0
    """Lowest mean KL per answer, in nats; a true one is never below 0 but for noise (trl#417). Default: -1. If unset:
    no limit."""

    max_kl: float | None = None
    """Highest mean KL per answer, in nats. If unset: no limit."""

    min_entropy: float | None = 0.0001
    """Lowest mean entropy per token, in nats: below it the policy says one thing only. Default: 0.0001. If unset: no
    limit."""

    min_ended_share: float | None = 0.05
    """Lowest share of answers that end by themselves. Default: 0.05. If unset: no limit."""

    max_length_factor: float | None = 4.0
    """Highest mean length as a multiple of that of the first update. Default: 4. If unset: no limit."""

    min_length_factor: float | None = 0.1
    """Lowest mean length as a multiple of that of the first update. Default: 0.1. If unset: no limit."""

    max_abs_reward: float | None = 1000.0
    """Highest absolute reward of a single answer. Default: 1,000. If unset: no limit."""

    min_reward_deviation: float | None = 0.0
    """The rewards' standard deviation must be above it: constant rewards teach nothing. Default: 0. If unset: no
    limit."""

    max_value_loss: float | None = 1000.0
    """Highest loss of the critic. Default: 1,000. If unset: no limit."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Updates in a row that a sign must last. Default: 3."""

    action: GuardAction = GuardAction.STOP
    """`stop` fails the stage, with the reason; `rollBack` goes back to the last checkpoint from before the sign, which
    is kept beside those that `checkpoints` keeps, with other random numbers and half the learning rate, up to
    `maxRollbacks` times. Default: stop."""

    max_rollbacks: Annotated[int, Field(ge=1, le=100)] = 2
    """Rollbacks after which a guard stops the stage. Default: 2."""


class PpoStage(Training):
    """Train a policy by a reward. `data` are prompts (a last answer in them is left out); `batch.samples` are the
    answers of one update; `budget.steps` counts updates, `epochs` passes over the prompts."""

    constraints = (
        Constraint(
            given("batch.samples"),
            "`batch.samples` is the number of answers in an update",
            "give it instead of `tokens`",
        ),
        Constraint(
            missing("budget.tokens"),
            "`budget` counts updates or passes over the prompts",
            "give `steps` or `epochs` instead of `tokens`",
        ),
    )

    model: Reference
    """The policy to start from, usually an `sft` stage's."""

    data: Annotated[tuple[PromptSource, ...], Field(min_length=1, max_length=64)]
    """Prompts to answer, mixed exactly by weight."""

    reference: Reference | None = None
    """The model the policy is held to. If unset: `model`; under LoRA it is the base below the adapter, kept only
    once."""

    template: Template | None = None
    """How a conversation becomes text. If unset: the chat template of the model's tokenizer."""

    rewards: RewardTerms
    """What an answer is worth: the sum of these."""

    critic: Critic = Critic()
    """The critic. Default: every field's own."""

    rollout: Rollout = Rollout()
    """How answers are made. Default: every field's own."""

    policy: PolicyLoss = PolicyLoss()
    """The objective. Default: every field's own."""

    kl: KlControl = KlControl()
    """The price of leaving the reference. Default: fixed, 0.02."""

    pretraining: PretrainingMix | None = None
    """Next-token training beside it (PPO-ptx). If unset: none."""

    guards: Guards = Guards()
    """Signs of failure. Default: every field's own."""

    pool_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] = 1 << 30
    """Memory that the answers of an update may take, in bytes; more is written to disk. Default: 1 GiB."""

    @model_validator(mode="after")
    def _mini_batches_divide_the_update(self) -> PpoStage:
        mini, samples = self.policy.mini_batch_samples, self.batch.samples
        if mini is not None and samples is not None and samples % mini:
            raise ValueError(f"`policy.miniBatchSamples` ({mini}) must divide `batch.samples` ({samples})")
        return self


# -- rules -------------------------------------------------------------------------------------------------------------

PARAMETERS_SHARDED = 3
"""The ZeRO stage that shards parameters too."""


def prompts_are_not_plain_text(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        for path, source in numbered(("data",), config.data):
            if source.format is Format.TEXT:
                yield wrong_format(
                    stage,
                    path,
                    source,
                    "plain text asks nothing a policy could answer",
                    "give conversations or preferences, or move it to `pretraining.data`",
                )
        mixed = config.pretraining.data if config.pretraining is not None else ()
        for path, source in numbered(("pretraining", "data"), mixed):
            if source.format in PREFERENCE_FORMATS:
                yield wrong_format(
                    stage,
                    path,
                    source,
                    "preferences are not text to predict: each has several answers",
                    "give text or conversations",
                )


def an_answer_leaves_room_for_its_prompt(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        if config.rollout.max_new_tokens >= config.sequence_length:
            yield Fault(
                stage.at("rollout", "maxNewTokens"),
                config.rollout.max_new_tokens,
                f"must be below {config.sequence_length:,} (`sequenceLength`), which prompt and answer share",
                "shorten the answers, or raise `sequenceLength`",
            )


def only_a_sharded_policy_generates_from_shards(draft: Draft) -> Iterator[Fault]:
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


def warm_up_leaves_updates_for_the_policy(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, PpoStage):
        steps = config.budget.steps
        if steps is not None and config.critic.warmup_updates >= steps:
            yield Fault(
                stage.at("critic", "warmupUpdates"),
                config.critic.warmup_updates,
                f"must be below {steps:,} (`budget.steps`), or the policy never learns",
                "shorten the warm-up or lengthen the budget",
            )


def the_policy_has_no_dropout(draft: Draft) -> Iterator[Fault]:
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


KIND = StageKind(
    name="ppo",
    position=60,
    summary="Train a policy on a reward by reinforcement learning.",
    config=PpoStage,
    makes=Artifact.MODEL,
    reads={
        "model": reads(Artifact.MODEL),
        "reference": reads(Artifact.MODEL),
        "rewards.model": reads(Artifact.REWARD_MODEL),
        "critic.model": reads(Artifact.REWARD_MODEL, Artifact.MODEL),
    },
    ranks=Ranks.ALL,
    heavy=True,
    tables=(
        *HELD_OUT_TABLES,
        MetricTable("Reinforcement learning, last update", ("reward", "kl", "endedShare", "answerTokens")),
    ),
    rules=(
        prompts_are_not_plain_text,
        an_answer_leaves_room_for_its_prompt,
        only_a_sharded_policy_generates_from_shards,
        warm_up_leaves_updates_for_the_policy,
        the_policy_has_no_dropout,
    ),
)
