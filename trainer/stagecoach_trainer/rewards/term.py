"""The interface of reward terms: an answer to score, its score, and the methods of a term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.text.messages import Message, described

SHOWN_CHARACTERS = 60
"""Maximum characters of a prompt or an answer that a message quotes."""


@dataclass(frozen=True)
class Completion:
    """One answer to score, with its prompt."""

    prompt: tuple[Message, ...]
    """The turns it replies to, in the form that chat templates take."""

    answer: str
    """Decoded, without special tokens."""

    num_tokens: int
    """Tokens of the answer, not counting the end token."""

    ended: bool
    """Whether the answer ended with an end token; otherwise it was truncated."""

    domain: str | None = None
    """Domain of the prompt: selects the system prompt of reward models that have domains. None for no domain."""

    tools: tuple[Message, ...] = ()
    """Tools that the answer may call."""


@dataclass(frozen=True)
class Score:
    """The score of one answer."""

    total: float
    """Sum of weight · value over the terms."""

    terms: Mapping[str, float] = field(default_factory=dict)
    """Value of each term, clipped, not weighted."""


class Term:
    """One term of a reward. A term without state needs to implement only `values`."""

    def values(self, batch: Sequence[Completion]) -> list[float]:
        """Return one value per answer. Raises UserError, naming the term and the answer, if one has no value."""
        raise NotImplementedError

    def prepare(self) -> bool:
        """Do one-time work before the first answer is scored, unless `load_state` has restored its result. All ranks
        call it at the same time. Return whether there was anything to do."""
        return False

    def sit_out(self) -> None:
        """Take part in the other ranks' collective calls when this rank has no answers to score."""

    def counts(self) -> dict[str, int]:
        """Return this rank's counters that a checkpoint must contain, such as requests. They are summed over ranks."""
        return {}

    def load_counts(self, counts: Mapping[str, int]) -> None:
        """Restore this rank's share of the counters, summed over all ranks when they were saved."""

    def state(self) -> dict[str, Any]:
        """Return other state that a checkpoint must contain, as JSON values; the same on all ranks."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state` returned."""

    def figures(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Return figures for the report, such as requests. `counts`: summed over all ranks."""
        return {}


def share_of(total: int, world: World) -> int:
    """Return this rank's part of a count.

    The parts sum to the total, and a part never exceeds the same rank's part of a larger total: a rank's part of the
    requests spent stays within its part of the budget.
    """
    return total // world.size + (world.rank < total % world.size)


def prompt_text(prompt: Sequence[Message]) -> str:
    """Return a prompt as plain text: a single user turn as it is, several turns each prefixed by its role."""
    if len(prompt) == 1 and prompt[0]["role"] == Role.USER.value:
        return described(prompt[0])
    return "\n".join(f"{message['role']}: {described(message)}" for message in prompt)


def describe(completion: Completion, index: int) -> str:
    """Return a description of an answer for messages: its index in the batch, and the beginnings of prompt and
    answer."""
    return f"sample {index} (prompt {_short(prompt_text(completion.prompt))}, answer {_short(completion.answer)})"


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…")
