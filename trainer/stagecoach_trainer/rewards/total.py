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
"""Key of the counters within a term's state."""


@dataclass(frozen=True)
class _TermContext:
    """Arguments for building terms."""

    context: StageContext
    device: torch.device | None
    precision: Precision
    batch_rows: int
    merge: bool


@dataclass(frozen=True)
class _WeightedTerm:
    """A term with its configuration: weight and limits."""

    config: RewardTerm
    term: Term
    where: str

    def values(self, batch: Sequence[Completion]) -> list[float]:
        """Return one value per answer, clipped. Raises UserError if one is NaN or infinite."""
        values = self.term.values(batch)
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(
                    f"{self.where} ({self.config.name}): the reward of {describe(batch[index], index)} is {value}, "
                    "which is not finite; correct the term, then resume from the last checkpoint"
                )
        low = -math.inf if self.config.at_least is None else self.config.at_least
        high = math.inf if self.config.at_most is None else self.config.at_most
        return [min(max(value, low), high) for value in values]


class RewardSum:
    """The terms of a reward, ready to score answers."""

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
        """Fetch, load and validate everything the terms need. Fitting is left to `prepare`.

        Args:
            terms: The terms.
            context: The stage's context; every rank builds its own sum.
            device: Device of reward models; the CPU if None.
            precision: Number format of reward models' bodies.
            batch_rows: Answers per forward pass of a reward model.
            where: The terms' field path, for messages.
            merge: Merge reward models that are adapters into their bases. Unmerged ones can share their base's memory.

        Raises UserError with all problems.
        """
        arguments = _TermContext(context, device, precision, batch_rows, merge)
        made: list[_WeightedTerm] = []
        problems: list[str] = []
        for index, config in enumerate(terms):
            try:
                made.append(_WeightedTerm(config, _make(config, f"{where}[{index}]", arguments), f"{where}[{index}]"))
            except UserError as error:
                problems.append(str(error))
        names = [config.name for config in terms]
        problems += [
            f"{where}: two terms are named `{name}`; give each a unique name"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        if problems:
            raise UserError("; ".join(problems))
        return cls(made, context.world)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, in order."""
        return tuple(item.config.name for item in self._terms)

    def prepare(self) -> bool:
        """Prepare the terms that `load_state` has not restored. All ranks call it, after `load_state` and before
        `score`. Return whether there was anything to do.

        Raises UserError as the terms do.
        """
        done = [item.term.prepare() for item in self._terms]
        if any(done):
            self.load_state(self.state())  # splits the requests that rank 0 made over all ranks' budgets
        return any(done)

    def score(self, batch: Sequence[Completion]) -> list[Score]:
        """Return the score of each answer. If reward models are sharded, all ranks must call it equally often, if need
        be with an empty batch.

        Raises UserError, naming term and answer, if a value is NaN or infinite, and as the terms do.
        """
        if not batch:
            for item in self._terms:
                item.term.sit_out()
            return []
        values = {item.config.name: item.values(batch) for item in self._terms}
        scores = []
        for index in range(len(batch)):
            terms = {name: of_term[index] for name, of_term in values.items()}
            # fsum: the total does not depend on the order of the terms.
            total = math.fsum(item.config.weight * terms[item.config.name] for item in self._terms)
            scores.append(Score(total, terms))
        return scores

    def reward_models(self) -> dict[str, RewardModel]:
        """Return the reward models among the terms, by term name."""
        return {name: term.model for name, term in self._model_terms().items()}

    def require_domains(self, requested: Mapping[str, str | None]) -> None:
        """Raise UserError for a prompt domain that a reward model with domains lacks, and for any domain if no reward
        model has domains, because it would have no effect.

        `requested`: domains by field path; None for no domain.
        """
        wanted = {where: domain for where, domain in requested.items() if domain is not None}
        available = {item.where: term.model.domains for item, term in self._terms_with_models() if term.model.domains}
        problems = [
            f"{field}: the reward model of {where} has no domain {domain!r}, only {', '.join(sorted(known))}"
            for field, domain in wanted.items()
            for where, known in available.items()
            if domain not in known
        ]
        if not available:
            problems += [
                f"{field}: no reward model among the terms has domains, so {domain!r} has no effect; remove it, or "
                "train the reward model with `domains`"
                for field, domain in wanted.items()
            ]
        if problems:
            raise UserError("; ".join(problems))

    def shard_models(self, shard: Callable[[nn.Module], None], device: torch.device, world: World) -> None:
        """Shard the parameters of all reward models across ranks by `shard`; they compute on `device`."""
        for term in self._model_terms().values():
            term.shard(shard, device, world)

    def _model_terms(self) -> dict[str, ModelTerm]:
        return {item.config.name: term for item, term in self._terms_with_models()}

    def _terms_with_models(self) -> list[tuple[_WeightedTerm, ModelTerm]]:
        from stagecoach_trainer.rewards.model import ModelTerm

        return [(item, item.term) for item in self._terms if isinstance(item.term, ModelTerm)]

    def figures(self) -> dict[str, dict[str, float]]:
        """Return each term's figures for the report: requests, unreadable verdicts, fitted weights. All ranks call
        it."""
        counts = self._counts()
        found = {item.config.name: item.term.figures(counts[item.config.name]) for item in self._terms}
        return {name: figures for name, figures in found.items() if figures}

    def state(self) -> dict[str, Any]:
        """Return the state of all ranks that a checkpoint must contain, as JSON values. All ranks call it."""
        counts = self._counts()
        found = {item.config.name: item.term.state() for item in self._terms}
        found = {name: state | ({COUNTS: counts[name]} if counts[name] else {}) for name, state in found.items()}
        return {name: state for name, state in found.items() if state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state` returned. Counters are split over the ranks, whose number may have changed."""
        for item in self._terms:
            own = dict(state.get(item.config.name, {}))
            counts = own.pop(COUNTS, None)
            if counts is not None:
                item.term.load_counts({what: share_of(int(total), self._world) for what, total in counts.items()})
            if own:
                item.term.load_state(own)

    def _counts(self) -> dict[str, dict[str, int]]:
        """Return the counters of each term, summed over all ranks."""
        own = {item.config.name: item.term.counts() for item in self._terms}
        if self._world.size == 1:
            return own
        from stagecoach_trainer.runtime.collectives import sum_over_ranks

        # One collective call for all counters; they are integers below 2**53, which fp64 holds exactly.
        totals = iter(sum_over_ranks([float(n) for counts in own.values() for n in counts.values()], self._world))
        return {name: {what: int(next(totals)) for what in counts} for name, counts in own.items()}


def _make(config: RewardTerm, where: str, arguments: _TermContext) -> Term:
    """Return the term of the one member that is set."""
    member = next(name for name in REWARD_MEMBERS if getattr(config, name) is not None)
    field = f"{where}.{member}"
    makers: dict[str, Callable[[Any], Term]] = {
        "model": lambda value: _model_term(value, arguments),
        "length": lambda value: length_term(value, field),
        "language": language_term,
        "repetition": repetition_term,
        "format": lambda value: format_term(value, field),
        "arithmetic": lambda value: TextTerm(arithmetic_value),
        "expression": lambda value: ExpressionTerm(value, field),
        "propositions": lambda value: _propositions_term(value, field, arguments),
        "feedback": lambda value: _feedback_term(value, field, arguments),
        "plugin": lambda value: _plugin_term(value, field),
    }
    return makers[member](getattr(config, member))


# The modules below import torch or the endpoint's client, so each is imported only if it is used.


def _model_term(value: Any, arguments: _TermContext) -> Term:
    import torch

    from stagecoach_trainer.engine.precision import DTYPES
    from stagecoach_trainer.models.reward import load_reward_model
    from stagecoach_trainer.rewards.model import ModelTerm

    device = arguments.device or torch.device("cpu")
    model = load_reward_model(arguments.context, value, DTYPES[arguments.precision], device, arguments.merge)
    return ModelTerm(model, arguments.batch_rows)


def _propositions_term(value: Any, where: str, arguments: _TermContext) -> Term:
    from stagecoach_trainer.rewards.propositions import PropositionsTerm

    return PropositionsTerm(value, where, arguments.context)


def _feedback_term(value: Any, where: str, arguments: _TermContext) -> Term:
    from stagecoach_trainer.rewards.feedback import FeedbackTerm

    return FeedbackTerm(value, where, arguments.context.world)


def _plugin_term(value: Any, where: str) -> Term:
    from stagecoach_trainer.rewards.plugin import PluginTerm

    return PluginTerm(value, where)
