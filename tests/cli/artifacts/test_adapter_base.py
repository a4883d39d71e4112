"""A downloaded adapter opens in plain PEFT, with the base it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach_api.artifacts import ModelCard, ResolvedInput, output_prefix
from stagecoach_api.store import open_store
from stagecoach_cli.artifacts.adapter_base import add_base
from stagecoach_cli.artifacts.store import fetch
from tests.cli.artifacts.test_artifacts import BASE, TUNED, publish

IDS = torch.tensor([[1, 20, 300, 40, 5]])


def files_of(folder: Path, **changes: Any) -> dict[str, bytes]:
    """Return the files of a model's folder, with changes to its card."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if changes:
        card = ModelCard.model_validate_json(files["stagecoach.json"]).model_copy(update=changes)
        files["stagecoach.json"] = card.model_dump_json().encode()
    return files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a plain LoRA over it."""
    from tests.trainer.evaluation.makers import save_chat_adapter, save_chat_base

    root = tmp_path_factory.mktemp("made")
    base = save_chat_base(root / "base")
    return base, save_chat_adapter(root, base, root / "adapter", grown=False, size=0.2)


@pytest.mark.parametrize("inside", [True, False], ids=["a base of the store", "a base from outside"])
def test_an_adapter_is_downloaded_with_its_base_and_opens_from_anywhere(
    tmp_path: Path, made: tuple[Path, Path], inside: bool
) -> None:
    """`base_model_name_or_path` was a path of the machine or of the store, so AutoPeftModel found no base."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = made
    store = open_store(str(tmp_path / "store"))
    manifest = publish(store, BASE, "base", files_of(base))
    named = ResolvedInput(uri=output_prefix(BASE), digest=manifest.content_digest, stage_digest=BASE)
    publish(store, TUNED, "sft", files_of(adapter, **({"base": named} if inside else {})))
    copy = tmp_path / "copy"
    list(fetch(store, TUNED, copy))
    assert add_base(store, copy, None, None) == f"PEFT opens it with its base: {copy / 'base'}"
    opened = AutoPeftModelForCausalLM.from_pretrained(copy).eval()
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert torch.equal(opened(IDS).logits, expected(IDS).logits)
    assert {path.name for path in (copy / "base").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("base_files", "changes", "message"),
    [
        ({"stagecoach.json": b'{"adapter": true}'}, {}, "its base is an adapter itself; an `export` stage"),
        ({"config.json": b"{}"}, {"new_rows": "mean"}, "rows were added to its base"),
        ({"config.json": b"{}"}, {"base": None}, "its base is not known"),
    ],
)
def test_a_base_that_is_no_folder_is_not_put_there(
    tmp_path: Path, base_files: dict[str, bytes], changes: dict[str, Any], message: str
) -> None:
    store = open_store(str(tmp_path / "store"))
    manifest = publish(store, BASE, "base", base_files)
    named = ResolvedInput(uri=output_prefix(BASE), digest=manifest.content_digest, stage_digest=BASE)
    card = ModelCard(adapter=True, base=named).model_copy(update=changes)
    config = {"base_model_name_or_path": "./base"}
    files = {"stagecoach.json": card.model_dump_json().encode(), "adapter_config.json": json.dumps(config).encode()}
    publish(store, TUNED, "sft", files)
    copy = tmp_path / "copy"
    list(fetch(store, TUNED, copy))
    assert message in str(add_base(store, copy, None, None))
    assert not (copy / "base").exists()
    assert json.loads((copy / "adapter_config.json").read_text()) == config


def test_a_base_that_has_changed_since_is_not_used(tmp_path: Path, made: tuple[Path, Path]) -> None:
    base, adapter = made
    store = open_store(str(tmp_path / "store"))
    other = ResolvedInput(uri=str(base), digest="0" * 64)
    publish(store, TUNED, "sft", files_of(adapter, base=other))
    list(fetch(store, TUNED, tmp_path / "copy"))
    assert "has changed since the adapter was trained" in str(add_base(store, tmp_path / "copy", None, None))


def test_a_name_that_the_user_gave_stays(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    assert add_base(store, tmp_path / "copy", None, None) == "PEFT opens it with its base: org/model"
    assert add_base(store, tmp_path / "store", None, None) is None
