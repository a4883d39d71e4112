"""An answer to be judged, what became of it, and what every term of a reward can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.text.templates import Message

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Completion:
    """One answer to be judged."""

    prompt: tuple[Message, ...]
    """The turns it replies to, as chat templates read them."""

    answer: str
    """Decoded, special tokens left out."""

    num_tokens: int
    """Tokens of the answer, the end token apart."""

    ended: bool
    """The answer ended by itself; else it was cut."""

    domain: str | None = None
    """What the prompt is about: chooses the system prompt of reward models that have domains. None: of no domain."""


@dataclass(frozen=True)
class Score:
    """What an answer is worth."""

    total: float
    """Sum of weight times value over the terms."""

    terms: Mapping[str, float] = field(default_factory=dict)
    """Value of each term, clipped, before its weight."""


class Term:
    """One term of a reward. A term without memory need only say `values`."""

    def values(self, batch: Sequence[Completion]) -> list[float]:
        """Return one value per answer. Raises UserError naming the term and the answer where there is none."""
        raise NotImplementedError

    def prepare(self) -> bool:
        """Do once what takes time or requests, unless `load_state` has brought it, before anything is judged; all ranks
        call it at the same time. Return whether anything was done."""
        return False

    def sit_out(self) -> None:
        """Take part in what all ranks do together while this one has no answer to judge."""

    def counts(self) -> dict[str, int]:
        """Return this rank's counters that must outlive a resume, such as requests made. They add up over the ranks."""
        return {}

    def load_counts(self, counts: Mapping[str, int]) -> None:
        """Take this rank's share of what `counts` gave on all ranks together."""

    def state(self) -> dict[str, Any]:
        """Return what else must outlive a resume, as JSON values; the same on all ranks."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""

    def figures(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return what the report tells, such as requests made. `counts`: those of all ranks together."""
        return {}


def share_of(total: int, world: World) -> int:
    """Return this rank's part of a count. The parts of all ranks make the whole, and no part of a smaller count is
    larger, so that what was spent of a budget is shared out as the budget is."""
    return total // world.size + (world.rank < total % world.size)


def message_text(message: Message) -> str:
    """Return what one turn says, Alpaca's `input` on a line of its own."""
    return "\n".join(part for part in (str(message["content"]), str(message.get("input", ""))) if part)


def prompt_text(prompt: Sequence[Message]) -> str:
    """Return a prompt as plain text: what the user says, or, of several turns, each behind its role."""
    if len(prompt) == 1 and prompt[0]["role"] == Role.USER.value:
        return message_text(prompt[0])
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)


def describe(judged: Completion, index: int) -> str:
    """Name an answer in a message: its place in the batch, and how it and its prompt begin."""
    return f"sample {index} (prompt {_short(prompt_text(judged.prompt))}, answer {_short(judged.answer)})"


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…")
