"""How a model generates answers, and prompts whose answers a report shows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Fraction, Model, ShortText


class Generation(Model):
    """How answers are generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    """Longest answer, in tokens. Default: 64."""

    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Sampling temperature; 0 takes the likeliest token. Default: 0."""

    top_p: Fraction = 1.0
    """Share of probability mass that is sampled from. Default: 1."""

    answer_begins_with: ShortText | None = None
    """Words, and a newline, that the answer is made to begin with and that do not count as part of it, such as the
    `good` words of a chain of hindsight. If unset: the model begins."""


Prompt = Annotated[str, Field(min_length=1, max_length=65536)]


class Samples(Model):
    """Prompts whose answers are shown in the report."""

    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=256)]
    """What the user says; each is rendered by the chat template."""

    generation: Generation = Generation()
    """How the answers are generated. Default: greedy, 64 new tokens."""
