"""Time from the start of a process to the end of its first optimiser step: our stage against a script with the Trainer.

Both do the same work: load a vocabulary, read and tokenise the same text, create the same model, train.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.llama import FEED_FORWARD, HEADS, LAYERS, WIDTH, llama_config
from bench.measuring import ROOT, Figure, Goal, alternate, compared, run_child

POEMS = ROOT / "examples" / "data" / "poems.jsonl.gz"
DOCUMENTS = 4000
TOKENS, ROWS, STEPS = 256, 8, 2
ARCHITECTURE = {"hiddenSize": WIDTH, "intermediateSize": FEED_FORWARD, "numLayers": LAYERS, "numHeads": HEADS}


def figures() -> list[Figure]:
    """Measure both sides alternately, with a vocabulary that is trained beforehand."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        lines = gzip.decompress(POEMS.read_bytes()).decode().splitlines(keepends=True)
        text.write_text("".join(lines[:DOCUMENTS]), encoding="utf-8")
        vocabulary = _make_vocabulary(text, folder / "vocabulary")
        pairs = alternate(
            lambda number: _ours(text, vocabulary, folder / f"ours-{number}"),
            lambda number: _peer(text, vocabulary, folder / f"peer-{number}"),
        )
    return [compared("process start to first optimiser step", "s", pairs, Goal("≤", 0.7))]


def _make_vocabulary(text: Path, folder: Path) -> Path:
    from bench.ours import full_config, output_of, resolve, run_stage_process

    train = {"data": [{"uri": str(text), "format": "text"}], "vocabSize": 4000, "characterCoverage": 0.98}
    stage = resolve("tokenizer", full_config("tokenizer", {"train": train}), [text], folder)
    run_stage_process(stage, folder)
    return output_of(stage)


def _ours(text: Path, vocabulary: Path, folder: Path) -> float:
    from bench.ours import OPTIMIZER, full_config, resolve, run_stage_process

    config: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "tokenizer": {"uri": str(vocabulary)},
        "data": [{"uri": str(text), "format": "text"}],
        "sequenceLength": TOKENS,
        "budget": {"steps": STEPS},
        "batch": {"tokens": ROWS * TOKENS, "microBatchRows": ROWS},
        "optimizer": OPTIMIZER,
        "schedule": {"name": "constant"},
    }
    stage = resolve("pretrain", full_config("pretrain", config), [text, vocabulary], folder)
    child, events = run_stage_process(stage, folder)
    first = next(event for event in events if event["activity"] == "train" and event["done"] >= 1)
    return float(first["time"]) - child.started


def _peer(text: Path, vocabulary: Path, folder: Path) -> float:
    child = run_child(["-m", "bench.startup", str(text), str(vocabulary), str(folder)])
    return float(child.report["firstStep"]) - child.started


def main(text: Path, vocabulary: Path, folder: Path) -> None:
    """Run the script with the Trainer; print when its first step ended."""
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # else accelerate imports it, which costs time
    from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator

    from bench.peer import arguments

    class FirstStep(TrainerCallback):
        ended = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended = self.ended or time.time()

    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    ids = [token for encoded in tokenizer(documents)["input_ids"] for token in [*encoded, tokenizer.eos_token_id]]
    blocks = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS, TOKENS)][: STEPS * ROWS]
    model = LlamaForCausalLM(llama_config(2048, len(tokenizer), bos_token_id=1, eos_token_id=2))
    first = FirstStep()
    trainer = Trainer(
        model=model,
        args=arguments(folder, bf16=True, micro_batch=ROWS, accumulation=1),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        data_collator=default_data_collator,
        callbacks=[first],
    )
    trainer.train()
    print(json.dumps({"firstStep": first.ended}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
