"""Comparison by reward: a model and its rivals answer the same prompts, and one reward scores all answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from stagecoach_trainer.samples.conversation import Conversation, conversation_of
from stagecoach_trainer.text.templates import message_of

SHOWN = 6
"""Number of prompts for which the report shows all models' answers."""

OWN = "model"
"""Name of the evaluated model in tables."""

ModelAndTokenizer = tuple[Any, Any]
"""A model on its device in evaluation mode, and its tokenizer."""


@dataclass(frozen=True)
class ModelScores:
    """One model's answers and their scores."""

    answers: tuple[Completion, ...]
    scores: tuple[Score, ...]

    @property
    def reward(self) -> float:
        return _mean([score.total for score in self.scores])

    def as_json(self) -> dict[str, Any]:
        names = self.scores[0].terms
        return {
            "reward": self.reward,
            "terms": {name: _mean([score.terms[name] for score in self.scores]) for name in names},
            "meanTokens": _mean([answer.num_tokens for answer in self.answers]),
            "ended": _mean([float(answer.ended) for answer in self.answers]),
        }


@dataclass(frozen=True)
class RewardComparison:
    """The result of one task."""

    name: str
    models: Mapping[str, ModelScores]
    """Results by name; the first is `OWN`, the evaluated model."""

    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Figures of the terms, such as requests."""

    @property
    def metrics(self) -> dict[str, float]:
        own, *rivals = self.models.values()
        names = list(self.models)[1:]
        found = {f"{self.name}.reward": own.reward}
        found |= {f"{self.name}.reward.{name}": rival.reward for name, rival in zip(names, rivals, strict=True)}
        shares = (win_rate(own.scores, rival.scores) for rival in rivals)
        return found | {f"{self.name}.winRate.{name}": share for name, share in zip(names, shares, strict=True)}

    def as_json(self) -> dict[str, Any]:
        prompts = [prompt_text(answer.prompt) for answer in next(iter(self.models.values())).answers]
        cases = [
            {
                "prompt": prompt,
                "answers": {name: found.answers[index].answer for name, found in self.models.items()},
                "rewards": {name: found.scores[index].total for name, found in self.models.items()},
            }
            for index, prompt in enumerate(prompts[:SHOWN])
        ]
        models = {name: found.as_json() for name, found in self.models.items()}
        return {"prompts": len(prompts), "models": models, "terms": dict(self.figures), "cases": cases}


def reward_metrics(task: RewardTask) -> list[str]:
    """Return the names of the metrics of a task."""
    rewards = [f"{task.name}.reward.{rival.name}" for rival in task.rivals]
    return [f"{task.name}.reward", *rewards, *(f"{task.name}.winRate.{rival.name}" for rival in task.rivals)]


def win_rate(own: Sequence[Score], other: Sequence[Score]) -> float:
    """Return the share of prompts for which `own` scores higher; ties count ½."""
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
    """Generate the answers of all models, one model after the other, and score them.

    `open_rival` loads the rival at an index; a rival is released before the next one is loaded.
    Raises UserError for records without a prompt, and as the terms do.
    """
    prompts = list(islice(_prompts(task, context), task.max_samples))
    if not prompts:
        raise UserError(f"rewards {task.name}: the set `{task.on.label}` has no records; it must contain prompts")
    total = len(prompts) * (1 + len(task.rivals))

    def scores_of(opened: ModelAndTokenizer, position: int) -> ModelScores:
        def report_of_all(done: int, _: int) -> None:
            report(position * len(prompts) + done, total)

        answers = _answers(task, opened, prompts, batch_rows, seed, report_of_all)
        return ModelScores(answers, tuple(rewards.score(answers)))

    models = {OWN: scores_of(subject, 0)}
    for index, rival in enumerate(task.rivals):
        models[rival.name] = scores_of(open_rival(index), index + 1)
    return RewardComparison(task.name, models, rewards.figures())


def _answers(
    task: RewardTask,
    opened: ModelAndTokenizer,
    prompts: Sequence[Conversation],
    batch_rows: int,
    seed: int,
    report: Report,
) -> tuple[Completion, ...]:
    model, tokenizer = opened
    prompter = Prompter(tokenizer, task.generation)
    ids = [prompter.encode(prompt.messages, prompt.tools) for prompt in prompts]
    generated = generate(model, tokenizer, ids, task.generation, batch_rows, seed, report)
    return tuple(
        Completion(prompt.messages, answer.text, answer.num_tokens, answer.ended, task.on.domain, tools=prompt.tools)
        for prompt, answer in zip(prompts, generated, strict=True)
    )


def _prompts(task: RewardTask, context: Fetches) -> Iterator[Conversation]:
    for record in read_records(context, task.on):
        yield prompt_of(record, f"rewards {task.name}")


def prompt_of(record: Record, what: str) -> Conversation:
    """Return the turns of a record that a model replies to: all but a final answer. A document is one user turn.

    Raises UserError if no turn is left.
    """
    if record.text is not None:
        return Conversation((message_of(Role.USER, record.text),), (), record.where)
    turns = record.messages
    if turns and turns[-1].role is Role.ASSISTANT:
        turns = turns[:-1]
    if not turns:
        raise UserError(f"{record.where}: {what} needs prompts; this record has no turn before the answer")
    return conversation_of(replace(record, messages=turns, answers=()))
