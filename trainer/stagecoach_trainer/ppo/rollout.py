"""From prompts to experiences: the policy answers, the reward judges; policy, reference and critic are asked about
every token.

M tokens of the answers of a chunk.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stagecoach_api.kinds.ppo import Rollout, RolloutEngine
from stagecoach_api.store import StoreError
from stagecoach_trainer.align.advantages import generalized_advantages
from stagecoach_trainer.align.kl import answer_sums, k1, token_rewards
from stagecoach_trainer.batches.collate import PADDING_TOKEN
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.engine.engine import Engine
from stagecoach_trainer.engine.sharded import PARAMETERS_SHARDED, gathered
from stagecoach_trainer.generation.generation import end_ids
from stagecoach_trainer.generation.sampling import Calls, Decoding, Sampled, sample_answers, uniforms
from stagecoach_trainer.kernels.answer_log_probs import collate_answers
from stagecoach_trainer.kernels.causal import CausalLoss, causal_model
from stagecoach_trainer.models.placement import place
from stagecoach_trainer.ppo.experience import Experience, Pool
from stagecoach_trainer.ppo.guards import UpdateFigures
from stagecoach_trainer.ppo.job import PpoJob, ReferenceModel
from stagecoach_trainer.ppo.objectives import Whitening
from stagecoach_trainer.ppo.saved_rollouts import KeptAnswers, name_of
from stagecoach_trainer.ppo.state import PpoProgress
from stagecoach_trainer.rewards.term import Judged, Judgement
from stagecoach_trainer.runtime.collectives import max_over_ranks, sum_over_ranks
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.samples.prompts import Prompt

log = logging.getLogger(__name__)

KEY_SAMPLING = 7
"""Sets the random numbers of answers apart from others of the same seed."""


# -- who answers -------------------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """Answers prompts with the policy as it is."""

    def refresh(self, owner: CausalLoss) -> None:
        """Take up the policy's weights, once before the answers of an update. `owner`: the module that is trained."""

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        """Return one answer per prompt; `keys` name the random numbers of each. All ranks call it equally often, also
        without prompts."""


def decoding_of(rollout: Rollout, ends: Sequence[int]) -> Decoding:
    return Decoding(rollout.max_new_tokens, rollout.temperature, rollout.top_p, tuple(ends))


def make_sampler(job: PpoJob, context: StageContext, device: torch.device, dtype: torch.dtype) -> Sampler:
    """Return who answers. Where ZeRO shards the parameters it is a copy of the policy, unless told otherwise (through
    ZeRO-3's hooks answering is six times slower), else the policy itself."""
    decoding = decoding_of(job.config.rollout, end_ids(causal_model(job.policy), job.tokenizer))
    if job.config.rollout.engine is RolloutEngine.VLLM:
        from stagecoach_trainer.ppo.vllm_sampler import VllmSampler

        return VllmSampler(job.config, job.policy, job.tokenizer, decoding, context.work / "vllm", context.world)
    if not job.config.rollout.whole_copy:
        return ShardedSampler(decoding, device, context.world)
    if job.config.sharding.zero == PARAMETERS_SHARDED:
        return CopySampler(job.policy, decoding, device, dtype)
    return OwnSampler(decoding, device)


class OwnSampler:
    """Answers with the policy's own weights."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._decoding = decoding
        self._device = device
        self._model: Any = None

    def refresh(self, owner: CausalLoss) -> None:
        self._model = causal_model(owner.model)

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        if not prompts:
            return []
        draws = [uniforms(key, self._decoding.max_new_tokens) for key in keys]
        return sample_answers(self._model, prompts, draws, self._decoding, self._device)


class CopySampler(OwnSampler):
    """Answers with a copy in the compute format; what is frozen in the policy is copied once, the rest every update."""

    def __init__(self, policy: nn.Module, decoding: Decoding, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(decoding, device)
        self._copy = place(copy.deepcopy(policy), dtype, device)

    def refresh(self, owner: CausalLoss) -> None:
        copies = dict(self._copy.named_parameters())
        for name, parameter in owner.model.named_parameters():
            if parameter.requires_grad:
                with gathered(parameter, PARAMETERS_SHARDED), torch.no_grad():
                    copies[name].copy_(parameter)
        self._model = causal_model(self._copy)


class ShardedSampler(OwnSampler):
    """Answers with the policy that ZeRO-3 has shared out. It is gathered in every call, so all ranks go on until the
    last one is done, and one without prompts answers a token of padding."""

    def __init__(self, decoding: Decoding, device: torch.device, world: World) -> None:
        super().__init__(decoding, device)
        self._world = world
        self._owner: CausalLoss | None = None

    def refresh(self, owner: CausalLoss) -> None:
        super().refresh(owner)
        self._owner = owner

    def answer(self, prompts: Sequence[Ids], keys: Sequence[Sequence[int]]) -> list[Sampled]:
        asked = prompts or [np.array([PADDING_TOKEN], np.int32)]
        draws = [uniforms(key, self._decoding.max_new_tokens) for key in keys or [(0,)]]
        together = _Together(self._owner, self._world)  # type: ignore[arg-type]
        found = sample_answers(self._model, asked, draws, self._decoding, self._device, together)
        return found[: len(prompts)]


class _Together(Calls):
    """Calls that all ranks make at the same time, through the module whose hooks gather."""

    def __init__(self, owner: CausalLoss, world: World) -> None:
        self._owner = owner
        self._world = world

    def mode(self) -> AbstractContextManager[Any]:
        return torch.no_grad()  # not inference mode: some of what is gathered stays, and is trained on

    def go_on(self, under_way: bool) -> bool:
        return max_over_ranks([float(under_way)], self._world)[0] > 0

    def logits(self, compute: Callable[[], Tensor]) -> Tensor:
        found: Tensor = self._owner(compute)
        return found


# -- what became of an update ------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over the answers of an update, over all ranks once they are shared."""

    answers: int = 0
    tokens: int = 0
    """Of answers."""
    model_tokens: int = 0
    """Of prompts and answers."""
    ended: int = 0
    empty: int = 0
    """Answers without any text."""
    longest: int = 0
    reward: float = 0.0
    reward_squares: float = 0.0
    max_abs_reward: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    value_error: float = 0.0
    advantage: float = 0.0
    advantage_squares: float = 0.0
    terms: tuple[float, ...] = ()
    """Sum of each reward term's values."""
    names: tuple[str, ...] = ()

    def whitening(self) -> Whitening:
        return Whitening.of(self.tokens, self.advantage, self.advantage_squares)

    def figures(self) -> UpdateFigures:
        mean = self.reward / self.answers
        return UpdateFigures(
            kl=self.kl / self.answers,
            entropy=self.entropy / self.tokens,
            ended_share=self.ended / self.answers,
            length=self.tokens / self.answers,
            max_abs_reward=self.max_abs_reward,
            reward_deviation=max(0.0, self.reward_squares / self.answers - mean**2) ** 0.5,
            value_loss=self.value_error / self.tokens,
        )

    def report(self) -> dict[str, float]:
        """Return the update's figures under the names that metrics have."""
        figures = self.figures()
        terms = {f"reward.{name}": value / self.answers for name, value in zip(self.names, self.terms, strict=True)}
        return {
            "reward": self.reward / self.answers,
            "rewardDeviation": figures.reward_deviation,
            **terms,
            "kl": figures.kl,
            "entropy": figures.entropy,
            "endedShare": figures.ended_share,
            "emptyShare": self.empty / self.answers,
            "answerTokens": figures.length,
        }


@dataclass(frozen=True)
class Harvest:
    """The judged answers of an update."""

    pool: Pool
    places: Sequence[int]
    """Place in the update of each of the pool's answers."""
    tally: Tally
    """Over all ranks."""


# -- answering and judging ---------------------------------------------------------------------------------------------


class Rollouts:
    """Fills pools."""

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
        self._scoring_rows = 2 * (job.config.batch.micro_batch_rows or 1)
        self._kept = KeptAnswers(context)

    def fill(self, pool: Pool, update: int, progress: PpoProgress) -> Harvest | None:
        """Answer and judge this rank's share of an update's prompts; return it with what became of all ranks'.

        None: asked to stop, on some rank; what was made so far is kept for the next attempt.
        """
        prompts = self._job.prompts.prompts(update)
        mine = list(range(len(prompts)))[self._world.rank :: self._world.size]
        mine.sort(key=lambda index: -len(prompts[index].ids))  # prompts of like length share a batch
        rows = self._config.rollout.batch_rows
        share = math.ceil(len(prompts) / self._world.size)  # of the rank that has most: all make as many calls as it
        name = name_of(update, progress.rollbacks, self._world)
        done, tally = self._take_up(pool, name)
        with self._asking():
            self._sampler.refresh(self._policy.loss)  # type: ignore[arg-type]
            for first in range(done, share, rows):
                if self._asked_to_stop():
                    self._keep(name, pool, first, tally)
                    return None
                chosen = mine[first : first + rows]
                asked = [prompts[index] for index in chosen]
                self._chunk(pool, tally, asked, chosen, update, progress, most=min(rows, share - first))
                self._context.progress.report("answer", first + len(chosen), len(mine), "answers")
        return Harvest(pool, mine, share_tally(tally, self._world))

    def _keep(self, name: str, pool: Pool, done: int, tally: Tally) -> None:
        """Keep what was made so far; where that fails the checkpoint matters more."""
        try:
            self._kept.keep(name, list(pool), done, asdict(tally))
        except (OSError, StoreError) as error:
            log.warning("the answers made so far could not be kept (%s); they will be made again", error)

    def _take_up(self, pool: Pool, name: str) -> tuple[int, Tally]:
        """Put what a stopped attempt has kept into the pool; return how far it came on every rank, and its sums."""
        names = self._job.rewards.names
        kept = self._kept.find(name)
        done = 0 if kept is None else kept.done
        negative, most = max_over_ranks([-float(done), float(done)], self._world)
        if kept is None or -negative != most:  # some rank has lost its part: all begin again
            return 0, Tally(names=names, terms=(0.0,) * len(names))
        pool.add_stored(kept.experiences)
        return done, Tally(**{**kept.sums, "names": names, "terms": tuple(kept.sums["terms"])})

    def forget_kept(self) -> None:
        """Delete what was taken up, once it is learnt from."""
        self._kept.forget()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        modules = [self._policy.loss, self._critic.loss]
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield

    def _asked_to_stop(self) -> bool:
        return sum_over_ranks([float(self._context.stop.is_set())], self._world)[0] > 0

    def _chunk(
        self,
        pool: Pool,
        tally: Tally,
        prompts: Sequence[Prompt],
        places: Sequence[int],
        update: int,
        progress: PpoProgress,
        most: int,
    ) -> None:
        """Answer some prompts, judge the answers, and add both to the pool. `most`: prompts of the rank that has
        most."""
        keys = [(self._context.seed, KEY_SAMPLING, progress.rollbacks, update, place) for place in places]
        sampled = self._sampler.answer([prompt.ids for prompt in prompts], keys)
        judged = [self._judged(prompt, answer) for prompt, answer in zip(prompts, sampled, strict=True)]
        scores = self._scores(judged, self._job.rewards.score(judged))
        experiences: list[Experience] = []
        for start in range(0, most, self._scoring_rows):
            part = slice(start, start + self._scoring_rows)
            pairs = [(prompt.ids, answer.ids) for prompt, answer in zip(prompts[part], sampled[part], strict=True)]
            experiences += self._ask(pairs, [score.total for score in scores[part]], tally, progress.kl_coefficient)
        for experience, answer, item, score in zip(experiences, sampled, judged, scores, strict=True):
            _count(tally, experience, answer, item, score)
        if experiences:
            pool.add(experiences)

    def _judged(self, prompt: Prompt, answer: Sampled) -> Judged:
        ids = answer.ids[:-1] if answer.ended else answer.ids
        text = self._job.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Judged(prompt.messages, text, len(ids), answer.ended, prompt.domain)

    def _scores(self, judged: Sequence[Judged], judgements: Sequence[Judgement]) -> list[Judgement]:
        """Return the judgements, with the price of an answer that did not end by itself."""
        price = self._config.rollout.missing_end_reward
        if price is None:
            return list(judgements)
        return [
            found if item.ended else Judgement(price, found.terms)
            for item, found in zip(judged, judgements, strict=True)
        ]

    def _ask(
        self, pairs: Sequence[tuple[Ids, Ids]], scores: Sequence[float], tally: Tally, price: float
    ) -> list[Experience]:
        """Ask policy, reference and critic about every token of some answers."""
        batch = collate_answers(pairs).to(self._policy.device)
        log_probs, entropies = (found.cpu() for found in self._policy.loss(batch))
        reference = self._reference.log_probs(batch).cpu()
        values = self._critic.loss(batch).cpu()
        if not pairs:
            return []
        mask = torch.arange(max(batch.lengths)) < torch.tensor(batch.lengths)[:, None]
        token_kl = _padded(k1(log_probs, reference), mask)
        rewards = token_rewards(torch.tensor(scores, dtype=torch.float32), token_kl, mask, price)
        policy = self._config.policy
        expected = _padded(values, mask)
        advantages, returns = generalized_advantages(rewards, expected, mask, policy.gamma, policy.gae_lambda)
        tally.kl += float(answer_sums(token_kl, mask).double().sum())
        tally.entropy += float(entropies.double().sum())
        tally.value_error += float(0.5 * (expected - returns)[mask].double().square().sum())
        flat = (log_probs, values, advantages[mask], returns[mask])
        columns = zip(*(torch.split(item.float(), list(batch.lengths)) for item in flat), strict=True)
        return [
            Experience(prompt, answer, *(column.numpy() for column in per_token))
            for (prompt, answer), per_token in zip(pairs, columns, strict=True)
        ]


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    """Return values of tokens [M] in rows [B, A], 0 behind each answer's end."""
    return torch.zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, flat.float())


def _count(tally: Tally, experience: Experience, answer: Sampled, judged: Judged, score: Judgement) -> None:
    tally.answers += 1
    tally.tokens += len(experience.answer)
    tally.model_tokens += experience.num_tokens
    tally.longest = max(tally.longest, experience.num_tokens)
    tally.ended += answer.ended
    tally.empty += not judged.answer.strip()
    tally.reward += score.total
    tally.reward_squares += score.total**2
    tally.max_abs_reward = max(tally.max_abs_reward, abs(score.total))
    tally.advantage += float(experience.advantages.astype(np.float64).sum())
    tally.advantage_squares += float(np.square(experience.advantages.astype(np.float64)).sum())
    tally.terms = tuple(old + score.terms[name] for old, name in zip(tally.terms, tally.names, strict=True))


def share_tally(tally: Tally, world: World) -> Tally:
    """Return the sums over all ranks, on every rank."""
    if world.size == 1:
        return tally
    summed = ("answers", "tokens", "model_tokens", "ended", "empty")
    real = ("reward", "reward_squares", "kl", "entropy", "value_error", "advantage", "advantage_squares")
    sums = sum_over_ranks([float(getattr(tally, name)) for name in (*summed, *real)] + list(tally.terms), world)
    longest, extreme = max_over_ranks([float(tally.longest), tally.max_abs_reward], world)
    whole: dict[str, Any] = dict(zip(summed, map(round, sums), strict=False))
    parts: dict[str, Any] = dict(zip(real, sums[len(summed) :], strict=False))
    terms = tuple(sums[len(summed) + len(real) :])
    return Tally(**whole, **parts, longest=round(longest), max_abs_reward=extreme, terms=terms, names=tally.names)
