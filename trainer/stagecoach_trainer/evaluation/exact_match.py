"""Exact match: the share of conversations whose last answer the model reproduces exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.kinds.evaluate import ExactMatch
from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.data.reading import Fetches, read_records
from stagecoach_trainer.data.records import Record, Turn
from stagecoach_trainer.generation.generation import Prompter, Report, generate
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import conversation_of

SHOWN = 8
"""Number of right and of wrong cases that the report shows."""


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer."""

    prompt: Ids
    """Token ids [T]."""

    asked: str
    """Text of the last turn, for the report."""

    reference: str
    """The right answer, without surrounding white space."""


@dataclass(frozen=True)
class ExactMatchResult:
    """The result of one task."""

    name: str
    num_questions: int
    num_right: int
    num_unended: int
    """Answers truncated at `maxNewTokens`."""

    cases: tuple[dict[str, Any], ...]
    """Some questions with reference and answer."""

    @property
    def metrics(self) -> dict[str, float]:
        return {f"{self.name}.exactMatch": self.num_right / self.num_questions}


def measure_exact_match(
    task: ExactMatch, model: Any, tokenizer: Any, context: Fetches, batch_rows: int, seed: int, report: Report
) -> ExactMatchResult:
    """Ask all questions of the task. Raises UserError for a record without an answer of the assistant."""
    questions = list(islice(_questions(task, Prompter(tokenizer, task.generation), context), task.max_samples))
    if not questions:
        raise UserError(
            f"exactMatch {task.name}: the set `{task.on.label}` has no records; it must contain conversations"
        )
    prompts = [question.prompt for question in questions]
    answers = generate(model, tokenizer, prompts, task.generation, batch_rows, seed, report)
    right = [answer.text.strip() == question.reference for question, answer in zip(questions, answers, strict=True)]
    shown = _first(right, True) + _first(right, False)
    return ExactMatchResult(
        name=task.name,
        num_questions=len(questions),
        num_right=sum(right),
        num_unended=sum(not answer.ended for answer in answers),
        cases=tuple(
            {
                "asked": questions[index].asked,
                "reference": questions[index].reference,
                "answer": answers[index].text.strip(),
                "right": right[index],
            }
            for index in sorted(shown)
        ),
    )


def _first(right: list[bool], wanted: bool) -> list[int]:
    return [index for index, value in enumerate(right) if value is wanted][:SHOWN]


def _questions(task: ExactMatch, prompter: Prompter, context: Fetches) -> Iterator[Question]:
    for record in read_records(context, task.on):
        last = max((index for index, turn in enumerate(record.messages) if _is_answer(turn)), default=0)
        if last == 0:
            raise UserError(
                f"{record.where}: exactMatch {task.name} needs conversations in which the assistant answers; "
                "this record has no such turn"
            )
        yield _question(record, last, prompter)


def _is_answer(turn: Turn) -> bool:
    return turn.role is Role.ASSISTANT and not turn.calls


def _question(record: Record, last: int, prompter: Prompter) -> Question:
    turns = record.messages[:last]
    conversation = conversation_of(replace(record, messages=turns))
    asked = "\n".join(part for part in (turns[-1].content, turns[-1].input) if part)
    return Question(
        prompt=prompter.encode(conversation.messages, conversation.tools),
        asked=asked,
        reference=record.messages[last].content.strip(),
    )
