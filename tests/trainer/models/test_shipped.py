"""What is saved opens by transformers' own classes with the same ids, templates and settings, and is refused before the
work otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stagecoach_api.artifacts import ModelCard
from stagecoach_trainer.models.rehearsal import rehearse_saving
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.models.save_vocabulary import save_vocabulary
from stagecoach_trainer.models.token_ids import set_token_ids
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.probes import PROBES
from stagecoach_trainer.text.vocabulary import load_tokenizer
from tests.trainer.architectures import tiny
from tests.trainer.models.makers import make_model, make_tokenizer, save_family

TEMPLATE = "{{ messages[0]['content'] }}"


def saved(folder: Path, model: Any, tokenizer: Any, source: Path) -> Path:
    folder.mkdir()
    save_model(model, tokenizer, source, folder, ModelCard(adapter=False))
    return folder


# -- templates ---------------------------------------------------------------------------------------------------------


def test_named_chat_templates_are_saved_as_transformers_saves_them(tmp_path: Path) -> None:
    """NeMo Automodel#1696: a base with several named templates trained to the end and could not be saved."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "!", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(tmp_path / "base")
    used = load_tokenizer(tmp_path / "base")
    output = saved(tmp_path / "output", make_model(len(used)), used, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    names = {path.name for path in (output / "additional_chat_templates").iterdir()}
    assert names == {"tool_use.jinja", "rag.jinja"}
    assert (output / "chat_template.jinja").read_text() == TEMPLATE


def test_a_template_of_the_stage_replaces_the_named_ones(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "!"}
    tokenizer.save_pretrained(tmp_path / "base")
    used = load_tokenizer(tmp_path / "base")
    used.chat_template = TEMPLATE + "?"
    output = saved(tmp_path / "output", make_model(len(used)), used, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(output).chat_template == TEMPLATE + "?"


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_a_folder_whose_family_prescribes_a_tokenizer_is_read_as_everybody_reads_it(tmp_path: Path) -> None:
    """A qwen2 folder with a plain class: AutoTokenizer gives other ids than the file, and training used the file."""
    folder = save_family(tmp_path / "base", "qwen2", make_tokenizer())
    public = AutoTokenizer.from_pretrained(folder)
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    assert any(public(text)["input_ids"] != plain(text)["input_ids"] for text in PROBES)
    used = load_tokenizer(folder)
    output = saved(tmp_path / "output", AutoModelForCausalLM.from_pretrained(folder), used, folder)
    shipped = [AutoTokenizer.from_pretrained(output), PreTrainedTokenizerFast.from_pretrained(output)]
    for text in PROBES:
        assert {tuple(found(text)["input_ids"]) for found in (public, used, *shipped)} == {
            tuple(used(text)["input_ids"])
        }


def test_a_vocabulary_that_the_family_would_open_otherwise_is_refused_before_the_work(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    used = load_tokenizer(tmp_path / "vocabulary")
    config = Qwen2Config(
        vocab_size=len(used), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="AutoTokenizer opens the vocabulary otherwise than it is used here"):
        rehearse_saving(model, used, tmp_path / "vocabulary")


def test_a_wrong_class_in_the_vocabulary_is_replaced_by_one_that_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    used = load_tokenizer(tmp_path / "vocabulary")
    file = tmp_path / "vocabulary" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "output").mkdir()
    save_vocabulary(used, tmp_path / "vocabulary", tmp_path / "output")
    opened = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert [opened(text)["input_ids"] for text in PROBES] == [used(text)["input_ids"] for text in PROBES]


# -- tied weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["modernbert-decoder", "biogpt", "gpt2", "olmoe"])
def test_a_tied_head_is_stored_once_whatever_its_family_calls_it(tmp_path: Path, family: str) -> None:
    """A head called `decoder` or `output_projection` made saving fail when the work was done."""
    model = tiny(family, tie_word_embeddings=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    output = saved(tmp_path / "output", model, load_tokenizer(tmp_path / "vocabulary"), tmp_path / "vocabulary")
    again: Any = AutoModelForCausalLM.from_pretrained(output).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


# -- special tokens ----------------------------------------------------------------------------------------------------


class Tokens:
    """A vocabulary's special tokens."""

    def __init__(self, bos: int | None = None, eos: int | None = 2, pad: int | None = None) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = bos, eos, pad, 0
        self.chat_template = None


@pytest.mark.parametrize("family", ["llama", "cwm", "emu3_text_model", "step3p5", "gpt2", "falcon_h1", "phimoe"])
@pytest.mark.parametrize("tokens", [Tokens(), Tokens(1, 2, 0), Tokens(None, None)], ids=["eos", "all", "none"])
def test_no_special_token_of_a_vocabulary_prevents_saving_the_configuration(
    tmp_path: Path, family: str, tokens: Tokens
) -> None:
    """Some architectures require an id of padding or BOS, and their configuration was not saved without one."""
    model: Any = make_model(400)
    kind: Any = CONFIG_MAPPING[family]
    model.config = kind(vocab_size=400)
    set_token_ids(model, tokens, {})
    model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    if tokens.eos_token_id is not None:
        assert again.eos_token_id in (2, [2])
        assert model.generation_config.eos_token_id == 2
    assert again.pad_token_id is None or again.pad_token_id < 400 or family in ("phimoe", "step3p5", "emu3_text_model")


@pytest.mark.parametrize(
    ("stated", "end", "expected"),
    [(None, 2, 2), (2, 2, 2), (3, 2, [3, 2]), ([3, 5], 2, [3, 5, 2]), ([2], 2, [2]), ([3, 999], 3, [3]), (3, None, 3)],
)
def test_the_end_tokens_of_the_base_stay_and_that_of_the_template_is_added(
    stated: Any, end: int | None, expected: Any
) -> None:
    model = make_model(400)
    model.generation_config.eos_token_id = stated
    set_token_ids(model, Tokens(eos=end), {})
    assert model.generation_config.eos_token_id == expected


def test_padding_of_the_base_stays_and_one_without_a_row_goes() -> None:
    model = make_model(400)
    model.config.pad_token_id, model.generation_config.pad_token_id = 7, 32000
    set_token_ids(model, Tokens(pad=5), {})
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (7, 5)
    assert torch.equal(model.state_dict()["lm_head.weight"], make_model(400).state_dict()["lm_head.weight"])


def test_the_token_with_which_the_template_ends_a_turn_ends_generation_too() -> None:
    """Gemma and Phi-3: turns end with a marker that is not the vocabulary's end token."""
    tokenizer = make_tokenizer(special=("<turn>", "<end_of_turn>"))
    tokenizer.chat_template = (
        "{%- for m in messages -%}<turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<turn>assistant\n{%- endif -%}"
    )
    model = make_model(len(tokenizer))
    set_token_ids(model, tokenizer, {})
    marker = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, marker]
