"""AI feedback (arXiv 2212.08073): a mark that a language model gives an answer, scaled to 0 (worst) to 1 (best)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

from stagecoach_api.rewards import FeedbackReward
from stagecoach_trainer.rewards.endpoint import Chat, Judge
from stagecoach_trainer.rewards.judge_prompts import QUOTED, VerdictCounts, ask_with_retry, chat_of, quote, read_mark
from stagecoach_trainer.rewards.term import Completion, Term, prompt_text
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError

SYSTEM = f"You mark answers of a language model. {QUOTED}"
MAX_UNPARSABLE = 0.1
"""Share of unreadable replies above which the stage fails: the instruction or the judge is then unsuitable."""

MIDDLE = 0.5
"""Value of an answer whose mark could not be read."""

_PLACEHOLDER = re.compile(r"\{(prompt|answer)\}")


class FeedbackTerm(Term):
    """Asks a judge for a mark of each answer.

    Raises UserError if `instruction` lacks `{answer}`, `worst` is not below `best`, or the key cannot be read.
    """

    def __init__(self, config: FeedbackReward, where: str, world: World) -> None:
        if "{answer}" not in config.instruction:
            raise UserError(f"{where}.instruction: must contain {{answer}} where the answer is to be inserted")
        if not config.worst < config.best:
            raise UserError(f"{where}: `worst` ({config.worst:g}) must be below `best` ({config.best:g})")
        self._config = config
        self._where = where
        self._judge = Judge(config.endpoint, f"{where}.endpoint", world)
        self._counts = VerdictCounts()
        self._again = f"Answer with one number from {config.worst:g} to {config.best:g}, and nothing else."

    def values(self, batch: Sequence[Completion]) -> list[float]:
        read = partial(read_mark, best=self._config.best)
        chats = [self._chat(completion) for completion in batch]
        marks = ask_with_retry(self._judge, chats, read, self._again, self._counts)
        self._require_marks()
        return [MIDDLE if mark is None else self._scaled(mark) for mark in marks]

    def _chat(self, completion: Completion) -> Chat:
        # In one pass, so that a literal "{prompt}" inside an answer is not replaced.
        values = {"prompt": quote(prompt_text(completion.prompt)), "answer": quote(completion.answer)}
        return chat_of(SYSTEM, _PLACEHOLDER.sub(lambda match: values[match[1]], self._config.instruction))

    def _scaled(self, mark: float) -> float:
        worst, best = self._config.worst, self._config.best
        return min(1.0, max(0.0, (mark - worst) / (best - worst)))

    def _require_marks(self) -> None:
        """Raise UserError if too many replies could not be read. A single one is tolerated in any number of replies."""
        failed, asked = self._counts.unparsable, self._counts.asked
        if failed > max(1.0, MAX_UNPARSABLE * asked):
            raise UserError(
                f"{self._where}: {failed} of {asked} replies of {self._config.endpoint.model} did not contain "
                "exactly one number, even when asked twice; make `instruction` ask for a number and nothing else, or "
                "use a better judge"
            )

    def counts(self) -> dict[str, int]:
        return self._counts.with_requests(self._judge)

    def load_counts(self, counts: Mapping[str, int]) -> None:
        self._counts.load(counts, self._judge)

    def figures(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"requests": counts["requests"], "unparsable": counts["unparsable"]}
