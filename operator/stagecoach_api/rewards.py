"""What an answer is worth: terms of a reward, each weighted, summed up.

Used by `ppo`, which trains for it, and by `evaluate`, which compares models by it.
"""

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
    """What the prompts are about: reward models with `domains` read the answers behind that domain's system prompt, and
    must have it; those without ignore it. If unset: of no domain, read without a system prompt of the reward
    model's."""


class PromptNamedSource(NamedSource):
    """Prompts with a name, to compare models on."""

    domain: Identifier | None = None
    """What the prompts are about, as in the `data` of `ppo`. If unset: of no domain."""


# -- domains of reward models ------------------------------------------------------------------------------------------


class Domain(Model):
    """A system prompt that tells the reward model which preferences count (InternLM2's COOL, arXiv 2403.17297)."""

    name: Identifier
    """The domain."""

    system: LongText
    """The system prompt in front of every conversation of the domain. Only the reward model sees it, never a policy."""


# -- language models behind an endpoint --------------------------------------------------------------------------------


class EndpointCredentials(Model):
    """Where an endpoint's key lies."""

    secret_name: Name
    """Name of the Secret; its key `apiKey` is mounted as a file, never put in env. On a laptop: the folder
    `STAGECOACH_ENDPOINT_KEYS` with one folder of this name."""


class Endpoint(Model):
    """A language model behind an OpenAI-compatible API (chat completions)."""

    url: Annotated[str, Field(min_length=8, max_length=1024, pattern=r"^https?://[^@/]+(/.*)?$")]
    """Base URL, such as `http://judge.models.svc:8000/v1`. No credentials in it."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The model's name there."""

    credentials: EndpointCredentials | None = None
    """Where the key lies. If unset: the endpoint asks for none."""

    timeout_seconds: Annotated[float, Field(ge=0.1, le=3600.0)] = 60.0
    """Longest time one request may take, in seconds. Default: 60."""

    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Times a request is made again after a time-out, a lost connection, 429 or 5xx. Default: 5."""

    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests under way at once. Default: 8."""

    max_requests: Count | None = None
    """Budget of the stage, as far as its checkpoints remember what was spent; when it is gone the stage fails. If
    unset: no limit."""


# -- terms -------------------------------------------------------------------------------------------------------------


class LengthReward(Model):
    """0 for an answer of fitting length; below `atLeast` and above `atMost` it falls in a straight line to -1, which an
    empty answer has, and one of twice `atMost`."""

    at_least: NonNegativeCount = 0
    """Fewest characters. Default: 0."""

    at_most: Count | None = None
    """Most characters. If unset: no limit."""


class LanguageReward(Model):
    """Share of the answer's characters, blanks apart, that belong to a script; 0 for an empty answer."""

    script: Script
    """The characters that count."""


class RepetitionReward(Model):
    """Minus the share of the answer's n-grams of characters that it has had before."""

    ngram: Annotated[int, Field(ge=1, le=64)] = 4
    """Characters of an n-gram. Default: 4."""


class FormatReward(Model):
    """1 where the pattern is found in the answer, else 0."""

    match: Pattern
    """Regular expression (RE2: linear time)."""


class ArithmeticReward(Model):
    """Equations such as `12 + 7 = 19` in the answer: right ones less wrong ones, divided by all; 0 without any."""


Expression = Annotated[str, Field(min_length=1, max_length=4096)]


class PluginReward(Model):
    """A function installed in the trainer's image."""

    entry_point: Identifier
    """Its name in the entry-point group `stagecoach.rewards`: a callable of prompts and answers, both lists of text,
    that returns a list of numbers."""


class Proposition(Model):
    """A yes-or-no statement on an answer, such as `The answer refuses without judging the user`."""

    name: Identifier
    """What the report calls it."""

    text: Annotated[str, Field(min_length=1, max_length=4096)]
    """The statement."""

    weight: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    """What it adds where it is true. If unset: `fit` finds it."""


class PropositionReward(Model):
    """Rule-based rewards (arXiv 2411.01111): statements that a language model judges, with a weight each."""

    endpoint: Endpoint
    """Who judges."""

    propositions: Annotated[tuple[Proposition, ...], Field(min_length=1, max_length=64)]
    """The statements."""

    fit: NamedSource | None = None
    """Ranked answers from which the weights are fitted by a hinge loss. If unset: every proposition has a `weight`."""

    constraints = (
        Constraint(
            either(given("fit"), each("propositions", given("weight"))),
            "every proposition needs a `weight`, unless `fit` determines them",
            "give `fit`, or a `weight` to every proposition",
        ),
    )


class FeedbackReward(Model):
    """A mark that a language model gives (AI feedback, arXiv 2212.08073): 0 for the worst, 1 for the best."""

    endpoint: Endpoint
    """Who marks."""

    instruction: LongText
    """What it is told; `{prompt}` and `{answer}` stand for what is to be judged. It must ask for a number."""

    worst: float = 0.0
    """The lowest mark. Default: 0."""

    best: float = 10.0
    """The highest mark. Default: 10."""


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
"""Members of a reward term of which exactly one is given (Python names)."""


class RewardTerm(Model):
    """One term of the reward: weight times value. Exactly one member says what the value is."""

    constraints = (exactly_one(*REWARD_MEMBERS),)

    name: Identifier
    """What metrics and reports call it."""

    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor of the value. Default: 1."""

    at_least: float | None = None
    """Lower values are raised to this. If unset: no limit."""

    at_most: float | None = None
    """Higher values are lowered to this. If unset: no limit."""

    model: Reference | None = None
    """A `rewardModel` artifact, or a Hugging Face folder with a sequence classifier of one label. If unset: another
    member is given."""

    length: LengthReward | None = None
    """By length. If unset: another member is given."""

    language: LanguageReward | None = None
    """By script. If unset: another member is given."""

    repetition: RepetitionReward | None = None
    """Against repetition. If unset: another member is given."""

    format: FormatReward | None = None
    """By a pattern. If unset: another member is given."""

    arithmetic: ArithmeticReward | None = None
    """By whether its sums are right. If unset: another member is given."""

    expression: Expression | None = None
    """By a formula over the answer's figures: numbers, `+ - * / ( )`, comparisons, `and or not`, `x if c else y`,
    `min max abs log exp sqrt`, `characters words lines tokens ended promptCharacters`, `count("…") contains("…")`.
    If unset: another member is given."""

    propositions: PropositionReward | None = None
    """By statements a language model judges. If unset: another member is given."""

    feedback: FeedbackReward | None = None
    """By a mark a language model gives. If unset: another member is given."""

    plugin: PluginReward | None = None
    """By a function of the image. If unset: another member is given."""


RewardTerms = Annotated[tuple[RewardTerm, ...], Field(min_length=1, max_length=16)]
