"""How a model generates answers, and prompts whose answers a report shows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Fraction, Model, ShortText


class Generation(Model):
    """How answers are generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    """Longest answer, in tokens."""

    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Sampling temperature; 0 selects the most likely token."""

    top_p: Fraction = 1.0
    """Share of the probability mass to sample from."""

    answer_begins_with: ShortText | None = None
    """Text that every answer is forced to begin with, followed by a newline and not counted as part of the answer, such
    as the `good` text of `hindsight`. If unset: answers begin freely."""


class ReleasedGeneration(Model):
    """Settings of `generation_config.json` that replace the base's own. Programs that serve the model read them."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Longest answer, in tokens; vLLM takes it as a limit of the server. If unset: that of the base, if it has one."""

    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Sampling temperature; 0 selects the most likely token. If unset: that of the base."""

    top_p: Fraction | None = None
    """Share of the probability mass to sample from. If unset: that of the base."""


Prompt = Annotated[str, Field(min_length=1, max_length=65536)]


class Samples(Model):
    """Prompts whose answers are shown in the report."""

    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=256)]
    """User turns; each is rendered by the chat template."""

    generation: Generation = Generation()
    """How the answers are generated."""
