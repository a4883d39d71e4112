"""The look into local inputs: what a stage would fail at is found in its first records and its model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from stagecoach_trainer.look.__main__ import findings
from stagecoach_trainer.look.finding import Finding

Records = list[dict[str, Any]]

ALPACA: Records = [
    {"instruction": f"Add 1 to {number}.", "input": "", "output": str(number + 1)} for number in range(9)
]
PROSE: Records = [{"text": f"A text about {number}."} for number in range(9)]
PAIRS: Records = [{"prompt": "Which?", "chosen": "this one", "rejected": "that one"}]
TRAINING = {"batch": {"samples": 8}, "optimizer": {"learningRate": 1e-4}, "sequenceLength": 64}
CHATML = {"name": "chatml"}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_lines(path: Path, records: Records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path.name


def save_model(folder: Path, config: Mapping[str, Any] = {}, template: str | None = None, ids: int = 16) -> str:
    """Save what a look reads of a model: its configuration, headers of weights, and vocabulary."""
    folder.mkdir()
    settings = {"model_type": "llama", "vocab_size": 16, "max_position_embeddings": 128, **config}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = {f"model.layers.0.block.{name}.weight": np.zeros((4, 4), np.float32) for name in LAYERS}
    save_file(weights | {"model.embed_tokens.weight": np.zeros((16, 4), np.float32)}, folder / "model.safetensors")
    vocabulary = {"model": {"vocab": {f"t{number}": number for number in range(ids)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    own = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    return folder.name


def look(folder: Path, kind: str, **config: Any) -> list[Finding]:
    """Look at a stage whose relative inputs are in `folder`."""
    local = {uri: f"file://{folder}/{uri}" for uri in _uris(config)}
    return list(findings({"kind": kind, "config": config}, local))


def _uris(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {value["uri"]} if "uri" in value else set().union(*map(_uris, value.values()))
    return set().union(*map(_uris, value)) if isinstance(value, list) else set()


def sft(folder: Path, data: list[dict[str, Any]], **changes: Any) -> list[Finding]:
    if not (folder / "model").exists():
        save_model(folder / "model")
    config = {"model": {"uri": "model"}, "data": data, "template": CHATML, **TRAINING, **changes}
    return look(folder, "sft", **config)


# -- records -----------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_everything_fits(tmp_path: Path) -> None:
    assert sft(tmp_path, [{"uri": write_lines(tmp_path / "a.jsonl", ALPACA), "format": "alpaca"}]) == []


def test_a_wrong_format_is_one_sentence_with_the_first_record(tmp_path: Path) -> None:
    name = write_lines(tmp_path / "a.jsonl", ALPACA)
    (found,) = sft(tmp_path, [{"uri": name, "format": "sharegpt"}])
    assert found.path == ("sft", "data", 0, "format")
    assert found.rule.startswith("of the first 9 records none can be read as `sharegpt`: a.jsonl:1: `conversations`")
    assert found.fatal


def test_a_layout_that_is_none_is_found(tmp_path: Path) -> None:
    (found,) = sft(tmp_path, [{"uri": write_lines(tmp_path / "a.jsonl", [{"query": "a", "reply": "b"}])}])
    assert found.path == ("sft", "data", 0, "uri")
    assert "the layout cannot be detected" in found.rule


def test_one_malformed_record_is_counted_and_named(tmp_path: Path) -> None:
    name = write_lines(tmp_path / "a.jsonl", [*ALPACA[:4], {"instruction": "no answer"}, *ALPACA[4:]])
    (found,) = sft(tmp_path, [{"uri": name, "format": "alpaca"}])
    assert found.rule.startswith("of the first 10 records 1 cannot be read as `alpaca`: a.jsonl:5: `output`")


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.1, 0)])
def test_a_data_stage_may_leave_malformed_records_out(tmp_path: Path, share: float, count: int) -> None:
    name = write_lines(tmp_path / "a.jsonl", [*PROSE, {"no": "text"}])
    found = look(tmp_path, "data", sources=[{"uri": name, "format": "text"}], maxMalformedShare=share)
    assert len(found) == count


def test_a_data_stage_reads_records_of_one_kind(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ALPACA)
    write_lines(tmp_path / "b.jsonl", PROSE)
    (found,) = look(tmp_path, "data", sources=[{"uri": "a.jsonl"}, {"uri": "b.jsonl"}])
    assert found.path == ("data", "sources", 1, "uri")
    assert found.rule == "has plain text, and another source has conversations"


def test_fields_that_are_not_read_are_a_warning(tmp_path: Path) -> None:
    name = write_lines(tmp_path / "a.jsonl", [{**record, "quality": 3} for record in ALPACA])
    (found,) = sft(tmp_path, [{"uri": name}])
    assert (found.rule, found.fatal) == ("in the first 64 records: fields not read: quality (9 records)", False)


def test_a_sorted_file_of_labels_is_no_warning(tmp_path: Path) -> None:
    liked: Records = [{"prompt": "a", "completion": "b", "label": True}] * 70
    name = write_lines(tmp_path / "a.jsonl", [*liked, {**liked[0], "label": False}])
    save_model(tmp_path / "model", template="x")
    loss: dict[str, Any] = {"kto": {}}
    assert look(tmp_path, "dpo", model={"uri": "model"}, data=[{"uri": name}], loss=loss, **TRAINING) == []


def test_an_empty_file_is_found(tmp_path: Path) -> None:
    (found,) = sft(tmp_path, [{"uri": write_lines(tmp_path / "a.jsonl", [])}])
    assert found.rule == "has no records"


@pytest.mark.parametrize(
    ("kind", "records", "words"),
    [
        ("pretrain", ALPACA, "has conversations, and the stage reads plain text here"),
        ("dpo", ALPACA, "has conversations, and the stage reads preference records here"),
        ("rewardModel", PROSE, "has plain text, and the stage reads preference records here"),
        ("ppo", PROSE, "has plain text, and the stage reads conversations or preference records here"),
        ("sft", PAIRS, "has preference records, each with several answers"),
    ],
)
def test_records_that_a_stage_cannot_use_are_found(tmp_path: Path, kind: str, records: Records, words: str) -> None:
    save_model(tmp_path / "model")
    data = [{"uri": write_lines(tmp_path / "a.jsonl", records)}]
    more: dict[str, Any] = {} if kind == "pretrain" else {"template": CHATML}
    more |= {"budget": {"steps": 1}} if kind in ("pretrain", "ppo") else {}
    more |= {"rewards": [{"name": "long", "expression": "1"}]} if kind == "ppo" else {}
    batch = {"tokens": 64} if kind == "pretrain" else {"samples": 8}
    found = look(tmp_path, kind, model={"uri": "model"}, data=data, **{**TRAINING, **more, "batch": batch})
    assert [item.rule for item in found] == [words]


def test_files_of_a_glob_are_read_and_others_are_not(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ALPACA)
    write_lines(tmp_path / "b.json", PROSE)
    assert sft(tmp_path, [{"uri": "*.jsonl", "format": "alpaca"}]) == []


LAYOUTS: dict[str, dict[str, Any]] = {
    "text": PROSE[0],
    "alpaca": ALPACA[0],
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "pairs": PAIRS[0],
    "comparison": {"user_input": "a", "completion_a": "b", "completion_b": "c"},
    "ranked": {"prompt": "a", "answers": ["b", "c"]},
    "labels": {"prompt": "a", "completion": "b", "label": True},
}


@settings(max_examples=40, deadline=None)
@given(written=st.sampled_from(sorted(LAYOUTS)), said=st.sampled_from(sorted(LAYOUTS)), count=st.integers(1, 80))
def test_a_format_is_accepted_exactly_if_the_records_have_it(
    tmp_path_factory: pytest.TempPathFactory, written: str, said: str, count: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "a.jsonl", [LAYOUTS[written]] * count)
    found = look(folder, "data", sources=[{"uri": "a.jsonl", "format": said}])
    assert [item.path for item in found] == ([] if said == written else [("data", "sources", 0, "format")])


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_file_pickled_weights_and_a_missing_vocabulary_are_found(tmp_path: Path) -> None:
    data = [{"uri": write_lines(tmp_path / "a.jsonl", ALPACA)}]
    (tmp_path / "file.bin").write_bytes(b"x")
    (found,) = sft(tmp_path, data, model={"uri": "file.bin"})
    assert "this is a file (pickled weights are never loaded)" in found.rule
    save_model(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "tokenizer.json").unlink()
    weights, vocabulary = sft(tmp_path, data, model={"uri": "pickled"})
    assert "pickled weights (pytorch_model.bin)" in weights.rule
    assert "it has no vocabulary" in vocabulary.rule
    assert sft(tmp_path, data, model={"uri": "pickled"}, tokenizer={"uri": "model"}) == [weights]


def test_a_damaged_file_of_weights_is_found(tmp_path: Path) -> None:
    data = [{"uri": write_lines(tmp_path / "a.jsonl", ALPACA)}]
    save_model(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (found,) = sft(tmp_path, data, model={"uri": "cut"})
    assert "not an intact safetensors file" in found.rule


def test_adapters_on_layers_that_do_not_exist_are_found_by_the_headers(tmp_path: Path) -> None:
    data = [{"uri": write_lines(tmp_path / "a.jsonl", ALPACA)}]
    assert sft(tmp_path, data, trainable={"lora": {}}) == []
    (found,) = sft(tmp_path, data, trainable={"lora": {"targets": ["q_proj", "c_attn"]}})
    assert (found.path, found.value) == (("sft", "trainable", "lora", "targets"), "c_attn")
    assert "its layers are down_proj, embed_tokens, gate_proj" in found.rule


def test_rows_beyond_the_positions_are_a_warning(tmp_path: Path) -> None:
    data = [{"uri": write_lines(tmp_path / "a.jsonl", ALPACA)}]
    (found,) = sft(tmp_path, data, sequenceLength=256)
    assert (found.path, found.fatal) == (("sft", "sequenceLength"), False)
    assert "128 positions" in found.rule


def test_ids_without_a_row_are_found_where_no_rows_are_added(tmp_path: Path) -> None:
    save_model(tmp_path / "large", template="x", ids=20)
    (found,) = look(tmp_path, "export", model={"uri": "large"})
    assert found.rule == "its vocabulary has 20 ids and the model 16 rows"
    data = [{"uri": write_lines(tmp_path / "a.jsonl", ALPACA)}]
    assert sft(tmp_path, data, model={"uri": "large"}) == []  # grows


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_a_base_without_a_template_needs_one(tmp_path: Path, template: str | None) -> None:
    save_model(tmp_path / "model", template=template)
    write_lines(tmp_path / "a.jsonl", PAIRS)
    found = look(tmp_path, "dpo", model={"uri": "model"}, data=[{"uri": "a.jsonl"}], **TRAINING)
    assert [item.path for item in found] == ([("dpo", "template")] if template is None else [])


def test_a_look_imports_no_torch_and_no_transformers() -> None:
    script = "import sys, stagecoach_trainer.look.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
