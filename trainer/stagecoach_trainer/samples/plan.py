"""The data of each optimiser step: phases, their mix, their rows. A pure function of the seed and the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stagecoach_api.kinds.pretrain import Phase
from stagecoach_api.training import Batch, Budget, Training
from stagecoach_trainer.batches.mixing import Int64, Mix, Stream, make_key, splitmix
from stagecoach_trainer.batches.packing import PackedRows, one_per_row, pack
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.batches.schedule import PhaseSchedule
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.rows import pack_rows
from stagecoach_trainer.samples.token_cache import TokenShard

WHOLE = "main"
"""Name of the only phase of a stage without phases."""

# They separate the orders derived from one seed; other numbers would change the order of all training data.
KEY_PACK, KEY_STREAM, KEY_MIX = 1, 2, 3


# -- pieces of shards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """Samples of several shards, none longer than a row.

    A document longer than a row is cut. The last position of a piece predicts the first token of the next one, so no
    target is lost. A last piece of one token would predict nothing and is dropped.
    """

    shards: tuple[TokenShard, ...]
    shard: npt.NDArray[np.int16]
    start: Int64
    length: npt.NDArray[np.int32]
    continues: npt.NDArray[np.bool_]
    """Whether the document continues in the next piece."""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    def rows(self, groups: Sequence[Int64]) -> list[Row]:
        """Return one row for each group of pieces, which are concatenated."""
        # All rows are read as one sequence of N tokens and split at the end: one gather instead of one for each piece.
        numbers = np.concatenate(groups)
        lengths = self.length[numbers].astype(np.int64)
        ends = np.cumsum(lengths)  # of each piece, in that sequence
        # Token offsets in the pieces' shards: the position in the sequence, shifted by the piece's own start.
        index = np.arange(ends[-1]) + np.repeat(self.start[numbers] - (ends - lengths), lengths)
        # A target is the token after its position. The last position of a document has no target; it reads its own
        # token, which the shard has even at its end, and is masked below.
        predicts = np.ones(len(index), np.bool_)
        predicts[ends - 1] = self.continues[numbers]
        tokens, labels = self._read(np.repeat(self.shard[numbers], lengths), index, index + predicts)
        labels[ends[~self.continues[numbers]] - 1] = IGNORE
        rows: list[Row] = []
        begin = first = 0
        for group in groups:
            last = first + len(group)
            end = int(ends[last - 1])
            rows.append(Row(tokens[begin:end], labels[begin:end], tuple(lengths[first:last].tolist())))
            begin, first = end, last
        return rows

    def _read(
        self, shard: npt.NDArray[np.int16], index: Int64, following: Int64
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the tokens [N] at `index` [N] of each position's shard, and the targets, at `following` [N]."""
        if len(self.shards) == 1:
            return _read_shard(self.shards[0], index, following)
        tokens, labels = np.empty(len(index), np.int32), np.empty(len(index), np.int32)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            tokens[here], labels[here] = _read_shard(self.shards[int(number)], index[here], following[here])
        return tokens, labels


def _read_shard(
    shard: TokenShard, index: Int64, following: Int64
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    labels = shard.tokens.take(following)
    if shard.trained is not None:
        labels[~shard.trained.take(following)] = IGNORE
    return shard.tokens.take(index), labels


def cut_into_pieces(shards: Sequence[TokenShard], sequence_length: int) -> Pieces:
    """Return the samples of `shards`, cut to at most `sequence_length` tokens."""
    parts = [_cut(shard, sequence_length) for shard in shards]
    return Pieces(
        tuple(shards),
        np.repeat(np.arange(len(shards), dtype=np.int16), [len(start) for start, _, _ in parts]),
        np.concatenate([start for start, _, _ in parts]),
        np.concatenate([length for _, length, _ in parts]),
        np.concatenate([continues for _, _, continues in parts]),
    )


def _cut(shard: TokenShard, size: int) -> tuple[Int64, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    lengths = np.diff(shard.offsets)
    numbers = np.maximum(1, -(-(lengths - 1) // size))  # a last piece of one token is left out
    sample = np.repeat(np.arange(len(lengths)), numbers)
    # Each piece's number in its document: its number among all pieces, less the pieces of the documents before.
    index = np.arange(len(sample)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    length = np.minimum(size, lengths[sample] - index * size)
    # Also true before a last piece that is left out: its one token is still a target.
    continues = (index + 1) * size < lengths[sample]
    return shard.offsets[sample] + index * size, length.astype(np.int32), continues


# -- units: the elements of a step's batch -----------------------------------------------------------------------------


class Units(Protocol):
    """What is drawn and mixed: rows, samples, or the answers to one prompt."""

    def __len__(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def rows(self, numbers: Int64) -> list[Any]:
        """Return the training data of each of the given units: a row, or a group of answers."""


@dataclass(frozen=True)
class RowUnits:
    """Rows packed once for the whole phase."""

    pieces: Pieces
    packed: PackedRows

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def num_tokens(self) -> int:
        return self.pieces.num_tokens

    def rows(self, numbers: Int64) -> list[Row]:
        return self.pieces.rows([self.packed.samples(int(number)) for number in numbers])


@dataclass(frozen=True)
class SampleUnits:
    """Single samples, which are packed in each step."""

    pieces: Pieces

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def num_tokens(self) -> int:
        return self.pieces.num_tokens

    def rows(self, numbers: Int64) -> list[Row]:
        return self.pieces.rows(np.split(numbers, len(numbers)))


# -- phases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseSettings:
    """The data settings of a phase, with the stage's values for those it does not set."""

    name: str
    sequence_length: int
    batch: Batch
    budget: Budget
    weights: tuple[float, ...] | None
    """Share of the training tokens of each data set; None if in proportion to their sizes."""


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its data."""

    settings: PhaseSettings
    units: tuple[Units, ...]
    mix: Mix
    per_step: int
    """Units of one optimiser step."""
    packing: bool
    first_step: int

    @property
    def num_steps(self) -> int:
        return -(-self.mix.total // self.per_step)

    def rows(self, step: int) -> list[Any]:
        """Return the global batch of step `step`, counted from the phase's first step."""
        draws = self.mix.draws(step * self.per_step, (step + 1) * self.per_step)
        rows: list[Any] = [None] * len(draws.sets)
        # Rows are read set by set, in one read each, but keep the order of the mix.
        for index in np.unique(draws.sets):
            places = np.flatnonzero(draws.sets == index)
            for place, row in zip(places, self.units[int(index)].rows(draws.units[places]), strict=True):
                rows[int(place)] = row
        # The first stream suffices: the phase's batch decides for all of them whether rows or samples are drawn.
        if self.packing and isinstance(self.units[0], SampleUnits):
            return pack_rows(rows, self.settings.sequence_length)
        return rows


class MixedPlan:
    """The steps of a stage: its phases in order (a `StepPlan`).

    A step of `batch.tokens` has `tokens // sequenceLength` rows, at least one. A step of `batch.samples` has that many
    samples, packed into few rows. If the budget is in epochs, the last step has the remaining units.
    """

    def __init__(self, phases: Sequence[PlannedPhase]) -> None:
        self.phases = tuple(phases)
        self._first_steps = [phase.first_step for phase in self.phases]

    @property
    def num_steps(self) -> int:
        last = self.phases[-1]
        return last.first_step + last.num_steps

    def rows(self, step: int) -> list[Any]:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        phase = self.phases[bisect_right(self._first_steps, step) - 1]
        return phase.rows(step - phase.first_step)


# -- planning ----------------------------------------------------------------------------------------------------------


def phase_settings(config: Training, names: Sequence[str], phases: Sequence[Phase] = ()) -> list[PhaseSettings]:
    """Return the phases with the stage's values for those they do not set. `names`: labels of the data sets.

    Raises UserError for weights on some sets only, and for a phase that names a set that `data` does not have.
    """
    whole = PhaseSettings(
        name=WHOLE,
        sequence_length=config.sequence_length,
        batch=config.batch,
        budget=config.budget,
        weights=_stage_weights(config),
    )
    found: list[PhaseSettings] = []
    for phase in phases:
        batch = whole.batch
        if phase.batch_tokens is not None:
            batch = Batch(tokens=phase.batch_tokens, micro_batch_rows=whole.batch.micro_batch_rows)
        found.append(
            replace(
                whole,
                name=phase.name,
                sequence_length=phase.sequence_length or whole.sequence_length,
                batch=batch,
                budget=Budget(tokens=phase.tokens),
                weights=_phase_weights(phase, names) if phase.weights else whole.weights,
            )
        )
    return found or [whole]


def phase_schedules(plan: MixedPlan, phases: Sequence[Phase]) -> list[PhaseSchedule]:
    """Return what each phase of a planned stage sets of its schedule; a rotary base holds until the next one is set."""
    found: list[PhaseSchedule] = []
    theta: float | None = None
    for planned, phase in zip(plan.phases, phases, strict=False):  # a stage without phases is planned as one
        theta = phase.rope_theta or theta
        found.append(PhaseSchedule(planned.first_step, planned.num_steps, phase.learning_rate, theta))
    return found


def _stage_weights(config: Training) -> tuple[float, ...] | None:
    weights = [source.weight for source in config.data]
    if all(weight is None for weight in weights):
        return None
    if any(weight is None for weight in weights):
        missing = ", ".join(source.label for source in config.data if source.weight is None)
        raise UserError(f"data: give a `weight` to every set or to none; {missing} has none")
    return _positive(tuple(weight or 0.0 for weight in weights), "data")


def _phase_weights(phase: Phase, names: Sequence[str]) -> tuple[float, ...]:
    given = {item.name: item.weight for item in phase.weights}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UserError(
            f"phases.{phase.name}.weights: no data set is called {unknown[0]!r}; the sets are {', '.join(names)}"
        )
    return _positive(tuple(given.get(name, 0.0) for name in names), f"phases.{phase.name}.weights")


def _positive(weights: tuple[float, ...], where: str) -> tuple[float, ...]:
    if not any(weights):
        raise UserError(f"{where}: every weight is 0, so there is nothing to train on")
    return weights


@dataclass(frozen=True)
class UnitsKey:
    """Identifies the units of a stream."""

    sets: tuple[int, ...]
    """Numbers of their data sets."""
    sequence_length: int
    by_rows: bool
    """Whether rows are drawn, else samples."""

    def numbers(self) -> tuple[int, ...]:
        return (*self.sets, self.sequence_length, int(self.by_rows))


class Planner:
    """Turns phase settings into a plan.

    Units that several phases share are packed once, and each stream continues where the previous phase stopped, so no
    unit is repeated before all were used. Phases with another sequence length or kind of batch have units of their own
    and start with their first.
    """

    def __init__(self, shards: Mapping[str, TokenShard], seed: int, packing: bool = True) -> None:
        self._names = tuple(shards)
        self._shards = tuple(shards.values())
        self._seed = seed
        self._packing = packing
        self._units: dict[UnitsKey, Units] = {}
        self._next_draws: dict[UnitsKey, int] = {}

    def plan(self, settings: Sequence[PhaseSettings]) -> MixedPlan:
        """Return the plan of a stage. Raises UserError for a set with a weight and without samples."""
        phases: list[PlannedPhase] = []
        first_step = 0
        for number, item in enumerate(settings):
            phases.append(self._phase(number, item, first_step))
            first_step += phases[-1].num_steps
        return MixedPlan(phases)

    def _phase(self, number: int, settings: PhaseSettings, first_step: int) -> PlannedPhase:
        keys = self._keys(settings)
        units = tuple(self._units_of(key) for key in keys)
        streams = [
            # Without the phase's number, unlike the mix's key: a later phase continues the passes over the same units.
            Stream(len(item), make_key(self._seed, KEY_STREAM, *key.numbers()))
            for item, key in zip(units, keys, strict=True)
        ]
        shares = _unit_shares(settings, units)
        mean_tokens = _mean_tokens(units, shares)
        per_step = self._per_step(settings, mean_tokens)
        total = _total_units(settings, units, mean_tokens, per_step)
        first_draws = [self._next_draws.get(key, 0) for key in keys]
        mix = Mix(streams, shares, total, make_key(self._seed, KEY_MIX, number), first_draws)
        self._next_draws.update(zip(keys, mix.next_draws, strict=True))
        return PlannedPhase(settings, units, mix, per_step, self._packing, first_step)

    def _keys(self, settings: PhaseSettings) -> list[UnitsKey]:
        """Return the key of each stream. Without weights, all sets are packed together as one."""
        if settings.weights is None:
            groups: list[tuple[int, ...]] = [tuple(range(len(self._shards)))]
        else:
            groups = [(index,) for index, weight in enumerate(settings.weights) if weight > 0]
        return [UnitsKey(group, settings.sequence_length, settings.batch.tokens is not None) for group in groups]

    def _units_of(self, key: UnitsKey) -> Units:
        if key not in self._units:
            self._units[key] = self._make_units(key)
        return self._units[key]

    def _make_units(self, key: UnitsKey) -> Units:
        pieces = cut_into_pieces([self._shards[index] for index in key.sets], key.sequence_length)
        if not len(pieces):
            raise self._nothing_in(key)
        if not key.by_rows:
            return SampleUnits(pieces)
        if not self._packing:
            return RowUnits(pieces, one_per_row(len(pieces)))
        shuffle = splitmix(np.arange(len(pieces), dtype=np.uint64) ^ np.uint64(make_key(self._seed, KEY_PACK)))
        return RowUnits(pieces, pack(pieces.length, key.sequence_length, tie_break=shuffle))

    def _nothing_in(self, key: UnitsKey) -> UserError:
        return UserError(f"data: {', '.join(self._names[index] for index in key.sets)} has no sample to train on")

    def _per_step(self, settings: PhaseSettings, mean_tokens: float) -> int:
        """Return the units of one optimiser step. `mean_tokens`: mean tokens of the units drawn."""
        del mean_tokens  # a row has as many tokens as the sequence, or nearly
        if settings.batch.tokens is not None:
            return max(1, settings.batch.tokens // settings.sequence_length)
        return settings.batch.samples or 1


def _unit_shares(settings: PhaseSettings, units: Sequence[Units]) -> list[float]:
    """Return each stream's share of the units: its share of the tokens, divided by its mean tokens per unit."""
    if settings.weights is None:
        return [1.0]
    weights = [weight for weight in settings.weights if weight > 0]
    return [weight * len(item) / item.num_tokens for weight, item in zip(weights, units, strict=True)]


def _mean_tokens(units: Sequence[Units], shares: Sequence[float]) -> float:
    """Return the mean tokens of a unit, over all units drawn."""
    per_unit = [item.num_tokens / len(item) for item in units]
    return sum(share * tokens for share, tokens in zip(shares, per_unit, strict=True)) / sum(shares)


def _total_units(settings: PhaseSettings, units: Sequence[Units], mean_tokens: float, per_step: int) -> int:
    """Return the units that a phase draws: whole steps for a budget in tokens or steps, passes for one in epochs."""
    budget = settings.budget
    if budget.steps is not None:
        return budget.steps * per_step
    if budget.epochs is not None:
        return max(1, round(budget.epochs * sum(len(item) for item in units)))
    return math.ceil((budget.tokens or 1) / (mean_tokens * per_step)) * per_step
