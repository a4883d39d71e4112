"""Preference records in every layout; expectations are written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.conversation import Role
from stagecoach_api.kinds.data import DataStage
from stagecoach_api.references import FieldMapping, Format, RecordSource, Split
from stagecoach_trainer.data.formats import detect_format, parser_for
from stagecoach_trainer.data.reading import read_index, read_records
from stagecoach_trainer.data.records import Answer, Record, RecordError, Turn, record_to_json, require_no_answers
from stagecoach_trainer.data.steps import content_hash, prompt_hash
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.stages.data import run
from tests import SHARED_DATA as SHARED
from tests.trainer.data.makers import make_context, write_jsonl

NO_FIELDS = FieldMapping()
QUESTION = (Turn(Role.USER, "q"),)
PAIR = (Answer("good", rank=1), Answer("bad", rank=2))


def parse(value: dict[str, Any], format_: Format, fields: FieldMapping = NO_FIELDS) -> Record:
    return parser_for(format_, fields, value)(value)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HH = {
    "chosen": [turn("user", "q"), turn("assistant", "good")],
    "rejected": [turn("user", "q"), turn("assistant", "bad")],
}


@pytest.mark.parametrize(
    ("value", "format_", "expected"),
    [
        pytest.param({"prompt": "q", "chosen": "good", "rejected": "bad"}, Format.PAIRS, QUESTION, id="strings"),
        pytest.param(
            {"instruction": "q", "input": "it", "chosen": "good", "rejected": "bad"},
            Format.PAIRS,
            (Turn(Role.USER, "q", "it"),),
            id="an instruction with input",
        ),
        pytest.param(
            {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
            Format.PAIRS,
            (Turn(Role.SYSTEM, "s"), *QUESTION),
            id="a separate system prompt",
        ),
        pytest.param(
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            Format.PAIRS,
            (Turn(Role.SYSTEM, "s"), *QUESTION),
            id="ShareGPT turns",
        ),
        pytest.param(
            {
                "messages": [turn("user", "1"), turn("assistant", "2"), turn("user", "q")],
                "chosen": turn("assistant", "good"),
                "rejected": [turn("assistant", "bad")],
            },
            Format.PAIRS,
            (Turn(Role.USER, "1"), Turn(Role.ASSISTANT, "2"), *QUESTION),
            id="messages, an answer as a turn and one as a list",
        ),
        pytest.param(HH, Format.PAIRS, QUESTION, id="two conversations with the prompt in common"),
        pytest.param({"prompt": "q", **HH}, Format.PAIRS, QUESTION, id="the prompt both separate and repeated"),
        pytest.param(
            {"prompt": "q", "system": "s", **HH}, Format.PAIRS, (Turn(Role.SYSTEM, "s"), *QUESTION), id="both"
        ),
        pytest.param(
            {"user_input": "q", "completion_a": "good", "completion_b": "bad"},
            Format.COMPARISON,
            QUESTION,
            id="HuangDi's comparison",
        ),
        pytest.param({"prompt": "q", "answers": ["good", "bad"]}, Format.RANKED, QUESTION, id="ranked by place"),
        pytest.param(
            {"prompt": "q", "answers": [{"text": "bad", "rank": 7}, {"content": "good", "rank": 3}]},
            Format.RANKED,
            QUESTION,
            id="ranked by rank",
        ),
        pytest.param(
            {"question": "q", "answers": [{"answer": "bad", "score": -1.5}, {"answer": "good", "score": 2}]},
            Format.RANKED,
            QUESTION,
            id="ranked by score",
        ),
    ],
)
def test_each_layout_is_detected_and_parsed(value: dict[str, Any], format_: Format, expected: tuple[Turn, ...]) -> None:
    assert detect_format(value, NO_FIELDS) is format_
    assert parse(value, format_) == Record(messages=expected, answers=PAIR)


@pytest.mark.parametrize(
    ("label", "liked"), [(True, True), (False, False), (1, True), (0, False), ("good", True), ("Bad", False)]
)
def test_labels_mark_an_answer_as_good_or_bad(label: object, liked: bool) -> None:
    value = {"prompt": "q", "completion": "a", "label": label}
    assert detect_format(value, NO_FIELDS) is Format.LABELS
    assert parse(value, Format.LABELS).answers == (Answer("a", liked=liked),)


def test_equal_ranks_and_scores_are_ties() -> None:
    by_score = [{"text": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 1), ("d", 2))]
    found = parse({"prompt": "q", "answers": by_score}, Format.RANKED)
    assert [(answer.content, answer.rank) for answer in found.answers] == [("b", 1), ("d", 2), ("a", 3), ("c", 3)]


def test_fields_are_read_under_configured_names() -> None:
    fields = FieldMapping(prompt="ask", chosen="win", rejected="lose", answers="said", completion="reply", label="ok")
    values: list[tuple[dict[str, Any], Format]] = [
        ({"ask": "q", "win": "good", "lose": "bad", "prompt": "no"}, Format.PAIRS),
        ({"ask": "q", "said": ["good", "bad"], "answers": "no"}, Format.RANKED),
    ]
    for value, format_ in values:
        assert detect_format(value, fields) is format_
        assert parse(value, format_, fields) == Record(messages=QUESTION, answers=PAIR)
    assert parse({"ask": "q", "win": "good", "lose": "bad"}, Format.COMPARISON, fields).answers == PAIR
    assert parse({"ask": "q", "reply": "a", "ok": 1}, Format.LABELS, fields).answers == (Answer("a", liked=True),)


COMPARED = {"user_input": "q", "completion_a": "good", "completion_b": "bad"}


@pytest.mark.parametrize(
    ("more", "second_rank"),
    [
        ({"preferred": "a"}, 2),
        ({"winner": "completion_a", "label": " A "}, 2),
        ({"better": "good"}, 2),
        ({"score_a": 9, "score_b": 2.5, "rank_a": 1, "rank_b": 2}, 2),
        ({"score_a": 9, "score_b": None}, 2),
        ({"score_a": "9", "score_b": "10e-1"}, 2),
        ({"score_a": " 3.0 ", "score_b": 3}, 1),
        ({"preferred": "tie"}, 1),
        ({"score_a": 3, "score_b": 3}, 1),
    ],
)
def test_a_comparison_may_prefer_a_or_declare_a_tie(more: dict[str, Any], second_rank: int) -> None:
    found = parse({**COMPARED, **more}, Format.COMPARISON)
    assert [answer.rank for answer in found.answers] == [1, second_rank]


@pytest.mark.parametrize(
    ("more", "got"),
    [
        ({"preferred": "b"}, "`preferred` is 'b'"),
        ({"winner": "completion_b"}, "`winner` is 'completion_b'"),
        ({"better": "bad"}, "`better` is 'bad'"),
        ({"label": 1}, "`label` is 1"),
        ({"score_a": 1, "score_b": 2}, "`score_a` is 1 and `score_b` 2"),
        ({"score_a": "3", "score_b": "9"}, "`score_a` is 3 and `score_b` 9"),
        ({"score_a": "9", "score_b": "10"}, "`score_a` is 9 and `score_b` 10"),
        ({"rank_a": 2, "rank_b": 1}, "`rank_a` is 2 and `rank_b` 1"),
    ],
)
def test_a_contradictory_comparison_is_an_error_with_its_line(tmp_path: Path, more: dict[str, Any], got: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [COMPARED, {**COMPARED, **more}])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: `completion_a` must be the preferred answer, but {got}; swap"):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(path))))


@pytest.mark.parametrize("mark", ["high", "", "1_0", "9/10", "nan", "inf", True, [3], pytest.param(10**400, id="huge")])
def test_a_score_that_is_not_numeric_is_an_error_with_its_line(tmp_path: Path, mark: object) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [COMPARED, {**COMPARED, "score_a": mark}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: `score_a` must be a number, got "):
        list(read_records(make_context(tmp_path), RecordSource(uri=str(path))))


@pytest.mark.parametrize(("key", "marks"), [("rank", ("7", "3")), ("score", ("9", "10"))])
def test_ranks_and_scores_may_be_numbers_in_quotes(key: str, marks: tuple[str, str]) -> None:
    answers = [{"text": text, key: mark} for text, mark in zip(("bad", "good"), marks, strict=True)]
    assert parse({"prompt": "q", "answers": answers}, Format.RANKED).answers == PAIR


@pytest.mark.parametrize(
    ("value", "format_", "message"),
    [
        pytest.param(
            {"chosen": "a", "rejected": "b"}, Format.PAIRS, "no prompt: it is looked for under", id="no prompt"
        ),
        pytest.param(
            {"prompt": 3, "chosen": "a", "rejected": "b"}, Format.PAIRS, "a string or a list of turns, got int", id="3"
        ),
        pytest.param({"prompt": "q", "chosen": "a"}, Format.PAIRS, "`rejected` must be a string, a turn", id="missing"),
        pytest.param(
            {"prompt": "q", "chosen": turn("user", "a"), "rejected": "b"},
            Format.PAIRS,
            "`chosen` must end in one turn of the assistant behind the prompt, got turns of: user",
            id="an answer of the user",
        ),
        pytest.param(
            {"chosen": HH["chosen"], "rejected": [turn("user", "other"), turn("assistant", "b")]},
            Format.PAIRS,
            "must be the same conversation up to their last turns",
            id="two prompts",
        ),
        pytest.param(
            {"prompt": [turn("assistant", "a")], "chosen": "a", "rejected": "b"},
            Format.PAIRS,
            "the prompt ends with a turn of the assistant",
            id="the assistant asks",
        ),
        pytest.param(
            {"chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]},
            Format.PAIRS,
            "the prompt has no turn",
            id="an empty prompt",
        ),
        pytest.param({"prompt": "q", "answers": ["a"]}, Format.RANKED, "must have 2 to 64 answers, got 1", id="one"),
        pytest.param({"prompt": "q", "answers": ["a"] * 65}, Format.RANKED, "2 to 64 answers, got 65", id="too many"),
        pytest.param({"prompt": "q", "answers": "ab"}, Format.RANKED, "must be a list of answers, got str", id="text"),
        pytest.param(
            {"prompt": "q", "answers": ["a", {"text": "b", "rank": 2}]},
            Format.RANKED,
            "must be all strings, the best first, or all objects",
            id="mixed",
        ),
        pytest.param(
            {"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "score": 2}]},
            Format.RANKED,
            r"`answers\[0\]`: every answer of a record needs one of whole numbers from 1 on as `rank`",
            id="rank and score",
        ),
        pytest.param(
            {"prompt": "q", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]},
            Format.RANKED,
            "got 0",
            id="rank 0",
        ),
        pytest.param(
            {"prompt": "q", "answers": [{"text": "a", "score": float("nan")}, {"text": "b", "score": 1}]},
            Format.RANKED,
            "got nan",
            id="a score that is not numeric",
        ),
        pytest.param(
            {"prompt": "q", "completion": "a", "label": "so so"}, Format.LABELS, "\"bad\", got 'so so'", id="so so"
        ),
        pytest.param({"prompt": "q", "completion": "a", "label": 2}, Format.LABELS, "got 2", id="label 2"),
        pytest.param({"prompt": "q", "completion": "a"}, Format.LABELS, "got no such field", id="no label"),
    ],
)
def test_a_malformed_preference_is_reported_by_field(value: dict[str, Any], format_: Format, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse(value, format_)


def test_questions_with_answers_in_other_shapes_are_not_rankings() -> None:
    dialogue = {"messages": [turn("user", "q"), turn("assistant", "a")], "answers": {"text": ["a"]}}
    assert detect_format(dialogue, NO_FIELDS) is Format.MESSAGES
    assert detect_format({"text": "a", "label": 1}, NO_FIELDS) is Format.TEXT


# -- the data stage ----------------------------------------------------------------------------------------------------


def data_stage(path: Path, **fields: Any) -> DataStage:
    return DataStage.model_validate({"sources": [{"uri": str(path)}], **fields}, by_alias=True, by_name=False)


def test_a_real_file_survives_a_round_trip_through_a_data_stage(tmp_path: Path) -> None:
    path = SHARED / "preference" / "comparison_zh.json"
    context = make_context(tmp_path)
    original = list(read_records(context, RecordSource(uri=str(path))))
    assert len(original) == 300
    assert [[answer.rank for answer in record.answers] for record in original] == [[1, 2]] * 300
    run(data_stage(path, steps=[], order="asGiven"), context)
    assert read_index(context.output)["format"] == "preferences"
    back = list(read_records(make_context(tmp_path / "2", stages={"d": context.output}), RecordSource(stage="d")))
    assert back == original


def test_records_with_the_same_prompt_stay_in_one_split(tmp_path: Path) -> None:
    values = [
        {"prompt": f"question {number % 40}", "completion": f"answer {number}", "label": number % 2 == 0}
        for number in range(400)
    ]
    context = make_context(tmp_path)
    run(data_stage(write_jsonl(tmp_path / "a.jsonl", values), heldOutShare=0.3), context)
    reader = make_context(tmp_path / "2", stages={"d": context.output})
    parts = {
        split: list(read_records(reader, RecordSource(stage="d", split=split)))
        for split in (Split.TRAIN, Split.HELD_OUT)
    }
    prompts = {split: {record.messages for record in records} for split, records in parts.items()}
    assert all(prompts.values())
    assert not prompts[Split.TRAIN] & prompts[Split.HELD_OUT]
    assert sum(map(len, parts.values())) == 400
    assert {answer.liked for records in parts.values() for record in records for answer in record.answers} == {
        True,
        False,
    }


def test_steps_see_and_clean_the_answers(tmp_path: Path) -> None:
    values = [
        {"prompt": "ｑ", "chosen": "ｇood", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "bad", "rejected": "good"},
        {"prompt": "q", "chosen": "an advertisement", "rejected": "bad"},
    ]
    steps = [
        {"normalize": {"unicode": "NFKC"}},
        {"match": {"drop": "advertisement"}},
        {"deduplicate": {}},
    ]
    context = make_context(tmp_path)
    run(data_stage(write_jsonl(tmp_path / "a.jsonl", values), steps=steps, order="asGiven"), context)
    reader = make_context(tmp_path / "2", stages={"d": context.output})
    found = list(read_records(reader, RecordSource(stage="d")))
    assert [[answer.content for answer in record.answers] for record in found] == [["good", "bad"], ["bad", "good"]]


def test_content_hashes_depend_on_answers_and_ranks_but_prompt_hashes_do_not() -> None:
    records = [
        Record(messages=QUESTION, answers=answers)
        for answers in (PAIR, PAIR[::-1], (Answer("good", liked=True),), (Answer("good", liked=False),), ())
    ]
    assert len({content_hash(record) for record in records}) == len(records)
    assert len({prompt_hash(record) for record in records}) == 1


def test_the_canonical_form_has_turns_and_verdicts() -> None:
    record = Record(messages=QUESTION, answers=(*PAIR, Answer("so", liked=False)), source="s")
    assert record_to_json(record) == {
        "messages": [{"role": "user", "content": "q"}],
        "answers": [{"content": "good", "rank": 1}, {"content": "bad", "rank": 2}, {"content": "so", "liked": False}],
        "source": "s",
    }
    assert record.content == "q\ngood\nbad\nso"


def test_a_preference_record_is_not_a_conversation() -> None:
    with pytest.raises(UserError, match=r"a:1: a preference record.*`rewardModel` or `dpo`.*`sft` with `hindsight`"):
        require_no_answers(Record(messages=QUESTION, answers=PAIR, where="a:1"))
    conversation = Record(messages=QUESTION)
    assert require_no_answers(conversation) is conversation
