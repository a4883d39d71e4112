"""Rule terms on the answer's text: length, script, repetition, a pattern, an expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagecoach_api.expressions import ExpressionError, Figures, parse_expression
from stagecoach_api.rewards import FormatReward, LanguageReward, LengthReward, RepetitionReward
from stagecoach_trainer.data.steps import SCRIPTS, count_characters
from stagecoach_trainer.rewards.term import Completion, Term, describe
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.messages import text_of


class TextTerm(Term):
    """A rule that depends only on one answer's text."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        self._rule = rule

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return [self._rule(completion.answer) for completion in batch]


def length_value(config: LengthReward, length: int) -> float:
    """Return 0 for a length (in characters) within the limits; outside it decreases linearly, to -1 at least."""
    if length < config.at_least:
        return -(config.at_least - length) / config.at_least
    if config.at_most is not None and length > config.at_most:
        return -min(1.0, (length - config.at_most) / config.at_most)
    return 0.0


def language_value(config: LanguageReward, answer: str) -> float:
    """Return the share of the characters, not counting white space, that belong to the script."""
    total = sum(map(len, answer.split()))
    return count_characters(SCRIPTS[config.script], answer) / total if total else 0.0


def repetition_value(config: RepetitionReward, answer: str) -> float:
    """Return minus the share of character n-grams that occurred earlier in the answer."""
    size = config.ngram
    grams = [answer[start : start + size] for start in range(len(answer) - size + 1)]
    return (len(set(grams)) - len(grams)) / len(grams) if grams else 0.0


def length_term(config: LengthReward, where: str) -> Term:
    if config.at_most is not None and config.at_least > config.at_most:
        raise UserError(f"{where}: `atLeast` ({config.at_least}) must not be above `atMost` ({config.at_most})")
    return TextTerm(lambda answer: length_value(config, len(answer)))


def language_term(config: LanguageReward) -> Term:
    return TextTerm(lambda answer: language_value(config, answer))


def repetition_term(config: RepetitionReward) -> Term:
    return TextTerm(lambda answer: repetition_value(config, answer))


def format_term(config: FormatReward, where: str) -> Term:
    """Return a term that is 1 for a match, else 0. Raises UserError for an invalid RE2 pattern."""
    import re2  # unlike `re`, linear time for every pattern

    options = re2.Options()
    options.log_errors = False
    try:
        search = re2.compile(config.match, options).search
    except re2.error as error:
        reason = error.args[0] if error.args else error
        message = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise UserError(
            f"{where}.match: {config.match!r} is not a valid RE2 pattern: {message}; RE2 has no look-arounds and "
            "back-references"
        ) from error
    return TextTerm(lambda answer: float(search(answer) is not None))


class ExpressionTerm(Term):
    """An expression over the answer's figures. Raises UserError if it is invalid."""

    def __init__(self, text: str, where: str) -> None:
        self._where = where
        try:
            self._expression = parse_expression(text)
        except ExpressionError as error:
            raise UserError(f"{where}: {text!r} is not a valid reward expression: {error}") from error

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return [self._value(completion, index) for index, completion in enumerate(batch)]

    def _value(self, completion: Completion, index: int) -> float:
        prompt_characters = sum(len(text_of(message)) for message in completion.prompt)
        figures = Figures(completion.answer, completion.num_tokens, completion.ended, prompt_characters)
        try:
            return self._expression.value(figures)
        except ExpressionError as error:
            raise UserError(
                f"{self._where}: {self._expression.text!r} has no value for {describe(completion, index)}: {error}"
            ) from error
