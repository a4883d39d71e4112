"""`python -m bench.alignment.reward_model FILE`: reward models on real preferences and on domains that disagree.

FILE holds preference records (`conversations`, `chosen`, `rejected`). They are parted into folds; a LLaMA of one layer,
from nothing, learns from all folds but one, its vocabulary included, and is measured on that one, against preferring
the longer answer. The other figures need no file: the same texts with opposite preferences in two domains, learnt by a
joint model and by COOL's focal loss with conditional system prompts. Stages run as they do for users.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDS = 5
PROMPT_CHARACTERS = 64
PIECES, CHARACTERS = 600, 400
"""Of the vocabulary: all, and those of one character. Rarer characters are unknown: by them a model
tells the pairs it learns from one by one, and has them by heart."""

SYSTEM = "请判断下面的回答是否有用、诚实、无害，表达是否清楚，条理是否分明，有没有多余的客套。" * 5
"""The same in front of every conversation. The one layer averages over all it reads; with this in it, a long answer
moves the average further than a short one."""

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("dog", "fox", "word", "task", "model", "quick", "lazy", "next", "brown", "over")
TASTES = {"sleep": ("the dog sleeps", "a fox jumps"), "jump": ("a fox jumps", "the dog sleeps")}
PROMPTS = {"sleep": "Sleep is good.", "jump": "Jumps are good."}


def main() -> None:
    """Print the figures as JSON lines; write those on real preferences to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="preference records; without it, the two domains only")
    parser.add_argument("--folds", type=int, default=FOLDS, help="folds to measure (of %(default)s)")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("bench/results/reward_model.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.file is None:
            two_domains(Path(folder))
        else:
            result = cross_validate(Path(folder), arguments)
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# -- domains that disagree ---------------------------------------------------------------------------------------------


def two_domains(folder: Path) -> None:
    """Print the held-out accuracy in both domains of a joint model and of a conditional one."""
    inputs: dict[str, Path] = {}
    for name, (good, bad) in TASTES.items():
        for part, count, seed in (("train", 64, 1), ("test", 32, 2)):
            inputs[f"{name}-{part}"] = write(folder / f"{name}-{part}.jsonl", toy_pairs(count, seed, good, bad))
    text = " ".join((*WORDS, *PROMPTS.values(), *(words for pair in TASTES.values() for words in pair)))
    inputs["base"] = save_base(folder / "toy-base", characters_of(text), [])
    common = {
        "data": [{"uri": f"{name}-train", "domain": name} for name in TASTES],
        "heldOut": {"sets": [{"name": name, "uri": f"{name}-test", "domain": name} for name in TASTES]},
        "budget": {"epochs": 5},
        "batch": {"samples": 8, "microBatchRows": 8},
        "optimizer": {"learningRate": 5e-3},
        "sequenceLength": 256,
    }
    domains = [{"name": name, "system": system} for name, system in PROMPTS.items()]
    arms: dict[str, dict[str, Any]] = {
        "joint, ranked": {"loss": {"ranked": {}}},
        "joint, focal": {"loss": {"focal": {}}},
        "conditional, focal": {"loss": {"focal": {}}, "domains": domains},
    }
    for number, (name, arm) in enumerate(arms.items()):
        metrics = train(folder / f"arm{number}", {**common, **arm}, inputs)
        accuracy = {domain: metrics[f"heldOut.{domain}.accuracy"] for domain in TASTES}
        print(json.dumps({"arm": name, **accuracy}), flush=True)


def toy_pairs(count: int, seed: int, good: str, bad: str) -> list[dict[str, str]]:
    chance = random.Random(seed)  # noqa: S311 - no secret
    records = []
    for _ in range(count):
        prompt, one, two = (" ".join(chance.choices(WORDS, k=3)) for _ in range(3))
        records.append({"prompt": prompt, "chosen": f"{one} {good}", "rejected": f"{two} {bad}"})
    return records


# -- real preferences --------------------------------------------------------------------------------------------------


def cross_validate(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the held-out figures of each fold; return them with their means."""
    records = json.loads(arguments.file.read_text(encoding="utf-8"))
    by_characters = statistics.fmean(longer(record) for record in records)
    for record in records:  # the last turn is what is asked; a long one is cut at its beginning
        turn = dict(record["conversations"][-1])
        record["conversations"] = [{**turn, "value": turn["value"][-PROMPT_CHARACTERS:]}]
    random.Random(0).shuffle(records)  # noqa: S311 - no secret
    folds = []
    for fold in range(arguments.folds):
        known = [record for index, record in enumerate(records) if index % FOLDS != fold]
        inputs = {
            "base": save_base(folder / f"base{fold}", *learn_vocabulary(known), width=32, deviation=0.02),
            "train": write(folder / f"train{fold}.jsonl", known),
            "test": write(folder / f"test{fold}.jsonl", records[fold::FOLDS]),
        }
        settings = {
            "data": [{"uri": "train", "domain": "zh"}],
            "heldOut": {"sets": [{"name": "test", "uri": "test", "domain": "zh"}], "maxTokens": 10**9},
            "domains": [{"name": "zh", "system": SYSTEM}],
            "budget": {"epochs": arguments.epochs},
            "batch": {"samples": 16, "microBatchRows": 2},
            "optimizer": {"learningRate": arguments.learning_rate},
            "schedule": {"warmupShare": 0.1},
            "sequenceLength": 4096,
            "checkpoints": {"everySteps": 100_000},
            "loss": {"pair": {}},
            "normalizeBias": "none",
        }
        metrics = train(folder / f"fold{fold}", settings, inputs)
        folds.append({name: metrics[f"heldOut.test.{name}"] for name in ("accuracy", "lengthBaseline", "loss")})
        print(json.dumps({"fold": fold, **folds[-1]}), flush=True)
    result = {**summary(folds), "pairs": len(records), "longerInCharacters": by_characters}
    print(json.dumps(result), flush=True)
    return {**result, "folds": folds}


def longer(record: Mapping[str, Any]) -> float:
    """Return 1 where the better answer has more characters, 0.5 where it has as many."""
    better, worse = (len(record[side]["value"]) for side in ("chosen", "rejected"))
    return float(better > worse) + 0.5 * float(better == worse)


def summary(folds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return means over folds; `met`: the gain over the length baseline is more than two of its standard errors."""
    accuracy, baseline = (statistics.fmean(fold[name] for fold in folds) for name in ("accuracy", "lengthBaseline"))
    gains = [fold["accuracy"] - fold["lengthBaseline"] for fold in folds]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    met = accuracy - baseline > 2.0 * error
    return {"accuracy": accuracy, "lengthBaseline": baseline, "gainStandardError": error, "met": met}


def learn_vocabulary(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the pieces and merges of a byte-pair vocabulary of the answers and questions of `records`."""
    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    backend.pre_tokenizer = lines()
    texts = [record[side]["value"] for record in records for side in ("chosen", "rejected")]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, limit_alphabet=CHARACTERS, special_tokens=list(SPECIAL),
        initial_alphabet=sorted(set("<human>:bot\n ")), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def lines() -> Any:
    """Return the split in front of the vocabulary: at line breaks, and into at most 40 characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(r"\n+|[^\n]{1,40}"), "isolated")


# -- stages ------------------------------------------------------------------------------------------------------------


def train(root: Path, settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> dict[str, float]:
    """Run one `rewardModel` stage and return its metrics."""
    from stagecoach_api.artifacts import ResolvedInput, ResolvedStage
    from stagecoach_api.stages.reward_model import RewardModelStage
    from stagecoach_api.store import external_digest, list_external, open_store
    from stagecoach_trainer.context import StageContext, World
    from stagecoach_trainer.progress import Progress
    from stagecoach_trainer.stages.reward_model import run

    for name in ("store", "work/output", "work/logs", "cache"):
        (root / name).mkdir(parents=True)
    found = {
        f"uri:{name}": ResolvedInput(uri=str(path), digest=external_digest(list_external(str(path))[1]))
        for name, path in inputs.items()
    }
    resolved = ResolvedStage(
        namespace="bench", run="bench", stage="reward", kind="rewardModel", attempt=1, digest="d" * 64, config={},
        inputs=found, seed=7, code="bench", storage_uri=str(root / "store"),
    )  # fmt: skip
    context = StageContext(
        resolved, open_store(str(root / "store")), root / "work", root / "cache", World(), Progress(None),
        threading.Event(),
    )  # fmt: skip
    common = {"model": {"uri": "base"}, "template": {"name": "humanBot"}, "precision": "fp32"}
    return dict(run(RewardModelStage.model_validate(common | settings), context).metrics)


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path


def characters_of(text: str) -> dict[str, int]:
    """Return a vocabulary of the characters of `text`."""
    characters = sorted(set(text) | set("<human>:bot\n "))
    return {token: index for index, token in enumerate((*SPECIAL, *characters))}


def save_base(
    folder: Path,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    width: int = 64,
    deviation: float = 0.1,
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
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
