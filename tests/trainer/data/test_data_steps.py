from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.character_sets import Script
from stagecoach_api.conversation import Role
from stagecoach_api.kinds.data import (
    CharacterShare,
    DataSource,
    DataStage,
    DataStep,
    Deduplicate,
    Length,
    Match,
    Normalize,
    Repetition,
    UnicodeForm,
)
from stagecoach_trainer.data.records import Answer, Record, ToolCall, Turn
from stagecoach_trainer.data.steps import Dropped, StepCounter, build_steps, content_hash
from stagecoach_trainer.runtime.errors import UserError


def one(step: DataStep) -> StepCounter:
    (counter,) = build_steps([step])
    return counter


COLLAPSE = Normalize(collapse_whitespace=True)


def clean(text: str, config: Normalize | None = None) -> str | None:
    result = one(DataStep(normalize=config or COLLAPSE)).apply(Record(text=text))
    assert isinstance(result, Record)
    return result.text


def outcomes(step: DataStep, texts: Iterable[str]) -> list[str | None]:
    """The reason each text is dropped for; None where it passes."""
    counter = one(step)
    results = [counter.apply(Record(text=text)) for text in texts]
    return [result.reason if isinstance(result, Dropped) else None for result in results]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("  a \t b\u00a0c\u3000 ", "a b c", id="runs of blanks"),
        pytest.param("a\r\nb\rc\u2028d", "a\nb\nc\nd", id="line ends of all kinds"),
        pytest.param("a\n\n \n\n\nb\n", "a\n\nb", id="at most one empty line in a row"),
        pytest.param("e\u0301", "\u00e9", id="NFC composes"),
        pytest.param("１２Ａ", "１２Ａ", id="NFC leaves full-width letters"),
    ],
)
def test_normalize_cleans(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert clean(expected) == expected


def test_normalize_does_only_what_is_configured() -> None:
    assert clean("１２ Ａ", Normalize(unicode=UnicodeForm.NFKC)) == "12 A"
    assert clean(" e\u0301  \r\n", Normalize(unicode=UnicodeForm.NONE)) == " e\u0301  \r\n"


@given(text=st.text(st.sampled_from("ab|- \t\n\r\u00a0\u3000\u200b\\'\"{}汉e\u0301"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_default_steps_change_no_word_and_no_blank(text: str) -> None:
    """open_llama#43, sentencepiece#650: indentation, tables and blanks in answers are what a model learns to write."""
    turns = (Turn(Role.USER, "q" + text), Turn(Role.ASSISTANT, text, reasoning=text, calls=(ToolCall("f", text),)))
    for record in (
        Record(text="d" + text),
        Record(messages=turns, tools=text),
        Record(messages=turns[:1], answers=(Answer(text, rank=1), Answer("b" + text, rank=2))),
    ):
        result: Record | Dropped = record
        for step in build_steps(DataStage(sources=(DataSource(uri="a"),)).steps):
            assert isinstance(result, Record)
            result = step.apply(result)
        assert isinstance(result, Record)
        assert as_nfc(result) == as_nfc(record)
        assert [turn.calls for turn in result.messages] == [turn.calls for turn in record.messages]


def as_nfc(record: Record) -> list[str]:
    texts = [record.text or "", *(text for turn in record.messages for text in (turn.content, turn.reasoning))]
    return [unicodedata.normalize("NFC", text) for text in (*texts, *(answer.content for answer in record.answers))]


def test_normalize_cleans_every_turn_and_counts_changed_records() -> None:
    step = one(DataStep(normalize=COLLAPSE))
    dirty = Record(messages=(Turn(Role.USER, " a ", "b  c"), Turn(Role.ASSISTANT, "d")))
    result = step.apply(dirty)
    assert isinstance(result, Record)
    assert result.messages == (Turn(Role.USER, "a", "b c"), Turn(Role.ASSISTANT, "d"))
    assert step.apply(result) is result
    assert (step.seen, step.changed, step.dropped.total()) == (2, 1, 0)


@pytest.mark.parametrize(
    ("step", "texts", "expected"),
    [
        pytest.param(
            DataStep(length=Length(min_characters=2, max_characters=3)),
            ["一", "一二", "一二三", "一二三四"],
            ["length.tooShort", None, None, "length.tooLong"],
            id="length counts characters",
        ),
        pytest.param(
            DataStep(length=Length(max_characters=2)),
            [" \n", " ab\n", "a b"],
            ["length.tooShort", None, "length.tooLong"],
            id="length without blanks at both ends",
        ),
        pytest.param(
            DataStep(match=Match(drop="(?i)error [0-9]+")),
            ["all well", "an Error 42 here"],
            [None, "match.matched"],
            id="match drops what is found",
        ),
        pytest.param(
            DataStep(match=Match(keep="^第.章")),
            ["第一章 起", "起"],
            [None, "match.notMatched"],
            id="match keeps what is found",
        ),
        pytest.param(
            DataStep(character_share=CharacterShare(script=Script.CJK, at_least=0.5)),
            ["床前 ab", "床 abc", "，。", ""],
            [None, "characterShare.cjkShare", "characterShare.cjkShare", "characterShare.cjkShare"],
            id="share of one script, ignoring whitespace",
        ),
        pytest.param(
            DataStep(character_share=CharacterShare(script=Script.ALPHANUMERIC, at_least=1.0)),
            ["Zürich 8001 床", "a_b"],
            [None, "characterShare.alphanumericShare"],
            id="alphanumeric in every language",
        ),
        pytest.param(
            DataStep(character_share=CharacterShare(script=Script.LATIN, at_least=1.0)),
            ["Straße café", "приве"],
            [None, "characterShare.latinShare"],
            id="latin with its accents",
        ),
        pytest.param(
            DataStep(repetition=Repetition(max_duplicate_lines=0.5, max_top_character=0.5)),
            ["ab\nab\ncd\nef", "ab\n ab \n\nab\ncd ef gh ij", "ab\nab\nab\nbc", "aaaab c d", "a a b c"],
            [None, None, None, "repetition.topCharacter", None],
            id="repetition at its limits",
        ),
        pytest.param(
            DataStep(repetition=Repetition(max_duplicate_lines=0.4)),
            ["ab\ncd\nef\nab\ncd"],
            [None],
            id="two of five lines are copies",
        ),
        pytest.param(
            DataStep(repetition=Repetition(max_duplicate_lines=0.39)),
            ["ab\ncd\nef\nab\ncd"],
            ["repetition.duplicateLines"],
            id="two of five lines are too many",
        ),
        pytest.param(
            DataStep(deduplicate=Deduplicate()),
            ["a", " a\n", "b", "a b", "b"],
            [None, "deduplicate.duplicate", None, None, "deduplicate.duplicate"],
            id="the first of equal texts stays",
        ),
    ],
)
def test_steps_drop_for_a_reason(step: DataStep, texts: list[str], expected: list[str | None]) -> None:
    assert outcomes(step, texts) == expected


def test_conversations_are_duplicates_only_when_every_turn_is_equal() -> None:
    def conversation(*turns: tuple[Role, str, str], tools: str | None = None) -> Record:
        return Record(messages=tuple(Turn(*turn) for turn in turns), tools=tools)

    base = conversation((Role.USER, "ab", "c"), (Role.ASSISTANT, "d", ""))
    others = [
        conversation((Role.USER, "a", "bc"), (Role.ASSISTANT, "d", "")),
        conversation((Role.USER, "ab", "c"), (Role.USER, "d", "")),
        conversation((Role.USER, "ab", "c"), (Role.ASSISTANT, "d", ""), tools="[]"),
        conversation((Role.USER, "ab", "cd")),
        Record(text="ab\nc\nd"),
    ]
    hashes = {content_hash(record) for record in (base, *others)}
    assert len(hashes) == 6
    assert content_hash(conversation((Role.USER, " ab", "c "), (Role.ASSISTANT, "d\n", ""))) == content_hash(base)
    assert content_hash(base, b"another key") not in hashes


def test_a_pattern_that_re2_lacks_is_rejected_by_field() -> None:
    steps = [DataStep(length=Length()), DataStep(match=Match(drop=r"(a)\1"))]
    with pytest.raises(UserError, match=r"steps\[1\]\.match\.drop: .*is not a valid RE2 pattern"):
        build_steps(steps)


def test_a_pattern_cannot_stall_the_stage() -> None:
    started = time.perf_counter()
    assert outcomes(DataStep(match=Match(drop="(a+)+$")), ["a" * 50_000 + "b"]) == [None]
    assert time.perf_counter() - started < 5


def test_repeated_steps_are_labelled_with_their_position() -> None:
    pipeline = build_steps([DataStep(length=Length()), DataStep(normalize=Normalize()), DataStep(length=Length())])
    assert [step.label for step in pipeline] == ["length1", "normalize", "length3"]
