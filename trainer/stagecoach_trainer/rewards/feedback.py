"""AI feedback: a mark that a language model gives an answer (arXiv 2212.08073), scaled to 0 for the worst and 1 for the
best."""

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
"""Share of replies without a mark above which the instruction, or the judge, is at fault."""

MIDDLE = 0.5
"""Value of an answer for which no mark could be read."""

_PLACE = re.compile(r"\{(prompt|answer)\}")


class FeedbackTerm(Term):
    """Raises UserError for an instruction without `{answer}`, marks upside down, and a key that is not there."""

    def __init__(self, config: FeedbackReward, where: str, world: World) -> None:
        if "{answer}" not in config.instruction:
            raise UserError(f"{where}.instruction: must hold {{answer}}, where the answer belongs")
        if not config.worst < config.best:
            raise UserError(f"{where}: `worst` ({config.worst:g}) must be below `best` ({config.best:g})")
        self._config = config
        self._where = where
        self._judge = Judge(config.endpoint, f"{where}.endpoint", world)
        self._counts = VerdictCounts()
        self._again = f"Answer with one number from {config.worst:g} to {config.best:g}, and nothing else."

    def values(self, batch: Sequence[Completion]) -> list[float]:
        read = partial(read_mark, best=self._config.best)
        chats = [self._chat(judged) for judged in batch]
        marks = ask_with_retry(self._judge, chats, read, self._again, self._counts)
        self._require_marks()
        return [MIDDLE if mark is None else self._scaled(mark) for mark in marks]

    def _chat(self, judged: Completion) -> Chat:
        # In one pass: an answer that says {prompt} is not filled in.
        words = {"prompt": quote(prompt_text(judged.prompt)), "answer": quote(judged.answer)}
        return chat_of(SYSTEM, _PLACE.sub(lambda match: words[match[1]], self._config.instruction))

    def _scaled(self, mark: float) -> float:
        worst, best = self._config.worst, self._config.best
        return min(1.0, max(0.0, (mark - worst) / (best - worst)))

    def _require_marks(self) -> None:
        """One reply that cannot be read is nothing; many are an error."""
        failed, asked = self._counts.unparsable, self._counts.asked
        if failed > max(1.0, MAX_UNPARSABLE * asked):
            raise UserError(
                f"{self._where}: in {failed} of {asked} replies of {self._config.endpoint.model} there was not one "
                "number, even when asked twice; let `instruction` ask for a number and nothing else, or take a "
                "better judge"
            )

    def counts(self) -> dict[str, int]:
        return self._counts.with_requests(self._judge)

    def load_counts(self, counts: Mapping[str, int]) -> None:
        self._counts.load(counts, self._judge)

    def figures(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"requests": counts["requests"], "unparsable": counts["unparsable"]}
