"""`python -m bench.alignment.reward_model FILE`: reward models on real preferences and on domains that disagree.

FILE holds preference records (`conversations`, `chosen`, `rejected`). They are parted into folds; a LLaMA of one layer
over characters, from nothing, learns from all folds but one and is measured on that one, against preferring the longer
answer. The other figures need no file: the same texts with opposite preferences in two domains, learnt by a joint model
and by COOL's focal loss with conditional system prompts. Stages run as they do for users.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDS = 5
PROMPT_CHARACTERS = 64
WIDTH, HEADS = 64, 4
SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("dog", "fox", "word", "task", "model", "quick", "lazy", "next", "brown", "over")
TASTES = {"sleep": ("the dog sleeps", "a fox jumps"), "jump": ("a fox jumps", "the dog sleeps")}
PROMPTS = {"sleep": "Sleep is good.", "jump": "Jumps are good."}


def main() -> None:
    """Print the figures as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="preference records; without it, the two domains only")
    parser.add_argument("--folds", type=int, default=FOLDS, help="folds to measure (of %(default)s)")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--epsilon", type=float, default=1e-8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        two_domains(Path(folder))
        if arguments.file is not None:
            cross_validate(Path(folder), arguments)


# -- domains that disagree ---------------------------------------------------------------------------------------------


def two_domains(folder: Path) -> None:
    """Print the held-out accuracy in both domains of a joint model and of a conditional one."""
    inputs: dict[str, Path] = {}
    for name, (good, bad) in TASTES.items():
        for part, count, seed in (("train", 64, 1), ("test", 32, 2)):
            inputs[f"{name}-{part}"] = write(folder / f"{name}-{part}.jsonl", toy_pairs(count, seed, good, bad))
    text = " ".join((*WORDS, *PROMPTS.values(), *(words for pair in TASTES.values() for words in pair)))
    inputs["base"] = save_base(folder / "toy-base", text)
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


def cross_validate(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the held-out figures of each fold, and their mean over pairs."""
    records = json.loads(arguments.file.read_text(encoding="utf-8"))
    for record in records:  # the last turn is what is asked; a long one is cut at its beginning
        turn = dict(record["conversations"][-1])
        record["conversations"] = [{**turn, "value": turn["value"][-PROMPT_CHARACTERS:]}]
    random.Random(0).shuffle(records)  # noqa: S311 - no secret
    base = save_base(folder / "base", json.dumps(records, ensure_ascii=False))
    found = []
    for fold in range(arguments.folds):
        inputs = {
            "base": base,
            "train": write(folder / f"train{fold}.jsonl", [r for i, r in enumerate(records) if i % FOLDS != fold]),
            "test": write(folder / f"test{fold}.jsonl", records[fold::FOLDS]),
        }
        settings = {
            "data": [{"uri": "train"}],
            "heldOut": {"sets": [{"name": "test", "uri": "test"}], "maxTokens": 10**9},
            "budget": {"epochs": arguments.epochs},
            "batch": {"samples": 32, "microBatchRows": 8},
            "optimizer": {"learningRate": arguments.learning_rate, "epsilon": arguments.epsilon},
            "sequenceLength": 4096,
            "loss": {"pair": {}},
        }
        metrics = train(folder / f"fold{fold}", settings, inputs)
        found.append([metrics[f"heldOut.test.{name}"] for name in ("accuracy", "lengthBaseline")])
        print(json.dumps({"fold": fold, "accuracy": found[-1][0], "lengthBaseline": found[-1][1]}), flush=True)
    means = [statistics.fmean(column) for column in zip(*found, strict=True)]
    print(json.dumps({"folds": len(found), "accuracy": means[0], "lengthBaseline": means[1]}), flush=True)


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


def save_base(folder: Path, text: str) -> Path:
    """Write a LLaMA of one layer with random weights and a vocabulary of the characters of `text`."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = sorted(set(text) | set("<human>:bot\n "))
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *characters))}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=SPECIAL[0]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=HEADS, max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=False,
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
