"""Rules over rewards: expressions that can be computed, limits that leave something, names that reports can tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagecoach_api.expressions import ExpressionError, parse_expression
from stagecoach_api.fields import FieldPath
from stagecoach_api.kinds import EvaluateStage, PpoStage, RewardModelStage
from stagecoach_api.problems import suggest
from stagecoach_api.rewards import RewardTerm
from stagecoach_api.rules.draft import Draft, Fault, configs

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


# -- domains -----------------------------------------------------------------------------------------------------------


def domains_of_prompts_are_known(draft: Draft) -> Iterator[Fault]:
    """What lies at a URI is looked at by the trainer."""
    for path, domain, terms in _asked_domains(draft):
        models = [term.model for term in terms if term.model is not None]
        names = list(dict.fromkeys(model.stage for model in models if model.stage is not None))
        known = {name: found for name in names if (found := _domains_of(draft, name)) is not None}
        for name, domains in known.items():
            if domains and domain not in domains:
                rule = f"must be one of the `domains` of the stage `{name}`, whose reward model judges the answers"
                yield Fault(path, domain, rule, suggest(domain, domains))
        told = len(known) == len(names) and all(model.stage is not None for model in models)
        if told and not any(known.values()):
            yield Fault(
                path,
                domain,
                "changes nothing: no reward model among the terms has domains",
                "leave it out, or give the `rewardModel` stage `domains`",
            )


def _asked_domains(draft: Draft) -> Iterator[tuple[FieldPath, str, Terms]]:
    """Yield the domains of prompts with their fields and the terms that judge the answers."""
    for stage, config in configs(draft, PpoStage):
        for index, source in enumerate(config.data):
            if source.domain is not None:
                yield stage.at("data", index, "domain"), source.domain, config.rewards
    for stage, evaluation in configs(draft, EvaluateStage):
        for index, task in enumerate(evaluation.rewards):
            if task.on.domain is not None:
                yield stage.at("rewards", index, "data", "domain"), task.on.domain, task.rewards


def _domains_of(draft: Draft, name: str) -> list[str] | None:
    """Return the domains of a `rewardModel` stage of this run. None: there is no such stage, or it cannot be read."""
    stage = draft.by_name.get(name)
    if stage is None or not isinstance(stage.config, RewardModelStage):
        return None
    return [domain.name for domain in stage.config.domains]


REWARD_RULES = (
    expressions_can_be_computed,
    reward_limits_leave_something,
    feedback_sees_the_answer,
    reward_names_are_unique,
    domains_of_prompts_are_known,
)
