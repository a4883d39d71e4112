"""DPO, IPO and KTO over a model: losses, gradients and figures against transformers' own logits, and loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stagecoach_api.kinds.dpo import DirectLoss
from stagecoach_trainer.align.answer_scores import score_answers
from stagecoach_trainer.align.direct_held_out import DirectPreferenceSet, direct_figures
from stagecoach_trainer.align.direct_objective import AnswerLoss, DirectObjective
from stagecoach_trainer.align.groups import sequences_of
from stagecoach_trainer.align.mismatched import PointedPlan, PointedUnit, mismatched
from stagecoach_trainer.align.reference_table import ReferenceTable, fill_table, windows
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.samples.groups import Counting, Group, TokenSequence, pairs_of
from tests.trainer.models.makers import make_context, make_model

ROWS = 300
CPU = torch.device("cpu")

SIGMOID = DirectLoss.model_validate({"sigmoid": {"beta": 0.5}})
SMOOTH = DirectLoss.model_validate({"sigmoid": {"beta": 0.5, "labelSmoothing": 0.1}})
IPO = DirectLoss.model_validate({"ipo": {"beta": 0.3}})
KTO = DirectLoss.model_validate({"kto": {"beta": 0.5, "desirableWeight": 1.5, "undesirableWeight": 0.5}})
LOSSES = pytest.mark.parametrize("loss", [SIGMOID, SMOOTH, IPO, KTO], ids=["sigmoid", "smooth", "ipo", "kto"])


# -- makers ------------------------------------------------------------------------------------------------------------


def sequence(random: np.random.Generator, prompt: np.ndarray | None = None) -> TokenSequence:
    front = random.integers(3, ROWS, random.integers(2, 7)).astype(np.int32) if prompt is None else prompt
    answer = random.integers(3, ROWS, random.integers(1, 9)).astype(np.int32)
    return TokenSequence(np.concatenate([front, answer]), len(front))


def make_pairs(count: int, seed: int = 0) -> list[Group]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        first = sequence(random)
        second = sequence(random, first.ids[: first.num_prompt])
        found.append(Group((first, second), *pairs_of((1, 2)), None, 0, (0, number), Counting.PAIRS))
    return found


def make_labels(count: int, seed: int = 0) -> list[Group]:
    random = np.random.default_rng(seed)
    none = np.empty(0, np.int64)
    return [
        Group((sequence(random),), none, none, np.array([number % 3 != 0]), 0, (0, number), Counting.ANSWERS)
        for number in range(count)
    ]


class FewSteps:
    """A plan of steps of these groups."""

    def __init__(self, *steps: Sequence[Group]) -> None:
        self._steps = steps
        self.num_steps = len(steps)

    def rows(self, step: int) -> Sequence[Group]:
        return self._steps[step]


def units_of(loss: DirectLoss, count: int = 5, world_size: int = 1) -> list[Any]:
    """Return one step's units."""
    if loss.kto is None:
        return list(make_pairs(count))
    return PointedPlan(FewSteps(make_labels(count)), 64, world_size).rows(0)


def groups_of(units: Sequence[Any]) -> list[Group]:
    return [group for unit in units for group in (unit.groups if isinstance(unit, PointedUnit) else (unit,))]


def point_of(units: Sequence[Any]) -> list[TokenSequence]:
    return list(units[0].sequences) if units and isinstance(units[0], PointedUnit) else []


def log_prob(model: Any, item: TokenSequence) -> Tensor:
    """Return log π(answer | prompt) by transformers' logits over the whole sequence, one at a time."""
    ids = torch.from_numpy(item.ids).long()
    logits = model(input_ids=ids[None]).logits[0].double()
    each: Tensor = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return each[item.num_prompt - 1 :].sum()


def table_of(model: Any, sequences: Sequence[TokenSequence]) -> ReferenceTable:
    table = ReferenceTable()
    with torch.no_grad():
        table.put(sequences, torch.stack([log_prob(model, item) for item in sequences]))
    return table


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def loss_by_hand(loss: DirectLoss, policy: Any, reference: Any, units: Sequence[Any]) -> Tensor:
    """Return the summed loss, a pair or an answer at a time, with gradients."""

    def ratio(item: TokenSequence) -> Tensor:
        return log_prob(policy, item) - log_prob(reference, item).detach()

    groups = groups_of(units)
    if loss.kto is not None:
        with torch.no_grad():
            point = max(0.0, float(np.mean([float(ratio(item)) for item in point_of(units)])))
        found = []
        for group in groups:
            assert group.liked is not None
            liked = bool(group.liked[0])
            lead = 0.5 * (ratio(group.sequences[0]) - point) * (1 if liked else -1)
            found.append((1.5 if liked else 0.5) * (1 - 1 / (1 + torch.exp(-lead))))
        return torch.stack(found).sum()
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        better, worse = (ratio(item) for item in group.sequences)
        if loss.ipo is not None:
            lengths = [len(item.ids) - item.num_prompt for item in group.sequences]
            total = total + (better / lengths[0] - worse / lengths[1] - 1 / (2 * 0.3)) ** 2
        else:
            assert loss.sigmoid is not None
            doubt, lead = loss.sigmoid.label_smoothing, 0.5 * (better - worse)
            total = total + (1 - doubt) * softplus(-lead) + doubt * softplus(lead)
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: item.grad.clone() for name, item in model.named_parameters()}


# -- loss and gradient -------------------------------------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_loss_and_gradient_equal_those_from_transformers_logits(loss: DirectLoss, fast: bool) -> None:
    policy, reference, units = make_model(ROWS, seed=2), make_model(ROWS, seed=1), units_of(loss)
    expected = loss_by_hand(loss, policy, reference, units) / 5
    expected.backward()
    by_hand = gradients(policy)
    policy.zero_grad()
    objective = DirectObjective(loss, table_of(reference, [*sequences_of(groups_of(units)), *point_of(units)]))
    module: Any = objective.module(policy)
    batch = objective.collate(units)
    assert batch.num_targets == 5
    with ExitStack() as stack:
        if fast:  # padding is left out then
            stack.enter_context(accelerate(module, CPU, torch.float32))
        value = module(batch, 1 / 5)
        value.backward()
    assert value.dtype is torch.float32
    assert loss.kto is None or float(module._point[1]) > 0.0
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("loss", "start"), [(SIGMOID, math.log(2)), (SMOOTH, math.log(2)), (IPO, (1 / 0.6) ** 2), (KTO, 3.25 / 5)]
)
def test_a_policy_that_is_the_reference_has_the_loss_of_no_opinion(loss: DirectLoss, start: float) -> None:
    policy, units = make_model(ROWS, seed=1), units_of(loss)
    objective = DirectObjective(loss, table_of(policy, [*sequences_of(groups_of(units)), *point_of(units)]))
    module: Any = objective.module(policy)
    expected = start if loss.kto is None else (3 * 1.5 + 2 * 0.5) / 2 / 5
    assert float(module(objective.collate(units), 1 / 5).detach()) == pytest.approx(expected, abs=1e-6)


@LOSSES
def test_micro_batches_and_ranks_sum_up_to_one_batch(loss: DirectLoss) -> None:
    policy, reference = make_model(ROWS, seed=2), make_model(ROWS, seed=1)
    units = units_of(loss, world_size=7)
    table = table_of(reference, [*sequences_of(groups_of(units)), *point_of(units)])
    objective = DirectObjective(loss, table)

    def summed(*parts: Sequence[Any]) -> tuple[float, dict[str, Tensor]]:
        policy.zero_grad()
        total = 0.0
        for part in parts:
            module: Any = objective.module(policy)  # each part on a rank of its own
            value = module(objective.collate(part), 0.2)
            value.backward()
            total += float(value.detach())
        return total, gradients(policy)

    whole, parted = summed(units), summed(units[:2], units[2:3], units[3:], ())
    assert whole[0] == pytest.approx(parted[0], abs=1e-6)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(gradient, parted[1][name], rtol=1e-4, atol=1e-6, msg=name)


@LOSSES
def test_a_rank_without_work_adds_nothing_and_reaches_every_weight(loss: DirectLoss) -> None:
    model = make_model(ROWS)
    objective = DirectObjective(loss, ReferenceTable())
    module: Any = objective.module(model)
    value = module(objective.collate(()), 1.0)
    value.backward()
    assert float(value.detach()) == 0.0
    assert all(item.grad is not None and not item.grad.any() for item in model.parameters())


def test_ranked_answers_of_one_prompt_make_all_their_pairs() -> None:
    policy, reference = make_model(ROWS, seed=2), make_model(ROWS, seed=1)
    random = np.random.default_rng(3)
    first = sequence(random)
    answers = (first, *(sequence(random, first.ids[: first.num_prompt]) for _ in range(2)))
    group = Group(answers, *pairs_of((1, 2, 3)), None, 0, (0, 0), Counting.PAIRS)
    pairs = [
        Group((answers[a], answers[b]), *pairs_of((1, 2)), None, 0, (0, 0), Counting.PAIRS)
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    objective = DirectObjective(SIGMOID, table_of(reference, answers))
    module: Any = objective.module(policy)
    assert objective.collate([group]).num_targets == 3
    expected = loss_by_hand(SIGMOID, policy, reference, pairs)
    assert float(module(objective.collate([group]), 1.0).detach()) == pytest.approx(float(expected.detach()), abs=3e-6)


# -- KTO's reference point ---------------------------------------------------------------------------------------------


def test_the_point_is_found_once_a_step_and_again_in_the_next() -> None:
    policy, reference = make_model(ROWS, seed=2), make_model(ROWS, seed=1)
    plan = PointedPlan(FewSteps(make_labels(4, seed=1), make_labels(4, seed=2)), 64, world_size=1)
    steps = [plan.rows(step) for step in range(2)]
    seen = [item for units in steps for item in (*sequences_of(groups_of(units)), *point_of(units))]
    objective = DirectObjective(KTO, table_of(reference, seen), point_rows=3)
    module: Any = objective.module(policy)
    passes: list[None] = []
    policy.model.register_forward_hook(lambda *_: passes.append(None))
    with torch.no_grad():
        for units in steps:
            for unit in units:
                module(objective.collate([unit]), 1.0)
    assert len(passes) == 2 * (4 + 2)  # four answers one by one, four mismatched sequences by three


def test_mismatched_sequences_are_prompts_with_answers_to_others() -> None:
    random = np.random.default_rng(0)
    first, second = sequence(random), sequence(random)
    again = sequence(random, first.ids[: first.num_prompt])
    found = mismatched([first, again, second], capacity=64)
    answers = [item.ids[item.num_prompt :].tolist() for item in (second, second, first)]
    assert [item.ids[: item.num_prompt].tolist() for item in found] == [
        item.ids[: item.num_prompt].tolist() for item in (first, again, second)
    ]
    assert [item.ids[item.num_prompt :].tolist() for item in found] == answers
    assert len(mismatched([first, again, second], capacity=64, most=2)) == 2
    assert mismatched([first, again], capacity=64) == []
    assert all(len(item.ids) <= 9 for item in mismatched(sequences_of(make_labels(20)), capacity=9))


def test_a_step_without_a_second_prompt_has_the_point_zero() -> None:
    policy, reference, units = make_model(ROWS, seed=2), make_model(ROWS, seed=1), units_of(KTO, count=1)
    [item] = sequences_of(groups_of(units))
    objective = DirectObjective(KTO, table_of(reference, [item]))
    module: Any = objective.module(policy)
    with torch.no_grad():
        ratio = float(log_prob(policy, item) - log_prob(reference, item))
        value = float(module(objective.collate(units), 1.0))
    assert value == pytest.approx(0.5 / (1 + math.exp(-0.5 * ratio)), abs=1e-6)  # the answer is not liked


def test_silent_units_count_for_nothing() -> None:
    units = units_of(KTO, count=2, world_size=5)
    assert [(unit.num_tokens > 0, unit.num_targets) for unit in units] == [(True, 1)] * 2 + [(False, 0)] * 3
    assert all(unit.sequences == units[0].sequences for unit in units)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_the_log_probabilities_from_all_logits(batch_size: int) -> None:
    model = make_model(ROWS, seed=4)
    items = sequences_of(make_pairs(6))
    found = score_answers(AnswerLoss(model, SIGMOID), items, batch_size, CPU, World())
    with torch.no_grad():
        expected = torch.stack([log_prob(model, item) for item in items])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_table_distinguishes_sequences_by_where_the_answer_begins(tmp_path: Path) -> None:
    context = make_context(tmp_path, "dpo")
    ids = np.arange(5, 11, dtype=np.int32)
    items = [TokenSequence(ids, 2), TokenSequence(ids, 3), TokenSequence(ids, 2)]
    asked: list[int] = []

    def scorer() -> Any:
        def score(window: Sequence[TokenSequence]) -> Tensor:
            asked.append(len(window))
            return torch.tensor([-0.1 * item.num_prompt for item in window], dtype=torch.float64)

        return score

    for key in ({"model": "a"}, {"model": "a"}, {"model": "b"}):
        table = ReferenceTable()
        fill_table(table, context, key, iter(items), scorer)
        assert table.of(items).tolist() == pytest.approx([-0.2, -0.3, -0.2])
        assert len(table) == 2
    assert asked == [2, 2]  # the second table was read, the third is of another model
    files = list((context.cache / "references").iterdir())
    assert len(files) == 2
    for file in files:  # a damaged window is scored again, not trained on
        file.write_bytes(file.read_bytes()[:-8] + np.float64(-9.0).tobytes())
    table = ReferenceTable()
    fill_table(table, context, {"model": "a"}, iter(items), scorer)
    assert table.of(items).tolist() == pytest.approx([-0.2, -0.3, -0.2])
    assert asked == [2, 2, 2]


def test_a_stopped_reference_pass_leaves_its_finished_windows_in_the_cache(tmp_path: Path) -> None:
    context = make_context(tmp_path, "dpo")
    random = np.random.default_rng(0)
    items = [sequence(random) for _ in range(2100)]
    asked: list[int] = []

    def scorer() -> Any:
        def score(window: Sequence[TokenSequence]) -> Tensor:
            asked.append(len(window))
            if len(asked) == 2:
                context.stop.set()
            return torch.zeros(len(window), dtype=torch.float64)

        return score

    expected = [len(window) for window in windows(items)]
    assert len(expected) == 3
    with pytest.raises(Interrupted, match="finished windows are cached"):
        fill_table(ReferenceTable(), context, {}, items, scorer)
    context.stop.clear()
    fill_table(ReferenceTable(), context, {}, items, scorer)
    assert asked == expected


def test_a_reference_without_numbers_is_refused(tmp_path: Path) -> None:
    context = make_context(tmp_path, "dpo")
    items = sequences_of(make_pairs(1))

    def broken() -> Any:
        return lambda window: torch.full((len(window),), math.nan, dtype=torch.float64)

    with pytest.raises(UserError, match="2 of 2 answers are NaN or infinite"):
        fill_table(ReferenceTable(), context, {}, items, broken)


# -- figures -----------------------------------------------------------------------------------------------------------


def ratios_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_figures_of_pairs_are_by_hand() -> None:
    groups = make_pairs(3)
    ratios = ratios_of(3.0, 1.0, -1.0, 1.0, 2.0, 2.0)
    found = direct_figures(SIGMOID, groups, ratios, ratios_of(0.0)[0])
    assert found["accuracy"] == 0.5  # right, wrong, equal
    assert found["margin"] == pytest.approx(0.5 * (2.0 - 2.0 + 0.0) / 3)
    losses = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0)), math.log(2.0)]
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    by_token = direct_figures(IPO, groups, ratios, ratios_of(0.0)[0])
    means = [
        float(ratio) / (len(item.ids) - item.num_prompt)
        for ratio, item in zip(ratios, sequences_of(groups), strict=True)
    ]
    leads = [means[0] - means[1], means[2] - means[3], means[4] - means[5]]
    assert by_token["margin"] == pytest.approx(0.3 * sum(leads) / 3)
    assert by_token["loss"] == pytest.approx(sum((lead - 1 / 0.6) ** 2 for lead in leads) / 3)


def test_figures_of_single_answers_are_by_hand() -> None:
    groups = make_labels(4)  # the first and the last are not liked
    found = direct_figures(KTO, groups, ratios_of(0.0, 2.0, 1.0, 3.0), torch.tensor(1.0, dtype=torch.float64))
    assert found["accuracy"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found["margin"] == pytest.approx(0.5 * (1.5 - 1.5))
    assert found["point"] == 1.0
    assert "margin" not in direct_figures(KTO, groups[1:3], ratios_of(1.0, 2.0), ratios_of(0.0)[0])


def scored(model: Any, items: Iterator[TokenSequence], rows: int) -> ReferenceTable:
    table = ReferenceTable()
    for window in windows(items):
        table.put(window, score_answers(AnswerLoss(model, KTO), window, 2 * rows, CPU, World()))
    return table


@LOSSES
def test_a_held_out_set_measured_with_the_reference_itself_has_ratios_of_exactly_zero(loss: DirectLoss) -> None:
    model = make_model(ROWS, seed=1)
    groups = make_pairs(5) if loss.kto is None else make_labels(5)
    table = ReferenceTable()
    held_out = DirectPreferenceSet("toy", groups, loss, 64, table)
    found = scored(model, held_out.sequences, rows=2)
    table.put(list(held_out.sequences), found.of(list(held_out.sequences)))
    figures = held_out.measure(AnswerLoss(model, loss), 2, CPU, World(), lambda done, total: None)
    assert figures["accuracy"] == 0.5
    assert figures["margin"] == 0.0


def test_a_held_out_set_for_kto_has_its_own_point() -> None:
    policy, reference, groups = make_model(ROWS, seed=2), make_model(ROWS, seed=1), make_labels(6)
    items = [*sequences_of(groups), *mismatched(sequences_of(groups), 64)]
    held_out = DirectPreferenceSet("toy", groups, KTO, 64, table_of(reference, items))
    found = held_out.measure(AnswerLoss(policy, KTO), 2, CPU, World(), lambda done, total: None)
    units = PointedPlan(FewSteps(groups), 64, 1).rows(0)
    with torch.no_grad():
        expected = float(loss_by_hand(KTO, policy, reference, units)) / 6
    assert found["loss"] == pytest.approx(expected, abs=1e-6)
