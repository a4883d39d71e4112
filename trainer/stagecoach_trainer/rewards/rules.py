"""Rewards that are rules on the answer's text: length, script, repetition, a pattern, a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagecoach_api.expressions import ExpressionError, Figures, parse_expression
from stagecoach_api.rewards import FormatReward, LanguageReward, LengthReward, RepetitionReward
from stagecoach_trainer.data.steps import SCRIPTS, count_characters
from stagecoach_trainer.rewards.term import Completion, Term, describe, message_text
from stagecoach_trainer.runtime.errors import UserError


class TextTerm(Term):
    """A rule that looks at one answer's text alone."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        self._rule = rule

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return [self._rule(judged.answer) for judged in batch]


def length_value(config: LengthReward, length: int) -> float:
    """Return 0 for a fitting number of characters, and less, down to -1, in a straight line outside the limits."""
    if length < config.at_least:
        return -(config.at_least - length) / config.at_least
    if config.at_most is not None and length > config.at_most:
        return -min(1.0, (length - config.at_most) / config.at_most)
    return 0.0


def language_value(config: LanguageReward, answer: str) -> float:
    """Return the share of the characters, blanks apart, that belong to the script."""
    total = sum(map(len, answer.split()))
    return count_characters(SCRIPTS[config.script], answer) / total if total else 0.0


def repetition_value(config: RepetitionReward, answer: str) -> float:
    """Return minus the share of n-grams of characters that stood in the answer before."""
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
    """Raises UserError for what is no RE2 pattern."""
    import re2  # linear time whatever the pattern

    options = re2.Options()
    options.log_errors = False
    try:
        search = re2.compile(config.match, options).search
    except re2.error as error:
        said = error.args[0] if error.args else error
        words = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise UserError(
            f"{where}.match: {config.match!r} is no RE2 pattern: {words}; look-arounds and back-references do not "
            "exist there"
        ) from error
    return TextTerm(lambda answer: float(search(answer) is not None))


class ExpressionTerm(Term):
    """A formula over the answer's figures. Raises UserError for one that is refused."""

    def __init__(self, text: str, where: str) -> None:
        self._where = where
        try:
            self._expression = parse_expression(text)
        except ExpressionError as error:
            raise UserError(f"{where}: {text!r} is no reward expression: {error}") from error

    def values(self, batch: Sequence[Completion]) -> list[float]:
        return [self._value(judged, index) for index, judged in enumerate(batch)]

    def _value(self, judged: Completion, index: int) -> float:
        prompt_characters = sum(len(message_text(message)) for message in judged.prompt)
        figures = Figures(judged.answer, judged.num_tokens, judged.ended, prompt_characters)
        try:
            return self._expression.value(figures)
        except ExpressionError as error:
            raise UserError(
                f"{self._where}: {self._expression.text!r} has no value for {describe(judged, index)}: {error}"
            ) from error
