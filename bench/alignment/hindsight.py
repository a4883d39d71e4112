"""`python -m bench.alignment.hindsight`: what `sft`'s hindsight modes are worth on a task whose best answer is known.

The prompt is four digits, the best answer the same in reverse. Each record has two worse answers: in both the first
digit is too high by one, in the worst the last one too. So two of three answers begin wrongly, and imitating all of
them is expected to learn that. Every arm begins with one and the same model, which has read digits that count up and
down, makes as many optimiser steps on as many samples, and is asked for its likeliest answer to prompts it has not
seen. Stages run as they do for users; only `last links` is a switch of the code alone.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

SEEDS = (0, 1, 2)
RECORDS, HELD_OUT, DIGITS = 1000, 300, 4
STEPS, SAMPLES = 300, 48
BASE_STEPS = 150
GOOD, BAD = "+", "-"
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}?{{ message['content'] }}{% else %}={{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@dataclass(frozen=True)
class Arm:
    """One way to train on the same records."""

    name: str
    data: Sequence[str]
    """Names of data sets, or `NAME:WEIGHT`."""
    hindsight: Mapping[str, Any] | None = None
    last_links: bool = True

    @property
    def asked_with(self) -> str | None:
        chain = self.hindsight is not None and self.hindsight.get("mode") == "chain"
        return GOOD if chain else None


def chain(**settings: Any) -> dict[str, Any]:
    return {"mode": "chain", "feedback": [{"good": GOOD, "bad": BAD}], **settings}


ARMS = (
    Arm("all answers, no hindsight", ["all"]),
    Arm("best", ["ranked"], {"mode": "best"}),
    Arm("chain", ["ranked"], chain()),
    Arm("chain, nothing hidden", ["ranked"], chain(maxMaskedShare=0)),
    Arm("chain, no last links", ["ranked"], chain(), last_links=False),
    Arm("chain, a tenth of the tokens text", ["ranked:0.9", "text:0.1"], chain()),
)


@dataclass
class Found:
    """What one arm came to, one value per seed."""

    exact: list[float] = field(default_factory=list)
    """Share of held-out prompts answered with the best answer."""
    exact_if_bad: list[float] = field(default_factory=list)
    """The same where a chain's model is asked with the bad words."""
    text_loss: list[float] = field(default_factory=list)
    """Loss on held-out text, in nats per token."""
    hidden: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


# -- the task ----------------------------------------------------------------------------------------------------------


def answers_to(prompt: str) -> list[str]:
    """Return the best answer, a worse one and the worst."""
    best = prompt[::-1]
    worse = _raised(best[0]) + best[1:]
    return [best, worse, worse[:-1] + _raised(worse[-1])]


def _raised(digit: str) -> str:
    return str((int(digit) + 1) % 10)


def write_data(folder: Path, seed: int) -> list[str]:
    """Write the data sets; return the held-out prompts."""
    random = np.random.default_rng(seed)
    numbers = random.permutation(10**DIGITS)[: RECORDS + HELD_OUT]
    prompts = [f"{number:0{DIGITS}d}" for number in numbers]
    ranked = [{"prompt": prompt, "answers": answers_to(prompt)} for prompt in prompts[:RECORDS]]
    single = [{"instruction": one["prompt"], "output": answer} for one in ranked for answer in one["answers"]]
    texts = [{"text": counting(random)} for _ in range(600)]
    for name, values in (("ranked", ranked), ("all", single), ("text", texts[:500]), ("heldOut", texts[500:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return prompts[RECORDS:]


def counting(random: np.random.Generator) -> str:
    """Return text for a base model: digits that go up or down by a step of 1 to 4."""
    start, step = int(random.integers(10)), int(random.choice([-4, -3, -2, -1, 1, 2, 3, 4]))
    return "".join(str((start + step * index) % 10) for index in range(24))


def make_tokenizer() -> Any:
    """Return a vocabulary of characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *"0123456789", "?", "=", GOOD, BAD, "\n"]
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def save_model(folder: Path, seed: int) -> None:
    """Write a LLaMA of 2 layers of width 64 with new weights, and its vocabulary."""
    from stagecoach_api.stages.pretrain import Architecture
    from stagecoach_trainer.models.scratch import build_model

    shape = Architecture(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, max_position_embeddings=64)
    tokenizer = make_tokenizer()
    build_model(shape, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- training and asking -----------------------------------------------------------------------------------------------


def run_sft(
    folder: Path, name: str, data: Path, values: Mapping[str, Any], seed: int
) -> tuple[Path, Mapping[str, float]]:
    """Run an `sft` stage in a folder of its own; return its output and its metrics."""
    from bench.ours import resolve
    from stagecoach_api.stages.sft import SftStage
    from stagecoach_trainer.context import World
    from stagecoach_trainer.run_stage import Attempt, build_context
    from stagecoach_trainer.stages.sft import run

    config = SftStage.model_validate(
        {
            "template": {"name": "custom", "jinja": TEMPLATE},
            "sequenceLength": 48,
            "batch": {"samples": SAMPLES, "microBatchRows": SAMPLES},
            "schedule": {"name": "cosine", "warmupSteps": 10},
            "precision": "fp32",
            "checkpoints": {"everySteps": 10**9},
            "heldOut": {"sets": [{"uri": str(data / "heldOut.jsonl"), "name": "text", "format": "text"}]},
            **values,
        }
    )
    uris = [Path(found.uri) for found in (config.model, *config.data, *config.held_out.sets) if found.uri]
    stage = resolve("sft", config.model_dump(mode="json"), uris, folder / name).model_copy(update={"seed": seed})
    place = folder / name
    attempt = Attempt(stage, config, place / "work", place / "cache", None, World(), time.time())
    context = build_context(attempt, threading.Event())
    outcome = run(config, context)
    return context.output, outcome.metrics | {"tokens": float(outcome.tokens or 0)}


def exact_match(model_folder: Path, prompts: Sequence[str], words: str | None) -> float:
    """Return the share of prompts whose likeliest answer is the best one. `words`: what is asked with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stagecoach_trainer.samples.encoding import Encoder
    from stagecoach_trainer.samples.hindsight import asked_prompt
    from stagecoach_trainer.text.templates import Renderer

    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder)
    renderer = Renderer(tokenizer)
    texts = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        asked = renderer.render(messages, add_generation_prompt=True)
        texts.append(asked if words is None else asked_prompt(renderer, messages, words))
    ids = torch.tensor(np.stack(Encoder(tokenizer).prompts(texts)), dtype=torch.long)
    with torch.no_grad():
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=DIGITS + 1, do_sample=False,
                              pad_token_id=tokenizer.eos_token_id)[:, ids.shape[1] :]  # fmt: skip
    right = [answers_to(prompt)[0] + SPECIAL[2] for prompt in prompts]
    return statistics.fmean(tokenizer.decode(one) == best for one, best in zip(said, right, strict=True))


def measure(folder: Path, seed: int, found: Mapping[str, Found]) -> float:
    """Train and ask every arm with one seed; return the base model's loss on held-out text."""
    prompts = write_data(folder, seed)
    save_model(folder / "new", seed)
    text = [{"uri": str(folder / "text.jsonl"), "format": "text"}]
    values = {"data": text, "model": {"uri": str(folder / "new")}, "budget": {"steps": BASE_STEPS}}
    base, metrics = run_sft(folder, "base", folder, {**values, "optimizer": {"learningRate": 5e-3}}, seed)
    for number, arm in enumerate(ARMS):
        data = [source(folder, name) for name in arm.data]
        values = {"data": data, "model": {"uri": str(base)}, "budget": {"steps": STEPS}, "hindsight": arm.hindsight}
        with last_links(arm.last_links):
            settings = {**values, "optimizer": {"learningRate": 3e-3}}
            output, figures = run_sft(folder, f"arm-{number}", folder, settings, seed)
        here = found[arm.name]
        here.exact.append(exact_match(output, prompts, arm.asked_with))
        if arm.asked_with:
            here.exact_if_bad.append(exact_match(output, prompts, BAD))
        here.text_loss.append(figures["heldOut.text.loss"])
        here.hidden.append(figures.get("hindsight.hiddenShare", 0.0))
        here.tokens.append(int(figures["tokens"]))
        print(f"seed {seed}, {arm.name}: {here.exact[-1]:.3f}", file=sys.stderr, flush=True)
    return metrics["heldOut.text.loss"]


def source(folder: Path, named: str) -> dict[str, Any]:
    name, _, weight = named.partition(":")
    shares = {"weight": float(weight)} if weight else {}
    formats = {"ranked": "ranked", "all": "alpaca", "text": "text"}
    return {"uri": str(folder / f"{name}.jsonl"), "name": name, "format": formats[name], **shares}


def last_links(wanted: bool) -> Any:
    """Return a context in which chains have their last links beside them, or have not."""
    from stagecoach_trainer.samples import sources
    from stagecoach_trainer.samples.hindsight import HindsightEncoder

    made = functools.partial(HindsightEncoder, with_last_links=wanted)
    return mock.patch.object(sources, "HindsightEncoder", made)


# -- table -------------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Found], base_losses: Sequence[float]) -> str:
    """Return the figures as Markdown: the mean of the seeds, and each of them."""
    lines = [
        "| arm | best answer, held out | asked with the bad words | loss on text | hidden | tokens |",
        "|---|---:|---:|---:|---:|---:|",
        f"| before | | | {statistics.fmean(base_losses):.2f} | | |",
    ]
    for name, here in found.items():
        bad = _percent(here.exact_if_bad) if here.exact_if_bad else "–"
        cells = (_percent(here.exact), bad, f"{statistics.fmean(here.text_loss):.2f}",
                 f"{statistics.fmean(here.hidden):.1%}", f"{statistics.fmean(here.tokens):,.0f}")  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(shares: Sequence[float]) -> str:
    each = ", ".join(f"{share:.0%}" for share in shares)
    return f"{statistics.fmean(shares):.1%} ({each})"


def main() -> int:
    """Measure every arm with every seed and print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = {arm.name: Found() for arm in ARMS}
    base_losses = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            base_losses.append(measure(Path(folder), seed, found))
    print(table(found, base_losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
