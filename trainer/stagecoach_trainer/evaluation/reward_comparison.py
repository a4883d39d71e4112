"""Comparison by reward: a model and its rivals answer the same prompts, and one sum of terms judges all answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.kinds.evaluate import RewardTask
from stagecoach_trainer.data.reading import Fetches, read_records
from stagecoach_trainer.data.records import Record
from stagecoach_trainer.generation.generation import Prompter, Report, generate
from stagecoach_trainer.rewards import Completion, RewardSum, Score
from stagecoach_trainer.rewards.term import prompt_text
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.templates import Message, message_of

SHOWN = 6
"""Prompts whose answers the report shows side by side."""

OWN = "model"
"""What tables call the model that is measured."""

ModelAndTokenizer = tuple[Any, Any]
"""A model, ready to measure, and its tokenizer."""


@dataclass(frozen=True)
class ModelScores:
    """What one model made of the prompts."""

    answers: tuple[Completion, ...]
    judgements: tuple[Score, ...]

    @property
    def reward(self) -> float:
        return _mean([judgement.total for judgement in self.judgements])

    def as_json(self) -> dict[str, Any]:
        names = self.judgements[0].terms
        return {
            "reward": self.reward,
            "terms": {name: _mean([judgement.terms[name] for judgement in self.judgements]) for name in names},
            "meanTokens": _mean([answer.num_tokens for answer in self.answers]),
            "ended": _mean([float(answer.ended) for answer in self.answers]),
        }


@dataclass(frozen=True)
class RewardComparison:
    """How one task went."""

    name: str
    models: Mapping[str, ModelScores]
    """By name: the model itself is `OWN`, in the first place."""

    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Counts of the terms, such as requests made."""

    @property
    def metrics(self) -> dict[str, float]:
        own, *rivals = self.models.values()
        names = list(self.models)[1:]
        found = {f"{self.name}.reward": own.reward}
        found |= {f"{self.name}.reward.{name}": rival.reward for name, rival in zip(names, rivals, strict=True)}
        shares = (win_rate(own.judgements, rival.judgements) for rival in rivals)
        return found | {f"{self.name}.winRate.{name}": share for name, share in zip(names, shares, strict=True)}

    def as_json(self) -> dict[str, Any]:
        prompts = [prompt_text(answer.prompt) for answer in next(iter(self.models.values())).answers]
        cases = [
            {
                "prompt": prompt,
                "answers": {name: found.answers[index].answer for name, found in self.models.items()},
                "rewards": {name: found.judgements[index].total for name, found in self.models.items()},
            }
            for index, prompt in enumerate(prompts[:SHOWN])
        ]
        models = {name: found.as_json() for name, found in self.models.items()}
        return {"prompts": len(prompts), "models": models, "terms": dict(self.figures), "cases": cases}


def reward_metrics(task: RewardTask) -> list[str]:
    """Return the names of the metrics a task will give."""
    rewards = [f"{task.name}.reward.{rival.name}" for rival in task.rivals]
    return [f"{task.name}.reward", *rewards, *(f"{task.name}.winRate.{rival.name}" for rival in task.rivals)]


def win_rate(own: Sequence[Score], other: Sequence[Score]) -> float:
    """Return the share of prompts for which `own` is worth more; a tie is half a win."""
    wins = [(one.total > two.total) + 0.5 * (one.total == two.total) for one, two in zip(own, other, strict=True)]
    return _mean(wins)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compare_by_reward(
    task: RewardTask,
    rewards: RewardSum,
    subject: ModelAndTokenizer,
    open_rival: Callable[[int], ModelAndTokenizer],
    context: Fetches,
    batch_rows: int,
    seed: int,
    report: Report,
) -> RewardComparison:
    """Let all models answer, one after the other, and judge what they say.

    `open_rival` loads the rival at an index; it is let go of before the next one is loaded.
    Raises UserError for records without a prompt, and as the terms do.
    """
    prompts = list(islice(_prompts(task, context), task.max_samples))
    if not prompts:
        raise UserError(f"rewards {task.name}: the set `{task.on.label}` has no records; give prompts")
    total = len(prompts) * (1 + len(task.rivals))

    def answered(opened: ModelAndTokenizer, place: int) -> ModelScores:
        def say(done: int, _: int) -> None:
            report(place * len(prompts) + done, total)

        answers = _answers(task, opened, prompts, batch_rows, seed, say)
        return ModelScores(answers, tuple(rewards.score(answers)))

    models = {OWN: answered(subject, 0)}
    for index, rival in enumerate(task.rivals):
        models[rival.name] = answered(open_rival(index), index + 1)
    return RewardComparison(task.name, models, rewards.figures())


def _answers(
    task: RewardTask,
    opened: ModelAndTokenizer,
    prompts: Sequence[tuple[Message, ...]],
    batch_rows: int,
    seed: int,
    say: Report,
) -> tuple[Completion, ...]:
    model, tokenizer = opened
    prompter = Prompter(tokenizer, task.generation)
    ids = [prompter.encode(prompt) for prompt in prompts]
    said = generate(model, tokenizer, ids, task.generation, batch_rows, seed, say)
    return tuple(
        Completion(prompt, answer.text, answer.num_tokens, answer.ended, task.on.domain)
        for prompt, answer in zip(prompts, said, strict=True)
    )


def _prompts(task: RewardTask, context: Fetches) -> Iterator[tuple[Message, ...]]:
    for record in read_records(context, task.on):
        yield prompt_of(record, f"rewards {task.name}")


def prompt_of(record: Record, what: str) -> tuple[Message, ...]:
    """Return the turns of a record that are replied to: a last answer is left out, a document is what a user says.

    Raises UserError where nothing is left.
    """
    if record.text is not None:
        return (message_of(Role.USER, record.text),)
    turns = record.messages
    if turns and turns[-1].role is Role.ASSISTANT:
        turns = turns[:-1]
    if not turns:
        raise UserError(f"{record.where}: {what} needs prompts; in this record there is nothing in front of the answer")
    return tuple(message_of(turn.role, turn.content, turn.input) for turn in turns)
