from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig

from stagecoach_api.kinds.tokenizer import (
    Algorithm,
    MergedCharacters,
    MergedScore,
    Normalization,
    TrainVocabulary,
)
from stagecoach_api.references import RecordSource
from stagecoach_trainer.text.conversion import merges, save_vocabulary
from stagecoach_trainer.text.measure import PROBES
from stagecoach_trainer.text.pieces import (
    Vocabulary,
    add_special_tokens,
    load_vocabulary,
    merge_vocabularies,
    sentences,
    train_vocabulary,
)
from stagecoach_trainer.text.vocabulary import encode_batch, load_tokenizer
from tests import SHARED_DATA as SHARED
from tests.trainer.data.makers import CHINESE, LLAMA

pytestmark = pytest.mark.slow

NASTY = (
    "",
    " ",
    "   x",
    "▁x",
    " ▁x",
    "x ▁▁ y",
    "\n",
    "\t\n \n  \n",
    " " * 16,
    " " * 17 + "x",
    " " * 33,
    "a" * 200,
    "\r\n a \r\n",
    "\ufeffmark",
    "\0a\0",
    "\u200b\u200d\u2028",
    "<s> </s> <unk> <0x0A> <|im_start|> [PAD]",
    "𠀤𠀀龘",
    "e\u0301\u0302 ü",
    unicodedata.normalize("NFD", "Việt Nam, Zürich, 안녕하세요"),
    "－１２３",
    "。。。……——",
)


@cache
def real_texts() -> list[str]:
    """Held-out text: poems, English web and encyclopedia, instructions in two languages, tool calls in JSON."""
    with (SHARED / "corpus" / "chinese_classics.jsonl").open(encoding="utf-8") as file:
        lines = file.readlines()[::200]
    with (SHARED / "corpus" / "c4_en.jsonl").open(encoding="utf-8") as file:
        lines += file.readlines()[:60]
    texts = [json.loads(line)["text"] for line in lines]
    texts += (SHARED / "corpus" / "wiki_en.txt").read_text(encoding="utf-8").splitlines()[:2]
    for name in ("alpaca_zh", "alpaca_en"):
        values = json.loads((SHARED / "sft" / f"{name}.json").read_text(encoding="utf-8"))[:300]
        texts += ["\n".join((value["instruction"], value["input"], value["output"])) for value in values]
    values = json.loads((SHARED / "sft" / "toolcall_sharegpt_zh.json").read_text(encoding="utf-8"))[:60]
    return texts + [turn["value"] for value in values for turn in value["conversations"]]


@cache
def random_texts() -> list[str]:
    generator = random.Random(7)
    return ["".join(generator.choices(" \n\t▁ab1<s>的中é😀", k=generator.randint(1, 60))) for _ in range(300)]


@cache
def built(name: str) -> Vocabulary:
    """The vocabulary of that name; `below`, `cjk` and `zero` are merged vocabularies."""
    if name == "llama":
        return load_vocabulary(LLAMA)
    if name == "chinese":
        return load_vocabulary(CHINESE)
    if name in ("below", "zero", "cjk"):
        characters = MergedCharacters.CJK if name == "cjk" else MergedCharacters.ALL
        score = MergedScore.ZERO if name == "zero" else MergedScore.BELOW
        return merge_vocabularies(built("llama"), built("chinese"), characters, score)
    algorithm, normalization = name.split()
    config = TrainVocabulary(
        on=(RecordSource(uri="x"),),
        vocab_size=3000,
        algorithm=Algorithm(algorithm),
        normalization=Normalization(normalization),
        character_coverage=0.98,
    )
    texts = real_texts()
    return train_vocabulary(config, list(sentences([*texts[:150], *texts[350:380]])), "train")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Vocabulary, Any]]:
    """Return a function that returns a vocabulary by name, and its folder as loaded by transformers."""

    @cache
    def open_(name: str) -> tuple[Vocabulary, Any]:
        folder = tmp_path_factory.mktemp("vocabulary")
        save_vocabulary(built(name), folder)
        return built(name), load_tokenizer(folder)

    return open_


Opened = Callable[[str], tuple[Vocabulary, Any]]


@pytest.mark.parametrize(
    "name",
    ["llama", "below", "cjk", "bpe identity", "bpe nmt_nfkc", "unigram identity", "unigram nmt_nfkc"],
)
def test_transformers_and_sentencepiece_agree_on_every_text(opened: Opened, name: str) -> None:
    vocabulary, tokenizer = opened(name)
    texts = [*real_texts(), *PROBES, *NASTY, *random_texts()]
    ours = [ids.tolist() for ids in encode_batch(tokenizer, texts)]
    theirs = vocabulary.processor().encode(texts)
    differing = [text for text, our, their in zip(texts, ours, theirs, strict=True) if our != their]
    assert differing == []
    assert len(texts) > 1400


def test_score_zero_makes_the_encoders_disagree(opened: Opened) -> None:
    vocabulary, tokenizer = opened("zero")
    texts = real_texts()[400:600]
    ours = encode_batch(tokenizer, texts)
    assert any(our.tolist() != their for our, their in zip(ours, vocabulary.processor().encode(texts), strict=True))


@pytest.mark.parametrize("name", ["llama", "below"])
def test_text_round_trips_through_its_ids(opened: Opened, name: str) -> None:
    _, tokenizer = opened(name)
    texts = [*real_texts()[::2], *PROBES]
    encoded = encode_batch(tokenizer, texts)
    assert [text for text, ids in zip(texts, encoded, strict=True) if tokenizer.decode(ids) != text] == []


@pytest.mark.parametrize("next_to_a_model", [False, True], ids=["alone", "next to a LLaMA model"])
def test_auto_tokenizer_opens_the_folder_and_gives_the_same_ids(tmp_path: Path, next_to_a_model: bool) -> None:
    vocabulary = add_special_tokens(built("cjk"), ["<|im_start|>", "<|im_end|>"], "[PAD]")
    save_vocabulary(vocabulary, tmp_path)
    if next_to_a_model:
        LlamaConfig().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocabulary.size
    texts = [text for text in (*real_texts()[::10], *NASTY) if "<s>" not in text]
    encoder = vocabulary.processor()
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == encoder.encode(texts)
    assert tokenizer.convert_ids_to_tokens(list(range(vocabulary.size))) == vocabulary.pieces
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
    assert specials == ("<s>", "</s>", "<unk>", "[PAD]")
    assert tokenizer.pad_token_id == encoder.pad_id() == vocabulary.size - 1
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)


def test_special_tokens_are_parsed_on_request_and_begin_no_text(tmp_path: Path) -> None:
    vocabulary = add_special_tokens(built("llama"), ["<|im_start|>"], None)
    save_vocabulary(vocabulary, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("hello").input_ids == [1, 22172]
    assert tokenizer.tokenize("<|im_start|>user <s>x </s> y") == [
        "<|im_start|>",
        "user",
        "▁",
        "<s>",
        "x",
        "▁",
        "</s>",
        "▁y",
    ]
    (plain,) = encode_batch(tokenizer, ["<|im_start|>user"])
    (special,) = encode_batch(tokenizer, ["<|im_start|>user"], parse_special=True)
    assert 32_000 not in plain
    assert special.tolist() == [32_000, 1792]


def test_saving_a_loaded_vocabulary_again_changes_no_id(tmp_path: Path, opened: Opened) -> None:
    vocabulary, tokenizer = opened("llama")
    tokenizer.save_pretrained(tmp_path)
    texts = [*PROBES, *NASTY]
    again = [ids.tolist() for ids in encode_batch(load_tokenizer(tmp_path), texts)]
    assert again == vocabulary.processor().encode(texts)


def test_the_folder_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_vocabulary(built("llama"), tmp_path / name)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert (tmp_path / "a" / "tokenizer.model").stat().st_size == LLAMA.stat().st_size


def test_merges_are_ordered_by_the_scores_of_their_pieces() -> None:
    vocabulary = built("below")
    scores = {piece.piece: piece.score for piece in vocabulary.model.pieces}
    found = merges(vocabulary)
    made = [scores[left + right] for left, right in found]
    assert made == sorted(made, reverse=True)
    # Of equal scores the longer left part comes first: spaces are merged from the left.
    assert found.index(("▁▁▁", "▁")) < found.index(("▁▁", "▁")) < found.index(("▁", "▁"))
    assert len(set(found)) == len(found)
