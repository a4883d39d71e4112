"""The README's section on fine-tuning, as a new user follows it: each command, word for word, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow

SECTION = "\n## Fine-tune your own model\n"


def commands() -> list[list[str]]:
    """Return the commands of the section's first block."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(SECTION)[1].split("\n## ")[0]
    block = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0]
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, in which every command has been run."""
    made = tmp_path_factory.mktemp("first")
    (made / "examples").mkdir()
    for name in ("lora-sft.yaml", "make_toy.py"):
        shutil.copy(ROOT / "examples" / name, made / "examples" / name)
    for command, *arguments in commands():
        program = [sys.executable, *(["-m", "stagecoach_cli"] if command.endswith("/stagecoach") else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*program, *arguments], cwd=made, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_the_section_runs_the_example_and_fetches_its_release(folder: Path) -> None:
    """A gate passed, and every stage is done."""
    record = json.loads((folder / ".stagecoach" / "runs" / "default" / "lora-sft" / "state.json").read_bytes())
    assert {name: stage["state"] for name, stage in record["stages"].items()} == dict.fromkeys(
        ("instructions", "tune", "score", "release"), "Succeeded"
    )


def test_the_release_opens_in_transformers_with_the_bases_own_template(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoTokenizer.from_pretrained(folder / "build" / "toy" / "base")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "build" / "tuned")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "build" / "tuned")
    assert tokenizer.chat_template == base.chat_template
    question = [{"role": "user", "content": "What is 3 plus 4?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :])
    assert re.match(r"\d+ \+ \d+ = \d+", answer), answer
