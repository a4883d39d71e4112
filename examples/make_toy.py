"""Write a toy model and instructions for it, to try `lora-sft.yaml` without a download.

    python examples/make_toy.py build/toy

`base/` is a LLaMA of 130,000 weights whose tokens are bytes, with a chat template of its own; it has seen sums, and no
conversation. `instructions.json` has sums as Alpaca records. A real run uses a model such as

    hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir build/base
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NUM_RECORDS = 400
STEPS, ROWS, PIECE = 60, 4, 64
END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def instructions() -> list[dict[str, str]]:
    """Return sums; half of the records have the figures as `input`."""
    found = []
    for number in range(NUM_RECORDS):
        left, right = number % 20, number // 20
        sum_ = {"output": f"{left} + {right} = {left + right}"}
        if number % 2:
            found.append({"instruction": f"What is {left} plus {right}?", "input": "", **sum_})
        else:
            found.append({"instruction": "Add these two numbers.", "input": f"{left}, {right}", **sum_})
    return found


def save_base(folder: Path) -> None:
    """Save a model and its vocabulary, all bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.add_special_tokens({"additional_special_tokens": list(ROLES)})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    text = " ".join(" ".join(record.values()) for record in instructions())
    train(model, torch.tensor(fast.encode(text, add_special_tokens=False)))
    model.save_pretrained(folder)


def train(model: Any, ids: Any) -> None:
    """Train on random pieces of a text, ids [T]."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - PIECE, (ROWS,), generator=generator)
        batch = torch.stack([ids[start : start + PIECE] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    save_base(folder / "base")
    text = json.dumps(instructions(), indent=1) + "\n"
    (folder / "instructions.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
