"""Try every family of models, and keep the table in docs/models.md.

    python -m tests.trainer.families             # try all and write the table
    python -m tests.trainer.families --check     # try all and compare
    python -m tests.trainer.families llama gpt2  # try these and print their rows

A family is tried with a tiny model of random weights by the stages themselves: full training, LoRA on all linear
layers, packing, and a release of the trained adapter. The release is opened by transformers alone and compared with the
adapter on its base, opened by PEFT alone.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from stagecoach_api.kinds.export import ExportStage
from stagecoach_api.kinds.sft import SftStage
from stagecoach_trainer.runtime.errors import UserError
from tests import ROOT
from tests.trainer.architectures import model_types, tiny
from tests.trainer.models.makers import make_context

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: python -m tests.trainer.families -->\n", "<!-- end of families -->\n"

TEMPLATE = (
    "{%- for m in messages -%}{{ m['role'][0] }}:{{ m['content'] }}"
    "{%- if m['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}a:{%- endif -%}"
)
SETTINGS: dict[str, Any] = {
    "model": {"uri": "base"},
    "data": [{"uri": "talks", "format": "alpaca"}],
    "template": {"name": "custom", "jinja": TEMPLATE},
    "sequenceLength": 64,
    "budget": {"steps": 2},
    "batch": {"tokens": 128, "microBatchRows": 2},
    "optimizer": {"learningRate": 0.01},
    "precision": "fp32",
}
SAME = 1e-4
"""Largest difference of logits, relative to the largest, between the release and the adapter on its base."""
LONGEST_NOTE = 110


@dataclass(frozen=True)
class Abilities:
    """What a family can do."""

    full: bool = False
    lora: bool = False
    packing: bool = False
    release: bool = False
    merged: bool = False
    note: str = ""
    """Why something is not possible: the beginning of the message."""

    @property
    def cells(self) -> list[str]:
        return [*("yes" if item else "no" for item in astuple(self)[:-1]), self.note]


class Trial:
    """One family, tried in a folder."""

    def __init__(self, root: Path, model_type: str) -> None:
        self.root = root
        self.inputs = {"base": save_tiny(root / "base", model_type), "talks": write_talks(root / "talks.json")}
        self.notes: list[str] = []

    def run(self) -> Abilities:
        full, packing = self._trains("full", {"full": {}})
        lora = full and self._adapts(packing)
        released = full and self._release("lora" if lora else "full", lora)
        return Abilities(full, lora, packing, released, released and lora, "; ".join(self.notes))

    def _trains(self, name: str, trainable: dict[str, Any]) -> tuple[bool, bool]:
        """Return whether the family trains, and whether it does on packed rows."""
        if self._why_not(lambda: self._sft(name, trainable, packing=True)) is None:
            return True, True
        why = self._why_not(lambda: self._sft(name, trainable, packing=False))
        self.notes.append(why or "`packing: false`")
        return why is None, False

    def _adapts(self, packing: bool) -> bool:
        """Return whether LoRA trains, of a mixture whose experts are one parameter with adapters on them."""
        why = self._why_not(lambda: self._sft("lora", {"lora": {}}, packing))
        if why is None:
            return True
        if self._why_not(lambda: self._sft("lora", {"lora": {"experts": "adapt"}}, packing)) is None:
            self.notes.append("LoRA with `experts: adapt`")
            return True
        self.notes.append(f"LoRA: {why}")
        return False

    def _sft(self, name: str, trainable: dict[str, Any], packing: bool) -> None:
        from stagecoach_trainer.stages.sft import run

        shutil.rmtree(self.root / name, ignore_errors=True)
        context = make_context(self.root / name, "sft", self.inputs)
        run(SftStage.model_validate({**SETTINGS, "trainable": trainable, "packing": packing}), context)
        self.inputs[name] = context.output

    def _release(self, source: str, lora: bool) -> bool:
        """Return whether the release, opened by transformers, computes what was trained."""
        context = make_context(self.root / "release", "export", self.inputs)

        def release() -> None:
            from stagecoach_trainer.stages.export import run

            settings = {"model": {"uri": source}, "precision": "fp32", "proof": {"tokens": 64}}
            run(ExportStage.model_validate(settings), context)

        why = self._why_not(release)
        if why is not None:
            self.notes.append(f"release: {why}")
            return False
        return self._same(context.output, self.inputs[source], lora)

    def _same(self, released: Path, trained: Path, lora: bool) -> bool:
        from peft import PeftModel

        ids = torch.arange(3, 43)[None]
        expected: Any = AutoModelForCausalLM.from_pretrained(self.inputs["base"] if lora else trained, dtype="float32")
        if lora:
            expected = PeftModel.from_pretrained(expected, trained)
        found: Any = AutoModelForCausalLM.from_pretrained(released, dtype="float32")
        with torch.inference_mode():
            before, after = (model.eval()(input_ids=ids, use_cache=False).logits for model in (expected, found))
        change = float((after - before).abs().max() / before.abs().max())
        if not change <= SAME:
            self.notes.append(f"the release differs by {change:.1g}")
        return change <= SAME

    def _why_not(self, act: Callable[[], None]) -> str | None:
        """Return the beginning of the message with which a stage refuses, without numbers; None if it does not."""
        try:
            act()
        except UserError as error:
            text = str(error).replace(f"{self.root}/", "").split(";")[0].split("\n")[0].replace("|", "/")
            text = re.sub(r"\b\d[\d.,]*(e[+-]?\d+)?\b", "…", text)
            return text if len(text) <= LONGEST_NOTE else text[: text.rfind(" ", 0, LONGEST_NOTE)] + " …"
        except Exception as error:  # an architecture that fails is a row of the table, not the end of it
            return f"it fails: {type(error).__name__}"
        return None


def save_tiny(folder: Path, model_type: str) -> Path:
    """Write a tiny model of the family, with a vocabulary of the printable characters; return the folder."""
    tiny(model_type).save_pretrained(folder)
    characters = ["Ġ", "Ċ", *map(chr, range(33, 127))]  # as byte-level vocabularies write a blank and a line's end
    pieces = ["<pad>", "<s>", "</s>", *characters]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )
    made.save_pretrained(folder)
    return folder


def write_talks(path: Path) -> Path:
    records = [{"instruction": f"add 1 to {number}", "output": str(number + 1)} for number in range(40)]
    path.write_text(json.dumps(records))
    return path


def abilities(model_type: str) -> Abilities:
    """Try a family."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = Trial(Path(folder), model_type)
        except Exception as error:
            return Abilities(note=f"transformers makes no tiny model of it ({type(error).__name__})")
        return trial.run()


# -- the table ---------------------------------------------------------------------------------------------------------


def row(model_type: str, found: Abilities) -> str:
    return f"| `{model_type}` | {' | '.join(found.cells)} |\n"


def table(rows: Sequence[str]) -> str:
    head = "| family | full training | LoRA | packing | release | merged = unmerged | note |\n"
    return f"{BEGIN}{head}|---|---|---|---|---|---|---|\n{''.join(rows)}{END}"


def rows_of(page: str) -> dict[str, str]:
    """Return the table's rows by family."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    rows = [line for line in inside.splitlines(keepends=True) if line.startswith("| `")]
    return {line.split("`")[1]: line for line in rows}


def replaced(page: str, rows: Sequence[str]) -> str:
    """Return the page with another table."""
    before, _, rest = page.partition(BEGIN)
    return before + table(rows) + rest.partition(END)[2]


def tried(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        line = row(name, abilities(name))
        print(line, end="", flush=True)
        yield line


def main(arguments: Sequence[str]) -> int:
    logging.disable()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = [item for item in arguments if not item.startswith("-")]
    rows = list(tried(names or model_types()))
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in arguments:
        known = rows_of(page)
        return int(any(known.get(line.split("`")[1]) != line for line in rows) or set(known) != set(model_types()))
    if not names:
        PAGE.write_text(replaced(page, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
