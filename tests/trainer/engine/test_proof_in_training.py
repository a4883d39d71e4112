"""What is trained is what transformers computes: scales, routers, causality, number formats, packing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagecoach_api.kinds.dpo import DirectLoss, SigmoidLoss
from stagecoach_api.kinds.reward_model import PairLoss, PreferenceLoss
from stagecoach_api.training import Precision
from stagecoach_trainer.align.direct_objective import AnswerLoss
from stagecoach_trainer.align.reward_objective import RewardLoss
from stagecoach_trainer.batches.collate import collate
from stagecoach_trainer.batches.rows import IGNORE, Row
from stagecoach_trainer.engine.packing_check import check_packing, leak_of
from stagecoach_trainer.engine.precision import MixedPrecision
from stagecoach_trainer.kernels.accelerate import accelerate
from stagecoach_trainer.kernels.answer_log_probs import collate_answers
from stagecoach_trainer.kernels.causal import CausalLoss
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.loop.measure import measure
from stagecoach_trainer.models.reward import make_reward_model
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.architectures import VOCABULARY, tiny
from tests.trainer.loop.makers import context, training

CPU = torch.device("cpu")
PADDING = 3


def rows_of(*lengths: int) -> list[Row]:
    random = np.random.default_rng(sum(lengths))
    tokens = [random.integers(4, VOCABULARY, length, dtype=np.int32) for length in lengths]
    return [Row(ids, np.append(ids[1:], IGNORE).astype(np.int32), (len(ids),)) for ids in tokens]


def loss_of_transformers(model: Any, rows: list[Row]) -> float:
    """transformers' own loss of rows padded on the right."""
    length = max(row.num_tokens for row in rows)
    tokens = torch.tensor([[*row.tokens, *[PADDING] * (length - row.num_tokens)] for row in rows]).long()
    mask = torch.tensor([[1] * row.num_tokens + [0] * (length - row.num_tokens) for row in rows])
    with torch.no_grad():
        found = model.eval()(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, IGNORE))
    return float(found.loss)


class Plan:
    """One step over the same rows, unpacked."""

    num_steps = 1

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def rows(self, step: int) -> list[Row]:
        del step
        return self._rows


def metrics_of(folder: Path) -> dict[str, float]:
    """The figures of the one step."""
    lines = (folder / "work" / "logs" / "metrics.jsonl").read_text().splitlines()
    (step,) = (row for row in map(json.loads, lines) if "loss" in row)
    return dict(step)


# -- logits that are more than a product -------------------------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "falcon_h1": {"lm_head_multiplier": 0.3, "embedding_multiplier": 2.0},
    "granite": {"logits_scaling": 4.0},
    "cohere2": {"logit_scale": 0.1},
    "gemma2": {"final_logit_softcapping": 1.5},
    "modernbert-decoder": {},
    "gptj": {},
}


@pytest.mark.parametrize("model_type", SCALED)
def test_the_first_step_reports_the_loss_of_transformers(model_type: str, tmp_path: Path) -> None:
    """Liger-Kernel#1477, unsloth-zoo#930: Falcon-H1 was trained without its scales, and others."""
    model, rows = tiny(model_type, **SCALED[model_type]), rows_of(20, 12)
    expected = loss_of_transformers(model, rows)
    assert measure(model, rows).loss == pytest.approx(expected, rel=1e-5)
    result = train(TrainingJob(model, training(), Plan(rows)), context(tmp_path))
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_a_small_soft_cap_is_found_in_low_precision_too(precision: Precision) -> None:
    model = tiny("gemma2", final_logit_softcapping=30.0)
    cast = MixedPrecision(model, precision)
    cast.cast(CPU)
    loss = CausalLoss(model)
    with accelerate(loss, CPU, cast.dtype):
        assert loss.head_weight is None


# -- losses that the model adds ----------------------------------------------------------------------------------------

ROUTED: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def test_routers_losses_are_trained_weighted_as_configured_and_reported_apart(tmp_path: Path) -> None:
    """trl#7222, transformers#44586: the routers' loss was left out."""
    model, rows = tiny("mixtral", **ROUTED), rows_of(20, 12)
    whole = loss_of_transformers(model, rows)
    model.config.output_router_logits = False
    tokens = loss_of_transformers(model, rows)
    model.config.output_router_logits = True
    assert whole - tokens > 0.1
    before = model.model.layers[0].mlp.gate.weight.clone()
    result = train(TrainingJob(model, training(), Plan(rows)), context(tmp_path))
    assert result.metrics["loss"] == pytest.approx(whole, rel=1e-5)
    assert metrics_of(tmp_path)["routerLoss"] == pytest.approx(whole - tokens, rel=1e-4)
    assert not model.model.layers[0].mlp.gate.weight.equal(before)


def test_of_several_micro_batches_routers_losses_are_averaged_by_positions_with_loss(tmp_path: Path) -> None:
    model, rows = tiny("qwen3_moe", **ROUTED), rows_of(20, 11, 7)
    weights = np.array([row.num_targets for row in rows]) / sum(row.num_targets for row in rows)
    expected = sum(weights * [loss_of_transformers(model, [row]) for row in rows])
    result = train(TrainingJob(model, training(micro_batch_rows=1), Plan(rows)), context(tmp_path))
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_router_logits_nothing_is_added_and_held_out_losses_are_of_tokens_alone(tmp_path: Path) -> None:
    rows = rows_of(20, 12)
    model = tiny("mixtral", output_router_logits=False)
    expected = loss_of_transformers(model, rows)
    assert measure(tiny("mixtral", **ROUTED), rows).loss == pytest.approx(expected, rel=1e-5)
    train(TrainingJob(model, training(), Plan(rows)), context(tmp_path))
    assert "routerLoss" not in metrics_of(tmp_path)


# -- causality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_falcon_is_trained_causally_on_a_cpu(precision: Precision, caplog: pytest.LogCaptureFixture) -> None:
    """With our attention, changing token 30 moved the states of tokens 0 to 29."""
    model = tiny("falcon")
    cast = MixedPrecision(model, precision)
    cast.cast(CPU)
    loss = CausalLoss(model).eval()
    (row,) = rows_of(40)
    changed = row.tokens.copy()
    changed[30] = 5
    with caplog.at_level(logging.INFO), accelerate(loss, CPU, cast.dtype), torch.no_grad():
        one = loss.hidden(collate([row]))
        other = loss.hidden(collate([Row(changed, row.labels, row.lengths)]))
    assert torch.equal(one[:, :30], other[:, :30])
    assert not torch.equal(one[:, 30:], other[:, 30:])
    assert "FalconForCausalLM keeps its own attention" in caplog.text


def test_a_model_that_reads_both_directions_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny("bert", is_decoder=False)
    with pytest.raises(UserError, match=r"BertLMHeadModel is not causal.*moved the states of earlier ones by 0\."):
        train(TrainingJob(model, training(), Plan(rows_of(20))), context(tmp_path))
    assert not (tmp_path / "work" / "logs" / "metrics.jsonl").read_text()


def test_a_model_with_another_loss_is_refused_with_both_numbers() -> None:
    model, rows = tiny("bart"), rows_of(20, 12)
    with pytest.raises(UserError, match=r"BartForCausalLM cannot be trained: its own loss is \d\.\d+ .* is \d\.\d+"):
        measure(model, rows)


# -- number formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2", "olmo", "exaone4", "gemma3n_text", "nanochat"])
def test_a_model_whose_fp32_norms_meet_bf16_products_is_trained(model_type: str, tmp_path: Path) -> None:
    """Gemma 3 and OLMo 2 failed in bf16, with a RuntimeError that was tried again for an hour."""
    model, rows = tiny(model_type), rows_of(20, 12)
    expected = loss_of_transformers(model, rows)
    result = train(TrainingJob(model, training(precision="bf16"), Plan(rows)), context(tmp_path))
    assert result.metrics["loss"] == pytest.approx(expected, abs=0.03)
    assert loss_of_transformers(model, rows) < expected  # and everything computes in fp32 again
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("model_type", ["llama4", "deepseek_v2", "deepseek_v3", "qwen3_moe", "falcon_h1"])
def test_the_loss_in_low_precision_is_that_in_fp32_but_for_rounding(model_type: str, precision: Precision) -> None:
    """Complex rotary embeddings lost their imaginary part in the cast to bf16."""
    model, rows = tiny(model_type), rows_of(20, 12)
    expected = loss_of_transformers(model, rows)
    MixedPrecision(model, precision).cast(CPU)
    loss, batch = CausalLoss(model).eval(), collate(rows)
    with torch.no_grad():
        assert float(loss(batch, 1.0 / batch.num_targets)) == pytest.approx(expected, abs=0.02)


# -- packing -----------------------------------------------------------------------------------------------------------

PACKED = Row(np.arange(4, 60, dtype=np.int32), np.append(np.arange(5, 60), IGNORE).astype(np.int32), (30, 26))


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("model_type", ["bloom", "opt", "mamba", "gpt_oss"])
def test_a_small_leak_between_packed_samples_is_found_in_every_precision(model_type: str, precision: Precision) -> None:
    """In bf16, BLOOM's leak of 0.007 was within the tolerance."""
    model = tiny(model_type)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attention" in name or "attn" in name or "mixer" in name:
                weight.mul_(0.1)
    cast = MixedPrecision(model, precision)
    cast.cast(CPU)
    with pytest.raises(UserError, match="packed samples see each other"):
        check_packing(CausalLoss(model), [PACKED], CPU, cast.dtype)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "gemma2", "gpt2", "phi3", "deepseek_v3"])
def test_samples_that_do_not_see_each_other_leak_exactly_nothing(model_type: str, precision: Precision) -> None:
    model = tiny(model_type)
    MixedPrecision(model, precision).cast(CPU)
    assert leak_of(CausalLoss(model), [PACKED], CPU) == 0.0


# -- log-probabilities and rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "falcon", "llama"])
def test_log_probabilities_are_those_of_transformers(model_type: str) -> None:
    """Every objective over answers is proved like the loss of text: DPO, and PPO's policy."""
    model = tiny(model_type)
    loss = AnswerLoss(model, DirectLoss(sigmoid=SigmoidLoss())).eval()
    ids = rows_of(18)[0].tokens
    with accelerate(loss, CPU, torch.float32), torch.no_grad():
        (found,) = loss(collate_answers([(ids[:6], ids[6:])], whole=True))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    each = torch.log_softmax(logits, -1)[:-1].gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])
    assert float(found) == pytest.approx(float(each[5:].sum()), rel=1e-5)


def test_a_reward_model_whose_scores_are_not_those_of_transformers_is_refused() -> None:
    model = make_reward_model(tiny("llama"), seed=1)
    with accelerate(RewardLoss(model, PreferenceLoss(pair=PairLoss())), CPU, torch.float32):
        pass
    bent = RewardLoss(model, PreferenceLoss(pair=PairLoss()))
    model.score.register_forward_hook(lambda module, inputs, output: output * (1.0 if inputs[0].ndim == 3 else 2.0))
    with (
        pytest.raises(UserError, match="LlamaForSequenceClassification cannot be trained"),
        accelerate(bent, CPU, torch.float32),
    ):
        pass
