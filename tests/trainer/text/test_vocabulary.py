from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.conversion import save_vocabulary
from stagecoach_trainer.text.pieces import load_vocabulary
from stagecoach_trainer.text.vocabulary import batches_of, encode_batch, load_tokenizer
from tests.trainer.data.makers import LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_vocabulary(load_vocabulary(LLAMA), folder)
    return folder


def test_a_batch_becomes_int32_arrays_without_special_tokens(folder: Path) -> None:
    encoded = encode_batch(load_tokenizer(folder), ["hello", "", "</s>"])
    assert [ids.dtype for ids in encoded] == [np.int32] * 3
    assert encoded[0].tolist() == [22172]
    assert encoded[1].tolist() == []
    assert 2 not in encoded[2]


def test_texts_encoded_in_batches_give_the_same_ids_as_in_one(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    texts = [f"text number {number}" for number in range(50)]
    stream = [ids for batch in batches_of(iter(texts), 100) for ids in encode_batch(tokenizer, batch)]
    assert [ids.tolist() for ids in stream] == [ids.tolist() for ids in encode_batch(tokenizer, texts)]


def test_encoding_does_not_change_the_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    encode_batch(tokenizer, ["</s>"])
    assert tokenizer("</s>").input_ids == [1, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(None, "not a folder", id="nothing there"),
        pytest.param({}, "neither tokenizer.json nor tokenizer.model", id="an empty folder"),
        pytest.param(
            {
                "tokenizer.json": "{}",
                "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}}),
            },
            "`trust_remote_code`.*never run",
            id="code of its own",
        ),
        pytest.param(
            {"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "malformed JSON", id="a broken configuration"
        ),
        pytest.param(
            {"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "expected a JSON object, got list", id="a list"
        ),
        pytest.param(
            {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
            "the vocabulary cannot be loaded",
            id="a broken vocabulary",
        ),
    ],
)
def test_a_folder_without_a_vocabulary_is_rejected(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)
