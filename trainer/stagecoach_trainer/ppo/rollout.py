"""From prompts to experiences: the policy answers, the reward scores the answers, and policy, reference and critic are
evaluated at every token.

M tokens of the answers of a batch; B answers, padded to A tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from stagecoach_api.store import StoreError
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.engine import Engine
from stagecoach_trainer.generation.sampling import Sampled
from stagecoach_trainer.kernels.answer_log_probs import collate_answers
from stagecoach_trainer.losses.advantages import generalized_advantages
from stagecoach_trainer.losses.kl import answer_sums, k1, token_rewards
from stagecoach_trainer.ppo.experience import Experience, Pool
from stagecoach_trainer.ppo.job import PpoJob
from stagecoach_trainer.ppo.reference import ReferenceModel
from stagecoach_trainer.ppo.samplers import Sampler
from stagecoach_trainer.ppo.saved_rollouts import SavedRollouts, name_of
from stagecoach_trainer.ppo.state import PpoProgress
from stagecoach_trainer.ppo.tally import Tally, sum_over_world
from stagecoach_trainer.rewards.term import Completion, Score
from stagecoach_trainer.runtime.collectives import max_over_ranks, sum_over_ranks
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.samples.prompts import Prompt

log = logging.getLogger(__name__)

KEY_SAMPLING = 7
"""Part of the random key of answers; separates them from other random numbers of the same seed."""


@dataclass(frozen=True)
class UpdateRollouts:
    """The scored answers of an update."""

    pool: Pool
    positions: Sequence[int]
    """Position in the update of each of the pool's answers."""
    tally: Tally
    """Over all ranks."""


class Rollouts:
    """Fills the pools of updates."""

    def __init__(
        self,
        job: PpoJob,
        context: StageContext,
        policy: Engine,
        critic: Engine,
        reference: ReferenceModel,
        sampler: Sampler,
    ) -> None:
        self._job = job
        self._config = job.config
        self._context = context
        self._world = context.world
        self._policy, self._critic, self._reference = policy, critic, reference
        self._sampler = sampler
        # Twice a training micro-batch: without gradients no activations are stored.
        self._scoring_rows = 2 * (job.config.batch.micro_batch_rows or 1)
        self._saved = SavedRollouts(context)

    def fill(self, pool: Pool, update: int, progress: PpoProgress) -> UpdateRollouts | None:
        """Answer and score this rank's share of an update's prompts; return it with the sums over all ranks.

        None if any rank is asked to stop; the answers made so far are then saved for the next attempt.
        """
        prompts = self._job.prompts.prompts(update)
        own = list(range(len(prompts)))[self._world.rank :: self._world.size]
        own.sort(key=lambda index: -len(prompts[index].ids))  # prompts of similar length share a batch
        rows = self._config.rollout.batch_rows
        # The largest share of any rank: all ranks make the same number of collective calls.
        share = math.ceil(len(prompts) / self._world.size)
        name = name_of(update, progress.rollbacks, self._world)
        done, tally = self._resume(pool, name)
        with self._evaluation_mode():
            self._sampler.refresh(self._policy.loss)  # type: ignore[arg-type]
            for first in range(done, share, rows):
                if self._stop_requested():
                    self._save(name, pool, first, tally)
                    return None
                positions = own[first : first + rows]
                batch = [prompts[index] for index in positions]
                self._answer_batch(pool, tally, batch, positions, update, progress, most=min(rows, share - first))
                self._context.progress.report("answer", first + len(positions), len(own), "answers")
        return UpdateRollouts(pool, own, sum_over_world(tally, self._world))

    def discard_saved(self) -> None:
        """Delete the saved answers that this update resumed from, once it has learnt from them."""
        self._saved.discard_loaded()

    # -- interruption --------------------------------------------------------------------------------------------------

    def _save(self, name: str, pool: Pool, done: int, tally: Tally) -> None:
        """Save the answers made so far. A failure is only logged: the checkpoint that follows matters more."""
        try:
            self._saved.save(name, list(pool), done, asdict(tally))
        except (OSError, StoreError) as error:
            log.warning("the answers made so far could not be saved (%s); they will be made again", error)

    def _resume(self, pool: Pool, name: str) -> tuple[int, Tally]:
        """Add the answers saved by a stopped attempt to the pool; return how many prompts of a rank's share are done,
        and the sums over this rank's answers."""
        names = self._job.rewards.names
        saved = self._saved.load(name)
        done = 0 if saved is None else saved.done
        least, most = max_over_ranks([-float(done), float(done)], self._world)
        if saved is None or -least != most:  # some rank has lost its part: all start over, to stay in step
            return 0, Tally(names=names, terms=(0.0,) * len(names))
        pool.add_stored(saved.experiences)
        return done, Tally(**{**saved.sums, "names": names, "terms": tuple(saved.sums["terms"])})

    def _stop_requested(self) -> bool:
        return sum_over_ranks([float(self._context.stop.is_set())], self._world)[0] > 0

    # -- one batch of answers ------------------------------------------------------------------------------------------

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        modules = [self._policy.loss, self._critic.loss]
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield

    def _answer_batch(
        self,
        pool: Pool,
        tally: Tally,
        prompts: Sequence[Prompt],
        positions: Sequence[int],
        update: int,
        progress: PpoProgress,
        most: int,
    ) -> None:
        """Answer some prompts, score the answers, and add them to pool and tally.

        `most`: number of prompts of the rank that has most in this batch.
        """
        # An answer's random numbers depend on its position in the update, not on its rank or batch.
        keys = [(self._context.seed, KEY_SAMPLING, progress.rollbacks, update, position) for position in positions]
        sampled = self._sampler.answer([prompt.ids for prompt in prompts], keys)
        completions = [self._completion(prompt, answer) for prompt, answer in zip(prompts, sampled, strict=True)]
        scores = self._final_scores(completions, self._job.rewards.score(completions))
        experiences: list[Experience] = []
        for start in range(0, most, self._scoring_rows):
            part = slice(start, start + self._scoring_rows)
            pairs = [(prompt.ids, answer.ids) for prompt, answer in zip(prompts[part], sampled[part], strict=True)]
            totals = [score.total for score in scores[part]]
            experiences += self._evaluate(pairs, totals, tally, progress.kl_coefficient)
        for experience, answer, completion, score in zip(experiences, sampled, completions, scores, strict=True):
            tally.count(experience, answer, completion, score)
        if experiences:
            pool.add(experiences)

    def _completion(self, prompt: Prompt, answer: Sampled) -> Completion:
        ids = answer.ids[:-1] if answer.ended else answer.ids
        text = self._job.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(prompt.messages, text, len(ids), answer.ended, prompt.domain, prompt.tools)

    def _final_scores(self, completions: Sequence[Completion], scores: Sequence[Score]) -> list[Score]:
        """Return the scores, with `missingEndReward` in place of the total of truncated answers."""
        missing_end = self._config.rollout.missing_end_reward
        if missing_end is None:
            return list(scores)
        return [
            score if completion.ended else Score(missing_end, score.terms)
            for completion, score in zip(completions, scores, strict=True)
        ]

    def _evaluate(
        self, pairs: Sequence[tuple[Ids, Ids]], scores: Sequence[float], tally: Tally, coefficient: float
    ) -> list[Experience]:
        """Evaluate policy, reference and critic at every token of some answers; return the experiences."""
        batch = collate_answers(pairs).to(self._policy.device)
        # The training forward, not the decoder's logits: the first ratio of an update is then exactly 1.
        log_probs, entropies = (output.cpu() for output in self._policy.loss(batch))
        reference = self._reference.log_probs(batch).cpu()
        values = self._critic.loss(batch).cpu()
        if not pairs:  # only took part in the other ranks' collective calls
            return []
        mask = torch.arange(max(batch.lengths)) < torch.tensor(batch.lengths)[:, None]
        token_kl = _padded(k1(log_probs, reference), mask)
        rewards = token_rewards(torch.tensor(scores, dtype=torch.float32), token_kl, mask, coefficient)
        policy = self._config.policy
        predicted = _padded(values, mask)
        advantages, returns = generalized_advantages(rewards, predicted, mask, policy.gamma, policy.gae_lambda)
        tally.kl += float(answer_sums(token_kl, mask).double().sum())
        tally.entropy += float(entropies.double().sum())
        tally.value_error += float(0.5 * (predicted - returns)[mask].double().square().sum())
        flat = (log_probs, values, advantages[mask], returns[mask])
        columns = zip(*(torch.split(item.float(), list(batch.lengths)) for item in flat), strict=True)
        return [
            Experience(prompt, answer, *(column.numpy() for column in per_token))
            for (prompt, answer), per_token in zip(pairs, columns, strict=True)
        ]


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    """Return per-token values [M] as rows [B, A], 0 after each answer's end."""
    return torch.zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, flat.float())
