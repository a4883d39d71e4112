"""What plain transformers would not open as it was trained is refused before the first step, by the weights' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from stagecoach_api.artifacts import ModelCard
from stagecoach_trainer.loop import loop
from stagecoach_trainer.models import model_part
from stagecoach_trainer.models.load import load_folder, own_tokenizer
from stagecoach_trainer.models.rehearsal import rehearse_saving
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.architectures import tiny
from tests.trainer.families import save_tiny
from tests.trainer.models.makers import make_model, make_tokenizer
from tests.trainer.stages.makers import Workshop


class Forgets(LlamaConfig):
    model_type = "test-forgets"


class ForgetsForCausalLM(LlamaForCausalLM):
    """Initialises a row of its head again after it was read, as Youtu does with that of the padding."""

    config_class = Forgets

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # transformers treats its own architectures in another way

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Linear):
            module.weight.data[0] = 1.0


class Converts(LlamaConfig):
    model_type = "test-converts"


class ConvertsForCausalLM(LlamaForCausalLM):
    """Turns a weight round when it is read, and not back when it is written."""

    config_class = Converts


class Turn(ConversionOps):
    def __init__(self, back: bool = True) -> None:
        self.back = back

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **others: Any) -> Any:
        del source_patterns, others
        (values,) = input_dict.values()
        value = values[0] if isinstance(values, list) else values
        return {target_patterns[0]: value.flip(0) if self.back else value}

    @property
    def reverse_op(self) -> ConversionOps:
        return Turn(back=False)


class Drops(LlamaConfig):
    """Does not read two of its settings, of which one means something."""

    model_type = "test-drops"

    def __post_init__(self, **settings: Any) -> None:
        super().__post_init__(**settings)  # type: ignore[no-untyped-call]
        self.rms_norm_eps, self.attention_dropout = 1e-6, 0.0


class DropsForCausalLM(LlamaForCausalLM):
    config_class = Drops


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    for config, model in ((Forgets, ForgetsForCausalLM), (Converts, ConvertsForCausalLM), (Drops, DropsForCausalLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    turn = WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", operations=[Turn()])
    register_checkpoint_conversion_mapping(Converts.model_type, [turn], overwrite=True)


def make(kind: Any) -> Any:
    config = dict(vars(make_model(400).config)) | {"num_hidden_layers": 3}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    model = kind(kind.config_class(vocab_size=400, **{name: config[name] for name in names}))
    for parameter in model.parameters():
        parameter.data += 0.1  # as after some training: nothing is what it was initialised to
    return model


def rehearse(model: Any, folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    rehearse_saving(model, tokenizer, folder)


@pytest.fixture(params=[False, True], ids=["whole", "part"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Try large models in the test, too: by their first blocks."""
    if request.param:
        monkeypatch.setattr(model_part, "SMALL", 0)
    return bool(request.param)


@pytest.mark.usefixtures("part")
def test_a_weight_that_is_initialised_after_it_was_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ForgetsForCausalLM cannot be saved exactly: .* 1 of its .*: lm_head\.w"):
        rehearse(make(ForgetsForCausalLM), tmp_path)


@pytest.mark.usefixtures("part")
def test_a_weight_that_begins_with_what_it_is_reset_to_is_named_too(tmp_path: Path) -> None:
    model = make(ForgetsForCausalLM)
    model.save_pretrained(tmp_path)
    opened = load_folder(tmp_path)
    assert (opened.lm_head.weight[0] == 1).all()
    with pytest.raises(UserError, match=r"come back changed: lm_head\.weight"):
        rehearse(opened, tmp_path)


def test_weights_that_are_turned_when_they_are_read_are_named(tmp_path: Path, part: bool) -> None:
    expected = f"{1 if part else 3} of its weights come back changed: model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(UserError, match=expected):
        rehearse(make(ConvertsForCausalLM), tmp_path)


@pytest.mark.usefixtures("part")
def test_settings_that_are_lost_are_named_if_they_mean_something(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its settings come back changed \(rms_norm_eps\), and outputs of up to"):
        rehearse(with_eps(make(DropsForCausalLM)), tmp_path)
    model = make(DropsForCausalLM)
    model.config.attention_dropout = 0.5  # of which no trace is left in a model that is used
    rehearse(model, tmp_path)


def with_eps(model: Any) -> Any:
    model.config.rms_norm_eps = 0.5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    return model


def test_such_a_model_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage trained to its end, and published nothing."""

    def must_not_train(*arguments: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(loop, "train", must_not_train)
    workshop = Workshop(tmp_path)
    make(ForgetsForCausalLM).save_pretrained(workshop.inputs["base"])
    with pytest.raises(UserError, match=r"cannot be saved exactly: .* lm_head\.weight; train an adapter"):
        workshop.pretrain("forgets")


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("kind", ["mixtral", "gemma3_text", "deepseek_v3", "gpt2", "bamba", "gemma4", "rwkv", "zaya"])
def test_families_that_can_be_saved_are_not_refused_and_do_not_change(tmp_path: Path, kind: str) -> None:
    model = load_folder(save_tiny(tmp_path, kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings, state = model.config.to_dict(), torch.random.get_rng_state()
    rehearse_saving(model, own_tokenizer(tmp_path), tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, value in model.config.to_dict().items() if settings.get(name) != value}
    assert changed <= {"pad_token_id", "bos_token_id", "eos_token_id", "architectures", "text_config"}


@pytest.mark.usefixtures("part")
def test_a_reward_model_is_opened_as_the_classifier_that_it_is(tmp_path: Path) -> None:
    rehearse(make_reward_model(make_model(400), seed=3), tmp_path)


def test_a_model_whose_padding_transformers_resets_is_saved_without_the_id(tmp_path: Path) -> None:
    """Youtu was trained in full, and its folder then opened with zeros in the row of the padding id."""
    base = save_tiny(tmp_path / "base", "youtu")
    model, tokenizer = load_folder(base), own_tokenizer(base)
    assert tokenizer is not None
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.pad_token_id] = 0.5
    rehearse_saving(model, tokenizer, base)
    (tmp_path / "output").mkdir()
    save_model(model, tokenizer, base, tmp_path / "output", ModelCard(adapter=False))
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert torch.equal(opened.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert GenerationConfig.from_pretrained(tmp_path / "output").pad_token_id == tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.save_pretrained(tmp_path / "output")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert not again.get_input_embeddings().weight[tokenizer.pad_token_id].any()  # the reason


# -- the part of a large model -----------------------------------------------------------------------------------------


def deep(kind: str, blocks: int) -> Any:
    """Return a tiny model with more blocks: its kinds of blocks repeat."""
    config = tiny(kind).config
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, (value * blocks)[:blocks])
    text.num_hidden_layers = blocks
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "enough"),
    [
        ("llama", 1),
        ("gemma3_text", 2),
        ("deepseek_v3", 2),
        ("qwen3_next", 2),
        ("gpt2", 1),
        ("mixtral", 1),
        ("olmo3", 2),
    ],
)
def test_a_part_has_a_block_of_each_kind_in_the_memory_of_the_whole(kind: str, enough: int) -> None:
    model = deep(kind, 5)
    found: Any = model_part.first_blocks(model)
    assert found.config.get_text_config().num_hidden_layers == enough
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    assert all(whole[name] is tensor for name, tensor in own.items())
    assert len(own) < len(whole)


def test_a_part_computes_what_the_first_blocks_of_the_model_compute() -> None:
    model = deep("llama", 4)
    found: Any = model_part.first_blocks(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        got = found(input_ids=ids, use_cache=False).logits
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        assert torch.equal(got, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["gemma3n_text", "longcat_flash"])
def test_a_model_whose_configuration_counts_blocks_in_another_way_has_no_part(kind: str) -> None:
    """The settings of Gemma 3n count how many of the last layers share keys; LongCat has two blocks in each layer."""
    assert model_part.first_blocks(tiny(kind) if kind == "longcat_flash" else deep(kind, 7)) is None
