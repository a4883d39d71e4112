"""Load a vocabulary, and encode text with it. Folders written by this program load without importing torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagecoach_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
MODEL_CONFIG_FILE = "config.json"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE)
"""Files of a `tokenizer` artifact's vocabulary; a model's folder has copies of them."""

META_SPACE = "\u2581"
"""Represents a space in SentencePiece pieces."""

PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that load `tokenizer.json` unchanged. AutoTokenizer would return the same class, but importing it needs
torch. In a model's folder it may return another one: some families prescribe theirs."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the vocabulary in `path`: a `tokenizer` artifact or a Hugging Face folder.

    Raises:
        UserError: It is not a folder with a vocabulary, or it needs its own code (`trust_remote_code`).
    """
    config = read_tokenizer_config(path)
    is_plain = config.get("tokenizer_class") in PLAIN_CLASSES and (path / TOKENIZER_FILE).is_file()
    if is_plain and not (path / MODEL_CONFIG_FILE).is_file():
        from transformers import PreTrainedTokenizerFast

        return _open(PreTrainedTokenizerFast, path)
    return open_publicly(path)


def open_publicly(path: Path) -> PreTrainedTokenizerFast:
    """Open the vocabulary in `path` by AutoTokenizer, as programs do that do not know this one. Raises UserError."""
    from transformers import AutoTokenizer

    return _open(AutoTokenizer, path)


def _open(loader: Any, path: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the exception type depends on which file is broken, and how
        raise UserError(f"{path}: the vocabulary cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{path}: {type(tokenizer).__name__} has no `tokenizer.json`; convert it with transformers")
    return tokenizer  # type: ignore[no-any-return]


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """Return `tokenizer_config.json`, or {} if there is none. Raises UserError if the vocabulary needs its own code."""
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; a vocabulary is a folder with {TOKENIZER_FILE} or {SENTENCEPIECE_FILE}")
    if not any((path / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        raise UserError(f"{path}: it has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; give a vocabulary")
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: malformed JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(config).__name__}")
    if "auto_map" in config:
        raise UserError(
            f"{file}: `auto_map` requires code from the folder (`trust_remote_code`), which is never run; "
            "use a vocabulary whose class is part of transformers"
        )
    return config


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], parse_special: bool = False
) -> list[NDArray[np.int32]]:
    """Encode texts in parallel, without adding special tokens.

    Args:
        tokenizer: A fast tokenizer, with a Rust back end.
        texts: B texts.
        parse_special: Encode text such as `</s>` as the special token. By default it is ordinary text, as for
            SentencePiece, so that data cannot forge the end of a turn.

    Returns:
        B arrays of token ids, int32 [T].
    """
    backend: Any = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = not parse_special
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


def batches_of(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yield texts in order, in lists of at least `characters` characters; the last list may have fewer."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
