"""The loop: whatever stops it, it ends with the weights and figures of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_api.kinds.ppo import PpoStage
from stagecoach_trainer.loop import checkpoint
from stagecoach_trainer.ppo import saved_rollouts
from stagecoach_trainer.ppo.job import PpoJob, PpoResult
from stagecoach_trainer.ppo.loop import train_policy
from stagecoach_trainer.ppo.mini_batches import own_mini_batches
from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Interrupted
from tests.trainer.loop.makers import RandomPlan, complete_steps, context, equal_weights, row, run_until_killed, weights
from tests.trainer.ppo.makers import (
    FunctionTerm,
    configuration,
    digit_model,
    digit_tokenizer,
    echoes,
    ppo_job,
    reward_of,
    with_adapter,
)

UPDATES, SAMPLES, ROUNDS = 5, 16, 4
Weights = dict[str, torch.Tensor]


def small(**settings: Any) -> PpoStage:
    """Five updates of 16 answers, made in 4 rounds; two inner epochs, adaptive KL, one update of critic warm-up."""
    values: dict[str, Any] = {
        "batch": {"samples": SAMPLES, "microBatchRows": 4},
        "budget": {"steps": UPDATES},
        "rollout": {"maxNewTokens": 4, "batchRows": SAMPLES // ROUNDS},
        "policy": {"innerEpochs": 2, "miniBatchSamples": 8, "entropyWeight": 0.01},
        "critic": {"warmupUpdates": 1, "optimizer": {"learningRate": 2e-2}},
        "kl": {"coefficient": 0.1, "target": 0.5, "horizon": 100},
        "checkpoints": {"everySteps": 2},
    }
    return configuration(**(values | settings))


@dataclass(frozen=True)
class Watched(PpoJob):
    """Calls `learning` with the update whenever it makes an optimiser step of the policy."""

    learning: Callable[[int], None] = lambda update: None

    def policy_rate(self, update: int) -> float:
        self.learning(update)
        return super().policy_rate(update)


def run(
    here: StageContext,
    config: PpoStage | None = None,
    judging: Callable[[int], None] = lambda answers: None,
    learning: Callable[[int], None] = lambda update: None,
    **making: Any,
) -> tuple[PpoResult, Weights, Weights, FunctionTerm]:
    """Train in `here`; return the result, the policy's and the critic's weights, and the reward's term.

    `judging`: called with the answers judged so far, by all attempts together, whenever some more are.
    """

    def judged(prompt: str, answer: str) -> float:
        judging(term.asked_before + len(term.asked))
        return echoes(prompt, answer)

    term = FunctionTerm(judged)
    job = ppo_job(config or small(), reward_of(("only", term, 1.0)), kind=Watched, **making)
    object.__setattr__(job, "learning", learning)
    result = train_policy(job, here)
    return result, weights(job.policy), weights(job.critic), term


def assert_same(left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    assert left[0] == right[0]
    assert equal_weights(left[1], right[1])
    assert equal_weights(left[2], right[2])


def stop_at(here: StageContext, answers: int) -> Callable[[int], None]:
    """Request a stop once this many answers are scored."""
    return lambda judged: here.stop.set() if judged >= answers else None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_while_answering_and_while_training_ends_bit_identical(tmp_path: Path, precision: str) -> None:
    config = small(precision=precision)
    whole = run(context(tmp_path / "whole"), config)
    here = context(tmp_path / "stopped")
    with pytest.raises(Interrupted, match="after update 2 of 5; a checkpoint is saved"):
        run(here, config, judging=stop_at(here, 2 * SAMPLES + 6))  # in the second of four rounds
    here = context(tmp_path / "stopped")
    with pytest.raises(Interrupted, match="after update 4 of 5; a checkpoint is saved"):
        run(here, config, learning=lambda update: here.stop.set() if update == 3 else None)
    resumed = run(context(tmp_path / "stopped"), config)
    assert_same(resumed, whole)
    assert resumed[3].state() == whole[3].state() == {"asked": UPDATES * SAMPLES}


def test_a_run_stopped_before_its_first_answer_can_resume(tmp_path: Path) -> None:
    whole = run(context(tmp_path / "whole"))
    here = context(tmp_path / "stopped")
    here.stop.set()
    with pytest.raises(Interrupted, match="after update 0 of 5"):
        run(here)
    assert_same(run(context(tmp_path / "stopped")), whole)


def test_answers_made_before_a_stop_are_not_made_again_even_if_it_is_stopped_there_twice(tmp_path: Path) -> None:
    whole = run(context(tmp_path / "whole"))
    for judged in (SAMPLES + 3, SAMPLES + 7):  # in the first round of the second update, and then in its second
        here = context(tmp_path / "stopped")
        with pytest.raises(Interrupted, match="after update 1 of 5"):
            run(here, judging=stop_at(here, judged))
    files = list((checkpoints_folder(here.store, here.cache, here.resolved.digest) / "pool").iterdir())
    assert len(files) == 2
    resumed = run(context(tmp_path / "stopped"))
    assert_same(resumed, whole)
    assert len(resumed[3].asked) == UPDATES * SAMPLES - SAMPLES - 8  # two rounds of four answers were kept
    assert not any(path.exists() for path in files)


def test_damaged_saved_answers_are_made_again_with_the_same_result(tmp_path: Path) -> None:
    whole = run(context(tmp_path / "whole"))
    here = context(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        run(here, judging=stop_at(here, SAMPLES + 5))
    pool = checkpoints_folder(here.store, here.cache, here.resolved.digest) / "pool"
    next(pool.glob("*.safetensors")).write_bytes(b"nonsense")
    assert_same(run(context(tmp_path / "stopped")), whole)


def test_answers_that_cannot_be_saved_are_made_again_and_the_checkpoint_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, *others: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    whole = run(context(tmp_path / "whole"))
    here = context(tmp_path / "stopped")
    monkeypatch.setattr(saved_rollouts, "write_chunk", full)
    with pytest.raises(Interrupted, match="after update 1 of 5"):
        run(here, judging=stop_at(here, SAMPLES + 5))
    assert "could not be saved ([Errno 28] No space left on device" in caplog.text
    assert_same(run(context(tmp_path / "stopped")), whole)


def test_a_killed_run_loses_at_most_one_interval_and_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    whole = run(context(tmp_path / "whole"))
    folder = tmp_path / "killed"
    run_until_killed(be_killed, folder, 250)
    here = context(folder)
    assert complete_steps(checkpoints_folder(here.store, here.cache, here.resolved.digest)) == [2]
    assert_same(run(here), whole)


def be_killed(folder: str) -> None:
    """Train, and die by SIGKILL while learning in the fourth update, when the checkpoint of update 2 is complete."""
    here = context(Path(folder))
    home = checkpoints_folder(here.store, here.cache, here.resolved.digest)

    def die(update: int) -> None:
        if update == 3:
            while complete_steps(home) != [2]:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    run(here, learning=die)


@dataclass
class Forgetful(FunctionTerm):
    """A term without state, like a reward model."""

    def state(self) -> dict[str, Any]:
        return {}


def stopped_while_answering(folder: Path, term: FunctionTerm) -> StageContext:
    """Train to the third update, and stop among its answers; only the newest checkpoint is kept."""
    here = context(folder)

    def judged(prompt: str, answer: str) -> float:
        if len(term.asked) > 2 * SAMPLES + 6:
            here.stop.set()
        return echoes(prompt, answer)

    term.function = judged
    with pytest.raises(Interrupted, match="after update 2 of 5; a checkpoint is saved"):
        train_policy(ppo_job(SAVING, reward_of(("only", term, 1.0))), here)
    return here


SAVING = small(checkpoints={"everySteps": 1, "keepLast": 1})


def checkpoint_files(here: StageContext) -> dict[str, int]:
    """When each file of a checkpoint was written."""
    home = checkpoints_folder(here.store, here.cache, here.resolved.digest)
    return {str(path.relative_to(home)): path.stat().st_mtime_ns for path in home.glob("step-*/*")}


def test_a_stop_while_answering_does_not_save_again_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(context(tmp_path / "whole"))
    saved: list[int] = []
    save = checkpoint.CheckpointManager.save

    def note(self: Any, state: Any, *others: Any) -> None:
        saved.append(state.step)
        save(self, state, *others)

    monkeypatch.setattr(checkpoint.CheckpointManager, "save", note)
    stopped_while_answering(tmp_path / "stopped", Forgetful(echoes))
    assert saved == [1, 2]
    resumed = run(context(tmp_path / "stopped"), SAVING)
    assert equal_weights(resumed[1], whole[1])


def test_a_stop_while_answering_that_is_killed_while_it_saves_leaves_the_checkpoint_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(context(tmp_path / "whole"), SAVING)
    write, before = checkpoint._described, list[dict[str, int]]()

    class Killed(BaseException):
        pass

    def die_at_the_third_save(path: Path) -> Any:
        if path.parent.name == "step-00000002-0001":
            before.append(checkpoint_files(here))
            raise Killed
        return write(path)

    here = context(tmp_path / "stopped")
    monkeypatch.setattr(checkpoint, "_described", die_at_the_third_save)
    with pytest.raises(Killed):
        stopped_while_answering(tmp_path / "stopped", FunctionTerm(echoes))
    assert "step-00000002/manifest.json" in before[0]
    monkeypatch.undo()
    resumed = run(context(tmp_path / "stopped"), SAVING)
    assert_same(resumed, whole)


def test_a_pool_on_disk_changes_nothing_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(context(tmp_path / "whole"))
    config = small()
    object.__setattr__(config, "pool_bytes", 0)
    here = context(tmp_path / "spilled")
    assert_same(run(here, config), whole)
    assert list((here.work / "pool").iterdir()) == []


def test_the_policy_stays_as_it_is_while_the_critic_warms_up(tmp_path: Path) -> None:
    critic = ppo_job(small()).critic.state_dict()
    config = small(critic={"warmupUpdates": 2}, budget={"steps": 2})
    result, policy, found, _ = run(context(tmp_path), config)
    assert equal_weights(policy, weights(digit_model()))
    assert not any(torch.equal(found[name], critic[name]) for name in found if "norm" not in name)
    assert [point["kl"] for point in result.history] == [0.0, 0.0]
    assert result.history[1]["valueLoss"] < result.history[0]["valueLoss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("reference", ["the base below the adapter", "a model of its own"])
def test_before_the_first_step_the_kl_is_exactly_zero(tmp_path: Path, reference: str, precision: str) -> None:
    model = digit_model(layers=2).bfloat16().float()
    adapter = reference == "the base below the adapter"
    config = small(precision=precision, budget={"steps": 2}, critic={"warmupUpdates": 0})
    making = {"model": with_adapter(model), "reference": False} if adapter else {"model": model}
    history = run(context(tmp_path), config, **making)[0].history
    assert history[0]["kl"] == 0.0
    assert history[1]["kl"] != 0.0


def test_under_an_adapter_only_the_adapter_learns_and_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    config = small(critic={"warmupUpdates": 0})
    whole = run(context(tmp_path / "whole"), config, model=with_adapter(digit_model()), reference=False)
    before = weights(with_adapter(digit_model()))
    changed = {name for name, tensor in whole[1].items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    here = context(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        run(here, config, stop_at(here, 3 * SAMPLES + 1), model=with_adapter(digit_model()), reference=False)
    here = context(tmp_path / "stopped")
    assert_same(run(here, config, model=with_adapter(digit_model()), reference=False), whole)


def test_the_figures_are_those_of_the_answers(tmp_path: Path) -> None:
    judged: list[float] = []
    result, _, _, term = run(context(tmp_path), small(critic={"warmupUpdates": 0}))
    judged = [term.function(str(item.prompt[-1]["content"]), item.answer) for item in term.asked]
    for update, point in enumerate(result.history):
        part = slice(update * SAMPLES, (update + 1) * SAMPLES)
        asked = term.asked[part]
        assert point["reward"] == pytest.approx(np.mean(judged[part]))
        assert point["reward.only"] == point["reward"]
        assert point["rewardDeviation"] == pytest.approx(np.std(judged[part]))
        assert point["endedShare"] == np.mean([item.ended for item in asked])
        assert point["emptyShare"] == np.mean([item.answer == "" for item in asked])
        assert point["answerTokens"] == np.mean([item.num_tokens + item.ended for item in asked])


def test_an_adaptive_price_follows_the_kl(tmp_path: Path) -> None:
    history = run(context(tmp_path), small(critic={"warmupUpdates": 0}))[0].history
    price = 0.1
    for point in history:
        error = min(max(point["kl"] / 0.5 - 1.0, -0.2), 0.2)
        price *= 1.0 + error * SAMPLES / 100
        assert point["klCoefficient"] == pytest.approx(price, rel=1e-12)


def test_answers_that_do_not_end_get_the_price_of_that(tmp_path: Path) -> None:
    config = small(rollout={"maxNewTokens": 4, "batchRows": 4, "missingEndReward": -3.0}, budget={"steps": 1})
    result, _, _, term = run(context(tmp_path), config)
    expected = [echoes(str(item.prompt[-1]["content"]), item.answer) if item.ended else -3.0 for item in term.asked]
    assert {item.ended for item in term.asked} == {True, False}
    assert result.history[0]["reward"] == pytest.approx(np.mean(expected))


def test_text_is_learnt_together_with_the_answers(tmp_path: Path) -> None:
    plan = RandomPlan(num_steps=UPDATES * 4, num_rows=2, length=12, masked_share=0.0, packed=False)

    class Digits(RandomPlan):
        def rows(self, step: int) -> list[Any]:
            found = [row((12,), 50 + index) for index in range(2)]
            return [type(item)(item.tokens % 13, np.where(item.labels < 0, item.labels, item.labels % 13), item.lengths)
                    for item in found]  # fmt: skip

    config = small(pretraining={"data": [{"uri": "unused"}], "weight": 5.0, "rowsPerStep": 2},
                   critic={"warmupUpdates": 0})  # fmt: skip
    with_text = run(context(tmp_path / "with"), config, text=Digits(num_steps=plan.num_steps))
    without = run(context(tmp_path / "without"), small(critic={"warmupUpdates": 0}))
    losses = []
    for found in (with_text, without):
        model = digit_model()
        model.load_state_dict(found[1], strict=False)
        rows = Digits().rows(0)
        ids = torch.from_numpy(np.stack([item.tokens for item in rows])).long()
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert losses[0] < losses[1] - 0.5


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    config = small(budget={"steps": 2})
    first, second = (run(context(tmp_path / name), config) for name in ("first", "second"))
    other = run(context(tmp_path / "other", seed=8), config)
    assert_same(first, second)
    assert other[0].history != first[0].history


def test_checkpoints_and_saved_answers_are_downloaded_on_another_machine(tmp_path: Path) -> None:
    from dataclasses import replace

    from stagecoach_api.store import FolderStore
    from stagecoach_api.stores.base import FolderLocation

    class Remote(FolderStore):
        """A folder that behaves like S3: nothing in it can be read in place."""

        def local_path(self, key: str) -> Path | None:
            return None

    def remote(machine: str) -> StageContext:
        here = replace(context(tmp_path / machine), store=Remote(FolderLocation(tmp_path / "bucket")))
        return replace(here, stop=threading.Event())

    first = remote("first")
    with pytest.raises(Interrupted):
        run(first, judging=stop_at(first, SAMPLES + 5))
    resumed = run(remote("second"))
    assert len(resumed[3].asked) == UPDATES * SAMPLES - SAMPLES - 8
    assert_same(resumed, run(context(tmp_path / "whole")))
    assert not list((tmp_path / "bucket").rglob("*pool*/*"))


# -- mini-batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_mini_batch_is_the_same_over_any_number_of_ranks(ranks: int) -> None:
    order = np.random.default_rng(1).permutation(24)
    shares = []
    for rank in range(ranks):
        places = list(range(24))[rank::ranks][::-1]
        shares.append([[places[int(index)] for index in part] for part in own_mini_batches(order, places, 6)])
    for number, mini in enumerate(np.array_split(order, 6)):
        together = [place for share in shares for place in share[number]]
        assert len(together) == 4
        assert sorted(together) == sorted(mini.tolist())


def test_the_tokenizer_of_the_toy_is_what_the_answers_are_read_with() -> None:
    assert digit_tokenizer().decode([3, 4, 2], skip_special_tokens=True) == "01"
