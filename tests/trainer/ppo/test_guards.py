"""Each guard's failure, provoked in a small training run, is stopped within five updates and named."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_api.kinds.ppo import Guards, PpoStage
from stagecoach_trainer.ppo.guards import UpdateFigures, Watch
from stagecoach_trainer.ppo.loop import train_policy
from stagecoach_trainer.ppo.objectives import TokenSums
from stagecoach_trainer.rewards.term import Completion
from stagecoach_trainer.runtime.errors import Diverged, UserError
from tests.trainer.loop.makers import context, equal_weights, weights
from tests.trainer.ppo.makers import FunctionTerm, configuration, digit_model, echoes, ppo_job, reward_of

GOOD = UpdateFigures(
    kl=0.5, entropy=1.0, ended_share=0.9, length=20.0, max_abs_reward=3.0, reward_deviation=0.4, value_loss=0.1
)
WITHIN = 5
"""Updates after a failure has set in until a guard must have stopped it."""


# -- the watch ---------------------------------------------------------------------------------------------------------


def reasons(history: list[UpdateFigures], **limits: Any) -> list[list[str]]:
    guards, watch, found = Guards.model_validate({"patience": 1} | limits), Watch(), []
    for figures in history:
        watch = watch.after(figures, guards)
        found.append(watch.reasons(figures, guards))
    return found


def test_a_healthy_run_breaks_no_guard() -> None:
    assert reasons([GOOD] * 10, maxKl=10.0) == [[]] * 10


@pytest.mark.parametrize(
    ("limits", "change", "name"),
    [
        ({"minKl": -1.0}, {"kl": -1.1}, "minKl"),
        ({"maxKl": 10.0}, {"kl": 10.1}, "maxKl"),
        ({"minEntropy": 0.01}, {"entropy": 0.009}, "minEntropy"),
        ({"minEndedShare": 0.1}, {"ended_share": 0.09}, "minEndedShare"),
        ({"maxLengthFactor": 4.0}, {"length": 81.0}, "maxLengthFactor"),
        ({"minLengthFactor": 0.1}, {"length": 1.9}, "minLengthFactor"),
        ({"maxAbsReward": 5.0}, {"max_abs_reward": 5.1}, "maxAbsReward"),
        ({"minRewardDeviation": 0.0}, {"reward_deviation": 0.0}, "minRewardDeviation"),
        ({"maxValueLoss": 10.0}, {"value_loss": 11.0}, "maxValueLoss"),
    ],
)
def test_each_sign_is_named_after_its_guard_and_only_it(
    limits: dict[str, Any], change: dict[str, float], name: str
) -> None:
    bad = replace(GOOD, **change)
    healthy, broken = reasons([GOOD, bad], **limits)
    assert healthy == []
    assert [re.search(r"`guards\.(\w+)`", reason)[1] for reason in broken] == [name]  # type: ignore[index]
    member = re.sub("[A-Z]", lambda letter: "_" + letter[0].lower(), name)
    assert reasons([GOOD, bad], **{name: None}) == [[], []]
    assert member in Guards.model_fields


def test_a_sign_must_last_and_one_good_update_ends_it() -> None:
    bad = replace(GOOD, kl=-5.0)
    found = reasons([bad, bad, GOOD, bad, bad, bad], patience=3)
    assert [len(item) for item in found] == [0, 0, 0, 0, 0, 1]
    assert "for 3 updates" in found[-1][0]


# -- failures provoked -------------------------------------------------------------------------------------------------

ONLY = dict.fromkeys(
    (
        "minKl", "maxKl", "minEntropy", "minEndedShare", "maxLengthFactor", "minLengthFactor", "maxAbsReward",
        "minRewardDeviation", "maxValueLoss",
    )
)  # fmt: skip
"""All guards off."""


def guarded(**guards: Any) -> dict[str, Any]:
    return {"guards": ONLY | guards}


def long_answers(**others: Any) -> dict[str, Any]:
    return {"rollout": {"maxNewTokens": 40, "batchRows": 32}, "sequenceLength": 48, **others}


def sharper(model: Any) -> Any:
    """The model with all logits tripled."""
    with torch.no_grad():
        model.lm_head.weight *= 3.0
    return model


Answers = list[Completion]
Sign = Callable[[Answers, Answers], bool]
"""Whether an update shows a failure, from its answers and those of the first update."""


def always(answers: Answers, first: Answers) -> bool:
    """The failure is there from the beginning."""
    del answers, first
    return True


def stopped(tmp_path: Path, settings: dict[str, Any], reward: Any = echoes, sign: Sign = always) -> str:
    """Train until a guard stops it, within five updates of the failure; return its message."""
    config = configuration(**({"budget": {"steps": 40}, "checkpoints": {"everySteps": 100}} | settings))
    term = FunctionTerm(reward)
    job = ppo_job(config, reward_of(("only", term, 1.0)))
    with pytest.raises(Diverged) as caught:
        train_policy(replace(job, reference=sharper(digit_model())), context(tmp_path))
    message = str(caught.value)
    update = int(message.removeprefix("update ").split(":")[0])
    made = [term.asked[first : first + 32] for first in range(0, len(term.asked), 32)]
    assert len(made) == update
    begin = next(number for number, answers in enumerate(made, 1) if sign(answers, made[0]))
    assert update < begin + WITHIN, message
    return message


def mean_tokens(answers: Answers) -> float:
    return float(np.mean([item.num_tokens + item.ended for item in answers]))


FAST = {"optimizer": {"learningRate": 0.1}}
STEADY = {"optimizer": {"learningRate": 2e-2}, "policy": {"innerEpochs": 4, "miniBatchSamples": 8}}
FASTER = FAST | {"policy": {"innerEpochs": 8, "miniBatchSamples": 8}}


def test_negative_kl_is_stopped(tmp_path: Path) -> None:
    """As in trl#417: the tokens are not drawn from the distribution whose log-probabilities are looked at."""
    settings = guarded(minKl=-1.0) | {"rollout": {"maxNewTokens": 8, "batchRows": 32, "topP": 0.3}}
    message = stopped(tmp_path, settings | {"optimizer": {"learningRate": 1e-5}})
    assert "negative KL: the policy's samples are not from the policy: -" in message
    assert "`guards.minKl`, for 3 updates" in message


def test_a_policy_that_runs_away_from_its_reference_is_stopped(tmp_path: Path) -> None:
    assert "KL explosion" in stopped(tmp_path, guarded(maxKl=1.0) | FAST)


def monotonous(answers: Answers, first: Answers) -> bool:
    return len({item.answer for item in answers}) < 0.2 * len({item.answer for item in first})


def test_entropy_collapse_is_stopped(tmp_path: Path) -> None:
    message = stopped(
        tmp_path, guarded(minEntropy=0.05) | FASTER, lambda prompt, answer: float("7" in answer), monotonous
    )
    assert "entropy collapse: answers no longer vary" in message


def none_ends(answers: Answers, first: Answers) -> bool:
    return bool(np.mean([item.ended for item in answers]) < 0.05)


def twice_as_long(answers: Answers, first: Answers) -> bool:
    return mean_tokens(answers) > 2.0 * mean_tokens(first)


def a_third_as_long(answers: Answers, first: Answers) -> bool:
    return mean_tokens(answers) < 0.3 * mean_tokens(first)


def test_answers_that_no_longer_end_are_stopped(tmp_path: Path) -> None:
    settings = long_answers(**guarded(minEndedShare=0.05), **FAST)
    message = stopped(tmp_path, settings, lambda prompt, answer: len(answer) / 40, none_ends)
    assert "answers no longer end: they are truncated" in message


def test_length_explosion_is_stopped(tmp_path: Path) -> None:
    settings = long_answers(**guarded(maxLengthFactor=2.0), **FAST)
    message = stopped(tmp_path, settings, lambda prompt, answer: len(answer) / 40, twice_as_long)
    assert "length explosion" in message


def test_length_collapse_is_stopped(tmp_path: Path) -> None:
    settings = long_answers(**guarded(minLengthFactor=0.3), **STEADY)
    message = stopped(tmp_path, settings, lambda prompt, answer: -len(answer) / 40, a_third_as_long)
    assert "length collapse" in message


def test_a_reward_out_of_range_is_stopped(tmp_path: Path) -> None:
    message = stopped(tmp_path, guarded(maxAbsReward=1000.0), reward=lambda prompt, answer: 2e3 * ("7" in answer))
    assert "reward out of range: 2000 is above 1000" in message


def test_a_constant_reward_is_stopped(tmp_path: Path) -> None:
    message = stopped(tmp_path, guarded(minRewardDeviation=0.0), reward=lambda prompt, answer: 0.25)
    assert "constant reward: a deviation of 0 is not above 0" in message


def test_value_loss_explosion_is_stopped(tmp_path: Path) -> None:
    settings = guarded(maxValueLoss=1000.0)
    message = stopped(tmp_path, settings, reward=lambda prompt, answer: 100.0 * len(answer))
    assert "value loss explosion" in message


def test_the_default_guards_leave_a_healthy_run_alone(tmp_path: Path) -> None:
    config = configuration(budget={"steps": 6}, guards={"minEndedShare": None}, optimizer={"learningRate": 1e-3})
    assert train_policy(ppo_job(config), context(tmp_path)).updates == 6


# -- what happens then -------------------------------------------------------------------------------------------------


def failing_from(update: int, answers: int = 32) -> Any:
    """A reward that is out of range from an update on."""
    asked = [0]

    def reward(prompt: str, answer: str) -> float:
        asked[0] += 1
        return 5e3 if asked[0] > update * answers else echoes(prompt, answer)

    return reward


def rolling_back(**changes: Any) -> PpoStage:
    guards = ONLY | {"maxAbsReward": 1000.0, "patience": 1, "action": "rollBack"}
    return configuration(**({"guards": guards, "budget": {"steps": 5}, "checkpoints": {"everySteps": 2}} | changes))


def test_a_run_goes_back_to_its_checkpoint_at_half_the_rate_with_other_random_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def once(prompt: str, answer: str) -> float:
        seen.append(answer)
        return 5e3 if len(seen) == 3 * 32 + 7 else echoes(prompt, answer)  # in the fourth update

    result = train_policy(ppo_job(rolling_back(), once), context(tmp_path))
    assert "update 4: reward out of range: 5000 is above 1000" in caplog.text
    assert "rolling back to update 2" in caplog.text
    assert result.updates == 5
    assert result.metrics["rollbacks"] == 1.0
    steps = [point["step"] for point in result.history]
    assert steps == [1, 2, 2, 3, 4, 5]
    rates = [point["learningRate"] for point in result.history if "learningRate" in point]
    assert rates == [1e-2, 1e-2, 5e-3, 5e-3, 5e-3]
    first_try, second_try = seen[2 * 32 : 3 * 32], seen[4 * 32 : 5 * 32]
    assert first_try != second_try


@pytest.mark.parametrize(
    ("failing", "back_to"),
    [((3, 4, 5), 1), ((4, 6, 7, 8), 4), ((1, 2, 3), 0)],
    ids=["from the third update on", "once before, and then to stay", "from the beginning on"],
)
def test_with_patience_a_run_goes_back_to_before_the_sign_began(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, failing: tuple[int, ...], back_to: int
) -> None:
    """The weights that answered in the first update with the sign were made by the update before it."""
    seen: list[str] = []

    def out_of_range(prompt: str, answer: str) -> float:
        seen.append(answer)
        return 5e3 if len(seen) in {32 * update for update in failing} else echoes(prompt, answer)

    guards = ONLY | {"maxAbsReward": 1000.0, "patience": 3, "action": "rollBack"}
    config = rolling_back(guards=guards, checkpoints={"everySteps": 1, "keepLast": 1}, budget={"steps": 9})
    result = train_policy(ppo_job(config, out_of_range), context(tmp_path))
    assert f"update {failing[-1]}: reward out of range" in caplog.text
    assert f"; rolling back to update {back_to}\n" in caplog.text
    assert ("no checkpoint is older than the failure" in caplog.text) == (failing[0] == 1)
    assert result.metrics["rollbacks"] == 1.0
    steps = [point["step"] for point in result.history]
    assert steps == [*range(1, back_to + 1), *range(back_to, 10)]


def test_a_collapse_is_gone_back_from_to_a_policy_that_had_not_collapsed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guards = ONLY | {"minEntropy": 0.05, "patience": 3, "action": "rollBack", "maxRollbacks": 1}
    config = configuration(**FASTER, guards=guards, budget={"steps": 30}, checkpoints={"everySteps": 1, "keepLast": 1})
    entropies: list[float] = []
    after = Watch.after

    def note_entropy(self: Watch, figures: UpdateFigures, limits: Guards) -> Watch:
        entropies.append(figures.entropy)
        return after(self, figures, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "after", note_entropy)
        with contextlib.suppress(Diverged):
            train_policy(ppo_job(config, lambda prompt, answer: float("7" in answer)), context(tmp_path))
    found = re.search(r"update (\d+): entropy collapse.*; rolling back to update (\d+)", caplog.text)
    assert found
    failed, back_to = int(found[1]), int(found[2])
    assert [entropy < 0.05 for entropy in entropies[failed - 4 : failed]] == [False, True, True, True]
    assert back_to == failed - 4
    assert entropies[failed] > 0.05


def test_after_as_many_rollbacks_as_allowed_it_stops(tmp_path: Path) -> None:
    config = rolling_back(
        guards=ONLY | {"maxAbsReward": 1000.0, "patience": 1, "action": "rollBack", "maxRollbacks": 2}
    )
    asked = []

    def out_of_range(prompt: str, answer: str) -> float:
        asked.append(answer)
        return 5e3

    with pytest.raises(Diverged, match=r"update 1: reward out of range.*the last checkpoint is that of update 0"):
        train_policy(ppo_job(config, out_of_range), context(tmp_path))
    assert len(asked) == 3 * 32


def test_a_run_resumed_after_a_rollback_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    from stagecoach_trainer.runtime.errors import Interrupted

    def flawed(stop: Any = None) -> Any:
        asked = [0]

        def reward(prompt: str, answer: str) -> float:
            asked[0] += 1
            if stop is not None and asked[0] == 5 * 32 + 3:
                stop.set()
            return 5e3 if asked[0] == 3 * 32 + 7 else echoes(prompt, answer)

        return reward

    whole = ppo_job(rolling_back(), flawed())
    expected = train_policy(whole, context(tmp_path / "whole"))
    here = context(tmp_path / "stopped")
    with pytest.raises(Interrupted, match="after update 4 of 5"):
        train_policy(ppo_job(rolling_back(), flawed(here.stop)), here)
    resumed = ppo_job(rolling_back())
    assert train_policy(resumed, context(tmp_path / "stopped")) == expected
    assert equal_weights(weights(resumed.policy), weights(whole.policy))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_reward_names_the_sample_and_the_run_can_be_resumed(tmp_path: Path, value: float) -> None:
    config = configuration(budget={"steps": 4}, checkpoints={"everySteps": 1})
    whole = ppo_job(config)
    expected = train_policy(whole, context(tmp_path / "whole"))
    asked = [0]

    def broken(prompt: str, answer: str) -> float:
        asked[0] += 1
        return value if asked[0] == 2 * 32 + 5 else echoes(prompt, answer)

    pattern = r"rewards\[0\] \(only\): the reward of sample 4 \(prompt '\d+', answer '\d*'\) is (nan|inf), which is no"
    with pytest.raises(UserError, match=pattern):
        train_policy(ppo_job(config, broken), context(tmp_path / "stopped"))
    mended = ppo_job(config)
    assert train_policy(mended, context(tmp_path / "stopped")) == expected
    assert equal_weights(weights(mended.policy), weights(whole.policy))
    assert len(mended.rewards._terms[0].term.asked) == 2 * 32  # type: ignore[attr-defined]


# -- NaN and infinity --------------------------------------------------------------------------------------------------


def poisoned(model: Any, name: str) -> Any:
    """Return the model with one NaN in a parameter."""
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = math.nan
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_reference_that_gives_nan_stops_the_first_update(tmp_path: Path, precision: str) -> None:
    """No guard exceeds its limit with NaN, and in fp16 each step was skipped as an overflow, to the end of the run."""
    job = ppo_job(configuration(precision=precision, **guarded()), reward_of(("only", FunctionTerm(echoes), 1.0)))
    job = replace(job, reference=poisoned(digit_model(), "lm_head.weight"))
    with pytest.raises(Diverged, match=r"^update 1: `kl` is nan.*; there is no checkpoint yet\. Lower `optimizer"):
        train_policy(job, context(tmp_path))


def test_a_critic_that_gives_nan_is_named_before_it_is_trained(tmp_path: Path) -> None:
    job = ppo_job(configuration(**guarded()), reward_of(("only", FunctionTerm(echoes), 1.0)))
    with pytest.raises(Diverged, match=r"^update 1: `valueLoss` is nan"):
        train_policy(replace(job, critic_bias=math.nan), context(tmp_path))


def test_a_ratio_that_overflows_while_it_is_learnt_from_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping gives such tokens a gradient of 0, so that nothing but the figure shows them."""
    take = TokenSums.take
    overflowed = {"policyLoss": 0.0, "clipped": 0.0, "updateKl": math.inf}
    monkeypatch.setattr(TokenSums, "take", lambda self: overflowed if "updateKl" in (sums := take(self)) else sums)
    job = ppo_job(configuration(**guarded()), reward_of(("only", FunctionTerm(echoes), 1.0)))
    with pytest.raises(Diverged, match=r"^update 1: `updateKl` is inf"):
        train_policy(job, context(tmp_path))


def test_a_reward_that_falls_is_a_warning(tmp_path: Path) -> None:
    here = context(tmp_path)
    term = FunctionTerm(lambda prompt, answer: echoes(prompt, answer) - len(term.asked) / 100)
    settings = {"budget": {"steps": 20}, "optimizer": {"learningRate": 1e-6}, "checkpoints": {"everySteps": 100}}
    train_policy(ppo_job(configuration(**settings, **guarded()), reward_of(("only", term, 1.0))), here)
    assert any("the mean reward fell from" in text for text in here.progress.warnings)
