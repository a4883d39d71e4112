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
from stagecoach_api.references import PREFERENCE_FORMATS, ArtifactType, Format, Reference, WeightedSource
from stagecoach_api.rewards import PromptSource, RewardTerms
from stagecoach_api.rules.formats import numbered, wrong_formats
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES, MetricTable
from stagecoach_api.training import Optimizer, Training


class RolloutEngine(StrEnum):
    """Engine that generates the answers."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Rollout(Model):
    """How the policy generates answers during training."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    """Longest answer, in tokens. Prompt and answer together must fit `sequenceLength`."""

    temperature: Annotated[float, Field(ge=0.001, le=10.0)] = 1.0
    """Sampling temperature. Log-probabilities are those at this temperature."""

    top_p: Annotated[float, Field(ge=0.001, le=1.0)] = 1.0
    """Share of the probability mass to sample from."""

    engine: RolloutEngine = RolloutEngine.TRANSFORMERS
    """Engine that generates the answers. `transformers`: batched generation with a key-value cache. `vllm`: vLLM, if
    the image has it."""

    whole_copy: bool = True
    """Under ZeRO-3: generate with a whole copy of the policy on every rank, in the compute format and refreshed once
    per update. False generates with the sharded policy itself, gathered layer by layer for every token: about six times
    slower, for a policy whose copy does not fit into memory."""

    batch_rows: Annotated[int, Field(ge=1, le=65536)] = 64
    """Answers that a rank generates at once."""

    missing_end_reward: float | None = None
    """Reward of an answer without an end token, instead of all terms. If unset: it is judged like any other."""


class Critic(Model):
    """The model that predicts the reward."""

    model: Reference | None = None
    """Model to start from: a reward model with the policy's vocabulary, or a language model with it, which gets a new
    head. Under LoRA, training continues a reward model that is an adapter, with its rank and targets, on the base of
    the policy's adapter. If unset: the first reward model among `rewards`, or else the policy's own weights with a new
    head."""

    warmup_updates: NonNegativeCount = 0
    """Number of first updates in which only the critic is trained and the policy is frozen. COOL uses 50."""

    optimizer: Optimizer | None = None
    """Settings of AdamW. If unset: the policy's."""

    clip: Annotated[float, Field(ge=1e-6, le=1e6)] | None = 0.2
    """Largest change of a prediction in one update before its loss stops falling. Set to null for no limit, as in
    COOL."""


class KlControl(Model):
    """KL penalty: `coefficient` · log(policy / reference) is subtracted from the reward of every token."""

    coefficient: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.02
    """Coefficient of the penalty; the initial one if it is adaptive. InstructGPT uses 0.02."""

    target: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """KL per answer, in nats, to which an adaptive coefficient is steered (arXiv 1909.08593). If unset: the coefficient
    is fixed."""

    horizon: Count = 10000
    """Number of answers over which the adaptation acts."""


class PolicyLoss(Model):
    """The clipped objective and its advantages."""

    clip: Annotated[float, Field(ge=1e-6, le=10.0)] = 0.2
    """Largest distance of a token's probability ratio from 1 before the token stops counting."""

    gamma: Fraction = 1.0
    """Discount per token. InstructGPT uses 1, which is no discount."""

    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438). COOL uses 0.99."""

    inner_epochs: Annotated[int, Field(ge=1, le=100)] = 1
    """Passes over the answers of one update."""

    mini_batch_samples: Count | None = None
    """Answers of one optimiser step. Must divide `batch.samples`. If unset: all answers of the update."""

    normalize_advantages: bool = True
    """Scale the update's advantages to mean 0 and standard deviation 1. COOL uses false."""

    entropy_weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Bonus per nat of entropy."""

    average_decay: Annotated[float, Field(ge=0.0, le=0.999999)] | None = None
    """Decay per update of a moving average of the policy's weights, which becomes the stage's output (InstructGPT:
    0.992). Answers are still generated with the weights themselves. If unset: the last weights are the output."""


class PretrainingMix(Model):
    """Next-token training in addition to the reward, to prevent forgetting (PPO-ptx)."""

    data: Annotated[tuple[WeightedSource, ...], Field(min_length=1, max_length=64)]
    """Text, or conversations with loss on the assistant's turns."""

    weight: Annotated[float, Field(ge=0.0, le=1e6)]
    """Weight of the mean loss per token (InstructGPT: 27.8; COOL: 0.5)."""

    rows_per_step: Count = 8
    """Rows of `sequenceLength` tokens added to each optimiser step."""


class GuardAction(StrEnum):
    """What happens when a guard is triggered."""

    STOP = "stop"
    ROLL_BACK = "rollBack"


class Guards(Model):
    """Limits whose violation indicates that training goes wrong. A guard set to null is disabled. A reward that is NaN
    always stops the stage."""

    min_kl: float | None = -1.0
    """Lowest mean KL per answer, in nats. The true value is never below 0; a sampled one may be, because of noise
    (trl#417). Set to null for no limit."""

    max_kl: float | None = None
    """Highest mean KL per answer, in nats. If unset: no limit."""

    min_entropy: float | None = 0.0001
    """Lowest mean entropy per token, in nats. Below it the policy's answers have collapsed. Set to null for no
    limit."""

    min_ended_share: float | None = 0.05
    """Lowest share of answers that end with an end token. Set to null for no limit."""

    max_length_factor: float | None = 4.0
    """Highest mean length, as a multiple of that of the first update. Set to null for no limit."""

    min_length_factor: float | None = 0.1
    """Lowest mean length, as a multiple of that of the first update. Set to null for no limit."""

    max_abs_reward: float | None = 1000.0
    """Highest absolute reward of a single answer. Set to null for no limit."""

    min_reward_deviation: float | None = 0.0
    """The standard deviation of the rewards must be above this: constant rewards carry no signal. Set to null for no
    limit."""

    max_value_loss: float | None = 1000.0
    """Highest loss of the critic. Set to null for no limit."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Consecutive updates with a violation before a guard is triggered."""

    action: GuardAction = GuardAction.STOP
    """`stop` fails the stage with the reason. `rollBack` returns to the last checkpoint before the violation, which is
    kept in addition to those that `checkpoints` keeps, and continues with other random numbers and half the learning
    rate, up to `maxRollbacks` times."""

    max_rollbacks: Annotated[int, Field(ge=1, le=100)] = 2
    """Number of rollbacks after which a guard stops the stage."""


class PpoStage(Training):
    """Train a policy on a reward. `data` are prompts (a last answer in them is ignored); `batch.samples` is the number
    of answers of one update; `budget.steps` counts updates and `budget.epochs` passes over the prompts."""

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
    """Policy to start from, usually an `sft` stage's."""

    data: Annotated[tuple[PromptSource, ...], Field(min_length=1, max_length=64)]
    """Prompts to answer, mixed exactly by weight."""

    reference: Reference | None = None
    """Reference model of the policy. Under LoRA it is the base of the adapter, which is kept in memory only once. If
    unset: `model`."""

    template: Template | None = None
    """How conversations are rendered as text. If unset: the chat template of the model's tokenizer."""

    rewards: RewardTerms
    """Terms of the reward; their sum is the value of an answer."""

    critic: Critic = Critic()
    """The model that predicts the reward."""

    rollout: Rollout = Rollout()
    """How the policy generates answers."""

    policy: PolicyLoss = PolicyLoss()
    """The objective of the policy."""

    kl: KlControl = KlControl()
    """KL penalty."""

    pretraining: PretrainingMix | None = None
    """Next-token training in addition to the reward (PPO-ptx). If unset: none."""

    guards: Guards = Guards()
    """Limits whose violation stops the stage or rolls it back."""

    pool_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] = 1 << 30
    """Memory for the answers of an update, in bytes. Answers beyond it are written to disk."""

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
        yield from wrong_formats(
            stage,
            numbered(("data",), config.data),
            {Format.TEXT},
            "plain text asks nothing a policy could answer",
            "give conversations or preferences, or move it to `pretraining.data`",
        )
        mixed = config.pretraining.data if config.pretraining is not None else ()
        yield from wrong_formats(
            stage,
            numbered(("pretraining", "data"), mixed),
            PREFERENCE_FORMATS,
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
            yield Fault(where, "false", "vLLM has its own copy", "leave it out, or set `engine: transformers`")
        elif config.sharding.zero != PARAMETERS_SHARDED:
            yield Fault(
                where,
                "false",
                "only ZeRO-3 shards the policy: here it is whole on every rank and generates the answers itself",
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
                "shorten the warm-up or increase the budget",
            )


def the_policy_has_no_dropout(draft: Draft) -> Iterator[Fault]:
    why = (
        "must be 0: PPO compares the policy's probabilities in training with those at generation, and dropout would "
        "make them differ before the first update"
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
    makes=ArtifactType.MODEL,
    reads={
        "model": reads(ArtifactType.MODEL),
        "reference": reads(ArtifactType.MODEL),
        "rewards.model": reads(ArtifactType.REWARD_MODEL),
        "critic.model": reads(ArtifactType.REWARD_MODEL, ArtifactType.MODEL),
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
