"""`python -m bench.alignment.hindsight`: the gain of `sft`'s hindsight modes on a task whose best answer is known.

The prompt is four digits, the best answer the same digits in reverse. Each record has two worse answers: in both, the
first digit is too high by one, in the worst one the last digit, too. So two of three answers begin wrongly, and
imitating all of them is expected to learn that. Every arm starts from the same model, which was trained on digits that
count up and down, makes the same number of optimiser steps on the same number of samples, and is evaluated by its
likeliest answer to held-out prompts. Stages run as they do for users; `last links` is the only switch that users lack.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.measuring import RESULTS, Figure, Goal, compared, gain, side_by_side, write_result

RESULT = RESULTS / "hindsight.json"
SEEDS = (0, 1, 2)
RECORDS, HELD_OUT, DIGITS = 1000, 300, 4
STEPS, SAMPLES = 300, 48
BASE_STEPS = 150
EFFECT = Goal("≥", 0.3)
"""Share of best answers to held-out prompts that a mode, or a part of it, must add."""
KEPT = Goal("≤", 0.5)
"""Ratio of the losses on text, with and without text in the mix."""
GOOD, BAD = "+", "-"
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}?{{ message['content'] }}{% else %}={{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@dataclass(frozen=True)
class Arm:
    """A way to train on the same records."""

    name: str
    data: Sequence[str]
    """Names of data sets, or `NAME:WEIGHT`."""
    hindsight: Mapping[str, Any] | None = None
    last_links: bool = True

    @property
    def feedback(self) -> str | None:
        """The feedback in front of the answer at evaluation."""
        chain = self.hindsight is not None and self.hindsight.get("mode") == "chain"
        return GOOD if chain else None


def chain(**settings: Any) -> dict[str, Any]:
    return {"mode": "chain", "feedback": [{"good": GOOD, "bad": BAD}], **settings}


ALL = Arm("all answers, no hindsight", ["all"])
BEST = Arm("`best`", ["ranked"], {"mode": "best"})
CHAIN = Arm("`chain`", ["ranked"], chain())
NO_LAST_LINKS = Arm("`chain`, no last links", ["ranked"], chain(), last_links=False)
WITH_TEXT = Arm("`chain`, a tenth of the tokens text", ["ranked:0.9", "text:0.1"], chain())
NOTHING_HIDDEN = Arm("`chain`, nothing hidden (`maxMaskedShare: 0`)", ["ranked"], chain(maxMaskedShare=0))
ARMS = (ALL, BEST, CHAIN, NOTHING_HIDDEN, NO_LAST_LINKS, WITH_TEXT)


@dataclass(frozen=True)
class SeedSettings:
    """What all arms of one seed have in common."""

    seed: int
    folder: Path
    """Holds the data sets and the trained models."""
    steps: int
    """Optimiser steps of every arm."""


@dataclass(frozen=True)
class Base:
    """The model from which all arms of a seed start."""

    seed: SeedSettings
    model: Path
    prompts: Sequence[str]
    """Held-out prompts."""
    text_loss: float


@dataclass(frozen=True)
class ArmResult:
    """The measurements of one arm with one seed."""

    exact: float
    """Share of held-out prompts answered with the best answer."""
    exact_if_bad: float | None
    """The same when a chain's model is given the feedback of bad answers; None for other arms."""
    text_loss: float
    """Loss on held-out text, in nats per token."""
    hidden: float
    """Share of the input tokens that are hidden."""
    tokens: int


Found = Mapping[str, Sequence[ArmResult]]
"""The results of every arm, one for each seed in order."""


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
    """Return a text for the base model: digits that count up or down in steps of 1 to 4."""
    start, step = int(random.integers(10)), int(random.choice([-4, -3, -2, -1, 1, 2, 3, 4]))
    return "".join(str((start + step * index) % 10) for index in range(24))


def make_tokenizer() -> Any:
    """Return a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *"0123456789", "?", "=", GOOD, BAD, "\n"]
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def save_model(folder: Path, seed: int) -> None:
    """Write a LLaMA of 2 layers of width 64 with random weights, and its tokenizer."""
    from stagecoach_api.kinds.pretrain import Architecture
    from stagecoach_trainer.models.new_model import build_model

    shape = Architecture(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, max_position_embeddings=64)
    tokenizer = make_tokenizer()
    build_model(shape, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- training and evaluation -------------------------------------------------------------------------------------------


def run_sft(
    folder: Path, name: str, data: Path, values: Mapping[str, Any], seed: int
) -> tuple[Path, Mapping[str, float]]:
    """Run an `sft` stage in the folder `name`; return its output and its metrics."""
    from bench.ours import resolve
    from stagecoach_api.kinds.sft import SftStage
    from stagecoach_trainer.run_stage import AttemptSettings, build_context
    from stagecoach_trainer.runtime.context import World
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
    attempt = AttemptSettings(stage, config, place / "work", place / "cache", None, World(), time.time())
    context = build_context(attempt, threading.Event())
    outcome = run(config, context)
    return context.output, {**outcome.metrics, "tokens": float(outcome.tokens or 0)}


def exact_match(model_folder: Path, prompts: Sequence[str], feedback: str | None) -> float:
    """Return the share of prompts whose likeliest answer, after `feedback`, is the best one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stagecoach_trainer.samples.hindsight import answer_frame, lead_in
    from stagecoach_trainer.text.encoding import Encoder
    from stagecoach_trainer.text.templates import Renderer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    renderer = Renderer(tokenizer)
    texts = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        prompt_text = renderer.render(messages, add_generation_prompt=True)
        framed = prompt_text if feedback is None else answer_frame(renderer, messages, ()).prompt + lead_in(feedback)
        texts.append(framed)
    ids = torch.tensor(np.stack(Encoder(tokenizer).prompts(texts)), dtype=torch.long)
    with torch.no_grad():
        answers = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=DIGITS + 1, do_sample=False,
                              pad_token_id=tokenizer.eos_token_id)[:, ids.shape[1] :]  # fmt: skip
    right = [answers_to(prompt)[0] + SPECIAL[2] for prompt in prompts]
    return statistics.fmean(tokenizer.decode(one) == best for one, best in zip(answers, right, strict=True))


def make_base(seed: SeedSettings) -> Base:
    """Write a seed's data and train the model from which all its arms start."""
    prompts = write_data(seed.folder, seed.seed)
    save_model(seed.folder / "new", seed.seed)
    values = {
        "data": [source(seed.folder, "text")],
        "model": {"uri": str(seed.folder / "new")},
        "budget": {"steps": BASE_STEPS},
        "optimizer": {"learningRate": 5e-3},
    }
    model, metrics = run_sft(seed.folder, "base", seed.folder, values, seed.seed)
    return Base(seed, model, prompts, metrics["heldOut.text.loss"])


def train(job: tuple[Base, int]) -> ArmResult:
    """Train and evaluate one arm, given by its number."""
    base, number = job
    arm, folder, seed = ARMS[number], base.seed.folder, base.seed.seed
    values = {
        "data": [source(folder, name) for name in arm.data],
        "model": {"uri": str(base.model)},
        "budget": {"steps": base.seed.steps},
        "hindsight": arm.hindsight,
        "optimizer": {"learningRate": 3e-3},
    }
    with last_links(arm.last_links):
        output, figures = run_sft(folder, f"arm-{number}", folder, values, seed)
    found = ArmResult(
        exact=exact_match(output, base.prompts, arm.feedback),
        exact_if_bad=exact_match(output, base.prompts, BAD) if arm.feedback else None,
        text_loss=figures["heldOut.text.loss"],
        hidden=figures.get("hindsight.hiddenShare", 0.0),
        tokens=int(figures["tokens"]),
    )
    print(f"seed {seed}, {arm.name}: {found.exact:.3f}", file=sys.stderr, flush=True)
    return found


def source(folder: Path, named: str) -> dict[str, Any]:
    name, _, weight = named.partition(":")
    shares = {"weight": float(weight)} if weight else {}
    formats = {"ranked": "ranked", "all": "alpaca", "text": "text"}
    return {"uri": str(folder / f"{name}.jsonl"), "name": name, "format": formats[name], **shares}


def last_links(enabled: bool) -> Any:
    """Return a context in which the chains' last links are trained on separately, too, or are not."""
    from stagecoach_trainer.samples import datasets as sources
    from stagecoach_trainer.samples.hindsight import HindsightEncoder

    made = functools.partial(HindsightEncoder, with_last_links=enabled)
    return mock.patch.object(sources, "HindsightEncoder", made)


# -- figures -----------------------------------------------------------------------------------------------------------


def figures() -> list[Figure]:
    """Measure every arm."""
    return figures_of(measure()[0])


def measure(num_seeds: int = len(SEEDS), steps: int = STEPS, path: Path = RESULT) -> tuple[Found, Sequence[float]]:
    """Train every arm with every seed and write the result file; return it, and the base models' losses on text."""
    with tempfile.TemporaryDirectory() as name:
        seeds = [SeedSettings(seed, Path(name) / f"seed-{seed}", steps) for seed in SEEDS[:num_seeds]]
        for seed in seeds:
            seed.folder.mkdir()
        bases = side_by_side(make_base, seeds)
        jobs = [(base, number) for number in range(len(ARMS)) for base in bases]
        results = side_by_side(train, jobs)
    found: dict[str, list[ArmResult]] = {}
    for (_, number), result in zip(jobs, results, strict=True):
        found.setdefault(ARMS[number].name, []).append(result)
    before = [base.text_loss for base in bases]
    arms = {name: [asdict(one) for one in trained] for name, trained in found.items()}
    write_result(path, {"textLossBefore": before, **arms})
    return found, before


def figures_of(found: Found) -> list[Figure]:
    """Return the gains of the modes over imitating all answers, and the gains of the parts of chains."""
    exact = {name: [one.exact for one in trained] for name, trained in found.items()}
    unit, chain_if_bad = "best answers", [one.exact_if_bad or 0.0 for one in found[CHAIN.name]]
    text = [(a.text_loss, b.text_loss) for a, b in zip(found[WITH_TEXT.name], found[CHAIN.name], strict=True)]
    return [
        gain("hindsight, `best` against all answers (HFFT)", unit, exact[BEST.name], exact[ALL.name], EFFECT),
        gain("hindsight, `chain` against all answers (CoH)", unit, exact[CHAIN.name], exact[ALL.name], EFFECT),
        gain("hindsight, good feedback against bad", unit, exact[CHAIN.name], chain_if_bad, EFFECT),
        gain("hindsight, last links against none", unit, exact[CHAIN.name], exact[NO_LAST_LINKS.name], EFFECT),
        compared("hindsight, loss on text, with text in the mix", "nats per token", text, KEPT),
    ]


# -- table -------------------------------------------------------------------------------------------------------------


def table(found: Found, base_losses: Sequence[float]) -> str:
    """Return a Markdown table of the arms: mean and value of each seed."""
    lines = [
        "| arm | best answer, held out | each seed | with the feedback of bad answers | loss on text | hidden |",
        "|---|---:|---|---:|---:|---:|",
        f"| before | | | | {statistics.fmean(base_losses):.2f} | |",
    ]
    for name, trained in found.items():
        exact = [one.exact for one in trained]
        bad = [one.exact_if_bad for one in trained if one.exact_if_bad is not None]
        cells = (
            name,
            f"{statistics.fmean(exact):.1%}",
            ", ".join(f"{share:.0%}" for share in exact),
            f"{statistics.fmean(bad):.1%}" if bad else "–",
            f"{statistics.fmean(one.text_loss for one in trained):.2f}",
            f"{statistics.fmean(one.hidden for one in trained):.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, then print the table and the goals. The options make shorter trials possible."""
    from bench.__main__ import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    found, before = measure(options.seeds, options.steps, options.output)
    print(table(found, before))
    return report(figures_of(found))


if __name__ == "__main__":
    sys.exit(main())
