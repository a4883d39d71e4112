"""The loop of PPO: answer, judge, look at the guards, learn, save."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from torch import nn

from stagecoach_api.kinds.ppo import GuardAction
from stagecoach_trainer.align.kl import kl_price
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.engine.engine import StepReport
from stagecoach_trainer.engine.plain import PlainEngine
from stagecoach_trainer.engine.precision import DTYPES
from stagecoach_trainer.engine.sharded import shard_frozen, shards_what_is_asked
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.loop.checkpoint import CheckpointManager, agree_on_checkpoint, read_checkpoint
from stagecoach_trainer.loop.loop import HISTORY_POINTS, build_engine, prepare_network, training_device
from stagecoach_trainer.loop.metrics import StepFlops, StepMetrics
from stagecoach_trainer.loop.state import (
    Progression,
    TrainingState,
    gather_random_states,
    seed_everything,
    set_random_state,
)
from stagecoach_trainer.models.placement import place
from stagecoach_trainer.ppo.average import WeightAverage
from stagecoach_trainer.ppo.experience import Pool
from stagecoach_trainer.ppo.guards import Watch
from stagecoach_trainer.ppo.job import (
    BaseBelowAdapter,
    PpoJob,
    PpoResult,
    ReferenceModel,
    SeparateReference,
    freeze,
    micro_batches,
    own_mini_batches,
)
from stagecoach_trainer.ppo.objectives import (
    CriticObjective,
    Policy,
    PolicyObjective,
    Whitening,
    collate_experiences,
)
from stagecoach_trainer.ppo.rollout import Harvest, Rollouts, Tally, make_sampler
from stagecoach_trainer.ppo.shared_weights import share_frozen
from stagecoach_trainer.ppo.state import PpoProgress, join_states, split_state
from stagecoach_trainer.runtime.checkpoint_paths import CheckpointId
from stagecoach_trainer.runtime.collectives import agree, max_over_ranks, sum_over_ranks, wait_for_all
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Diverged, Interrupted
from stagecoach_trainer.runtime.startup import frozen_heap

log = logging.getLogger(__name__)

KEY_ORDER = 8
"""Sets the order in which answers are learnt from apart from other random numbers of the same seed."""


def train_policy(job: PpoJob, context: StageContext) -> PpoResult:
    """Train, going on from the newest complete checkpoint if there is one.

    Afterwards `job.policy` holds the final weights in fp32 on the CPU (on rank 0). Raises Interrupted after a
    checkpoint when `context.stop` is set, Diverged when a guard is broken or a loss is no number, UserError for rewards
    that are no numbers.
    """
    with contextlib.ExitStack() as stack:
        loop = PpoLoop(job, context, stack)
        return loop.run()


class PpoLoop:
    """One run of a PPO stage. The methods are its steps, in order."""

    def __init__(self, job: PpoJob, context: StageContext, stack: contextlib.ExitStack) -> None:
        config, self._world = job.config, context.world
        self._job, self._config, self._context = job, config, context
        self._device = training_device(context.world)
        # Before the policy is cast, as it may copy it.
        sampler = make_sampler(job, context, self._device, DTYPES[config.precision])
        self._objective = policy_objective = PolicyObjective(config.policy, config.rollout.temperature)
        critic_objective = CriticObjective(config.critic.clip, job.critic_bias)
        critic_config = config.model_copy(update={"optimizer": config.critic.optimizer or config.optimizer})
        for network in (job.policy, job.critic):
            prepare_network(network, config)
        self._policy = build_engine(job.policy, config, self._world, self._device, policy_objective)
        self._critic = build_engine(job.critic, critic_config, self._world, self._device, critic_objective)
        flops = StepFlops(job.policy, self._device, self._world.size)
        share_frozen([job.policy, job.critic, *job.asked])
        reference = self._reference()
        if shards_what_is_asked(config, self._world):
            job.rewards.shard_models(self._shard, self._device, self._world)
        asked = (reference.module,) if isinstance(reference, SeparateReference) else ()
        for module in (self._policy.loss, self._critic.loss, *asked):
            stack.enter_context(accelerate(module, self._device, self._policy.dtype))
        self._book = stack.enter_context(
            contextlib.closing(CheckpointManager(context, config.checkpoints, job.prompts.num_updates))
        )
        logs = context.work / "logs" if self._world.is_main else None
        self._meter = stack.enter_context(StepMetrics(logs, context.progress, job.prompts.num_updates, flops))
        self._rollouts = Rollouts(job, context, self._policy, self._critic, reference, sampler)
        self._at = Progression()
        self._ppo = PpoProgress(kl_price(config.kl.coefficient, config.kl.target, config.kl.horizon).coefficient)
        decay = config.policy.average_decay
        self._average = None if decay is None else WeightAverage(decay, self._policy.masters())
        self._saved_step: int | None = None
        """Update whose state the newest checkpoint holds, where training has not gone on since."""
        self._micro_rows = config.batch.micro_batch_rows or 1

    def _reference(self) -> ReferenceModel:
        if self._job.reference is None:
            return BaseBelowAdapter(self._policy.loss)
        if isinstance(self._policy, PlainEngine):
            model = freeze(self._job.reference, self._config.precision, self._device)
        else:
            model = place(self._job.reference, self._policy.dtype, self._device)
        module = Policy(model, self._config.policy, self._config.rollout.temperature).eval()
        if shards_what_is_asked(self._config, self._world):
            self._shard(module)
        return SeparateReference(module)

    def _shard(self, module: nn.Module) -> None:
        shard_frozen(module, self._config, self._world, self._device)

    def run(self) -> PpoResult:
        """Train to the end."""
        self._restore()
        fitted = self._job.rewards.prepare()
        if self._at.step == 0 and (fitted or self._config.guards.action is GuardAction.ROLL_BACK):
            self._save()  # something to go back to; and what was paid for is not paid again
        with frozen_heap():
            while self._at.step < self._job.prompts.num_updates:
                self._update()
        self._book.wait()
        self._policy.finish()
        self._critic.finish()
        if self._average is not None:
            self._average.put_into(self._job.policy)
        last = self._at.history[-1] if self._at.history else {}
        metrics = {name: value for name, value in last.items() if name not in ("step", "tokens")}
        metrics["rollbacks"] = float(self._ppo.rollbacks)
        return PpoResult(self._at.tokens, self._at.step, metrics, tuple(self._at.history))

    # -- state ---------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Take up the newest complete checkpoint; rank 0 decides which."""
        mark = agree_on_checkpoint(self._book.find_newest() if self._world.is_main else None, self._world)
        seed_everything(self._context.seed, self._world.rank)
        if mark is not None:
            self._load(mark)
            self._job.rewards.load_state(self._ppo.rewards)  # not in a rollback: what is spent stays spent
            if self._world.is_main:
                log.info("going on after update %d of %d", mark.step, self._job.prompts.num_updates)

    def _load(self, mark: CheckpointId) -> None:
        if self._world.local_rank == 0:
            self._book.fetch(mark)
        wait_for_all(self._world)
        state = read_checkpoint(self._book.fetch(mark), self._world.rank)
        self._at = state.progression
        self._ppo = PpoProgress.from_json(self._at.extra)
        policy, critic, average = split_state(state.engine, self._ppo)
        self._policy.load_state(policy)
        self._critic.load_state(critic)
        if self._average is not None and self._world.is_main:
            self._average.load(average)
        seed_everything(self._context.seed + mark.step, self._world.rank)
        if state.random_states:
            set_random_state(state.random_states[0])
        self._saved_step = mark.step

    def _save(self) -> None:
        policy, critic = self._policy.state(), self._critic.state()
        random_states = gather_random_states(self._world)
        rewards = self._job.rewards.state()
        self._saved_step = self._at.step
        if not self._world.is_main:
            return
        self._ppo.note(critic, rewards)
        self._at.extra = self._ppo.to_json()
        progression = Progression.from_json(self._at.to_json())
        progression.history = list(self._at.history)
        average = {} if self._average is None else self._average.copied()
        goes_back = self._config.guards.action is GuardAction.ROLL_BACK
        self._book.save(
            TrainingState(progression, join_states(policy, critic, average), random_states),
            self._healthy(self._at.step - 1) if goes_back else None,
        )

    # -- an update -----------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        number, began = self._at.step, time.perf_counter()
        self._meter.pause()
        harvest = self._harvest(number)
        answered = time.perf_counter() - began
        if self._goes_back(harvest):
            harvest.pool.discard()
            return
        learnt = self._learn(harvest, number)
        if self._average is not None:
            self._average.follow(self._policy.masters())
        harvest.pool.discard()
        self._rollouts.forget_kept()
        self._ppo.kl_coefficient = self._next_price(harvest.tally)
        self._at.step = number + 1
        self._record(harvest, learnt, answered)
        self._between_updates()

    def _harvest(self, number: int) -> Harvest:
        """Answer and judge the update's prompts. Raises Interrupted when asked to stop meanwhile."""
        folder = self._context.work / "pool" / f"update-{number:08d}-rank-{self._world.rank:05d}"
        pool = Pool(folder, self._config.pool_bytes)
        return self._rollouts.fill(pool, number, self._ppo) or self._stop()

    def _goes_back(self, harvest: Harvest) -> bool:
        """Hold the update against the guards; True where training was taken back to a checkpoint."""
        figures = harvest.tally.figures()
        watch = self._ppo.watch.after(figures, self._config.guards)
        reasons = watch.reasons(figures, self._config.guards)
        self._ppo.watch = watch
        if not reasons:
            return False
        why = "; ".join(reasons)
        with contextlib.suppress(Exception):
            self._book.wait()
        guards = self._config.guards
        if guards.action is GuardAction.ROLL_BACK and self._ppo.rollbacks < guards.max_rollbacks:
            good = self._find_healthy()
            if good is not None:
                self._roll_back(good, why)
                return True
        last = agree_on_checkpoint(self._book.newest, self._world)
        where = f"the last checkpoint is that of update {last.step}" if last else "there is no checkpoint yet"
        raise Diverged(
            f"update {self._at.step + 1}: {why}; {where}. Lower `optimizer.learningRate`, raise `kl.coefficient`, "
            "look at the rewards, or change the guard"
        )

    def _healthy(self, answered: int) -> int:
        """Return the last update whose weights answered without a sign, the guards having looked at the answers of
        update `answered`'s weights last. Below 0: none did."""
        return answered - self._ppo.watch.longest

    def _find_healthy(self) -> CheckpointId | None:
        """Return the newest checkpoint from before the signs that there are now, or else the oldest there is."""
        step = self._healthy(self._at.step)
        found = agree_on_checkpoint(self._book.find_before(step) if self._world.is_main else None, self._world)
        if found is not None and found.step > step and self._world.is_main:
            log.warning(
                "there is no checkpoint from before the failure: its sign has been there since update %d; the oldest "
                "one is taken",
                step + 2,
            )
        return found

    def _roll_back(self, mark: CheckpointId, why: str) -> None:
        """Go back to a checkpoint, with other random numbers and half the learning rate."""
        rollbacks = self._ppo.rollbacks + 1
        log.warning("update %d: %s; back to update %d", self._at.step + 1, why, mark.step)
        self._load(mark)
        self._ppo.rollbacks = rollbacks
        self._ppo.watch = Watch(self._ppo.watch.first_length)  # it gets all of `patience` again
        self._at.history.append({"step": self._at.step, "tokens": self._at.tokens, "rollbacks": rollbacks})
        self._save()

    # -- learning ------------------------------------------------------------------------------------------------------

    def _learn(self, harvest: Harvest, number: int) -> dict[str, float]:
        """Make all optimiser steps of an update; return figures over their tokens."""
        pool, policy = harvest.pool, self._config.policy
        whitening = harvest.tally.whitening() if policy.normalize_advantages else Whitening()
        lengths = np.array([item.num_tokens for item in pool], np.int64)
        trains_policy = number >= self._config.critic.warmup_updates
        norms: list[StepReport] = []
        with self._learning():
            for epoch in range(policy.inner_epochs):
                key = [self._context.seed, KEY_ORDER, self._ppo.rollbacks, number, epoch]
                order = np.random.default_rng(np.random.SeedSequence(key)).permutation(harvest.tally.answers)
                for place, mini in enumerate(own_mini_batches(order, harvest.places, self._job.mini_batches)):
                    step = (number * policy.inner_epochs + epoch) * self._job.mini_batches + place
                    micro = micro_batches(mini, lengths, self._micro_rows)
                    norms.append(self._step(pool, micro, whitening, step, number, trains_policy))
        return self._learnt_figures(norms)

    @contextlib.contextmanager
    def _learning(self) -> Iterator[None]:
        for engine in (self._policy, self._critic):
            engine.loss.train()
        try:
            yield
        finally:
            for engine in (self._policy, self._critic):
                engine.loss.eval()

    def _step(
        self,
        pool: Pool,
        micro_batches: Sequence[np.ndarray],
        whitening: Whitening,
        step: int,
        number: int,
        trains_policy: bool,
    ) -> StepReport:
        """Make one optimiser step of the critic and, unless it is frozen still, of the policy."""
        own = sum(len(pool[int(index)].answer) for micro in micro_batches for index in micro)
        total, most = self._agree_on_work(own, len(micro_batches))
        batches = [
            collate_experiences([pool[int(index)] for index in micro], whitening)
            for micro in [*micro_batches, *([np.empty(0, np.int64)] * (most - len(micro_batches)))]
        ]
        for index, batch in enumerate(batches):
            self._critic.accumulate(batch, 1.0 / total, last=index + 1 == len(batches))
        report = self._critic.step(self._job.critic_rate(number) * self._ppo.rate_factor)
        self._refuse_nonsense("critic", report, number)
        if not trains_policy:
            return StepReport(0.0)
        text = self._text_batches(step)
        for index, batch in enumerate(batches):
            self._policy.accumulate(batch, 1.0 / total, last=not text and index + 1 == len(batches))
        for index, (rows, scale) in enumerate(text):
            self._at.loss = float(self._policy.accumulate(rows, scale, last=index + 1 == len(text)))
        report = self._policy.step(self._job.policy_rate(number) * self._ppo.rate_factor)
        self._refuse_nonsense("policy", report, number)
        return report

    def _agree_on_work(self, tokens: int, micro_batches: int) -> tuple[float, int]:
        """Return the tokens over all ranks, and the most micro-batches that one of them has."""
        most = max_over_ranks([float(micro_batches)], self._world)[0]
        return sum_over_ranks([float(tokens)], self._world)[0], int(most)

    def _text_batches(self, step: int) -> list[tuple[Any, float]]:
        """Return this rank's micro-batches of text beside an optimiser step, each with its scale."""
        mix = self._config.pretraining
        if self._job.text is None or mix is None:
            return []
        rows = self._job.text.rows(step)
        self._objective.prove(self._policy.loss, rows, self._device, self._policy.dtype)
        share = shard_batch(rows, self._micro_rows, self._world.rank, self._world.size)
        scale = mix.weight / max(1, share.num_targets)
        return [(self._objective.collate(rows), scale) for rows in share.micro_batches]

    def _refuse_nonsense(self, side: str, report: StepReport, number: int) -> None:
        if math.isfinite(report.gradient_norm) or report.skipped:
            return
        good = self._book.newest_step
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is that of update {good}"
        raise Diverged(
            f"update {number + 1}: the {side}'s gradient norm is {report.gradient_norm}; {where}. Lower "
            "`optimizer.learningRate` or `critic.optimizer.learningRate`, or limit the rewards (`atLeast`, `atMost`)"
        )

    def _learnt_figures(self, reports: Sequence[StepReport]) -> dict[str, float]:
        sums = dict.fromkeys(("policyLoss", "clipped", "updateKl", "valueLoss"), 0.0)
        for engine in (self._policy, self._critic):
            module: Any = engine.loss
            sums |= module.figures.take()
        names = list(sums)
        totals = dict(zip(names, sum_over_ranks([sums[name] for name in names], self._world), strict=True))
        norms = [report.gradient_norm for report in reports if math.isfinite(report.gradient_norm)]
        return totals | {"gradNorm": sum(norms) / max(1, len(norms))}

    def _next_price(self, tally: Tally) -> float:
        kl = self._config.kl
        price = kl_price(self._ppo.kl_coefficient, kl.target, kl.horizon)
        return price.after(tally.figures().kl, tally.answers).coefficient

    # -- between updates -----------------------------------------------------------------------------------------------

    def _record(self, harvest: Harvest, learnt: Mapping[str, float], answered_seconds: float) -> None:
        tally = harvest.tally
        trained = tally.tokens * self._config.policy.inner_epochs
        self._at.tokens += tally.model_tokens * self._config.policy.inner_epochs
        per_token = {name: value / max(1, trained) for name, value in learnt.items() if name != "gradNorm"}
        figures = tally.report() | {
            **per_token,
            "gradNorm": learnt["gradNorm"],
            "klCoefficient": self._ppo.kl_coefficient,
            "learningRate": self._job.policy_rate(self._at.step - 1) * self._ppo.rate_factor,
        }
        every = max(1, self._job.prompts.num_updates // HISTORY_POINTS)
        if self._at.step % every == 0 or self._at.step in (1, self._job.prompts.num_updates):
            self._at.history.append({"step": self._at.step, "tokens": self._at.tokens, **figures})
        shown = figures | {"rolloutSeconds": answered_seconds}
        self._meter.step(self._at.step, shown, tally.model_tokens, tally.longest, 0.0, 0.0)

    def _between_updates(self) -> None:
        step, last = self._at.step, self._at.step == self._job.prompts.num_updates
        if last:
            return
        if self._asked_to_stop():
            self._stop()
        if self._book.is_due(step):
            self._save()

    def _asked_to_stop(self) -> bool:
        return sum_over_ranks([float(self._context.stop.is_set())], self._world)[0] > 0

    def _is_saved(self) -> bool:
        """Tell whether the newest checkpoint holds all there is: a stop while answering adds to it only what the
        rewards remember."""
        kept = self._saved_step == self._at.step and self._job.rewards.state() == self._ppo.rewards
        return bool(agree(int(kept), self._world))

    def _stop(self) -> NoReturn:
        """Save, and leave on all ranks at the same time: the first to go takes the others along."""
        if not self._is_saved():
            self._save()
        if self._world.is_main:
            self._book.wait()
        wait_for_all(self._world)
        raise Interrupted(
            f"stopped after update {self._at.step} of {self._job.prompts.num_updates}; a checkpoint is saved"
        )
