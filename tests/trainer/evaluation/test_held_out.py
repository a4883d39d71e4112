"""Held-out figures against transformers' own loss, text by text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach_api.kinds.evaluate import EvaluateStage
from stagecoach_api.references import NamedSource
from stagecoach_trainer.evaluation.held_out import HeldOutFigures, measure_held_out
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.encoding import Encoder
from tests.trainer.data.makers import write_jsonl
from tests.trainer.evaluation.makers import chat_tokenizer, lively_model
from tests.trainer.models.makers import make_context, make_tokenizer

TEXTS = ("the quick brown fox", "白日依山尽 黄河入海流", "a model learns what the next word is " * 6, "x")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return lively_model(len(tokenizer))


def measured(
    tmp_path: Path, records: list[dict[str, Any]], model: Any, tokenizer: Any, **settings: Any
) -> HeldOutFigures:
    context = make_context(tmp_path, inputs={"set": write_jsonl(tmp_path / "set.jsonl", records)})
    source = NamedSource(name="zh", uri="set")
    values = {"model": {"uri": "m"}, "sequenceLength": 256, "batchRows": 2, **settings}
    return measure_held_out(source, EvaluateStage.model_validate(values), model, tokenizer, context)


def nll_of(model: Any, ids: list[int], scored_from: int = 1) -> float:
    """Nats of the tokens from `scored_from` on, computed alone by transformers."""
    labels = torch.tensor([ids])
    labels[0, :scored_from] = -100
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss
    return float(loss) * (len(ids) - scored_from)


def test_the_loss_of_packed_texts_is_that_of_each_alone(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    found = measured(tmp_path, [{"text": text} for text in TEXTS], model, tokenizer)
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in TEXTS]
    nll = sum(nll_of(model, tokens) for tokens in ids)
    tokens = sum(len(item) - 1 for item in ids)
    characters = sum(len(text) for text in TEXTS)
    assert found.counts == {"tokens": tokens, "characters": characters}
    expected = {
        "heldOut.zh.loss": nll / tokens,
        "heldOut.zh.perplexity": math.exp(nll / tokens),
        "heldOut.zh.bitsPerCharacter": nll / math.log(2) / characters,
        "heldOut.zh.perplexityPerCharacter": math.exp(nll / characters),
        "heldOut.zh.tokensPerCharacter": tokens / characters,
    }
    assert found.metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sequence_length", [8, 13, 64])
def test_each_token_of_a_long_text_is_scored_once(
    tmp_path: Path, model: Any, tokenizer: Any, sequence_length: int
) -> None:
    text = "".join(TEXTS)
    found = measured(tmp_path, [{"text": text}], model, tokenizer, sequenceLength=sequence_length)
    expected = {"tokens": len(tokenizer.encode(text, add_special_tokens=False)), "characters": len(text)}
    assert found.counts == expected


def test_measuring_ends_at_the_limit(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    found = measured(tmp_path, [{"text": text} for text in TEXTS], model, tokenizer, maxTokens=9)
    assert 0 < found.counts["tokens"] <= 9
    assert found.metrics["heldOut.zh.tokensPerCharacter"] == found.counts["tokens"] / found.counts["characters"]


def test_a_conversation_is_scored_on_the_assistants_turns(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "what is a fox"},
        {"role": "assistant", "content": "a quick dog"},
        {"role": "user", "content": "床前"},
        {"role": "assistant", "content": "明月光"},
    ]
    found = measured(tmp_path, [{"messages": talk}], model, tokenizer)
    encoder = Encoder(tokenizer)
    nll, tokens = 0.0, 0
    for index in (1, 3):
        served = tokenizer.apply_chat_template(
            talk[:index], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        answer = [*encoder.continuations([talk[index]["content"]])[0].tolist(), tokenizer.eos_token_id]
        nll += nll_of(model, served + answer, len(served))
        tokens += len(answer)
    assert found.counts["tokens"] == tokens
    assert found.counts["characters"] == len("a quick dog") + len("明月光")
    assert found.metrics["heldOut.zh.loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_a_conversation_longer_than_a_row_is_left_out(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    short = {"instruction": "fox", "output": "dog"}
    long = {"instruction": "fox " * 300, "output": "dog"}
    found = measured(tmp_path, [long, short], model, tokenizer, maxDroppedShare=0.5)
    assert found.counts == {"tokens": 3, "characters": 3, "tooLong": 1}
    with pytest.raises(UserError, match=r"50\.0% of the samples .*`maxDroppedShare` 5\.0%.*tooLong 1"):
        measured(tmp_path, [long, short], model, tokenizer)
    with pytest.raises(UserError, match="zh has no conversation to measure"):
        measured(tmp_path, [long], model, tokenizer)


def test_conversations_without_a_chat_template_are_an_error(tmp_path: Path, model: Any) -> None:
    with pytest.raises(UserError, match="heldOut zh: conversations need a chat template"):
        measured(tmp_path, [{"instruction": "a", "output": "b"}], model, make_tokenizer())


def test_a_nan_loss_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    broken = lively_model(len(tokenizer))
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="the loss is NaN or infinite"):
        measured(tmp_path, [{"text": "the fox"}], broken, tokenizer)
