"""Write a SentencePiece vocabulary as a folder that `AutoTokenizer` opens, with the same ids for the same text.

Why the ids are equal (measured with transformers 5.23 and tokenizers 0.23):
- BPE merges are sorted by the score of the resulting piece, highest first. SentencePiece merges by that score; the
  stock conversion sorts differently, and its ids differed on 5 of 400 texts.
- SentencePiece merges pieces of equal score (LLaMA's runs of spaces) from the left. Listing the merge with the longer
  left part first has the same effect.
- SentencePiece prepends a space to every text. `Metaspace` omits it if the text begins with a space, so a normaliser
  doubles a leading space. transformers' `LlamaTokenizer` drops normalisers, hence the plain class
  `PreTrainedTokenizerFast`, which loads `tokenizer.json` unchanged in every version of transformers.
- Special tokens are matched after normalisation, so that only the beginning of the text is treated as a beginning,
  not the text after each special token.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from stagecoach_trainer.text.pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary, splits_of
from stagecoach_trainer.text.vocabulary import (
    CONFIG_FILE,
    META_SPACE,
    SENTENCEPIECE_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
)

UNTYPABLE_FACTOR = 256
"""A unigram `tokenizer.json` lists control and byte pieces among the ordinary ones; a score this many times the lowest
keeps a text that spells `<s>` from producing them."""


def save_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and the two configuration files to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SENTENCEPIECE_FILE).write_bytes(vocabulary.serialize())
    _write_json(folder / TOKENIZER_FILE, tokenizer_json(vocabulary), indent=None)
    special = special_tokens(vocabulary)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": "bos_token" in special,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        **special,
    }
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / SPECIAL_TOKENS_FILE, special)


def special_tokens(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the special tokens by the names that transformers gives them."""
    spec = vocabulary.model.trainer_spec
    pieces = vocabulary.pieces
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    named = {name: pieces[index] for name, index in ids.items() if 0 <= index < len(pieces)}
    others = [
        piece.piece for piece in vocabulary.model.pieces if piece.type == CONTROL and piece.piece not in named.values()
    ]
    return {**named, **({"additional_special_tokens": others} if others else {})}


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of `tokenizer.json`."""
    normalizer = vocabulary.model.normalizer_spec
    prefix = bool(normalizer.add_dummy_prefix)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(normalizer, prefix)},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": META_SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "post_processor": _post_processor(vocabulary),
        "decoder": _decoder(prefix),
        "model": _bpe(vocabulary) if vocabulary.is_bpe else _unigram(vocabulary),
    }


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    return [
        {
            "id": index,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,  # matched after normalisation; see the module's docstring
            "special": piece.type != USER_DEFINED,
        }
        for index, piece in enumerate(vocabulary.model.pieces)
        if piece.type in (CONTROL, UNKNOWN, USER_DEFINED)
    ]


def _normalizers(spec: Any, prefix: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        # tokenizers looks up each grapheme cluster as a whole and drops what follows the first match. Composing them
        # beforehand (NFC) makes decomposed accents and Hangul come out as in SentencePiece. The cluster \r\n would lose
        # one of its two characters in the same way.
        if "nfkc" in spec.name:
            steps.append({"type": "NFC"})
        if spec.name.startswith("nmt_"):
            steps.append({"type": "Replace", "pattern": {"String": "\r\n"}, "content": "\n\n"})
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [_replace(r" +\z", ""), _replace(r"\A +", " " if prefix else ""), _replace(" {2,}", " ")]
    elif prefix:
        steps.append(_replace(r"\A ", "  "))
    if prefix:
        # A literal U+2581 counts as a space for `Metaspace`, so a leading one suppresses the prepended space, too.
        steps.append(_replace(rf"\A{META_SPACE}", META_SPACE * 2))
    return steps


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    index = vocabulary.model.trainer_spec.bos_id
    if not 0 <= index < vocabulary.size:
        return None
    token = vocabulary.pieces[index]

    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _bpe(vocabulary: Vocabulary) -> dict[str, Any]:
    pieces = vocabulary.model.pieces
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[vocabulary.model.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(vocabulary.model.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(pieces)},
        "merges": merges(vocabulary),
    }


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the BPE merges in order: by the resulting piece's score, then the longer left part, then its id."""
    scores = {piece.piece: piece.score for piece in vocabulary.model.pieces if piece.type == NORMAL}
    pairs = [pair for piece in scores for pair in splits_of(piece, scores.keys())]
    # `sorted` is stable, so pairs of equal keys stay in the order of their ids.
    return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))


def _unigram(vocabulary: Vocabulary) -> dict[str, Any]:
    pieces = vocabulary.model.pieces
    lowest = min(piece.score for piece in pieces if piece.type == NORMAL)
    return {
        "type": "Unigram",
        "unk_id": vocabulary.model.trainer_spec.unk_id,
        "vocab": [
            [piece.piece, piece.score if piece.type == NORMAL else UNTYPABLE_FACTOR * lowest] for piece in pieces
        ],
        "byte_fallback": bool(vocabulary.model.trainer_spec.byte_fallback),
    }


def _write_json(path: Path, value: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
