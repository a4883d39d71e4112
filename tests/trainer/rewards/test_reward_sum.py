"""The sum of the terms: weights, limits, problems reported together, reward models, plug-ins."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import ModelCard, RewardCard
from stagecoach_api.rewards import RewardTerm
from stagecoach_trainer.models.reward import RewardModel, make_reward_model
from stagecoach_trainer.models.save import save_model
from stagecoach_trainer.rewards import Completion, RewardSum, plugin
from stagecoach_trainer.rewards.term import prompt_text
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.align.makers import rewards_of
from tests.trainer.evaluation.makers import chat_tokenizer
from tests.trainer.models.makers import make_context, make_model, make_tokenizer
from tests.trainer.rewards.makers import feedback_term, make_judged


def build(root: Path, *terms: dict[str, Any], inputs: dict[str, Path] | None = None) -> RewardSum:
    parsed = tuple(RewardTerm.model_validate({"name": f"t{index}"} | term) for index, term in enumerate(terms))
    return RewardSum.build(parsed, make_context(root, "ppo", inputs))


def test_the_total_is_the_weighted_sum_of_clipped_values(tmp_path: Path) -> None:
    terms = (
        {"expression": "characters", "weight": 0.5, "atMost": 3},
        {"expression": "-characters", "weight": 2, "atLeast": -1},
        {"language": {"script": "latin"}},
    )
    short, long = build(tmp_path, *terms).score([make_judged("a"), make_judged("abcdef")])
    assert short.terms == {"t0": 1.0, "t1": -1.0, "t2": 1.0}
    assert short.total == 0.5 * 1 - 2 * 1 + 1
    assert long.terms == {"t0": 3.0, "t1": -1.0, "t2": 1.0}
    assert long.total == 0.5 * 3 - 2 * 1 + 1


def test_no_answers_have_no_judgements(tmp_path: Path) -> None:
    assert build(tmp_path, {"expression": "1"}).score([]) == []


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    terms = (
        {"expression": "__import__('os')"},
        {"format": {"match": "(?<=a)b"}},
        {"length": {"atLeast": 3, "atMost": 2}},
        {"plugin": {"entryPoint": "missing"}},
        feedback_term(secret=None) | {"name": "t2"},
    )
    with pytest.raises(UserError) as caught:
        build(tmp_path, *terms)
    message = str(caught.value)
    for words in (
        "rewards[0].expression: ",
        "rewards[1].format.match: '(?<=a)b' is not a valid RE2 pattern",
        "rewards[2].length: `atLeast` (3) must not be above",
        "rewards[3].plugin.entryPoint: the group `stagecoach.rewards` has no entry point missing",
        "two terms are named `t2`",
    ):
        assert words in message


# -- plug-ins ----------------------------------------------------------------------------------------------------------


def half_length(prompts: list[str], answers: list[str]) -> list[float]:
    return [len(prompt) + len(answer) / 2 for prompt, answer in zip(prompts, answers, strict=True)]


def one_too_few(prompts: list[str], answers: list[str]) -> list[float]:
    return [0.0] * (len(answers) - 1)


def words_for_numbers(prompts: list[str], answers: list[str]) -> list[str]:
    return ["good"] * len(answers)


def not_a_number(prompts: list[str], answers: list[str]) -> list[float]:
    return [math.nan if answer == "bad" else 1.0 for answer in answers]


def nothing(prompts: list[str], answers: list[str]) -> None:
    return None


def trips(prompts: list[str], answers: list[str]) -> list[float]:
    raise KeyError("lost")


NO_FUNCTION = 3


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of an installed package, loaded as importlib.metadata loads any."""
    functions = ("half_length", "one_too_few", "words_for_numbers", "not_a_number", "nothing", "trips", "NO_FUNCTION")
    points = [EntryPoint(name, f"plugged_rewards:{name}", plugin.GROUP) for name in functions]
    points.append(EntryPoint("absent", "no_such_module:f", plugin.GROUP))
    monkeypatch.setitem(__import__("sys").modules, "plugged_rewards", __import__("types").SimpleNamespace(**globals()))
    monkeypatch.setattr(plugin, "entry_points", lambda group: [point for point in points if point.group == group])


@pytest.mark.usefixtures("plugged")
def test_a_plug_in_gets_prompts_and_answers_as_text(tmp_path: Path) -> None:
    (judgement,) = build(tmp_path, {"plugin": {"entryPoint": "half_length"}}).score([make_judged("abc", "12345")])
    assert judgement.total == 6.5


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one_too_few", "returned 1 values for 2 answers"),
        ("words_for_numbers", "returned 'good' for answer 0; it must return numbers"),
        ("nothing", "returned NoneType; it must return a list of numbers"),
        ("trips", "failed: KeyError: 'lost'"),
        (
            "not_a_number",
            r"rewards\[0\] \(t0\): the reward of sample 1 \(prompt 'what is a fox', answer 'bad'\) is nan",
        ),
        ("NO_FUNCTION", "is int, which is not callable"),
        ("absent", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_what_a_plug_in_gives_is_checked(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(tmp_path, {"plugin": {"entryPoint": name}}).score([make_judged("good"), make_judged("bad")])


# -- reward models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RewardModel]:
    """A reward model with the policy's vocabulary, and one with another."""
    made = {}
    for name, tokenizer in (("same", chat_tokenizer()), ("other", make_tokenizer(380, extra=("龘",)))):
        tokenizer.chat_template = chat_tokenizer().chat_template
        made[name] = RewardModel(make_reward_model(make_model(len(tokenizer)), seed=3).eval(), tokenizer)
    return made


@pytest.mark.parametrize("name", ["same", "other"])
def test_a_reward_model_reads_text_so_its_vocabulary_may_be_another(
    tmp_path: Path, judges: dict[str, RewardModel], name: str
) -> None:
    reward = judges[name]
    folder, vocabulary = tmp_path / "reward", tmp_path / "vocabulary"
    folder.mkdir()
    reward.tokenizer.save_pretrained(vocabulary)
    save_model(reward.model, reward.tokenizer, vocabulary, folder, ModelCard(adapter=False))
    batch = [make_judged("the dog sleeps"), make_judged("白日依山尽", "床前明月光")]
    built = build(tmp_path, {"model": {"uri": "reward"}, "weight": 3}, inputs={"reward": folder})
    found = [judgement.total / 3 for judgement in built.score(batch)]
    assert found == pytest.approx(rewards_of(reward, [(judged.prompt, judged.answer) for judged in batch], 1), abs=1e-5)
    assert found[0] != found[1]
    assert list(built.reward_models()) == ["t0"]


def save_judge(root: Path, domains: dict[str, str]) -> RewardModel:
    """Write a reward model with system prompts by domain to `root`, and return it."""
    tokenizer = chat_tokenizer()
    reward = RewardModel(make_reward_model(make_model(len(tokenizer)), seed=3).eval(), tokenizer, 0.0, domains)
    root.mkdir(parents=True)
    tokenizer.save_pretrained(root.parent / "vocabulary")
    card = ModelCard(adapter=False, reward=RewardCard(bias=0.0, domains=domains))
    save_model(reward.model, tokenizer, root.parent / "vocabulary", root, card)
    return reward


DOMAINS = {"poems": "Judge the poem.", "sums": "Are the sums right?"}


def test_each_answer_is_scored_with_the_system_prompt_of_its_prompts_domain(tmp_path: Path) -> None:
    reward = save_judge(tmp_path / "judge" / "model", DOMAINS)
    asked = ("poems", None, "sums", "poems")
    batch = [replace(make_judged("the dog sleeps", f"say {n}"), domain=domain) for n, domain in enumerate(asked)]
    built = build(tmp_path, {"model": {"uri": "reward"}}, inputs={"reward": tmp_path / "judge" / "model"})
    expected = [rewards_of(reward, [(item.prompt, item.answer)], 1, item.domain)[0] for item in batch]
    plain = [rewards_of(reward, [(item.prompt, item.answer)], 1)[0] for item in batch]
    assert [judgement.total for judgement in built.score(batch)] == pytest.approx(expected, abs=1e-5)
    assert [one == pytest.approx(two, abs=1e-5) for one, two in zip(expected, plain, strict=True)] == [
        domain is None for domain in asked
    ]


def test_reward_models_without_domains_ignore_them_if_another_one_has_some(tmp_path: Path) -> None:
    plain = save_judge(tmp_path / "plain" / "model", {})
    save_judge(tmp_path / "judge" / "model", DOMAINS)
    inputs = {"plain": tmp_path / "plain" / "model", "judge": tmp_path / "judge" / "model"}
    built = build(tmp_path, {"model": {"uri": "plain"}}, {"model": {"uri": "judge"}}, inputs=inputs)
    built.require_domains({"data[0].domain": "poems", "data[1].domain": None})
    (found,) = built.score([replace(make_judged("a fox"), domain="poems")])
    judged = make_judged("a fox")
    assert found.terms["t0"] == pytest.approx(rewards_of(plain, [(judged.prompt, judged.answer)], 1)[0], abs=1e-5)
    assert found.terms["t1"] != pytest.approx(found.terms["t0"], abs=1e-5)


def test_the_message_for_an_unknown_domain_names_the_known_ones(tmp_path: Path) -> None:
    save_judge(tmp_path / "judge" / "model", DOMAINS)
    built = build(tmp_path, {"model": {"uri": "reward"}}, inputs={"reward": tmp_path / "judge" / "model"})
    with pytest.raises(UserError, match=r"data\[1\]\.domain: .*rewards\[0\] has no domain 'songs', only poems, sums"):
        built.require_domains({"data[0].domain": "poems", "data[1].domain": "songs"})


@pytest.mark.parametrize("model", [True, False])
def test_a_domain_that_no_reward_model_heeds_is_a_mistake(tmp_path: Path, model: bool) -> None:
    save_judge(tmp_path / "judge" / "model", {})
    term: dict[str, Any] = {"model": {"uri": "reward"}} if model else {"expression": "1"}
    built = build(tmp_path, term, inputs={"reward": tmp_path / "judge" / "model"})
    built.require_domains({"data[0].domain": None})
    with pytest.raises(UserError, match=r"data\[0\]\.domain: no reward model .* has domains, so 'poems' "):
        built.require_domains({"data[0].domain": "poems"})


def test_a_language_model_is_rejected_as_a_reward_model(tmp_path: Path) -> None:
    from tests.trainer.evaluation.makers import save_chat_base

    with pytest.raises(UserError, match="not a reward model"):
        build(tmp_path, {"model": {"uri": "m"}}, inputs={"m": save_chat_base(tmp_path / "m")})


def test_the_text_of_a_prompt_of_several_turns_has_their_roles() -> None:
    turns = (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "add", "input": "1 and 2"},
    )
    assert prompt_text(turns) == "system: be kind\nuser: add\n1 and 2"
    assert prompt_text(Completion(turns[1:], "", 0, True).prompt) == "add\n1 and 2"
