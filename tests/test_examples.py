"""The examples: each is loaded, validated and planned; the demos' data can be made again."""

from __future__ import annotations

import gzip
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagecoach_api.expressions import Figures, parse_expression
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.reading.loading import load_run
from stagecoach_api.spec import TrainingRun
from stagecoach_api.stage_kind import Ranks
from stagecoach_core.plan import external_uris, make_plan
from stagecoach_core.values import External, Plan
from tests import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DATA = ROOT / "examples" / "data"
CLASSICS = ROOT.parent / "shared" / "data" / "corpus" / "chinese_classics.jsonl"
SEVEN_B = "chinese-llama-alpaca-7b"
TINY = "chinese-alpaca-tiny"
RLHF = "rlhf-tiny"
INSTRUCT = "instructgpt"
FULL_SIZE = (SEVEN_B, INSTRUCT)


def load(name: str) -> TrainingRun:
    return load_run(ROOT / "examples" / f"{name}.yaml").run


def plan_of(run: TrainingRun) -> Plan:
    found = {key: External(uri=uri, digest="sha256:" + "0" * 64) for key, uri in external_uris(run).items()}
    return make_plan(run, found, code="sha256:" + "1" * 64)


def make_data() -> dict[str, Any]:
    """Return the names that `examples/make_data.py` defines."""
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


@pytest.mark.parametrize("name", [TINY, SEVEN_B])
def test_runs_of_two_languages_measure_both_in_every_training_stage(name: str) -> None:
    training = [stage for stage in load(name).spec.stages if stage.kind in ("pretrain", "sft")]
    assert training
    for stage in training:
        config: Any = stage.config
        assert {held_out.name for held_out in config.held_out.sets} == {"zh", "en"}


def test_the_demo_has_every_step_of_chinese_alpaca() -> None:
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


@pytest.mark.parametrize(("name", "files"), [(TINY, 4), (RLHF, 6)])
def test_every_file_a_demo_reads_is_shipped(name: str, files: int) -> None:
    uris = external_uris(load(name)).values()
    assert len(set(uris)) == files
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


def test_training_instructions_contain_no_held_out_poem_and_no_prompt_of_the_release() -> None:
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


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_run_trains_on_two_nodes_of_eight_a100(name: str) -> None:
    run = load(name)
    for planned in plan_of(run).stages.values():
        resources = planned.stage.resources
        if STAGE_KINDS[planned.stage.kind].ranks is Ranks.ALL:
            assert (resources.nodes, resources.gpus_per_node) == (2, 8)
            assert resources.gpu_product == "NVIDIA-A100-SXM4-80GB"
        assert planned.stage.queue is not None
        assert "@sha256:" in (planned.stage.image or "")
    assert (run.spec.storage.uri or "").startswith("s3://")


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_the_alignment_demo_has_instructgpts_three_steps_and_dpo() -> None:
    plan = plan_of(load(RLHF))
    kinds = {name: planned.stage.kind for name, planned in plan.stages.items()}
    assert kinds == {
        "poems": "data",
        "vocabulary": "tokenizer",
        "base": "pretrain",
        "sft": "sft",
        "reward-model": "rewardModel",
        "ppo": "ppo",
        "dpo": "dpo",
        "compare": "evaluate",
    }
    assert set(plan.stages["ppo"].upstream) >= {"reward-model", "sft"}
    assert plan.stages["dpo"].upstream == ("sft",)
    assert set(plan.stages["compare"].upstream) == {"dpo", "ppo", "reward-model", "sft"}


def test_the_answers_can_be_made_again_from_the_poems(tmp_path: Path) -> None:
    script = make_data()
    script["make_answers"](tmp_path)
    again = sorted(path.name for path in tmp_path.iterdir())
    assert again == ["comparisons.heldout.jsonl.gz", "comparisons.train.jsonl.gz", "demonstrations.jsonl.gz"]
    for name in again:
        assert gzip.decompress((tmp_path / name).read_bytes()) == gzip.decompress((DATA / name).read_bytes())


def poem_of(prompt: str) -> str:
    return prompt.partition("\n")[2]


def test_demonstrations_comparisons_and_held_out_comparisons_share_no_poem() -> None:
    read = make_data()["read_records"]
    shown = {record["input"] for record in read(DATA / "demonstrations.jsonl.gz")}
    compared = {poem_of(record["prompt"]) for record in read(DATA / "comparisons.train.jsonl.gz")}
    held_out = {poem_of(record["prompt"]) for record in read(DATA / "comparisons.heldout.jsonl.gz")}
    assert (len(shown), len(compared), len(held_out)) == (2400, 1200, 200)
    assert not shown & compared
    assert not (shown | compared) & held_out


def quality(answer: str, form: str) -> tuple[bool, bool, bool]:
    """Return the criteria of preference, the most important first: right form, no repetition, a whole sentence."""
    return form in answer, answer.count("。") < 2, answer.startswith("這是一首")


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_answers_are_ranked_by_right_form_then_no_repetition_then_whole_sentence(part: str) -> None:
    script = make_data()
    for record in script["read_records"](DATA / f"comparisons.{part}.jsonl.gz"):
        form = script["form_of"](poem_of(record["prompt"])).name
        marks = [quality(answer, form) for answer in record["answers"]]
        assert len(set(marks)) == script["ANSWERS_COMPARED"]
        assert marks == sorted(marks, reverse=True)


def test_demonstrations_are_of_mixed_quality() -> None:
    script = make_data()
    records = list(script["read_records"](DATA / "demonstrations.jsonl.gz"))
    found = [quality(record["output"], script["form_of"](record["input"]).name) for record in records]
    shares = {mark: found.count(mark) / len(found) for mark in found}
    assert shares[(True, True, True)] == pytest.approx(0.20, abs=0.03)
    assert sum(share for mark, share in shares.items() if not mark[0]) == pytest.approx(0.20, abs=0.03)
    assert sum(share for mark, share in shares.items() if not mark[1]) == pytest.approx(0.35, abs=0.03)


def test_the_rule_used_only_for_evaluation_finds_the_right_form_of_every_held_out_poem() -> None:
    compare: Any = next(stage.config for stage in load(RLHF).spec.stages if stage.name == "compare")
    task = next(task for task in compare.rewards if task.name == "rules")
    rule = parse_expression(next(term.expression for term in task.rewards if term.name == "right"))
    forms = [form.name for form in make_data()["FORMS"]]
    for record in json.loads((DATA / "instructions.heldout.json").read_text(encoding="utf-8")):
        length = len(f"{record['instruction']}\n{record['input']}")
        values = {form: rule.value(Figures(f"這是一首{form}。", prompt_characters=length)) for form in forms}
        assert values == {form: float(form == record["output"]) for form in forms}


def test_instructgpt_has_the_papers_figures() -> None:
    stages: dict[str, Any] = {stage.name: stage.config for stage in load(INSTRUCT).spec.stages}
    sft, start, judge, ppo = (stages[name] for name in ("sft", "start", "reward-model", "ppo"))
    assert (sft.batch.samples, sft.budget.epochs, sft.optimizer.learning_rate) == (32, 16, 9.65e-6)
    assert (start.batch.samples, start.optimizer.learning_rate) == (32, 1.04e-5)
    demonstrations, (own, text) = 12_725, start.data
    samples = demonstrations + text.max_samples
    assert (own.max_samples, own.weight, text.weight) == (None, None, None)
    assert text.max_samples / samples == pytest.approx(0.1, abs=1e-4)
    assert math.ceil(start.budget.epochs * samples / start.batch.samples) == 884
    assert start.budget.epochs == 2
    assert (judge.batch.samples, judge.budget.epochs, judge.optimizer.learning_rate) == (64, 1, 9e-6)
    assert judge.loss.ranked is not None
    assert {stages[name].schedule.floor for name in ("sft", "start", "reward-model")} == {0.1}
    assert ppo.budget.steps * ppo.batch.samples == 256_000
    assert (ppo.batch.samples, ppo.policy.mini_batch_samples, ppo.policy.inner_epochs) == (512, 64, 1)
    assert ppo.policy.average_decay == 0.992
    assert (ppo.policy.clip, ppo.policy.gamma, ppo.kl.coefficient, ppo.kl.target) == (0.2, 1.0, 0.02, None)
    assert (ppo.rollout.temperature, ppo.schedule.warmup_steps) == (1.0, 10)
    assert ppo.critic.optimizer.learning_rate == 9e-6
    assert ppo.max_dropped_share == 1.0
    assert (ppo.pretraining.weight, ppo.pretraining.rows_per_step) == (27.8, 8 * 64)
