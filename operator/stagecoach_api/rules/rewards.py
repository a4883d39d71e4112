"""Rules over rewards: expressions that can be computed, limits that leave something, names that reports can tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagecoach_api.expressions import ExpressionError, parse_expression
from stagecoach_api.fields import FieldPath
from stagecoach_api.rewards import RewardTerm
from stagecoach_api.rules.draft import Draft, Fault, configs
from stagecoach_api.stages import EvaluateStage, PpoStage

Terms = Sequence[RewardTerm]


def _lists_of_terms(draft: Draft) -> Iterator[tuple[FieldPath, Terms]]:
    for stage, config in configs(draft, PpoStage):
        yield stage.at("rewards"), config.rewards
    for stage, evaluation in configs(draft, EvaluateStage):
        for index, task in enumerate(evaluation.rewards):
            yield stage.at("rewards", index, "rewards"), task.rewards


def _all_terms(draft: Draft) -> Iterator[tuple[FieldPath, RewardTerm]]:
    for path, terms in _lists_of_terms(draft):
        for index, term in enumerate(terms):
            yield (*path, index), term


def expressions_can_be_computed(draft: Draft) -> Iterator[Fault]:
    for path, term in _all_terms(draft):
        if term.expression is None:
            continue
        try:
            parse_expression(term.expression)
        except ExpressionError as error:
            rule, _, allowed = str(error).rpartition("; ")
            remedy = allowed.replace("allowed are", "use", 1) if rule else "write a shorter one"
            yield Fault((*path, "expression"), term.expression, f"is no reward expression: {rule or error}", remedy)


def reward_limits_leave_something(draft: Draft) -> Iterator[Fault]:
    swap = "swap them, or change one"
    for path, term in _all_terms(draft):
        if term.at_least is not None and term.at_most is not None and term.at_least > term.at_most:
            limits = {"atLeast": term.at_least, "atMost": term.at_most}
            yield Fault(path, limits, "`atLeast` must not be above `atMost`", swap)
        length = term.length
        if length is not None and length.at_most is not None and length.at_least > length.at_most:
            limits = {"atLeast": length.at_least, "atMost": length.at_most}
            yield Fault((*path, "length"), limits, "`atLeast` must not be above `atMost`", swap)
        if term.feedback is not None and not term.feedback.worst < term.feedback.best:
            marks = {"worst": term.feedback.worst, "best": term.feedback.best}
            yield Fault((*path, "feedback"), marks, "`worst` must be below `best`", swap)


def feedback_sees_the_answer(draft: Draft) -> Iterator[Fault]:
    for path, term in _all_terms(draft):
        if term.feedback is not None and "{answer}" not in term.feedback.instruction:
            yield Fault(
                (*path, "feedback", "instruction"),
                term.feedback.instruction,
                "must hold `{answer}`, or every answer gets the same mark",
                "write `{answer}` where the answer belongs",
            )


def reward_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for path, terms in _lists_of_terms(draft):
        yield from _repeated(path, [term.name for term in terms])
    for path, term in _all_terms(draft):
        if term.propositions is not None:
            names = [item.name for item in term.propositions.propositions]
            yield from _repeated((*path, "propositions", "propositions"), names)
    for stage, config in configs(draft, EvaluateStage):
        yield from _repeated(stage.at("rewards"), [task.name for task in config.rewards])
        for index, task in enumerate(config.rewards):
            yield from _repeated(stage.at("rewards", index, "rivals"), [rival.name for rival in task.rivals])


def _repeated(path: FieldPath, names: Sequence[str]) -> Iterator[Fault]:
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Fault((*path, index, "name"), name, "must be unique in this list", "rename one of the two")


REWARD_RULES = (
    expressions_can_be_computed,
    reward_limits_leave_something,
    feedback_sees_the_answer,
    reward_names_are_unique,
)
