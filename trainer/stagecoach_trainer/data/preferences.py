"""Convert raw values to preference records: a prompt, and answers to it that people compared.

Whatever the layout, ranked answers are returned best first, with ranks from 1; equal ranks are ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, Format
from stagecoach_trainer.data.contract import LABEL_FIELDS, Content, verdict_of
from stagecoach_trainer.data.messages import listed
from stagecoach_trainer.data.names import Names
from stagecoach_trainer.data.records import Answer, Record, RecordError, Turn
from stagecoach_trainer.data.turns import (
    MESSAGES_TURNS,
    REASONING_FIELDS,
    Parse,
    TurnKeys,
    describe,
    list_of_turns,
    optional_string_of,
    string_of,
    tools_of,
    turn_keys_of,
    turn_of,
    unread_in_turns,
    with_lists,
)
from stagecoach_trainer.data.verdicts import (
    COMPARISON_FIGURES,
    PAIR_SCORES,
    VERDICT_FIELDS,
    is_tie,
    marks_of,
    ranks_disagree,
    scores_disagree,
)

PROMPT_FIELDS = ("prompt", "conversations", "messages", "question", "instruction")
"""Fields that may contain the prompt of a preference record, in order of precedence."""

TURN_LISTS = ("messages", "conversations")
MIN_ANSWERS, MAX_ANSWERS = 2, 64
SEPARATE_MARKS = ("scores", "ranks", "ratings", "rewards", "labels")
"""Fields that may have the marks of ranked answers in a list of their own, as RRHF's data does."""

ANSWER_FIELDS = ("content", "text", "answer", "value")
"""Fields that may contain the text of a ranked answer, in order of precedence."""


def detect_preferences(value: Mapping[str, Any], fields: FieldMapping) -> list[Format]:
    """Return the layouts of preferences that the first record of a source fits."""
    found = []
    if "completion_a" in value and "completion_b" in value:
        found.append(Format.COMPARISON)
    if (fields.chosen or "chosen") in value and (fields.rejected or "rejected") in value:
        found.append(Format.PAIRS)
    answers = value.get(fields.answers or "answers")
    if isinstance(answers, list) and len(answers) >= MIN_ANSWERS and _prompt_field(value, fields.prompt) is not None:
        found.append(Format.RANKED)
    label = label_field(value, fields)
    if label in value and (fields.completion or "completion") in value:
        found.append(Format.LABELS)
    is_judged = verdict_of(value.get(label)) is not None
    return found or ([Format.LABELS] if is_judged and _has_answer(value, fields) else [])


def label_field(value: Mapping[str, Any], fields: FieldMapping) -> str:
    """Return the field that states whether an answer is good."""
    return fields.label or next((name for name in LABEL_FIELDS if name in value), LABEL_FIELDS[0])


def _has_answer(value: Mapping[str, Any], fields: FieldMapping) -> bool:
    """Return whether a record without a separate completion ends with an answer."""
    turns = value.get(_turn_list(value, fields))
    last = turns[-1] if isinstance(turns, list) and turns else None
    if isinstance(last, Mapping):
        keys = turn_keys_of(last)
        return keys.roles.get(str(last.get(keys.role))) is Role.ASSISTANT
    return (fields.instruction or "instruction") in value and (fields.output or "output") in value


def _turn_list(value: Mapping[str, Any], fields: FieldMapping) -> str:
    return fields.messages or next((name for name in TURN_LISTS if name in value), TURN_LISTS[0])


def preference_parser(format_: Format, names: Names) -> Parse:
    """Return the parser of a preference source."""
    parser = _Parser(names)
    match format_:
        case Format.PAIRS:
            return parser.pair
        case Format.COMPARISON:
            return parser.comparison
        case Format.RANKED:
            return parser.ranked
        case Format.LABELS:
            return parser.label
        case _:
            raise ValueError(f"{format_} is not a layout of preferences")


def canonical_preferences(value: Mapping[str, Any]) -> Record:
    """Parse a preference record of a `data` artifact. Raises RecordError."""
    turns = list_of_turns(value.get("messages"), "messages", MESSAGES_TURNS)
    answers = []
    for index, item in enumerate(_items(value, "answers")):
        if not isinstance(item, Mapping):
            raise RecordError(f"`answers[{index}]` must be an object, got {type(item).__name__}")
        rank, liked = item.get("rank"), item.get("liked")
        if not ((isinstance(rank, int) and liked is None) or (isinstance(liked, bool) and rank is None)):
            raise RecordError(f"`answers[{index}]` must have a `rank`, a whole number, or `liked`, true or false")
        said = turn_of({**item, "role": "assistant"}, MESSAGES_TURNS)
        answers.append(Answer(said.content, rank, liked, said.reasoning, said.calls))
    return Record(messages=tuple(turns), tools=tools_of(value), answers=tuple(answers))


class _Parser:
    """Parses preference records, one method for each layout. Raises RecordError."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._fields = names.fields

    # -- layouts -------------------------------------------------------------------------------------------------------

    def pair(self, value: Mapping[str, Any]) -> Record:
        names = (self._fields.chosen or "chosen", self._fields.rejected or "rejected")
        prompt = self._optional_prompt(value, self._fields.prompt)
        if prompt is None:
            prompt, answers = self._pair_without_prompt(value, names)
        else:
            answers = [self._answer(value, name, prompt) for name in names]
        judged = [_judged(answers[0], rank=1), _judged(answers[1], rank=2)]
        scores = [name for pair in PAIR_SCORES for name in pair]
        record = self._record(value, prompt, judged, (*names, *scores), lists=names)
        return replace(record, scores_disagree=True) if scores_disagree(value) else record

    def _pair_without_prompt(self, value: Mapping[str, Any], names: tuple[str, str]) -> tuple[list[Turn], list[Turn]]:
        """Return the common first turns of two conversations and their last turns, as in data sets of the HH kind."""
        if not all(isinstance(value.get(name), list) for name in names):
            self._required_prompt(value, self._fields.prompt)
        chosen, rejected = ([*self._names.system(value), *self._turns(value, name)] for name in names)
        if chosen[:-1] != rejected[:-1]:
            raise RecordError(
                f"`{names[0]}` and `{names[1]}` must be the same conversation up to their last turns; give the prompt "
                "in `prompt`"
            )
        last = (_only_answer(turns[-1:], name) for turns, name in zip((chosen, rejected), names, strict=True))
        return chosen[:-1], list(last)

    def comparison(self, value: Mapping[str, Any]) -> Record:
        """Parse HuangDi's layout, in which `completion_a` is the better answer; verdicts elsewhere must agree."""
        names = (self._fields.chosen or "completion_a", self._fields.rejected or "completion_b")
        asked = self._fields.prompt or "user_input"
        prompt = self._required_prompt(value, asked)
        better, other = (self._answer(value, name, prompt) for name in names)
        tie = is_tie(value, names, (better.content, other.content), self._fields.label)
        judged = [_judged(better, rank=1), _judged(other, rank=1 if tie else 2)]
        verdicts = (self._fields.label,) if self._fields.label else VERDICT_FIELDS
        reads = (*names, *verdicts, *COMPARISON_FIGURES)
        return self._record(value, prompt, judged, reads, lists=names, prompt_read=asked)

    def ranked(self, value: Mapping[str, Any]) -> Record:
        name = self._fields.answers or "answers"
        items = _items(value, name)
        _refuse_separate_marks(value, items, name, self._fields.ignore)
        if not MIN_ANSWERS <= len(items) <= MAX_ANSWERS:
            raise RecordError(f"`{name}` must have {MIN_ANSWERS} to {MAX_ANSWERS} answers, got {len(items)}")
        prompt = self._required_prompt(value, self._fields.prompt)
        if all(isinstance(item, str) for item in items):
            answers = [Answer(string_of({name: item}, name), rank) for rank, item in enumerate(items, 1)]
            return self._record(value, prompt, answers, (name,))
        record = self._record(value, prompt, _ranked_objects(items, name), (name,))
        unread = unread_in_turns([_only_unread(item) for item in items], name, MESSAGES_TURNS, self._fields.ignore)
        return replace(record, unread=(*record.unread, *sorted(unread)), scores_disagree=ranks_disagree(items))

    def label(self, value: Mapping[str, Any]) -> Record:
        value = with_lists(value, (self._fields.messages,) if self._fields.messages else TURN_LISTS)
        name = label_field(value, self._fields)
        liked = verdict_of(value.get(name))
        if liked is None:
            got = f"{value[name]!r:.60}" if name in value else describe(value, name)
            raise RecordError(f'`{name}` must be true or false, 1 or 0, "good" or "bad", got {got}')
        others = [
            other for other in LABEL_FIELDS if self._fields.label is None and verdict_of(value.get(other)) is not None
        ]
        if any(verdict_of(value[other]) is not liked for other in others):
            raise RecordError(f"{' and '.join(f'`{other}`' for other in others)} contradict each other; leave one out")
        completion = self._fields.completion or "completion"
        if completion in value or not _has_answer(value, self._fields):
            prompt = self._required_prompt(value, self._fields.prompt)
            said = self._answer(value, completion, prompt)
            return self._record(value, prompt, [_judged(said, liked=liked)], (name, completion), lists=(completion,))
        return self._labelled_conversation(value, name, liked)

    def _labelled_conversation(self, value: Mapping[str, Any], label: str, liked: bool) -> Record:
        """Parse a conversation whose last answer is judged, as turns (TRL, LLaMA-Factory) or in Alpaca's fields."""
        turn_list = _turn_list(value, self._fields)
        if turn_list in value:
            *prompt, last = [*self._names.system(value), *self._turns(value, turn_list)]
            answer = _judged(_only_answer([last], turn_list), liked=liked)
            return self._record(value, prompt, [answer], (label, turn_list), lists=(turn_list,), prompt_read=turn_list)
        output, instruction = self._fields.output or "output", self._fields.instruction or "instruction"
        prompt = self._required_prompt(value, instruction)
        answer = Answer(string_of(value, output), liked=liked)
        return self._record(value, prompt, [answer], (label, output), prompt_read=instruction)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _record(
        self,
        value: Mapping[str, Any],
        prompt: Sequence[Turn],
        answers: Sequence[Answer],
        reads: Sequence[str],
        lists: Sequence[str] = (),
        prompt_read: str | None = None,
    ) -> Record:
        """Return the record of a prompt and its answers, with the fields that were not read.

        Args:
            reads: Fields that were read, without the prompt's.
            lists: Those of them that may hold turns.
            prompt_read: Field of the prompt. If it is None, it is looked for as `_optional_prompt` does.
        """
        if not prompt:
            raise RecordError("the prompt has no turn, so there is nothing that the answers reply to")
        if prompt[-1].role is Role.ASSISTANT:
            raise RecordError(
                "the prompt ends with a turn of the assistant, and the answers would follow it; end it with the user's "
                "turn"
            )
        field = prompt_read or _prompt_field(value, self._fields.prompt)
        text = [self._fields.input or "input", self._fields.history or "history"] if _is_text(value, field) else []
        contract = self._names.contract(Content.PREFERENCES, *reads, *text, *([field] if field else []))
        unread = list(contract.unread(value))
        for name in dict.fromkeys([*lists, *([field] if field else [])]):
            if isinstance(value.get(name), list | Mapping):
                unread += sorted(unread_in_turns(value[name], name, self._keys(value[name]), self._fields.ignore))
        return Record(
            messages=tuple(prompt), tools=self._names.tools(value), answers=tuple(answers), unread=tuple(unread)
        )

    def _required_prompt(self, value: Mapping[str, Any], name: str | None) -> list[Turn]:
        prompt = self._optional_prompt(value, name)
        if prompt is None:
            allowed = f"`{name}`" if name else ", ".join(f"`{field}`" for field in PROMPT_FIELDS)
            there = listed(sorted(map(str, value))) or "none"
            raise RecordError(f"there is no prompt: it is looked for under {allowed} (there are: {there})")
        return prompt

    def _optional_prompt(self, value: Mapping[str, Any], name: str | None) -> list[Turn] | None:
        """Return the turns that the answers reply to. None if the value has no field for them."""
        field = _prompt_field(value, name)
        if field is None:
            return None
        system = self._names.system(value)
        if isinstance(value[field], str):
            more = optional_string_of(value, self._fields.input or "input") or ""
            return [*system, *self._names.history(value), Turn(Role.USER, string_of(value, field), more)]
        if not isinstance(value[field], list):
            raise RecordError(f"`{field}` must be a string or a list of turns, got {describe(value, field)}")
        return [*system, *self._turns(value, field)]

    def _turns(self, value: Mapping[str, Any], name: str) -> list[Turn]:
        return list_of_turns(value[name], name, self._keys(value[name]))

    def _keys(self, items: Any) -> TurnKeys:
        first = items[0] if isinstance(items, list) and items else items
        return self._names.turns or turn_keys_of(first)

    def _answer(self, value: Mapping[str, Any], name: str, prompt: Sequence[Turn]) -> Turn:
        """Return the assistant's turn of an answer: a string, a turn, or turns that may repeat the prompt before it."""
        answer = value.get(name)
        if isinstance(answer, str):
            return Turn(Role.ASSISTANT, string_of(value, name))
        if isinstance(answer, Mapping):
            try:
                return _only_answer([turn_of(answer, self._keys(answer))], name)
            except RecordError as error:
                raise RecordError(f"`{name}`: {error}") from error
        if not isinstance(answer, list):
            raise RecordError(f"`{name}` must be a string, a turn or a list of turns, got {describe(value, name)}")
        turns = self._turns(value, name)
        # The answer's turns may repeat the prompt with or without its system prompt.
        for front in (list(prompt), [turn for turn in prompt if turn.role is not Role.SYSTEM]):
            if len(turns) > len(front) and turns[: len(front)] == front:
                return _only_answer(turns[len(front) :], name)
        return _only_answer(turns, name)


def _refuse_separate_marks(value: Mapping[str, Any], items: Sequence[Any], name: str, ignores: Sequence[str]) -> None:
    """Raise RecordError if a list next to the answers has a mark for each: it may order them in another way."""
    for field in SEPARATE_MARKS:
        marks = value.get(field)
        if isinstance(marks, list) and len(marks) == len(items) and field not in ignores:
            raise RecordError(
                f"`{field}` has a mark for each of `{name}`, which this layout does not read: write each answer as an "
                "object with its `score` or `rank`; to leave it out knowingly, list it in `fields.ignore`"
            )


def _ranked_objects(items: Sequence[Any], name: str) -> list[Answer]:
    """Return answers that have a `rank` (1 is best) or a `score` (higher is better) each, best first."""
    if not all(isinstance(item, Mapping) for item in items):
        raise RecordError(f"`{name}` must be all strings, the best first, or all objects with `rank` or `score`")
    marks = marks_of(items, name)
    said = [_said(item, f"{name}[{index}]") for index, item in enumerate(items)]
    ranks = {mark: rank for rank, mark in enumerate(sorted(set(marks)), 1)}
    ranked = [_judged(turn, rank=ranks[mark]) for turn, mark in zip(said, marks, strict=True)]
    return sorted(ranked, key=lambda answer: answer.rank or 0)


def _only_unread(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a ranked answer without the fields that it is read from."""
    content = next((field for field in ANSWER_FIELDS if field in item), "content")
    return {name: held for name, held in item.items() if name not in ("rank", "score", content)}


def _judged(said: Turn, rank: int | None = None, liked: bool | None = None) -> Answer:
    return Answer(said.content, rank, liked, said.reasoning, said.calls)


def _prompt_field(value: Mapping[str, Any], name: str | None) -> str | None:
    return next((field for field in ((name,) if name else PROMPT_FIELDS) if value.get(field) is not None), None)


def _is_text(value: Mapping[str, Any], field: str | None) -> bool:
    return field is not None and isinstance(value.get(field), str)


def _only_answer(turns: Sequence[Turn], name: str) -> Turn:
    """Return the only turn, which must be the assistant's."""
    if len(turns) != 1 or turns[0].role is not Role.ASSISTANT:
        roles = ", ".join(turn.role.value for turn in turns) or "none"
        raise RecordError(f"`{name}` must end in one turn of the assistant behind the prompt, got turns of: {roles}")
    return turns[0]


def _said(item: Mapping[str, Any], where: str) -> Turn:
    """Return the turn of the assistant in an answer with a judgement."""
    name = next((field for field in ANSWER_FIELDS if field in item), "content")
    more = {field: item[field] for field in (*REASONING_FIELDS, "tool_calls") if field in item}
    try:
        return turn_of({"role": "assistant", "content": item.get(name), **more}, MESSAGES_TURNS)
    except RecordError as error:
        raise RecordError(f"`{where}`: {error}") from error


def _items(value: Mapping[str, Any], name: str) -> list[Any]:
    items = value.get(name)
    if not isinstance(items, list):
        raise RecordError(f"`{name}` must be a list of answers, got {describe(value, name)}")
    return items
