"""The examples people copy: each is loaded, validated and planned; the demo's data can be made again."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagecoach_api.loading import load_run
from stagecoach_api.spec import TrainingRun
from stagecoach_core.plan import external_keys, make_plan
from stagecoach_core.values import External, Plan

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DATA = ROOT / "examples" / "data"
CLASSICS = ROOT.parent / "shared" / "data" / "corpus" / "chinese_classics.jsonl"
SEVEN_B = "chinese-llama-alpaca-7b"
TINY = "chinese-alpaca-tiny"


def load(name: str) -> TrainingRun:
    return load_run(ROOT / "examples" / f"{name}.yaml").run


def plan_of(run: TrainingRun) -> Plan:
    found = {key: External(uri=uri, digest="sha256:" + "0" * 64) for key, uri in external_keys(run).items()}
    return make_plan(run, found, code="sha256:" + "1" * 64)


def make_data() -> dict[str, Any]:
    """What `examples/make_data.py` defines."""
    return runpy.run_path(str(ROOT / "examples" / "make_data.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_can_be_planned(path: Path) -> None:
    run = load(path.stem)
    plan = plan_of(run)
    assert run.metadata.name == path.stem
    assert set(plan.stages) == {stage.name for stage in run.spec.stages}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_reads_the_same_without_yaml_aliases(path: Path) -> None:
    events = list(yaml.parse(path.read_text(encoding="utf-8")))
    assert events
    assert not [event for event in events if isinstance(event, yaml.AliasEvent)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_measures_both_languages_in_every_training_stage(path: Path) -> None:
    training = [stage for stage in load(path.stem).spec.stages if stage.kind in ("pretrain", "sft")]
    assert training
    for stage in training:
        config: Any = stage.config
        assert {held_out.name for held_out in config.held_out.sets} == {"zh", "en"}


def test_the_demo_goes_through_every_step_of_chinese_alpaca() -> None:
    plan = plan_of(load(TINY))
    kinds = [(name, planned.stage.kind) for name, planned in plan.stages.items()]
    assert sorted(kinds) == [
        ("base", "pretrain"),
        ("chinese", "data"),
        ("embeddings", "pretrain"),
        ("english", "data"),
        ("pretrain", "pretrain"),
        ("release", "export"),
        ("score", "evaluate"),
        ("sft", "sft"),
        ("vocabulary", "tokenizer"),
        ("vocabulary-base", "tokenizer"),
    ]
    assert plan.stages["release"].upstream == ("score", "sft")


def test_every_file_the_demo_reads_is_shipped() -> None:
    uris = external_keys(load(TINY)).values()
    assert len(set(uris)) == 4
    for uri in uris:
        assert (ROOT / "examples" / uri).is_file()


def test_the_demos_data_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 4_000_000


def test_the_demos_instructions_can_be_made_again_from_the_poems() -> None:
    train, held_out = make_data()["make_instructions"]()
    assert train == json.loads((DATA / "instructions.train.json").read_text(encoding="utf-8"))
    assert held_out == json.loads((DATA / "instructions.heldout.json").read_text(encoding="utf-8"))


def test_the_demos_poems_can_be_made_again_from_the_collection(tmp_path: Path) -> None:
    script = make_data()
    script["make_poems"](CLASSICS, tmp_path / "poems.jsonl.gz")
    again = list(script["read_records"](tmp_path / "poems.jsonl.gz"))
    assert again == list(script["read_records"](DATA / "poems.jsonl.gz"))


def test_no_held_out_poem_and_no_shown_prompt_stands_among_the_training_instructions() -> None:
    train = {record["input"] for record in json.loads((DATA / "instructions.train.json").read_text(encoding="utf-8"))}
    held_out = json.loads((DATA / "instructions.heldout.json").read_text(encoding="utf-8"))
    assert not train & {record["input"] for record in held_out}
    export: Any = next(stage.config for stage in load(TINY).spec.stages if stage.kind == "export")
    assert not train & {prompt.partition("\n")[2] for prompt in export.samples.prompts}


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_every_answer_follows_from_its_poem(part: str) -> None:
    numerals = {"五": 5, "七": 7}
    records = json.loads((DATA / f"instructions.{part}.json").read_text(encoding="utf-8"))
    for record in records:
        verses = [
            verse for verse in record["input"].translate(str.maketrans("，。？！", "\n" * 4)).split("\n") if verse
        ]
        assert numerals[record["output"][0]] == len(verses[0])
        assert {"言絕句": 4, "言律詩": 8}[record["output"][1:]] == len(verses)
    answers = [record["output"] for record in records]
    assert {answer: answers.count(answer) for answer in answers} == dict.fromkeys(answers, len(answers) // 4)


def test_the_full_size_run_has_the_papers_figures() -> None:
    plan = plan_of(load(SEVEN_B))
    for name, steps, rate, rows in (("embeddings", 3000, 2e-4, 1024), ("pretrain", 6000, 1e-4, 1024)):
        config: Any = plan.stages[name].stage.config
        assert config.budget.steps == steps
        assert config.optimizer.learning_rate == rate
        assert config.batch.tokens == rows * config.sequence_length == rows * 512
    sft: Any = plan.stages["sft"].stage.config
    assert (sft.batch.samples, sft.optimizer.learning_rate, sft.schedule.warmup_share) == (512, 1e-4, 0.03)
    assert sum(source.max_samples for source in sft.data) == 2_000_000


def test_the_full_size_run_trains_on_two_nodes_of_eight_a100() -> None:
    run = load(SEVEN_B)
    for planned in plan_of(run).stages.values():
        resources = planned.stage.resources
        if planned.stage.kind in ("pretrain", "sft"):
            assert (resources.nodes, resources.gpus_per_node) == (2, 8)
            assert resources.gpu_product == "NVIDIA-A100-SXM4-80GB"
        assert planned.stage.queue is not None
        assert "@sha256:" in (planned.stage.image or "")
    assert (run.spec.storage.uri or "").startswith("s3://")
