"""Text is encoded by every published shape of tokenizer as that tokenizer itself encodes it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stagecoach_trainer.text.encoding import Encoder

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
UNKNOWN = {"unk_token": "<unk>"}
NAMES = [*UNKNOWN.values(), *SPECIAL.values()]
CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x + 1", "naïve café 北京 12 345"] * 3


def trained(model: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any, trainer: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def bpe(normalizer: Any, pre_tokenizer: Any, decoder: Any = None) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=NAMES, show_progress=False)
    return trained(models.BPE(**UNKNOWN), normalizer, pre_tokenizer, decoder, trainer)


def gemma() -> PreTrainedTokenizerFast:
    return bpe(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))


def bare_replace() -> PreTrainedTokenizerFast:
    return bpe(normalizers.Replace(Regex("[ ]"), "▁"), None)


def llama() -> PreTrainedTokenizerFast:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return bpe(normalizers.Sequence(steps), None)


def only_prepends() -> PreTrainedTokenizerFast:
    return bpe(normalizers.Prepend("▁"), pre_tokenizers.Whitespace())


def metaspace() -> PreTrainedTokenizerFast:
    return bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoders.Metaspace())


def byte_level() -> PreTrainedTokenizerFast:
    return bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def byte_level_after_split() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|\S+"), "isolated")
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return bpe(normalizers.NFC(), steps, decoders.ByteLevel())


def byte_level_with_prefix() -> PreTrainedTokenizerFast:
    return bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel())


def digits_and_punctuation() -> PreTrainedTokenizerFast:
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
    return bpe(normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]), pre_tokenizers.Sequence(steps))


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=NAMES, **UNKNOWN, show_progress=False)
    normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return trained(models.Unigram(), normalizer, pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer)


def word_piece() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=NAMES, show_progress=False)
    return trained(
        models.WordPiece(**UNKNOWN),
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        trainer,
    )


WITHOUT_PREFIX = [gemma, bare_replace, byte_level, byte_level_after_split, word_piece]
WITH_PREFIX = [llama, only_prepends, metaspace, byte_level_with_prefix, digits_and_punctuation, unigram]
TOKENIZERS = {shape.__name__: shape() for shape in [*WITHOUT_PREFIX, *WITH_PREFIX]}
TEXTS = st.lists(st.text(st.sampled_from("theo quick  \n\t1234.,:(){}é北"), max_size=30), min_size=1, max_size=4)


def own_ids(name: str, texts: list[str]) -> list[list[int]]:
    return [TOKENIZERS[name](text, add_special_tokens=False).input_ids for text in texts]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=TEXTS)
def test_prompts_and_documents_have_the_tokenizers_own_ids(name: str, texts: list[str]) -> None:
    encoder = Encoder(TOKENIZERS[name])
    expected = own_ids(name, texts)
    assert [ids.tolist() for ids in encoder.prompts(texts)] == expected
    assert [ids.tolist() for ids in encoder.documents(texts)] == expected


@pytest.mark.parametrize("name", [shape.__name__ for shape in WITHOUT_PREFIX])
@given(texts=TEXTS)
def test_continuations_have_the_tokenizers_own_ids_if_it_prepends_nothing(name: str, texts: list[str]) -> None:
    """Gemma 1, 2 and 3, whose normaliser is a bare `Replace`, among them."""
    got = Encoder(TOKENIZERS[name]).continuations(texts)
    assert [ids.tolist() for ids in got] == own_ids(name, texts)


@pytest.mark.parametrize("name", [shape.__name__ for shape in WITH_PREFIX])
def test_continuations_begin_without_a_space_and_leave_the_tokenizer_unchanged(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    before = own_ids(name, ["the dog"])
    (ids,) = Encoder(tokenizer).continuations(["the dog"])
    first = tokenizer.convert_ids_to_tokens(ids.tolist())[0]
    assert not first.startswith(("▁", "Ġ"))
    assert own_ids(name, ["the dog"]) == before
    assert tokenizer.convert_ids_to_tokens(before[0])[0].startswith(("▁", "Ġ"))
