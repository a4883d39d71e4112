"""The training loop of PPO: answer, score, check the guards, train, save."""

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
from stagecoach_trainer.batches.shard import shard_batch
from stagecoach_trainer.engine.engine import StepReport
from stagecoach_trainer.engine.plain import PlainEngine
from stagecoach_trainer.engine.precision import DTYPES
from stagecoach_trainer.engine.sharded import shard_frozen, shards_frozen_models
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.loop.checkpoint import CheckpointManager, agree_on_checkpoint, read_checkpoint
from stagecoach_trainer.loop.health import concerns, exploding, not_finite
from stagecoach_trainer.loop.loop import HISTORY_POINTS, build_engine, prepare_network, training_device
from stagecoach_trainer.loop.metrics import StepFlops, StepMetrics
from stagecoach_trainer.loop.state import (
    Progression,
    TrainingState,
    gather_random_states,
    seed_everything,
    set_random_state,
)
from stagecoach_trainer.losses.advantages import Whitening
from stagecoach_trainer.losses.kl import kl_controller
from stagecoach_trainer.models.placement import place
from stagecoach_trainer.ppo import shared_weights
from stagecoach_trainer.ppo.experience import Pool
from stagecoach_trainer.ppo.guards import Watch
from stagecoach_trainer.ppo.job import PpoJob, PpoResult
from stagecoach_trainer.ppo.mini_batches import micro_batches, own_mini_batches
from stagecoach_trainer.ppo.objectives import (
    CriticObjective,
    PolicyModule,
    PolicyObjective,
    collate_experiences,
)
from stagecoach_trainer.ppo.reference import PolicyWithoutAdapter, ReferenceModel, SeparateReference, freeze
from stagecoach_trainer.ppo.rollout import Rollouts, UpdateRollouts
from stagecoach_trainer.ppo.samplers import make_sampler
from stagecoach_trainer.ppo.state import PpoProgress, join_states, split_state
from stagecoach_trainer.ppo.tally import Tally
from stagecoach_trainer.ppo.weight_average import WeightAverage
from stagecoach_trainer.runtime.checkpoint_paths import CheckpointId
from stagecoach_trainer.runtime.collectives import agree, max_over_ranks, sum_over_ranks, wait_for_all
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import Diverged, Interrupted
from stagecoach_trainer.runtime.startup import frozen_heap

log = logging.getLogger(__name__)

KEY_ORDER = 8
"""Part of the random key of the training order; separates it from other random numbers of the same seed."""


def train_policy(job: PpoJob, context: StageContext) -> PpoResult:
    """Train, resuming from the newest complete checkpoint if there is one.

    Afterwards `job.policy` holds the final weights in fp32 on the CPU (on rank 0).

    Raises:
        Interrupted: `context.stop` is set; a checkpoint is saved.
        Diverged: A guard is violated, or a gradient is NaN or infinite.
        UserError: A reward is NaN or infinite.
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
        # Before the policy is cast and sharded: the sampler may copy it.
        sampler = make_sampler(job, context, self._device, DTYPES[config.precision])
        self._objective = policy_objective = PolicyObjective(config.policy, config.rollout.temperature)
        critic_objective = CriticObjective(config.critic.clip, job.critic_bias)
        critic_config = config.model_copy(update={"optimizer": config.critic.optimizer or config.optimizer})
        for network in (job.policy, job.critic):
            prepare_network(network, config)
        self._policy = build_engine(job.policy, config, self._world, self._device, policy_objective)
        self._critic = build_engine(job.critic, critic_config, self._world, self._device, critic_objective)
        flops = StepFlops(job.policy, self._device, self._world.size)
        # Again after `stages.ppo`: casting to the compute format has given each model its own copy.
        shared_weights.share_frozen([job.policy, job.critic, *job.inference_only])
        reference = self._reference()
        if shards_frozen_models(config, self._world):
            job.rewards.shard_models(self._shard, self._device, self._world)
        # The adapter-free reference is the policy's own module, which is accelerated already.
        separate = (reference.module,) if isinstance(reference, SeparateReference) else ()
        samples = policy_objective.samples(job.prompts.prompts(0))
        for module in (self._policy.loss, self._critic.loss, *separate):
            stack.enter_context(accelerate(module, self._device, self._policy.dtype, samples, self._world))
        self._checkpoints = stack.enter_context(
            contextlib.closing(CheckpointManager(context, config.checkpoints, job.prompts.num_updates))
        )
        logs = context.work / "logs" if self._world.is_main else None
        self._metrics = stack.enter_context(StepMetrics(logs, context.progress, job.prompts.num_updates, flops))
        self._rollouts = Rollouts(job, context, self._policy, self._critic, reference, sampler)
        self._progress = Progression()
        self._ppo_progress = PpoProgress(config.kl.coefficient)
        decay = config.policy.average_decay
        self._average = None if decay is None else WeightAverage(decay, self._policy.masters())
        self._saved_step: int | None = None
        """Update of the newest checkpoint."""
        self._micro_rows = config.batch.micro_batch_rows or 1

    def _reference(self) -> ReferenceModel:
        if self._job.reference is None:
            return PolicyWithoutAdapter(self._policy.loss)
        # In the engine's own number formats, so that the KL to an equal policy is exactly 0.
        if isinstance(self._policy, PlainEngine):
            model = freeze(self._job.reference, self._config.precision, self._device)
        else:
            model = place(self._job.reference, self._policy.dtype, self._device)
        module = PolicyModule(model, self._config.policy, self._config.rollout.temperature).eval()
        if shards_frozen_models(self._config, self._world):
            self._shard(module)
        return SeparateReference(module)

    def _shard(self, module: nn.Module) -> None:
        shard_frozen(module, self._config, self._world, self._device)

    def run(self) -> PpoResult:
        """Train to the end and return the result."""
        self._restore()
        fitted = self._job.rewards.prepare()
        if self._progress.step == 0 and (fitted or self._config.guards.action is GuardAction.ROLL_BACK):
            # A checkpoint to roll back to; and fitted reward weights, for which requests were spent, outlive a restart.
            self._save()
        with frozen_heap():
            while self._progress.step < self._job.prompts.num_updates:
                self._update()
        self._checkpoints.wait()
        self._policy.finish()
        self._critic.finish()
        if self._average is not None:
            self._average.put_into(self._job.policy)
        for text in concerns(self._progress.history):
            self._context.progress.warn(text)
        last = self._progress.history[-1] if self._progress.history else {}
        metrics = {name: value for name, value in last.items() if name not in ("step", "tokens")}
        metrics["rollbacks"] = float(self._ppo_progress.rollbacks)
        return PpoResult(self._progress.tokens, self._progress.step, metrics, tuple(self._progress.history))

    # -- state ---------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Load the newest complete checkpoint, if any. Rank 0 decides which one it is."""
        checkpoint = agree_on_checkpoint(self._checkpoints.find_newest() if self._world.is_main else None, self._world)
        seed_everything(self._context.seed, self._world.rank)
        if checkpoint is not None:
            self._load(checkpoint)
            # Not in `_load`: after a rollback the requests spent since the checkpoint still count.
            self._job.rewards.load_state(self._ppo_progress.rewards)
            self._metrics.resume(checkpoint.step)
            if self._world.is_main:
                log.info("resuming after update %d of %d", checkpoint.step, self._job.prompts.num_updates)

    def _load(self, checkpoint: CheckpointId) -> None:
        if self._world.local_rank == 0:
            self._checkpoints.fetch(checkpoint)
        wait_for_all(self._world)
        state = read_checkpoint(self._checkpoints.fetch(checkpoint), self._world.rank)
        self._progress = state.progression
        self._ppo_progress = PpoProgress.from_json(self._progress.extra)
        policy, critic, average = split_state(state.engine, self._ppo_progress)
        self._policy.load_state(policy)
        self._critic.load_state(critic)
        if self._average is not None and self._world.is_main:
            self._average.load(average)
        seed_everything(self._context.seed + checkpoint.step, self._world.rank)
        if state.random_states:
            set_random_state(state.random_states[0])
        self._saved_step = checkpoint.step

    def _save(self) -> None:
        policy, critic = self._policy.state(), self._critic.state()
        random_states = gather_random_states(self._world)
        rewards = self._job.rewards.state()
        self._saved_step = self._progress.step
        if not self._world.is_main:
            return
        self._ppo_progress.record(critic, rewards)
        self._progress.extra = self._ppo_progress.to_json()
        progression = Progression.from_json(self._progress.to_json())
        progression.history = list(self._progress.history)
        average = {} if self._average is None else self._average.copied()
        keeps_healthy = self._config.guards.action is GuardAction.ROLL_BACK
        self._checkpoints.save(
            TrainingState(progression, join_states(policy, critic, average), random_states),
            self._healthy(self._progress.step - 1) if keeps_healthy else None,
        )

    # -- an update -----------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        number, began = self._progress.step, time.perf_counter()
        self._metrics.pause()
        rollouts = self._roll_out(number)
        answered = time.perf_counter() - began
        tally = rollouts.tally
        self._require_finite(tally.report() | {"valueLoss": tally.figures().value_loss}, number)
        if self._rolled_back(rollouts):
            rollouts.pool.discard()
            return
        learnt = self._learn(rollouts, number)
        self._require_finite(learnt | ({} if self._job.text is None else {"loss": self._progress.loss}), number)
        if self._average is not None:
            self._average.follow(self._policy.masters())
        rollouts.pool.discard()
        self._rollouts.discard_saved()
        self._ppo_progress.kl_coefficient = self._next_kl_coefficient(rollouts.tally)
        self._progress.step = number + 1
        self._record(rollouts.tally, learnt, answered)
        self._between_updates()

    def _roll_out(self, number: int) -> UpdateRollouts:
        """Answer and score the update's prompts. Raises Interrupted if a stop is requested meanwhile."""
        folder = self._context.work / "pool" / f"update-{number:08d}-rank-{self._world.rank:05d}"
        pool = Pool(folder, self._config.pool_bytes)
        return self._rollouts.fill(pool, number, self._ppo_progress) or self._stop()

    def _rolled_back(self, rollouts: UpdateRollouts) -> bool:
        """Check the guards; return whether training was rolled back to a checkpoint.

        Raises Diverged if a guard is violated and training cannot or must not be rolled back.
        """
        figures = rollouts.tally.figures()
        watch = self._ppo_progress.watch.after(figures, self._config.guards)
        reasons = watch.reasons(figures, self._config.guards)
        self._ppo_progress.watch = watch
        if not reasons:
            return False
        why = "; ".join(reasons)
        with contextlib.suppress(Exception):  # a failed upload must not hide why training failed
            self._checkpoints.wait()
        guards = self._config.guards
        if guards.action is GuardAction.ROLL_BACK and self._ppo_progress.rollbacks < guards.max_rollbacks:
            good = self._find_healthy()
            if good is not None:
                self._roll_back(good, why)
                return True
        last = agree_on_checkpoint(self._checkpoints.newest, self._world)
        where = f"the last checkpoint is that of update {last.step}" if last else "there is no checkpoint yet"
        raise Diverged(
            f"update {self._progress.step + 1}: {why}; {where}. Lower `optimizer.learningRate`, raise "
            "`kl.coefficient`, check the rewards, or change the guard"
        )

    def _healthy(self, answered: int) -> int:
        """Return the last update whose weights answered without violating a guard; below 0 if there is none.

        `answered`: the last update whose weights' answers the guards have checked.
        """
        return answered - self._ppo_progress.watch.longest

    def _find_healthy(self) -> CheckpointId | None:
        """Return the newest checkpoint from before the current violations began, or else the oldest checkpoint."""
        step = self._healthy(self._progress.step)
        found = agree_on_checkpoint(self._checkpoints.find_before(step) if self._world.is_main else None, self._world)
        if found is not None and found.step > step and self._world.is_main:
            log.warning(
                "no checkpoint is older than the failure, which began at update %d; rolling back to the oldest one",
                step + 2,
            )
        return found

    def _roll_back(self, checkpoint: CheckpointId, why: str) -> None:
        """Return to a checkpoint, with different random numbers and half the learning rate."""
        rollbacks = self._ppo_progress.rollbacks + 1
        log.warning("update %d: %s; rolling back to update %d", self._progress.step + 1, why, checkpoint.step)
        self._load(checkpoint)
        self._ppo_progress.rollbacks = rollbacks
        self._ppo_progress.watch = Watch(self._ppo_progress.watch.first_length)  # counts `patience` from 0
        self._progress.history.append(
            {"step": self._progress.step, "tokens": self._progress.tokens, "rollbacks": rollbacks}
        )
        self._save()

    # -- learning ------------------------------------------------------------------------------------------------------

    def _learn(self, rollouts: UpdateRollouts, number: int) -> dict[str, float]:
        """Make all optimiser steps of an update; return sums over the tokens they were trained on."""
        pool, policy = rollouts.pool, self._config.policy
        whitening = rollouts.tally.whitening() if policy.normalize_advantages else Whitening()
        lengths = np.array([item.num_tokens for item in pool], np.int64)
        trains_policy = number >= self._config.critic.warmup_updates
        reports: list[StepReport] = []
        with self._training_mode():
            for epoch in range(policy.inner_epochs):
                key = [self._context.seed, KEY_ORDER, self._ppo_progress.rollbacks, number, epoch]
                order = np.random.default_rng(np.random.SeedSequence(key)).permutation(rollouts.tally.answers)
                own = own_mini_batches(order, rollouts.positions, self._job.mini_batches)
                for index, mini in enumerate(own):
                    step = (number * policy.inner_epochs + epoch) * self._job.mini_batches + index
                    micro = micro_batches(mini, lengths, self._micro_rows)
                    reports.append(self._step(pool, micro, whitening, step, number, trains_policy))
        return self._learnt_figures(reports)

    @contextlib.contextmanager
    def _training_mode(self) -> Iterator[None]:
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
        """Make one optimiser step of the critic and, after its warm-up, of the policy."""
        own = sum(len(pool[int(index)].answer) for micro in micro_batches for index in micro)
        total, most = self._agree_on_work(own, len(micro_batches))
        # Empty micro-batches where another rank has more: under ZeRO the ranks' backward passes are collective.
        batches = [
            collate_experiences([pool[int(index)] for index in micro], whitening)
            for micro in [*micro_batches, *([np.empty(0, np.int64)] * (most - len(micro_batches)))]
        ]
        # Each loss is divided by the tokens of the mini-batch over all ranks: every token has equal weight.
        for index, batch in enumerate(batches):
            self._critic.accumulate(batch, 1.0 / total, last=index + 1 == len(batches))
        report = self._critic.step(self._job.critic_rate(number) * self._ppo_progress.rate_factor)
        self._require_finite_gradient("critic", report, number)
        if not trains_policy:
            return StepReport(0.0)
        # One optimiser step of the policy sums the gradients of answers and of text (PPO-ptx, arXiv 2203.02155).
        text = self._text_batches(step)
        for index, batch in enumerate(batches):
            self._policy.accumulate(batch, 1.0 / total, last=not text and index + 1 == len(batches))
        for index, (rows, scale) in enumerate(text):
            self._progress.loss = float(self._policy.accumulate(rows, scale, last=index + 1 == len(text)))
        report = self._policy.step(self._job.policy_rate(number) * self._ppo_progress.rate_factor)
        self._require_finite_gradient("policy", report, number)
        return report

    def _agree_on_work(self, tokens: int, micro_batches: int) -> tuple[float, int]:
        """Return the tokens of all ranks, and the largest number of micro-batches of any rank."""
        most = max_over_ranks([float(micro_batches)], self._world)[0]
        return sum_over_ranks([float(tokens)], self._world)[0], int(most)

    def _text_batches(self, step: int) -> list[tuple[Any, float]]:
        """Return this rank's micro-batches of text for an optimiser step, each with its scale."""
        mix = self._config.pretraining
        if self._job.text is None or mix is None:
            return []
        rows = self._job.text.rows(step)
        self._objective.prove(self._policy.loss, rows, self._device, self._policy.dtype)
        # Divided by the text's own targets: its weight does not depend on the lengths of answers and text.
        share = shard_batch(rows, self._micro_rows, self._world.rank, self._world.size)
        scale = mix.weight / max(1, share.num_targets)
        return [(self._objective.collate(rows), scale) for rows in share.micro_batches]

    def _require_finite_gradient(self, side: str, report: StepReport, number: int) -> None:
        # A skipped step is an fp16 overflow, after which the loss scale is lowered.
        if not math.isfinite(report.gradient_norm) and not report.skipped:
            self._diverge(f"the {side}'s gradient norm is {report.gradient_norm}", number)

    def _require_finite(self, figures: Mapping[str, float], number: int) -> None:
        """Raise Diverged if a figure of all ranks is NaN or infinite. No guard sees that: NaN exceeds no limit."""
        found = not_finite(figures)
        if found:
            self._diverge(", ".join(found), number)

    def _diverge(self, what: str, number: int) -> NoReturn:
        good = self._checkpoints.newest_step
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is that of update {good}"
        raise Diverged(
            f"update {number + 1}: {what}; {where}. Lower `optimizer.learningRate` or "
            "`critic.optimizer.learningRate`, or limit the rewards (`atLeast`, `atMost`)"
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

    def _next_kl_coefficient(self, tally: Tally) -> float:
        kl = self._config.kl
        controller = kl_controller(self._ppo_progress.kl_coefficient, kl.target, kl.horizon)
        return controller.after(tally.figures().kl, tally.answers).coefficient

    # -- between updates -----------------------------------------------------------------------------------------------

    def _record(self, tally: Tally, learnt: Mapping[str, float], answered_seconds: float) -> None:
        trained = tally.tokens * self._config.policy.inner_epochs
        self._progress.tokens += tally.model_tokens * self._config.policy.inner_epochs
        # Metrics are means over the tokens trained on; gradients' norms are already averaged over steps.
        per_token = {name: value / max(1, trained) for name, value in learnt.items() if name != "gradNorm"}
        figures = tally.report() | {
            **per_token,
            "gradNorm": learnt["gradNorm"],
            "klCoefficient": self._ppo_progress.kl_coefficient,
            "learningRate": self._job.policy_rate(self._progress.step - 1) * self._ppo_progress.rate_factor,
        }
        every = max(1, self._job.prompts.num_updates // HISTORY_POINTS)
        if self._progress.step % every == 0 or self._progress.step in (1, self._job.prompts.num_updates):
            self._progress.history.append({"step": self._progress.step, "tokens": self._progress.tokens, **figures})
            self._warn_early()
        shown = figures | {"rolloutSeconds": answered_seconds}
        self._metrics.step(self._progress.step, shown, tally.model_tokens, tally.longest, 0.0, 0.0)

    def _warn_early(self) -> None:
        text = exploding(self._progress.history)
        if text is not None:
            self._context.progress.warn(text)

    def _between_updates(self) -> None:
        step, last = self._progress.step, self._progress.step == self._job.prompts.num_updates
        if last:
            return
        if self._stop_requested():
            self._stop()
        if self._checkpoints.is_due(step):
            self._save()

    def _stop_requested(self) -> bool:
        return sum_over_ranks([float(self._context.stop.is_set())], self._world)[0] > 0

    def _is_saved(self) -> bool:
        """Return whether the newest checkpoint is up to date on all ranks.

        If the stop came while answering, only the state of the rewards can have changed since.
        """
        saved = self._saved_step == self._progress.step and self._job.rewards.state() == self._ppo_progress.rewards
        return bool(agree(int(saved), self._world))

    def _stop(self) -> NoReturn:
        """Save a checkpoint and raise Interrupted on all ranks at the same time: a rank that exits ends the others."""
        if not self._is_saved():
            self._save()
        if self._world.is_main:
            self._checkpoints.wait()
        wait_for_all(self._world)
        raise Interrupted(
            f"stopped after update {self._progress.step} of {self._job.prompts.num_updates}; a checkpoint is saved"
        )
