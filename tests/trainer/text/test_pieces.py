from __future__ import annotations

import json

import pytest

from stagecoach_api.kinds.tokenizer import Algorithm, MergedCharacters, MergedScore, TrainVocabulary
from stagecoach_api.references import RecordSource
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    Vocabulary,
    add_characters,
    add_special_tokens,
    append_tokens,
    load_vocabulary,
    lowest_score,
    merge_vocabularies,
    parse_vocabulary,
    sentences,
    train_vocabulary,
    unreachable_pieces,
)
from tests import SHARED_DATA as SHARED
from tests.trainer.data.makers import CHINESE, LLAMA

ON = (RecordSource(uri="corpus.jsonl"),)


@pytest.fixture(scope="module")
def llama() -> Vocabulary:
    return load_vocabulary(LLAMA)


@pytest.fixture(scope="module")
def chinese() -> Vocabulary:
    return load_vocabulary(CHINESE)


@pytest.fixture(scope="module")
def merged(llama: Vocabulary, chinese: Vocabulary) -> Vocabulary:
    return merge_vocabularies(llama, chinese, MergedCharacters.ALL, MergedScore.BELOW)


@pytest.fixture(scope="module")
def poems() -> list[str]:
    with (SHARED / "corpus" / "chinese_classics.jsonl").open(encoding="utf-8") as file:
        return list(sentences(json.loads(line)["text"] for line, _ in zip(file, range(800), strict=False)))


def typed(vocabulary: Vocabulary) -> list[tuple[str, float, int]]:
    return [(piece.piece, piece.score, piece.type) for piece in vocabulary.model.pieces]


# -- merging -----------------------------------------------------------------------------------------------------------


def test_llama_and_the_chinese_vocabulary_make_49_953_pieces(llama: Vocabulary, merged: Vocabulary) -> None:
    assert merged.size == 49_953
    assert merged.model.trainer_spec.vocab_size == 49_953
    assert typed(merged)[: llama.size] == typed(llama)
    assert len(set(merged.pieces)) == merged.size


def test_only_han_pieces_make_49_139(llama: Vocabulary, chinese: Vocabulary) -> None:
    han = merge_vocabularies(llama, chinese, MergedCharacters.CJK, MergedScore.BELOW)
    assert han.size == 49_139
    assert all(not piece.isascii() for piece in han.pieces[llama.size :])
    text = (SHARED / "corpus" / "wiki_en.txt").read_text(encoding="utf-8")[:20_000]
    ascii_text = "".join(character for character in text if character.isascii())
    assert han.processor().encode(ascii_text) == llama.processor().encode(ascii_text)


def test_new_pieces_follow_the_second_vocabulary_in_order_and_in_steps_of_one(
    llama: Vocabulary, chinese: Vocabulary, merged: Vocabulary
) -> None:
    known = set(llama.pieces)
    expected = [piece.piece for piece in chinese.model.pieces if piece.piece not in known and piece.type == NORMAL]
    assert merged.pieces[llama.size :] == expected
    assert lowest_score(llama) == -31_740  # the runs of spaces at -1e9 do not count
    scores = [piece.score for piece in merged.model.pieces[llama.size :]]
    assert scores == [-31_741.0 - index for index in range(17_953)]  # exact in float32


def test_zero_gives_every_new_piece_the_score_zero(llama: Vocabulary, chinese: Vocabulary) -> None:
    zero = merge_vocabularies(llama, chinese, MergedCharacters.ALL, MergedScore.ZERO)
    assert {piece.score for piece in zero.model.pieces[llama.size :]} == {0.0}
    assert typed(zero)[: llama.size] == typed(llama)


def test_pieces_that_no_two_pieces_form_are_found(merged: Vocabulary, llama: Vocabulary, chinese: Vocabulary) -> None:
    unreachable, without_split = unreachable_pieces(merged)
    assert (len(unreachable), len(without_split)) == (338, 321)
    assert {"越来越", "意大利"} <= set(without_split) <= set(unreachable)
    encoder = merged.processor()
    assert all(encoder.encode(piece.removeprefix("▁")) != [merged.pieces.index(piece)] for piece in unreachable[:40])
    assert unreachable_pieces(llama) == ([], [])
    assert unreachable_pieces(chinese) == ([], [])  # a unigram model reaches every piece


def test_a_unigram_base_cannot_be_merged_into(llama: Vocabulary, chinese: Vocabulary) -> None:
    with pytest.raises(UserError, match="the base is a unigram vocabulary"):
        merge_vocabularies(chinese, llama, MergedCharacters.ALL, MergedScore.BELOW)


# -- adding ------------------------------------------------------------------------------------------------------------


def test_characters_are_added_once_and_only_where_they_are_missing(llama: Vocabulary) -> None:
    grown = add_characters(llama, "的龘 靐\n龘▁a")
    assert typed(grown)[: llama.size] == typed(llama)
    assert typed(grown)[llama.size :] == [("龘", -31_741.0, NORMAL), ("靐", -31_742.0, NORMAL)]
    assert grown.processor().encode("龘的", out_type=str) == ["▁", "龘", "的"]


def test_special_tokens_are_control_pieces_that_text_never_produces(llama: Vocabulary) -> None:
    grown = add_special_tokens(llama, ["<|im_start|>", "</s>", "<|im_start|>"], "[PAD]")
    assert typed(grown)[llama.size :] == [("<|im_start|>", 0.0, CONTROL), ("[PAD]", 0.0, CONTROL)]
    encoder = grown.processor()
    assert encoder.pad_id() == 32_001
    text = "<|im_start|>[PAD]"
    assert encoder.encode(text) == llama.processor().encode(text)


@pytest.mark.parametrize(
    ("token", "message"),
    [("the", "is an ordinary piece"), ("<0x0A>", "is an ordinary piece"), (" <a>", "has whitespace at an end")],
)
def test_a_special_token_that_text_produces_is_rejected(llama: Vocabulary, token: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_special_tokens(llama, [token], None)


def test_tokens_after_the_pieces_keep_their_ids(llama: Vocabulary) -> None:
    grown = append_tokens(llama, [("[PAD]", True), ("<image>", False)])
    assert grown.pieces[32_000:] == ["[PAD]", "<image>"]


# -- training ----------------------------------------------------------------------------------------------------------


def test_sentences_are_lines_of_bounded_length_without_blank_ones() -> None:
    assert list(sentences(["a\n\n b\r\nc", "", "x" * 9000])) == ["a", " b", "c", "x" * 4000, "x" * 4000, "x" * 1000]


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_training_gives_the_requested_size_deterministically(poems: list[str], algorithm: Algorithm) -> None:
    config = TrainVocabulary(on=ON, vocab_size=3000, algorithm=algorithm, character_coverage=0.98)
    vocabulary = train_vocabulary(config, poems, "train")
    assert (vocabulary.size, vocabulary.algorithm) == (3000, algorithm.value)
    assert vocabulary.pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert [piece.type for piece in vocabulary.model.pieces].count(BYTE) == 256
    assert vocabulary.serialize() == train_vocabulary(config, poems, "train").serialize()
    encoder = vocabulary.processor()
    strange = "  two  blanks,\ttab\nline 123 😀 𠀀 "
    assert encoder.decode(encoder.encode(strange)) == strange


def test_every_digit_is_a_piece_of_its_own(poems: list[str]) -> None:
    lines = [f"{number} {number} years" for number in range(1990, 2020)] * 20
    vocabulary = train_vocabulary(TrainVocabulary(on=ON, vocab_size=280), lines, "train")
    assert [piece for piece in vocabulary.pieces[259:] if sum(map(str.isdigit, piece)) > 1] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"vocab_size": 600}, r"train\.vocabSize: 600 pieces are too few: .* need [12],\d\d\d; raise", id="too small"
        ),
        pytest.param(
            {"vocab_size": 900_000},
            r"train\.vocabSize: 900,000 pieces are too many .*; at most \d+,\d\d\d",
            id="too large",
        ),
        pytest.param(
            {"vocab_size": 900_000, "algorithm": "unigram"}, "are too many .*; at most", id="too large, unigram"
        ),
        pytest.param(
            {"vocab_size": 4000, "character_coverage": 0.5},
            r"0\.5 is too low; allowed are 0\.98 to 1",
            id="low coverage",
        ),
    ],
)
def test_a_failed_training_is_reported_with_advice(poems: list[str], fields: dict[str, object], message: str) -> None:
    config = TrainVocabulary.model_validate({"on": ON, **fields})
    with pytest.raises(UserError, match=message):
        train_vocabulary(config, poems[:800], "train")


def test_missing_text_is_reported(poems: list[str]) -> None:
    with pytest.raises(UserError, match=r"train\.data: there is no text"):
        train_vocabulary(TrainVocabulary(on=ON, vocab_size=300), [], "train")


@pytest.mark.parametrize("data", [b"", b"no model at all", b"\x08\x01"])
def test_bytes_that_are_not_a_model_are_rejected(data: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.model: not a SentencePiece model"):
        parse_vocabulary(data, "x.model")
