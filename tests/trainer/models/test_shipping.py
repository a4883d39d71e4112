"""What training stages publish: opened by transformers and PEFT alone it measures what the stage measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stagecoach_api.artifacts import ModelCard
from stagecoach_api.training import LoraTraining, Trainable
from stagecoach_trainer.models.load import Head
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.models.save import save_adapter, save_model
from stagecoach_trainer.models.shipping import SavedProbe
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.models.makers import make_model, make_tokenizer, save_base
from tests.trainer.stages.makers import Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("shipping"))


def plain_loss(model: Any, tokenizer: Any, lines: list[str]) -> float:
    """Return the mean loss of transformers over the tokens of texts, each after BOS."""
    total, tokens = 0.0, 0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        row = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            total += float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
        tokens += row.shape[1] - 1
    return total / tokens


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_plain_transformers_measures_the_held_out_loss_that_the_stage_reports(workshop: Workshop, lora: bool) -> None:
    held_out = {"sets": [{"uri": "texts", "name": "en"}]}
    trainable: dict[str, Any] = {"lora": {"rank": 4}} if lora else {"full": {}}
    outcome, output = workshop.pretrain(f"plain-{lora}", trainable=trainable, heldOut=held_out)
    model: Any = AutoModelForCausalLM.from_pretrained(workshop.inputs["base"] if lora else output)
    if lora:
        model = PeftModel.from_pretrained(model, output)
    lines = workshop.inputs["texts"].read_text(encoding="utf-8").splitlines()
    found = plain_loss(model.eval(), AutoTokenizer.from_pretrained(output), lines)
    assert found == pytest.approx(outcome.metrics["heldOut.en.loss"], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5}}],
)
def test_a_configuration_that_computes_something_else_is_not_published(tmp_path: Path, change: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    model = make_model(len(tokenizer))
    (tmp_path / "output").mkdir()
    save_model(model, tokenizer, tmp_path / "vocabulary", tmp_path / "output", ModelCard(adapter=False))
    probe = SavedProbe.of(model, tokenizer)
    probe.prove(tmp_path / "output", None, Head.LANGUAGE_MODEL)
    file = tmp_path / "output" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match="opened by transformers, differs from the trained one: its outputs by"):
        probe.prove(tmp_path / "output", None, Head.LANGUAGE_MODEL)


def test_an_adapter_of_another_base_is_not_published(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    bases = [save_base(tmp_path / f"base-{seed}", tokenizer, seed) for seed in (0, 1)]
    model = choose_trainable(make_model(len(tokenizer), 0), Trainable(lora=LoraTraining()), range(0), seed=1).model
    with torch.no_grad():
        for name, item in model.named_parameters():
            item.add_(0.1 if "lora_B" in name else 0.0)
    (tmp_path / "output").mkdir()
    save_adapter(model, tokenizer, bases[0], tmp_path / "output", ModelCard(adapter=True))
    probe = SavedProbe.of(model, tokenizer)
    probe.prove(tmp_path / "output", bases[0], Head.LANGUAGE_MODEL)
    with pytest.raises(UserError, match="differs from the trained one"):
        probe.prove(tmp_path / "output", bases[1], Head.LANGUAGE_MODEL)


def test_a_reward_model_and_its_adapter_give_the_same_reward_in_plain_transformers_and_peft(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    base = save_base(tmp_path / "base", tokenizer)
    ids = torch.tensor([[1, 20, 300, 40]])
    reward = make_reward_model(AutoModelForCausalLM.from_pretrained(base), seed=3).eval()
    (tmp_path / "whole").mkdir()
    save_model(reward, tokenizer, base, tmp_path / "whole", ModelCard(adapter=False))
    opened: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(opened(input_ids=ids).logits, reward(input_ids=ids).logits)
    SavedProbe.of(reward, tokenizer).prove(tmp_path / "whole", None, Head.CLASSIFIER)
    adapted = choose_trainable(reward, Trainable(lora=LoraTraining()), range(0), seed=1).model.eval()
    with torch.no_grad():
        for name, item in adapted.named_parameters():
            item.add_(0.1 if "lora_B" in name else 0.0)
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted, tokenizer, base, tmp_path / "adapter", ModelCard(adapter=True))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(peft(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-6, rtol=0)
