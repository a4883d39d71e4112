"""`python -m bench.alignment.reward_model [FILE]`: reward models on real preferences, against the longer answer.

FILE contains preference records (`conversations`, `chosen`, `rejected`), which are split into folds. A LLaMA of one
layer and its vocabulary are trained from scratch on all folds but one, on which it is measured. Stages run as they do
for users.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measuring import RESULTS, ROOT, Figure, Goal, gain, side_by_side, write_result

FILE = ROOT.parent / "shared" / "data" / "preference" / "comparison_zh.json"
RESULT = RESULTS / "reward_model.json"
FOLDS, EPOCHS = 5, 3.0
PROMPT_CHARACTERS = 64
PIECES, CHARACTERS = 600, 400
"""Pieces of the vocabulary, and those of one character. Rarer characters are unknown: a model would recognise the
training pairs by them and memorise each."""

SYSTEM = "请判断下面的回答是否有用、诚实、无害，表达是否清楚，条理是否分明，有没有多余的客套。" * 5
"""System prompt of every conversation. The single layer averages over the whole sequence; with this text in it, a long
answer changes the average more than a short one."""

TEMPLATE = frozenset("<human>:bot\n ")
"""Characters of the chat template, which every vocabulary must contain."""

SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Fold:
    """The records on which one model is trained and measured."""

    number: int
    known: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    epochs: float


def figures() -> list[Figure]:
    """Measure all folds of the default file."""
    return figures_of(cross_validate())


def cross_validate(file: Path = FILE, num_folds: int = FOLDS, epochs: float = EPOCHS, path: Path = RESULT) -> Any:
    """Measure each fold, write the result file and return its content."""
    records = json.loads(file.read_text(encoding="utf-8"))
    by_characters = statistics.fmean(longer(record) for record in records)
    for record in records:  # the last turn is the prompt; a long one is cut at its beginning
        turn = dict(record["conversations"][-1])
        record["conversations"] = [{**turn, "value": turn["value"][-PROMPT_CHARACTERS:]}]
    random.Random(0).shuffle(records)  # noqa: S311 - no secret
    parts = [records[number::FOLDS] for number in range(FOLDS)]
    known = [[one for index, one in enumerate(records) if index % FOLDS != number] for number in range(FOLDS)]
    folds = side_by_side(measure, [Fold(number, known[number], parts[number], epochs) for number in range(num_folds)])
    result = {**summary(folds), "pairs": len(records), "longerInCharacters": by_characters, "folds": folds}
    write_result(path, result)
    return result


def measure(fold: Fold) -> dict[str, float]:
    """Return the held-out figures of one fold."""
    settings = {
        "data": [{"uri": "train", "domain": "zh"}],
        "heldOut": {"sets": [{"name": "test", "uri": "test", "domain": "zh"}], "maxTokens": 10**9},
        "domains": [{"name": "zh", "system": SYSTEM}],
        "budget": {"epochs": fold.epochs},
        "batch": {"samples": 16, "microBatchRows": 2},
        "optimizer": {"learningRate": 3e-3},
        "schedule": {"warmupShare": 0.1},
        "sequenceLength": 4096,
        "checkpoints": {"everySteps": 100_000},
        "loss": {"pair": {}},
        "normalizeBias": "none",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {
            "base": save_base(folder / "base", *learn_vocabulary(fold.known), width=32, deviation=0.02),
            "train": write(folder / "train.jsonl", fold.known),
            "test": write(folder / "test.jsonl", fold.held_out),
        }
        metrics = train(folder / "stage", settings, inputs)
    found = {name: metrics[f"heldOut.test.{name}"] for name in ("accuracy", "lengthBaseline", "loss")}
    print(json.dumps({"fold": fold.number, **found}), file=sys.stderr, flush=True)
    return found


def figures_of(result: Mapping[str, Any]) -> list[Figure]:
    """Compare the accuracy with that of the longer answer: the gain must exceed two standard errors over the folds."""
    folds = result["folds"]
    ours, longest = ([fold[name] for fold in folds] for name in ("accuracy", "lengthBaseline"))
    goal = Goal(">", round(2.0 * result["gainStandardError"], 4))
    return [gain("reward model, real preferences, against the longer answer", "accuracy", ours, longest, goal)]


def longer(record: Mapping[str, Any]) -> float:
    """Return 1 if the better answer has more characters, 0.5 if both have equally many, else 0."""
    better, worse = (len(record[side]["value"]) for side in ("chosen", "rejected"))
    return float(better > worse) + 0.5 * float(better == worse)


def summary(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over the folds, and the standard error of the gain over the length baseline."""
    accuracy, baseline = (statistics.fmean(fold[name] for fold in folds) for name in ("accuracy", "lengthBaseline"))
    gains = [fold["accuracy"] - fold["lengthBaseline"] for fold in folds]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 1.0
    return {"accuracy": accuracy, "lengthBaseline": baseline, "gainStandardError": error}


def learn_vocabulary(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a byte-pair vocabulary on the answers of `records`; return its pieces and merges."""
    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    backend.pre_tokenizer = lines()
    texts = [record[side]["value"] for record in records for side in ("chosen", "rejected")]
    alphabet = alphabet_of(texts)  # given in full: the trainer breaks ties arbitrarily
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, limit_alphabet=len(alphabet), special_tokens=list(SPECIAL), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def alphabet_of(texts: Sequence[str]) -> list[str]:
    """Return the template's characters and the most frequent others, `CHARACTERS` in all; ties are broken by code
    point."""
    counts = Counter("".join(texts))
    others = sorted(counts.keys() - TEMPLATE, key=lambda character: (-counts[character], character))
    return sorted(TEMPLATE | set(others[: CHARACTERS - len(TEMPLATE)]))


def lines() -> Any:
    """Return the pre-tokenizer: it splits at line breaks, and into at most 40 characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(r"\n+|[^\n]{1,40}"), "isolated")


# -- stages ------------------------------------------------------------------------------------------------------------


def train(root: Path, settings: Mapping[str, Any], inputs: Mapping[str, Path], seed: int = 7) -> dict[str, float]:
    """Run one `rewardModel` stage and return its metrics."""
    from stagecoach_api.artifacts import ResolvedInput, ResolvedStage
    from stagecoach_api.kinds.reward_model import RewardModelStage
    from stagecoach_api.store import external_digest, list_external, open_store
    from stagecoach_trainer.runtime.context import StageContext, World
    from stagecoach_trainer.runtime.progress import Progress
    from stagecoach_trainer.stages.reward_model import run

    for name in ("store", "work/output", "work/logs", "cache"):
        (root / name).mkdir(parents=True)
    found = {
        f"uri:{name}": ResolvedInput(uri=str(path), digest=external_digest(list_external(str(path))[1]))
        for name, path in inputs.items()
    }
    resolved = ResolvedStage(
        namespace="bench", run="bench", stage="reward", kind="rewardModel", attempt=1, digest="d" * 64, config={},
        inputs=found, seed=seed, code="bench", storage_uri=str(root / "store"),
    )  # fmt: skip
    context = StageContext(
        resolved, open_store(str(root / "store")), root / "work", root / "cache", World(), Progress(None),
        threading.Event(),
    )  # fmt: skip
    common = {"model": {"uri": "base"}, "template": {"name": "humanBot"}, "precision": "fp32"}
    return dict(run(RewardModelStage.model_validate({**common, **settings}), context).metrics)


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path


def characters_of(text: str) -> dict[str, int]:
    """Return a vocabulary of the characters of `text`."""
    characters = sorted(set(text) | TEMPLATE)
    return {token: index for index, token in enumerate((*SPECIAL, *characters))}


def save_base(
    folder: Path,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    width: int = 64,
    deviation: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write a LLaMA of one layer with random weights and a byte-pair vocabulary."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=SPECIAL[0]))
    if merges:
        backend.pre_tokenizer = lines()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=4096, initializer_range=deviation, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


# -- table -------------------------------------------------------------------------------------------------------------


def table_of(result: Mapping[str, Any]) -> str:
    """Return a Markdown table of the folds."""
    lines = ["| fold | accuracy | `lengthBaseline` |", "|---|---:|---:|"]
    for number, fold in enumerate(result["folds"]):
        lines.append(f"| {number} | {fold['accuracy']:.3f} | {fold['lengthBaseline']:.3f} |")
    return "\n".join([*lines, f"| all | **{result['accuracy']:.3f}** | {result['lengthBaseline']:.3f} |"])


def main() -> int:
    """Measure, then print the table and the goal. The options make shorter trials possible."""
    from bench.__main__ import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=FILE, help="preference records; default: %(default)s")
    parser.add_argument("--folds", type=int, default=FOLDS, help="folds to measure (of %(default)s)")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    result = cross_validate(options.file, options.folds, options.epochs, options.output)
    print(table_of(result))
    return report(figures_of(result))


if __name__ == "__main__":
    sys.exit(main())
