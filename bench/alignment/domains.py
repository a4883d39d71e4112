"""`python -m bench.alignment.domains`: reward models on two domains that agree on one thing and disagree on another.

An answer states how well something was done (which both domains rate highest) and what it is about (of which each
domain prefers another thing). Prompts and answers are drawn separately for each domain, and few pairs are decided by
taste. Four arms: one model for both domains or COOL's conditional system prompts, each with the plain ranking loss and
with COOL's focal loss. Pairs decided by quality, on which the domains agree, and pairs decided by taste are measured
separately. Stages run as they do for users.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.alignment.reward_model import characters_of, save_base, train, write
from bench.measuring import RESULTS, Figure, Goal, gain, side_by_side, write_result

RESULT = RESULTS / "domains.json"
SEEDS = range(3)
PAIRS, HELD_OUT, EPOCHS = 192, 64, 8.0
TASTE_SHARE = 0.25
"""Share of the training pairs decided by taste; the others are decided by quality."""
WORDS = ("dog", "fox", "word", "task", "model", "quick", "lazy", "next", "brown", "over")
GOOD, BAD = "well done", "badly done"
LIKED = {"sleep": ("it sleeps", "it jumps"), "jump": ("it jumps", "it sleeps")}
PROMPTS = {"sleep": "Sleep is good.", "jump": "Jumps are good."}
KINDS = ("quality", "taste")
ARMS = tuple(itertools.product(("joint", "conditional"), ("ranked", "focal")))
EFFECT, EFFECT_OF_FOCAL = Goal("≥", 0.1), Goal("≥", 0.1)
"""Accuracy that conditional prompts, and then the focal loss, must add where the domains disagree."""


@dataclass(frozen=True)
class Training:
    """One arm with one seed."""

    prompts: str
    loss: str
    seed: int
    epochs: float


Found = Mapping[str, Sequence[Mapping[str, float]]]
"""For each arm and seed: accuracy by kind of pair, averaged over both domains."""


def figures() -> list[Figure]:
    """Measure every arm."""
    return figures_of(measure())


def measure(num_seeds: int = len(SEEDS), epochs: float = EPOCHS, path: Path = RESULT) -> Found:
    """Train every arm, write the result file and return the accuracies."""
    jobs = [Training(*arm, seed, epochs) for arm in ARMS for seed in SEEDS[:num_seeds]]
    found: dict[str, list[Mapping[str, float]]] = {}
    for job, accuracy in zip(jobs, side_by_side(accuracies, jobs), strict=True):
        found.setdefault(f"{job.prompts}, {job.loss}", []).append(accuracy)
    write_result(path, found)
    return found


def accuracies(training: Training) -> dict[str, float]:
    """Train a reward model; return its accuracy on held-out pairs of each kind."""
    settings = {
        "data": [{"uri": name, "domain": name} for name in LIKED],
        "heldOut": {
            "sets": [{"name": f"{name}-{kind}", "uri": f"{name}-{kind}", "domain": name} for name, kind in parts()]
        },
        "domains": [{"name": name, "system": system} for name, system in PROMPTS.items()],
        "budget": {"epochs": training.epochs},
        "batch": {"samples": 8, "microBatchRows": 8},
        "optimizer": {"learningRate": 5e-3},
        "sequenceLength": 256,
        "loss": {training.loss: {}},
    }
    if training.prompts == "joint":
        del settings["domains"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = train(folder / "stage", settings, make_inputs(folder, training.seed), training.seed)
    found = {kind: statistics.fmean(metrics[f"heldOut.{name}-{kind}.accuracy"] for name in LIKED) for kind in KINDS}
    print(json.dumps({"arm": [training.prompts, training.loss, training.seed], **found}), file=sys.stderr, flush=True)
    return found


def parts() -> list[tuple[str, str]]:
    return list(itertools.product(LIKED, KINDS))


def make_inputs(folder: Path, seed: int) -> dict[str, Path]:
    """Write the base model and all pairs; return their paths by name."""
    text = " ".join((*WORDS, GOOD, BAD, *PROMPTS.values(), *(words for pair in LIKED.values() for words in pair)))
    inputs = {"base": save_base(folder / "base", characters_of(text), [], seed=seed)}
    for number, name in enumerate(LIKED):
        chance = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        kinds = ["taste" if chance.random() < TASTE_SHARE else "quality" for _ in range(PAIRS)]
        inputs[name] = write(folder / f"{name}.jsonl", [pair(chance, name, kind) for kind in kinds])
        for kind in KINDS:
            records = [pair(chance, name, kind) for _ in range(HELD_OUT)]
            inputs[f"{name}-{kind}"] = write(folder / f"{name}-{kind}.jsonl", records)
    return inputs


def pair(chance: random.Random, domain: str, kind: str) -> dict[str, str]:
    """Return a pair decided by `quality`, whatever the taste, or by `taste`, at equal quality."""
    liked, other = LIKED[domain]
    if kind == "quality":
        better, worse = (GOOD, chance.choice((liked, other))), (BAD, chance.choice((liked, other)))
    else:
        quality = chance.choice((GOOD, BAD))
        better, worse = (quality, liked), (quality, other)
    prompt, one, two = (" ".join(chance.choices(WORDS, k=3)) for _ in range(3))
    return {"prompt": prompt, "chosen": " ".join((one, *better)), "rejected": " ".join((two, *worse))}


def figures_of(found: Found) -> list[Figure]:
    """Return the gains on pairs decided by taste: of conditional prompts, for each loss, and of the focal loss."""
    taste = {arm: [seed["taste"] for seed in seeds] for arm, seeds in found.items()}
    compared = (
        ("conditional, ranked", "joint, ranked", EFFECT),
        ("conditional, focal", "joint, focal", EFFECT),
        ("conditional, focal", "conditional, ranked", EFFECT_OF_FOCAL),
    )
    return [
        gain(f"reward model, domains that disagree: {ours} against {peer}", "accuracy", taste[ours], taste[peer], goal)
        for ours, peer, goal in compared
    ]


def table_of(found: Found) -> str:
    """Return a Markdown table of the arms: mean and value of each seed."""
    lines = ["| arm | decided by quality | decided by taste |", "|---|---:|---:|"]
    for arm, seeds in found.items():
        cells = (
            f"{statistics.fmean(seed[kind] for seed in seeds):.3f} ({', '.join(f'{seed[kind]:.3f}' for seed in seeds)})"
            for kind in KINDS
        )
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, then print the table and the goals. The options make shorter trials possible."""
    from bench.__main__ import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    found = measure(options.seeds, options.epochs, options.output)
    print(table_of(found))
    return report(figures_of(found))


if __name__ == "__main__":
    sys.exit(main())
