"""Rewards: weighted terms whose sum is the value of an answer. Used by `ppo`, which trains on it, and `evaluate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Count, Identifier, LongText, Model, Name, NonNegativeCount, Pattern
from stagecoach_api.character_sets import Script
from stagecoach_api.constraints import Constraint, each, either, exactly_one, given
from stagecoach_api.references import NamedSource, Reference, WeightedSource

# -- prompts -----------------------------------------------------------------------------------------------------------


class PromptSource(WeightedSource):
    """Prompts to answer."""

    domain: Identifier | None = None
    """Domain of the prompts. Reward models with `domains` read the answers after that domain's system prompt, and must
    have it; other reward models ignore it. If unset: no domain; answers are read without a system prompt of the reward
    model."""


class PromptNamedSource(NamedSource):
    """Prompts with a name, to compare models on."""

    domain: Identifier | None = None
    """Domain of the prompts, as in `data` of a `ppo` stage. If unset: no domain."""


# -- domains of reward models ------------------------------------------------------------------------------------------


class Domain(Model):
    """A system prompt that states to the reward model which preferences count (InternLM2's COOL, arXiv 2403.17297)."""

    name: Identifier
    """Name of the domain."""

    system: LongText
    """System prompt at the start of every conversation of the domain. Only the reward model sees it, never a policy."""


# -- language models at an endpoint -----------------------------------------------------------------------------------


class EndpointCredentials(Model):
    """Where an endpoint's key is stored."""

    secret_name: Name
    """Name of the Secret. Its key `apiKey` is mounted as a file and never set as an environment variable. On a laptop
    it is a folder of this name in the folder `STAGECOACH_ENDPOINT_KEYS`."""


class Endpoint(Model):
    """A language model with an OpenAI-compatible API (chat completions)."""

    url: Annotated[str, Field(min_length=8, max_length=1024, pattern=r"^https?://[^@/]+(/.*)?$")]
    """Base URL, such as `http://judge.models.svc:8000/v1`, without credentials."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the model at the endpoint."""

    credentials: EndpointCredentials | None = None
    """Where the key is stored. If unset: the endpoint needs no key."""

    timeout_seconds: Annotated[float, Field(ge=0.1, le=3600.0)] = 60.0
    """Timeout of a request, in seconds."""

    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Number of times a request is repeated after a timeout, a lost connection, 429 or 5xx."""

    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Number of concurrent requests."""

    max_requests: Count | None = None
    """Largest number of requests in the whole stage, as recorded in its checkpoints; the stage fails when it is
    exceeded. If unset: no limit."""


# -- terms -------------------------------------------------------------------------------------------------------------


class LengthReward(Model):
    """0 for an answer whose length is within the limits. Outside them the reward falls linearly to -1, reached by an
    empty answer and by one twice as long as `atMost`."""

    at_least: NonNegativeCount = 0
    """Smallest number of characters."""

    at_most: Count | None = None
    """Largest number of characters. If unset: no limit."""


class LanguageReward(Model):
    """Share of the answer's characters, without whitespace, that belong to a script; 0 for an empty answer."""

    script: Script
    """Script whose characters count."""


class RepetitionReward(Model):
    """Minus the share of the answer's character n-grams that occurred earlier in it."""

    ngram: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of characters of an n-gram."""


class FormatReward(Model):
    """1 if the pattern is found in the answer, else 0."""

    match: Pattern
    """Regular expression (RE2: linear time)."""


class ArithmeticReward(Model):
    """Equations such as `12 + 7 = 19` in the answer: correct ones minus incorrect ones, divided by all; 0 if there are
    none."""


Expression = Annotated[str, Field(min_length=1, max_length=4096)]


class PluginReward(Model):
    """A function installed in the trainer's image."""

    entry_point: Identifier
    """Name in the entry-point group `stagecoach.rewards` of a callable that takes prompts and answers, both lists of
    text, and returns a list of numbers."""


class Proposition(Model):
    """A yes-or-no statement about an answer, such as `The answer refuses without judging the user`."""

    name: Identifier
    """Name of the statement in reports."""

    text: Annotated[str, Field(min_length=1, max_length=4096)]
    """The statement."""

    weight: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    """Reward if the statement is true. If unset: determined by `fit`."""


class PropositionReward(Model):
    """Rule-based rewards (arXiv 2411.01111): weighted statements judged by a language model."""

    endpoint: Endpoint
    """Language model that judges."""

    propositions: Annotated[tuple[Proposition, ...], Field(min_length=1, max_length=64)]
    """The statements."""

    fit: NamedSource | None = None
    """Ranked answers from which the weights are fitted with a hinge loss. If unset: every proposition has a
    `weight`."""

    constraints = (
        Constraint(
            either(given("fit"), each("propositions", given("weight"))),
            "every proposition needs a `weight`, unless `fit` determines them",
            "give `fit`, or a `weight` to every proposition",
        ),
    )


class FeedbackReward(Model):
    """A mark given by a language model (AI feedback, arXiv 2212.08073), scaled to 0 for the worst and 1 for the
    best."""

    endpoint: Endpoint
    """Language model that gives the mark."""

    instruction: LongText
    """Prompt of the judge, with `{prompt}` and `{answer}` in place of the judged texts. It must ask for a number."""

    worst: float = 0.0
    """Lowest mark."""

    best: float = 10.0
    """Highest mark."""


REWARD_MEMBERS = (
    "model",
    "length",
    "language",
    "repetition",
    "format",
    "arithmetic",
    "expression",
    "propositions",
    "feedback",
    "plugin",
)
"""Members of a reward term of which exactly one is set (Python names)."""


class RewardTerm(Model):
    """One term of the reward: weight times value. Exactly one member that defines the value must be set."""

    constraints = (exactly_one(*REWARD_MEMBERS),)

    name: Identifier
    """Name of the term in metrics and reports."""

    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor of the value."""

    at_least: float | None = None
    """Lower limit; lower values are raised to it. If unset: no limit."""

    at_most: float | None = None
    """Upper limit; higher values are lowered to it. If unset: no limit."""

    model: Reference | None = None
    """Score of a reward model: a `rewardModel` artifact, or a Hugging Face folder with a sequence classifier of one
    label. If unset: another member is set."""

    length: LengthReward | None = None
    """Reward for the length. If unset: another member is set."""

    language: LanguageReward | None = None
    """Reward for the script. If unset: another member is set."""

    repetition: RepetitionReward | None = None
    """Penalty for repetition. If unset: another member is set."""

    format: FormatReward | None = None
    """Reward for matching a pattern. If unset: another member is set."""

    arithmetic: ArithmeticReward | None = None
    """Reward for correct arithmetic. If unset: another member is set."""

    expression: Expression | None = None
    """Formula over properties of the answer: numbers, `+ - * / ( )`, comparisons, `and or not`, `x if c else y`, `min
    max abs log exp sqrt`, `characters words lines tokens ended promptCharacters`, `count("…") contains("…")`. If unset:
    another member is set."""

    propositions: PropositionReward | None = None
    """Reward for statements that a language model judges to be true. If unset: another member is set."""

    feedback: FeedbackReward | None = None
    """Mark given by a language model. If unset: another member is set."""

    plugin: PluginReward | None = None
    """Value of a function installed in the trainer's image. If unset: another member is set."""


RewardTerms = Annotated[tuple[RewardTerm, ...], Field(min_length=1, max_length=16)]
