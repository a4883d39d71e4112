"""Loading: what is refused before anything is read, and what comes out of a chain of adapters."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagecoach_api.artifacts import ModelCard, ResolvedInput
from stagecoach_api.references import Reference
from stagecoach_api.training import LoraTraining, NewRows, Trainable
from stagecoach_trainer.models.load import load_folder, load_model, locate_base, name_base
from stagecoach_trainer.models.resize import grow
from stagecoach_trainer.models.save import save_adapter, save_model
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_context, make_model, make_tokenizer, outside, save_base


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_to_bin(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))


def pickle_under_another_name(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))


def torch_zip_under_another_name(folder: Path, canary: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "model.safetensors")


def only_a_pt_file(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.pt")


def code_in_the_folder(folder: Path, canary: Path) -> None:
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")


def code_for_the_tokenizer(folder: Path, canary: Path) -> None:
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


def unknown_architecture(folder: Path, canary: Path) -> None:
    change_json(folder / "config.json", model_type="unheard_of")


def huge_header(folder: Path, canary: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def rewrite_header(folder: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlapping_offsets(folder: Path, canary: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        first, second = [name for name in header if name.endswith("layernorm.weight")][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]

    rewrite_header(folder, change)


def wrong_shape(folder: Path, canary: Path) -> None:
    rewrite_header(folder, lambda header: header["model.norm.weight"].update(shape=[31]))


def offsets_beyond_the_end(folder: Path, canary: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def header_is_a_list(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


def missing_weight(folder: Path, canary: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def weight_left_over(folder: Path, canary: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.odd.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def index_that_leaves_the_folder(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def index_of_pickles(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))


def malformed_config(folder: Path, canary: Path) -> None:
    (folder / "config.json").write_text("{")


def larger_vocabulary(folder: Path, canary: Path) -> None:
    make_tokenizer(extra=("龘", "靐")).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename_to_bin, "pytorch_model.bin"),
        (pickle_under_another_name, "pickle"),
        (torch_zip_under_another_name, "pickle"),
        (only_a_pt_file, "model.pt"),
        (code_in_the_folder, "auto_map"),
        (code_for_the_tokenizer, "auto_map"),
        (unknown_architecture, "configuration"),
        (huge_header, "header"),
        (overlapping_offsets, "overlap"),
        (wrong_shape, "model.norm.weight"),
        (offsets_beyond_the_end, "bytes of tensors"),
        (header_is_a_list, "not a JSON object"),
        (missing_weight, "missing weights"),
        (weight_left_over, "unexpected weights"),
        (index_that_leaves_the_folder, "not a safetensors file"),
        (index_of_pickles, "not a safetensors file"),
        (malformed_config, "malformed JSON"),
        (larger_vocabulary, "402 ids and the model 400 rows, so 2 tokens have none, such as '靐'; train the model in"),
    ],
)
def test_a_bad_folder_is_rejected_and_none_of_its_code_runs(
    tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    folder, canary = save_base(tmp_path / "base", make_tokenizer()), tmp_path / "canary"
    spoil(folder, canary)
    context = make_context(tmp_path, inputs={"base": folder})
    with pytest.raises(UserError, match=message):
        load_model(context, Reference(uri="base"))
    assert not canary.exists()


def test_a_head_that_differs_from_the_embedding_survives_a_configuration_that_ties_them(tmp_path: Path) -> None:
    """transformers#45127: saved as tied, the folder would have lost its head."""
    folder, context = save_base(tmp_path / "base", make_tokenizer()), make_context(tmp_path)
    change_json(folder / "config.json", tie_word_embeddings=True)
    loaded = load_model(context, outside(folder))
    save_model(loaded.model, loaded.tokenizer, folder, context.output, ModelCard(adapter=False))
    head = load_file(context.output / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, load_file(folder / "model.safetensors")["lm_head.weight"])
    assert not json.loads((context.output / "config.json").read_text())["tie_word_embeddings"]


def test_a_file_instead_of_a_folder_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="pickled"):
        load_model(make_context(tmp_path, inputs={"base": path}), Reference(uri="base"))


def test_an_intact_folder_is_loaded_bit_for_bit_in_the_requested_format(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", make_tokenizer(), seed=3)
    loaded = load_model(make_context(tmp_path, inputs={"base": folder}), Reference(uri="base"), dtype=torch.bfloat16)
    expected = make_model(len(loaded.require_tokenizer()), seed=3).state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16))
    assert loaded.card == ModelCard(adapter=False)


def make_adapter(base: Path, output: Path, root: Path, grown: bool) -> ResolvedInput:
    """Write an adapter artifact with random weights over `base`; return its location."""
    output.mkdir()
    context = make_context(root, inputs={"base": base})
    loaded = load_model(context, Reference(uri="base"))
    tokenizer = make_tokenizer(extra=("龘", "靐")) if grown else loaded.require_tokenizer()
    rows = grow(loaded.model, loaded.tokenizer, tokenizer, NewRows.RANDOM, seed=5) if grown else range(0)
    trainable = Trainable(lora=LoraTraining(targets=("q_proj",), new_rows=grown))
    model = choose_trainable(loaded.model, trainable, rows, seed=1).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    vocabulary = root / "vocabulary"
    tokenizer.save_pretrained(vocabulary)
    card = ModelCard(
        adapter=True, base=loaded.source, new_rows="random" if grown else None, resize_seed=5 if grown else None
    )
    save_adapter(model, tokenizer, vocabulary, output, card)
    return outside(output)


@pytest.mark.parametrize("grown", [False, True])
def test_an_adapter_is_applied_to_its_base_grown_as_recorded_and_merged(tmp_path: Path, grown: bool) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    found = make_adapter(base, tmp_path / "adapter", tmp_path, grown)
    context = make_context(tmp_path)
    apart = load_model(context, found, merge=False)
    merged = load_model(context, found)
    ids = torch.tensor([[1, 300, 5, len(merged.require_tokenizer()) - 1]])
    with torch.no_grad():
        difference = (apart.model(ids).logits - merged.model(ids).logits).abs().max()
        plain = load_folder(base)
        changed = (
            (plain(ids[:, :3]).logits - merged.model(ids[:, :3]).logits[..., : plain.config.vocab_size]).abs().max()
        )
    assert difference <= 1e-5
    assert changed > 1e-3
    assert merged.model.get_input_embeddings().weight.shape[0] == len(merged.require_tokenizer())
    assert type(merged.model).__name__ == "LlamaForCausalLM"
    assert apart.card.base is not None
    assert all(
        "lora" in name or "trainable_tokens" in name for name, p in apart.model.named_parameters() if p.requires_grad
    )


def test_an_adapter_of_an_adapter_is_loaded_through_the_whole_chain(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    make_adapter(base, tmp_path / "first", tmp_path / "one", grown=True)
    found = make_adapter(tmp_path / "first", tmp_path / "second", tmp_path / "two", grown=False)
    chained = load_model(make_context(tmp_path), found)
    first = load_model(make_context(tmp_path), outside(tmp_path / "first"))
    assert len(chained.require_tokenizer()) == len(make_tokenizer()) + 2
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(chained.model.state_dict()[name], first.model.state_dict()[name])
    other = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(chained.model.state_dict()[other], first.model.state_dict()[other])


def test_a_pickled_or_foreign_adapter_is_rejected(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    make_adapter(base, tmp_path / "adapter", tmp_path / "one", grown=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin"):
        load_model(make_context(tmp_path), outside(tmp_path / "adapter"))
    (tmp_path / "adapter" / "stagecoach.json").unlink()
    with pytest.raises(UserError, match="base is unknown"):
        load_model(make_context(tmp_path), outside(tmp_path / "adapter"))


def test_adapter_weights_that_fit_no_layer_are_rejected(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_tokenizer())
    make_adapter(base, tmp_path / "adapter", tmp_path / "one", grown=False)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    save_file({f"odd.{name}": tensor for name, tensor in state.items()}, path)
    with pytest.raises(UserError, match="do not fit"):
        load_model(make_context(tmp_path), outside(tmp_path / "adapter"))


def test_a_card_names_its_base_independently_of_the_stores_location() -> None:
    digest = "a" * 64
    source = ResolvedInput(uri=f"s3://b/models/artifacts/{digest}/output", digest="c" * 64, stage_digest=digest)
    named = name_base(source, "s3://b/models/")
    assert named.uri == f"artifacts/{digest}/output"
    elsewhere = ResolvedInput(uri=f"/copy/artifacts/{'e' * 64}/output", digest="f" * 64, stage_digest="e" * 64)
    assert locate_base(named, elsewhere, "s3://b/models").uri == f"/copy/artifacts/{digest}/output"
    assert locate_base(named, ResolvedInput(uri="/x", digest="0" * 64), "s3://b/models") == source
    assert name_base(source, "s3://other") == source


def test_a_saved_model_reloads_with_vocabulary_card_and_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    (tmp_path / "vocabulary" / "tokenizer.model").write_bytes(b"pieces")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = make_model(len(tokenizer), tied=True)
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        output.mkdir()
        save_model(model, tokenizer, tmp_path / "vocabulary", output, ModelCard(adapter=False, old_rows=3))
    files = [{path.name: path.read_bytes() for path in output.iterdir()} for output in outputs]
    assert files[0] == files[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"} <= set(
        files[0]
    )
    assert not any(str(tmp_path).encode() in content for content in files[0].values())
    loaded = load_model(make_context(tmp_path), outside(outputs[0]))
    assert loaded.card.old_rows == 3
    assert loaded.require_tokenizer().chat_template == tokenizer.chat_template
    assert loaded.model.config.eos_token_id == tokenizer.eos_token_id
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight


@pytest.mark.parametrize(("spoil", "message"), [("nan", "not finite"), ("zero", "all zero")])
def test_a_broken_model_is_not_saved(tmp_path: Path, spoil: str, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    model = make_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan") if spoil == "nan" else 0.0)
    with pytest.raises(UserError, match=f"lm_head.*{message}"):
        save_model(model, tokenizer, tmp_path / "vocabulary", tmp_path, ModelCard(adapter=False))


def test_an_adapter_that_learnt_nothing_is_not_saved(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    model = choose_trainable(make_model(len(tokenizer)), Trainable(lora=LoraTraining()), range(0), seed=1).model
    with pytest.raises(UserError, match="learnt nothing"):
        save_adapter(model, tokenizer, tmp_path / "vocabulary", tmp_path, ModelCard(adapter=True))


def test_a_model_is_saved_in_several_files_and_in_another_number_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it takes seconds, and fails here
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    model = make_model(len(tokenizer))
    output = tmp_path / "output"
    output.mkdir()
    save_model(
        model, tokenizer, tmp_path / "vocabulary", output, ModelCard(adapter=False), torch.bfloat16, 30_000,
        {"max_new_tokens": 9},
    )  # fmt: skip
    assert len(list(output.glob("model-*.safetensors"))) > 1
    loaded = load_folder(output, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16))
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.generation_config.max_new_tokens == 9
    assert model.dtype == torch.float32


def test_contradictory_generation_settings_do_not_lose_a_trained_model(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    model = make_model(len(tokenizer))
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6
    output = tmp_path / "output"
    output.mkdir()
    save_model(model, tokenizer, tmp_path / "vocabulary", output, ModelCard(adapter=False))
    settings = json.loads((output / "generation_config.json").read_text())
    assert (settings["do_sample"], settings["temperature"]) == (True, 0.6)
