"""Preferences as token groups: encoded as served, every lost answer is counted, plans are exact."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagecoach_api.conversation import Role, Template, TemplateName
from stagecoach_api.kinds.reward_model import RewardModelStage
from stagecoach_api.references import RecordSource
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Record, Turn
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.groups import LOST_ANSWERS, Counting, Group, GroupShard, check_lost_answers, plan_groups
from stagecoach_trainer.samples.preferences import Grouping, group_shard
from stagecoach_trainer.samples.prompts import prompt_records, read_prompts
from stagecoach_trainer.text.templates import apply_template, message_of
from stagecoach_trainer.text.vocabulary import load_tokenizer
from tests import SHARED_DATA as SHARED
from tests.trainer.data.makers import make_context, write_jsonl
from tests.trainer.models.makers import make_tokenizer

REAL = RecordSource(uri=str(SHARED / "preference" / "comparison_zh.json"))

SHORT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LLaMA's real vocabulary, with a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copyfile(SHARED / "tokenizers" / "llama_32000.model", folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    apply_template(tokenizer, Template(name=TemplateName.VICUNA))
    return tokenizer


@pytest.fixture(scope="module")
def small() -> Any:
    tokenizer = make_tokenizer()
    apply_template(tokenizer, Template(name=TemplateName.CUSTOM, jinja=SHORT_TEMPLATE))
    return tokenizer


def shard_of(
    folder: Path,
    values: list[dict[str, Any]],
    tokenizer: Any,
    grouping: Grouping = Grouping.PROMPTS,
    sequence_length: int = 512,
    **options: Any,
) -> GroupShard:
    path = write_jsonl(folder / "in" / "a.jsonl", values)
    source = RecordSource(uri=str(path))
    return group_shard(make_context(folder), source, tokenizer, sequence_length, grouping, **options)


def groups_of(shard: GroupShard, counting: Counting = Counting.GROUPS) -> list[Group]:
    return list(shard.groups(counting))


def served(tokenizer: Any, turns: tuple[Turn, ...], system: str | None = None) -> list[int]:
    """Return, using only transformers, the ids that a served model receives."""
    messages = [message_of(turn.role, turn.content, turn.input) for turn in turns]
    if system is not None:
        messages = [message_of(Role.SYSTEM, system), *(item for item in messages if item["role"] != "system")]
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return found


def answers_in(tokenizer: Any, group: Group) -> list[str]:
    return [
        tokenizer.decode(sequence.ids[sequence.num_prompt :]).removesuffix(tokenizer.eos_token).strip()
        for sequence in group.sequences
    ]


@pytest.mark.parametrize("system", [None, "判断医学回答的好坏。"])
def test_real_pairs_are_the_served_prompt_the_answer_and_the_end(
    tmp_path: Path, llama: Any, system: str | None
) -> None:
    context = make_context(tmp_path)
    shard = group_shard(context, REAL, llama, 100_000, Grouping.PROMPTS, system)
    records = list(read_records(context, REAL))
    groups = groups_of(shard, Counting.PAIRS)
    assert len(groups) == len(records) == 300
    for record, group in zip(records[:80], groups[:80], strict=True):
        prompt = served(llama, record.messages, system)
        for answer, sequence in zip(record.answers, group.sequences, strict=True):
            assert sequence.ids[: sequence.num_prompt].tolist() == prompt
            assert sequence.ids[-1] == llama.eos_token_id
            whole, front = llama.decode(sequence.ids[:-1]), llama.decode(prompt)
            assert whole.startswith(front)
            assert whole[len(front) :].strip() == answer.content.strip()
        assert (group.better.tolist(), group.worse.tolist(), group.num_targets) == ([0], [1], 1)
    assert shard.num_tokens == sum(group.num_tokens for group in groups)


def test_a_real_file_loses_what_does_not_fit_and_reports_it(tmp_path: Path, llama: Any) -> None:
    whole = group_shard(make_context(tmp_path), REAL, llama, 100_000, Grouping.PROMPTS)
    lengths = [[len(sequence.ids) for sequence in group.sequences] for group in groups_of(whole)]
    cut = group_shard(make_context(tmp_path, seed=2), REAL, llama, 1024, Grouping.PROMPTS)
    fitting = [sum(length <= 1024 for length in pair) for pair in lengths]
    assert cut.counts["groups"] == len(cut) == fitting.count(2) > 100
    assert cut.counts["tooLong"] == 600 - sum(fitting) > 0
    assert cut.counts["fewAnswers"] == fitting.count(1)
    assert cut.counts["answersRead"] == cut.counts["answers"] + sum(cut.counts.get(name, 0) for name in LOST_ANSWERS)
    assert max(len(sequence.ids) for group in groups_of(cut) for sequence in group.sequences) <= 1024


RANKED = {
    "prompt": "which word is next",
    "answers": [{"text": text, "rank": rank} for text, rank in (("dog", 1), ("fox", 2), ("model", 2), ("word", 3))],
}


def test_ranked_answers_form_all_pairs_except_ties(tmp_path: Path, small: Any) -> None:
    shard = shard_of(tmp_path, [RANKED], small)
    [group] = groups_of(shard, Counting.PAIRS)
    assert answers_in(small, group) == ["dog", "fox", "model", "word"]
    pairs = set(zip(group.better.tolist(), group.worse.tolist(), strict=True))
    assert pairs == {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}
    assert group.num_targets == len(pairs) == shard.counts["pairs"]
    assert shard.counts["ties"] == 1
    assert [found.num_targets for found in groups_of(shard, Counting.GROUPS)] == [1]
    assert [found.num_targets for found in groups_of(shard, Counting.ANSWERS)] == [4]


def test_a_ranking_can_be_split_into_pairs(tmp_path: Path, small: Any) -> None:
    shard = shard_of(tmp_path, [RANKED], small, Grouping.PAIRS)
    found = [tuple(answers_in(small, group)) for group in groups_of(shard)]
    assert found == [("dog", "fox"), ("dog", "model"), ("dog", "word"), ("fox", "word"), ("model", "word")]
    assert all(group.num_targets == 1 for group in groups_of(shard, Counting.PAIRS))
    assert [group.place for group in groups_of(shard)] == [(0, index) for index in range(5)]
    assert shard.num_tokens == sum(group.num_tokens for group in groups_of(shard))


def test_a_ranking_can_be_split_into_liked_and_other_answers(tmp_path: Path, small: Any) -> None:
    labels = [{"prompt": "q", "completion": "good one", "label": 1}, {"prompt": "q", "completion": "bad", "label": 0}]
    apart = shard_of(tmp_path, [RANKED], small, Grouping.ANSWERS)
    liked = [(answers_in(small, group), group.liked.tolist()) for group in groups_of(apart) if group.liked is not None]
    assert liked == [(["dog"], [True]), (["fox"], [False]), (["model"], [False]), (["word"], [False])]
    given = groups_of(shard_of(tmp_path / "labels", labels, small, Grouping.ANSWERS), Counting.ANSWERS)
    assert [group.liked.tolist() for group in given if group.liked is not None] == [[True], [False]]
    assert [(len(group.better), group.num_targets) for group in given] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("answers", "counts"),
    [
        pytest.param(["dog", "dog"], {"sameAnswers": 1, "fewAnswers": 1}, id="chosen is rejected"),
        pytest.param(["dog", " \n"], {"emptyAnswers": 1, "fewAnswers": 1}, id="one is empty"),
        pytest.param(["", " "], {"emptyAnswers": 2}, id="both are empty"),
        pytest.param(["dog", "fox " * 80], {"tooLong": 1, "fewAnswers": 1}, id="one is too long"),
        pytest.param(["dog " * 80, "fox " * 80], {"tooLong": 2}, id="both are too long"),
        pytest.param(
            [{"text": "dog", "rank": 1}, {"text": "fox", "rank": 1}], {"fewAnswers": 2, "ties": 1}, id="a tie"
        ),
    ],
)
def test_answers_that_cannot_be_compared_are_dropped_and_counted(
    tmp_path: Path, small: Any, answers: list[Any], counts: dict[str, int]
) -> None:
    values = [{"prompt": "the lazy", "answers": answers}, {"prompt": "the lazy", "answers": ["dog", "fox"]}]
    shard = shard_of(tmp_path, values, small, sequence_length=80)
    expected = {"records": 2, "groups": 1, "answersRead": 4, "answers": 2, "pairs": 1, **counts}
    assert {name: count for name, count in shard.counts.items() if count and name != "tokens"} == expected
    [group] = groups_of(shard)
    assert answers_in(small, group) == ["dog", "fox"]


def test_a_prompt_longer_than_the_sequence_leaves_no_group(tmp_path: Path, small: Any) -> None:
    shard = shard_of(tmp_path, [{"prompt": "dog " * 200, "answers": ["a", "b"]}], small, sequence_length=64)
    assert (len(shard), shard.counts["tooLong"]) == (0, 2)
    with pytest.raises(
        UserError, match=r"no preference to learn from is left \(a: records 1, answersRead 2, tooLong 2"
    ):
        check_lost_answers({"a": shard.counts}, 1.0)


def test_an_answer_that_does_not_fit_leaves_the_others_of_its_prompt(tmp_path: Path, small: Any) -> None:
    value = {"prompt": "the lazy", "answers": ["dog", "fox " * 80, "model"]}
    shard = shard_of(tmp_path, [value], small, sequence_length=80)
    assert [answers_in(small, group) for group in groups_of(shard)] == [["dog", "model"]]
    check_lost_answers({"a": shard.counts}, 0.4)
    with pytest.raises(UserError, match=r"33\.3% of the answers .*`maxDroppedShare` 30\.0%.*tooLong 1"):
        check_lost_answers({"a": shard.counts}, 0.3)


@pytest.mark.parametrize(
    ("value", "grouping", "message"),
    [
        pytest.param({"text": "a"}, Grouping.PROMPTS, r"a\.jsonl:1: a text where preferences are expected", id="text"),
        pytest.param(
            {"instruction": "q", "output": "a"},
            Grouping.PAIRS,
            r"a\.jsonl:1: a conversation where preferences are expected; give .*`sft`",
            id="a conversation",
        ),
        pytest.param(
            {"prompt": "q", "completion": "a", "label": 1},
            Grouping.PAIRS,
            r"a\.jsonl:1: an answer judged as good or bad.*`dpo` stage with `loss: \{kto: \{\}\}`",
            id="labels where pairs are needed",
        ),
    ],
)
def test_records_of_another_kind_are_rejected_with_advice(
    tmp_path: Path, small: Any, value: dict[str, Any], grouping: Grouping, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        shard_of(tmp_path, [value], small, grouping)


def test_a_system_prompt_replaces_that_of_the_conversation(tmp_path: Path, small: Any) -> None:
    values = [{"system": "own", "prompt": "q", "answers": ["a", "b"]}, {"prompt": "q", "answers": ["a", "b"]}]
    first, second = groups_of(shard_of(tmp_path, values, small, system="be kind", domain=3, number=2))
    assert first.sequences[0].ids.tolist() == second.sequences[0].ids.tolist()
    expected = served(small, (Turn(Role.SYSTEM, "be kind"), Turn(Role.USER, "q")))
    assert first.sequences[0].ids[: first.sequences[0].num_prompt].tolist() == expected
    assert (first.domain, first.place, second.place) == (3, (2, 0), (2, 1))


def test_a_shard_is_built_once_for_equal_settings(tmp_path: Path, small: Any) -> None:
    values = [{"prompt": "q", "answers": ["a", "b"]}]
    settings: list[dict[str, Any]] = [{}, {"domain": 5}, {"system": "s"}, {"sequence_length": 99}]
    for index, options in enumerate(settings):
        path = write_jsonl(tmp_path / "in.jsonl", values)
        context = make_context(tmp_path, seed=index + 1)
        group_shard(
            context,
            RecordSource(uri=str(path)),
            small,
            options.get("sequence_length", 50),
            Grouping.PROMPTS,
            system=options.get("system"),
            domain=options.get("domain", 0),
        )
    assert len(list((tmp_path / "cache" / "tokens").glob("*/index.json"))) == 3


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_config(**changes: Any) -> RewardModelStage:
    values: dict[str, Any] = {
        "model": {"uri": "m"},
        "data": [{"uri": "a", "name": "a"}, {"uri": "b", "name": "b"}],
        "batch": {"samples": 4},
        "optimizer": {"learningRate": 1.0},
    }
    return RewardModelStage.model_validate({**values, **changes})


@pytest.fixture
def two_sets(tmp_path: Path, small: Any) -> dict[str, GroupShard]:
    def values(name: str, count: int, long: int) -> list[dict[str, Any]]:
        return [{"prompt": f"{name}{n} " * long, "answers": ["dog", "fox", "model"][: 2 + n % 2]} for n in range(count)]

    return {
        "a": shard_of(tmp_path / "a", values("a", 10, 1), small, number=0),
        "b": shard_of(tmp_path / "b", values("b", 20, 4), small, number=1, domain=1),
    }


def test_an_epoch_has_every_group_once_and_steps_are_random_access(two_sets: dict[str, GroupShard]) -> None:
    plan = plan_groups(two_sets, plan_config(), Counting.PAIRS, seed=1)
    steps = [plan.rows(step) for step in range(plan.num_steps)]
    assert [len(step) for step in steps] == [4] * 7 + [2]
    places = Counter(group.place for step in steps for group in step)
    assert places == Counter([(0, n) for n in range(10)] + [(1, n) for n in range(20)])
    again = plan_groups(two_sets, plan_config(), Counting.PAIRS, seed=1).rows(5)
    assert [group.place for group in again] == [group.place for group in steps[5]]
    other = plan_groups(two_sets, plan_config(), Counting.PAIRS, seed=2).rows(5)
    assert [group.place for group in other] != [group.place for group in steps[5]]
    for group in steps[0]:
        same = two_sets["ab"[group.place[0]]].group(group.place[1], Counting.PAIRS)
        assert [found.ids.tolist() for found in same.sequences] == [found.ids.tolist() for found in group.sequences]
        assert group.domain == group.place[0]
    drawn = sum(group.num_tokens for step in steps for group in step)
    assert drawn == sum(shard.num_tokens for shard in two_sets.values())


def test_weights_are_shares_of_the_tokens(two_sets: dict[str, GroupShard]) -> None:
    sets = [{"uri": "a", "name": "a", "weight": 3}, {"uri": "b", "name": "b", "weight": 1}]
    plan = plan_groups(two_sets, plan_config(data=sets, budget={"steps": 100}), Counting.GROUPS, seed=1)
    tokens = Counter[int]()
    for step in range(plan.num_steps):
        for group in plan.rows(step):
            tokens[group.place[0]] += group.num_tokens
    assert tokens[0] / tokens.total() == pytest.approx(0.75, abs=0.02)


def test_batches_and_budgets_of_tokens_are_met_on_average(two_sets: dict[str, GroupShard]) -> None:
    config = plan_config(batch={"tokens": 1500}, budget={"tokens": 30_000}, sequenceLength=512)
    plan = plan_groups(two_sets, config, Counting.GROUPS, seed=1)
    tokens = [sum(group.num_tokens for group in plan.rows(step)) for step in range(plan.num_steps)]
    assert np.mean(tokens) == pytest.approx(1500, rel=0.1)
    assert sum(tokens) == pytest.approx(30_000, rel=0.1)
    assert len({len(plan.rows(step)) for step in range(plan.num_steps)}) == 1


def test_a_set_with_weight_but_without_groups_is_rejected(tmp_path: Path, small: Any) -> None:
    empty = shard_of(tmp_path, [{"prompt": "q", "answers": ["a", "a"]}], small)
    config = plan_config(data=[{"uri": "a", "name": "a"}])
    with pytest.raises(UserError, match="data: a has no sample to train on"):
        plan_groups({"a": empty}, config, Counting.GROUPS, seed=1)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_the_served_ids_without_the_last_answer(tmp_path: Path, small: Any) -> None:
    values = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "the lazy dog " * 60}, {"role": "assistant", "content": "a"}]},
    ]
    source = RecordSource(uri=str(write_jsonl(tmp_path / "a.jsonl", values)))
    found = read_prompts(make_context(tmp_path), source, small, max_tokens=100)
    assert found.counts == {"records": 5, "prompts": 2, "empty": 2, "tooLong": 1}
    asked = [
        (Turn(Role.USER, "q"),),
        tuple(Turn(role, role.value) for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER)),
    ]
    assert [prompt.ids.tolist() for prompt in found.prompts] == [served(small, turns) for turns in asked]
    assert found.prompts[0].messages == ({"role": "user", "content": "q"},)
    assert [prompt.where for prompt in found.prompts] == ["a.jsonl:1", "a.jsonl:2"]


def test_preferences_give_prompts_and_text_is_rejected(tmp_path: Path, llama: Any) -> None:
    context = make_context(tmp_path)
    records = list(prompt_records(context, REAL))
    assert len(records) == 300
    assert not any(record.answers for record in records)
    assert records[0] == Record(messages=records[0].messages, source="comparison_zh.json")
    assert len(read_prompts(context, REAL, llama, 100_000).prompts) == 300
    text = RecordSource(uri=str(write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])))
    with pytest.raises(UserError, match=r"text\.jsonl:1: a text where prompts are expected; give conversations"):
        list(prompt_records(context, text))
