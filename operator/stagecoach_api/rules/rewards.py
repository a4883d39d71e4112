"""Rules over rewards: expressions that can be computed, limits that are in order, names that are unique in reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagecoach_api.base import Model
from stagecoach_api.draft import Draft, Fault, Rule, repeated_names
from stagecoach_api.expressions import ExpressionError, parse_expression
from stagecoach_api.fields import FieldPath, walk_values
from stagecoach_api.problems import suggest
from stagecoach_api.rewards import Domain, PromptNamedSource, PromptSource, RewardTerm

Terms = Sequence[RewardTerm]


def _lists_of_terms(draft: Draft) -> Iterator[tuple[FieldPath, Terms]]:
    for stage in draft.stages:
        for path, value in walk_values(stage.config):
            if terms := _terms(value):
                yield stage.at(*path), terms


def _terms(value: object) -> Terms:
    """Return the terms if the value is a list of them, else nothing."""
    return [item for item in value if isinstance(item, RewardTerm)] if isinstance(value, tuple) else []


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
            yield Fault((*path, "expression"), term.expression, f"is not a reward expression: {rule or error}", remedy)


def reward_limits_are_in_order(draft: Draft) -> Iterator[Fault]:
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
                "must contain `{answer}`, or every answer gets the same mark",
                "write `{answer}` where the answer belongs",
            )


def reward_names_are_unique(draft: Draft) -> Iterator[Fault]:
    for path, terms in _lists_of_terms(draft):
        yield from repeated_names(path, [term.name for term in terms])
    for path, term in _all_terms(draft):
        if term.propositions is not None:
            names = [item.name for item in term.propositions.propositions]
            yield from repeated_names((*path, "propositions", "propositions"), names)


# -- domains -----------------------------------------------------------------------------------------------------------


def domains_of_prompts_are_known(draft: Draft) -> Iterator[Fault]:
    """Reward models at a URI are checked by the trainer."""
    for path, domain, terms in _domains_of_prompts(draft):
        models = [term.model for term in terms if term.model is not None]
        names = list(dict.fromkeys(model.stage for model in models if model.stage is not None))
        known = {name: domains for name in names if (domains := _domains_of(draft, name)) is not None}
        for name, domains in known.items():
            if domains and domain not in domains:
                rule = f"must be one of the `domains` of the stage `{name}`, whose reward model judges the answers"
                yield Fault(path, domain, rule, suggest(domain, domains))
        all_known = len(known) == len(names) and all(model.stage is not None for model in models)
        if all_known and not any(known.values()):
            yield Fault(
                path,
                domain,
                "has no effect: no reward model among the terms has domains",
                "leave it out, or give the `rewardModel` stage `domains`",
            )


def _domains_of_prompts(draft: Draft) -> Iterator[tuple[FieldPath, str, Terms]]:
    """Yield the domains of prompts with their paths and the terms that judge the answers: those in the same model."""
    for stage in draft.stages:
        for path, value in walk_values(stage.config):
            members = list(_members(value))
            terms = [term for _, member in members for term in _terms(member)]
            for steps, source in _prompts(members) if terms else ():
                if source.domain is not None:
                    yield stage.at(*path, *steps, "domain"), source.domain, terms


def _members(value: object) -> Iterator[tuple[str, object]]:
    for name, field in type(value).model_fields.items() if isinstance(value, Model) else ():
        yield field.alias or name, getattr(value, name)


def _prompts(members: Sequence[tuple[str, object]]) -> Iterator[tuple[FieldPath, PromptSource | PromptNamedSource]]:
    """Yield the sources of prompts among a model's members and in its lists, with their paths."""
    for name, member in members:
        if isinstance(member, PromptSource | PromptNamedSource):
            yield (name,), member
        for index, item in enumerate(member if isinstance(member, tuple) else ()):
            if isinstance(item, PromptSource | PromptNamedSource):
                yield (name, index), item


def _domains_of(draft: Draft, name: str) -> list[str] | None:
    """Return the domains of a reward model's stage of this run; None if there is none or it cannot be read."""
    stage = draft.by_name.get(name)
    domains = getattr(stage.config, "domains", None) if stage is not None else None
    return [item.name for item in domains if isinstance(item, Domain)] if isinstance(domains, tuple) else None


REWARD_RULES: tuple[Rule, ...] = (
    expressions_can_be_computed,
    reward_limits_are_in_order,
    feedback_sees_the_answer,
    reward_names_are_unique,
    domains_of_prompts_are_known,
)
