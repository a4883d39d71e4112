"""The reward: the weighted sum of its terms, each checked and clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagecoach_api.rewards import REWARD_MEMBERS, RewardTerm, RewardTerms
from stagecoach_api.training import Precision
from stagecoach_trainer.rewards.arithmetic import arithmetic_value
from stagecoach_trainer.rewards.rules import (
    ExpressionTerm,
    TextTerm,
    format_term,
    language_term,
    length_term,
    repetition_term,
)
from stagecoach_trainer.rewards.term import Completion, Score, Term, describe, share_of
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stagecoach_trainer.models.reward import RewardModel
    from stagecoach_trainer.rewards.model import ModelTerm


COUNTS = "counts"
"""Where a term's state holds its counters."""


@dataclass(frozen=True)
class _TermContext:
    """What terms are made with."""

    context: StageContext
    device: torch.device | None
    precision: Precision
    batch_rows: int
    merge: bool


@dataclass(frozen=True)
class _WeightedTerm:
    """A term, and how it enters the sum."""

    config: RewardTerm
    term: Term
    where: str

    def values(self, batch: Sequence[Completion]) -> list[float]:
        """Return one value per answer, clipped. Raises UserError where one is no number."""
        values = self.term.values(batch)
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(
                    f"{self.where} ({self.config.name}): the reward of {describe(batch[index], index)} is {value}, "
                    "which is no number; mend the term, then go on from the last checkpoint"
                )
        low = -math.inf if self.config.at_least is None else self.config.at_least
        high = math.inf if self.config.at_most is None else self.config.at_most
        return [min(max(value, low), high) for value in values]


class RewardSum:
    """The terms of a reward, ready to judge."""

    def __init__(self, terms: Sequence[_WeightedTerm], world: World | None = None) -> None:
        self._terms = terms
        self._world = world or World()

    @classmethod
    def build(
        cls,
        terms: RewardTerms,
        context: StageContext,
        device: torch.device | None = None,
        precision: Precision = Precision.FP32,
        batch_rows: int = 8,
        where: str = "rewards",
        merge: bool = True,
    ) -> RewardSum:
        """Fetch, load and check everything the terms need; what is fitted waits for `prepare`.

        Args:
            terms: The terms.
            context: The stage's; every rank builds its own.
            device: Where reward models compute. None: the CPU.
            precision: Number format of reward models' bodies.
            batch_rows: Answers a reward model scores at once.
            where: The terms' field path, for messages.
            merge: Merge reward models that are adapters into their bases; else the bases can be shared.

        Raises UserError with all problems at once.
        """
        workshop = _TermContext(context, device, precision, batch_rows, merge)
        made: list[_WeightedTerm] = []
        problems: list[str] = []
        for index, config in enumerate(terms):
            try:
                made.append(_WeightedTerm(config, _make(config, f"{where}[{index}]", workshop), f"{where}[{index}]"))
            except UserError as error:
                problems.append(str(error))
        names = [config.name for config in terms]
        problems += [
            f"{where}: two terms are called `{name}`" for name in dict.fromkeys(names) if names.count(name) > 1
        ]
        if problems:
            raise UserError("; ".join(problems))
        return cls(made, context.world)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, in their order."""
        return tuple(item.config.name for item in self._terms)

    def prepare(self) -> bool:
        """Fit what no state brought; all ranks call it, after `load_state` and before `score`. Return whether there was
        anything to fit.

        Raises UserError as the terms do.
        """
        done = [item.term.prepare() for item in self._terms]
        if any(done):
            self.load_state(self.state())  # what one rank asked is on the account of all
        return any(done)

    def score(self, batch: Sequence[Completion]) -> list[Score]:
        """Return what each answer is worth. Where the ranks share reward models, all of them call it as often, without
        an answer too.

        Raises UserError naming term and sample where a value is no number, and as the terms do.
        """
        if not batch:
            for item in self._terms:
                item.term.sit_out()
            return []
        values = {item.config.name: item.values(batch) for item in self._terms}
        judgements = []
        for index in range(len(batch)):
            terms = {name: of_term[index] for name, of_term in values.items()}
            total = math.fsum(item.config.weight * terms[item.config.name] for item in self._terms)
            judgements.append(Score(total, terms))
        return judgements

    def reward_models(self) -> dict[str, RewardModel]:
        """Return the reward models among the terms by the terms' names, for a critic that starts from one."""
        return {name: term.model for name, term in self._model_terms().items()}

    def require_domains(self, asked: Mapping[str, str | None]) -> None:
        """Raise UserError for a domain of prompts that a reward model does not know, and where no reward model has
        domains at all, so that nothing would heed it. Beside one that has domains those without ignore them.

        `asked`: domains by the path of their field. None: of no domain.
        """
        wanted = {where: domain for where, domain in asked.items() if domain is not None}
        having = {item.where: term.model.domains for item, term in self._placed_models() if term.model.domains}
        problems = [
            f"{field}: the reward model of {where} knows no domain {domain!r}; it has {', '.join(sorted(known))}"
            for field, domain in wanted.items()
            for where, known in having.items()
            if domain not in known
        ]
        if not having:
            problems += [
                f"{field}: no reward model among the terms has domains, so {domain!r} changes nothing; leave it out, "
                "or train the reward model with `domains`"
                for field, domain in wanted.items()
            ]
        if problems:
            raise UserError("; ".join(problems))

    def shard_models(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> None:
        """Share the parameters of all reward models out over the ranks by `shard`; they compute on `device`."""
        for term in self._model_terms().values():
            term.shard(shard, device, world)

    def _model_terms(self) -> dict[str, ModelTerm]:
        return {item.config.name: term for item, term in self._placed_models()}

    def _placed_models(self) -> list[tuple[_WeightedTerm, ModelTerm]]:
        from stagecoach_trainer.rewards.model import ModelTerm

        return [(item, item.term) for item in self._terms if isinstance(item.term, ModelTerm)]

    def figures(self) -> dict[str, dict[str, float]]:
        """Return what the report tells of each term: requests made, verdicts that could not be read, fitted weights.
        All ranks call it."""
        counts = self._counts()
        found = {item.config.name: item.term.figures(counts[item.config.name]) for item in self._terms}
        return {name: figures for name, figures in found.items() if figures}

    def state(self) -> dict[str, Any]:
        """Return what must outlive a resume, as JSON values, of all ranks together. All ranks call it."""
        counts = self._counts()
        found = {item.config.name: item.term.state() for item in self._terms}
        found = {name: state | ({COUNTS: counts[name]} if counts[name] else {}) for name, state in found.items()}
        return {name: state for name, state in found.items() if state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave, on however many ranks: counts are shared out among them."""
        for item in self._terms:
            told = dict(state.get(item.config.name, {}))
            counts = told.pop(COUNTS, None)
            if counts is not None:
                item.term.load_counts({what: share_of(int(total), self._world) for what, total in counts.items()})
            if told:
                item.term.load_state(told)

    def _counts(self) -> dict[str, dict[str, int]]:
        """Return the counters of each term over all ranks."""
        own = {item.config.name: item.term.counts() for item in self._terms}
        if self._world.size == 1:
            return own
        from stagecoach_trainer.runtime.collectives import sum_over_ranks

        totals = iter(sum_over_ranks([float(n) for counts in own.values() for n in counts.values()], self._world))
        return {name: {what: int(next(totals)) for what in counts} for name, counts in own.items()}


def _make(config: RewardTerm, where: str, workshop: _TermContext) -> Term:
    """Return the term that the one given member asks for."""
    member = next(name for name in REWARD_MEMBERS if getattr(config, name) is not None)
    place = f"{where}.{member}"
    makers: dict[str, Callable[[Any], Term]] = {
        "model": lambda value: _model_term(value, workshop),
        "length": lambda value: length_term(value, place),
        "language": language_term,
        "repetition": repetition_term,
        "format": lambda value: format_term(value, place),
        "arithmetic": lambda value: TextTerm(arithmetic_value),
        "expression": lambda value: ExpressionTerm(value, place),
        "propositions": lambda value: _propositions_term(value, place, workshop),
        "feedback": lambda value: _feedback_term(value, place, workshop),
        "plugin": lambda value: _plugin_term(value, place),
    }
    return makers[member](getattr(config, member))


# The modules below bring torch or the endpoint's client, so each is imported where its term is asked for.


def _model_term(value: Any, workshop: _TermContext) -> Term:
    import torch

    from stagecoach_trainer.engine.precision import DTYPES
    from stagecoach_trainer.models.reward import load_reward_model
    from stagecoach_trainer.rewards.model import ModelTerm

    device = workshop.device or torch.device("cpu")
    model = load_reward_model(workshop.context, value, DTYPES[workshop.precision], device, workshop.merge)
    return ModelTerm(model, workshop.batch_rows)


def _propositions_term(value: Any, place: str, workshop: _TermContext) -> Term:
    from stagecoach_trainer.rewards.propositions import PropositionsTerm

    return PropositionsTerm(value, place, workshop.context)


def _feedback_term(value: Any, place: str, workshop: _TermContext) -> Term:
    from stagecoach_trainer.rewards.feedback import FeedbackTerm

    return FeedbackTerm(value, place, workshop.context.world)


def _plugin_term(value: Any, place: str) -> Term:
    from stagecoach_trainer.rewards.plugin import PluginTerm

    return PluginTerm(value, place)
