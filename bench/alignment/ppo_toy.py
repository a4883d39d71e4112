"""`python -m bench.alignment.ppo_toy`: PPO on a task whose optimum is known, and what each of its switches does there.

A prompt is two to four digits; the reward of an answer is the share of its four places that hold the prompt's last
digit, so 1 is the optimum, and of random answers 1 in 13 places is right. The policy, a LLaMA of one layer of width 32
with new weights, has to find out the rule by itself. At the end it is asked the prompts it was trained on: once for
its likeliest answer, and several times at temperature 1, as it was trained. Ten seeds; then single switches are turned,
three seeds each, for fewer updates. The toy, and the server behind the two terms that ask one, are the tests'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.measuring import RESULTS, Figure, Goal, gain, side_by_side, write_result

RESULT = RESULTS / "ppo_toy.json"
SEEDS, FEW_SEEDS = range(10), range(3)
UPDATES, FEW_UPDATES = 150, 60
ENOUGH = 0.95
"""Share of the optimum that counts as reached."""
DRAWS = 8
"""Answers to each prompt at temperature 1."""
GREEDY = 1e-4
"""Temperature at which the likeliest answer is all but certain."""
REACHED = Goal("≥", 9)
"""Seeds of ten."""
MEANS = ("greedy", "sampled", "kl", "early", "value_loss")
"""What the table of switches shows of every arm, the likeliest answers first."""
EFFECT = Goal("≥", 0.3)
"""True reward that a right judge must bring beside a reward model that misleads."""

SETTINGS: dict[str, Any] = {
    "batch": {"samples": 64, "microBatchRows": 64},
    "rollout": {"maxNewTokens": 4, "batchRows": 64},
    "policy": {"innerEpochs": 4, "miniBatchSamples": 32, "entropyWeight": 0.1, "gaeLambda": 1.0},
    "critic": {"clip": None},
    "optimizer": {"learningRate": 3e-3, "clip": 1.0},
    "schedule": {"name": "linear"},
    # A policy that has found the optimum ends no answer, says one thing only and is paid the same for all of it.
    "guards": {"minEndedShare": None, "minEntropy": None, "minRewardDeviation": None},
    "checkpoints": {"everySteps": 10**6},
}

Terms = Callable[[ExitStack], Any]
"""Makes the reward; what it opens is closed at the end."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of `SETTINGS`, member by member."""
    terms: Terms | None = None
    """None: the true reward."""


@dataclass(frozen=True)
class Training:
    """One arm with one seed."""

    arm: Arm
    seed: int
    updates: int


@dataclass(frozen=True)
class Trained:
    """What it came to."""

    greedy: float
    """True reward of the likeliest answers to the prompts it was trained on."""
    sampled: float
    """True reward of answers at temperature 1 to them."""
    kl: float
    """Mean KL per answer in the last update, in nats."""
    early: float
    """Reward trained for, mean over the first half of the updates."""
    value_loss: float
    """Of the critic, mean over the first ten updates."""
    seconds: float
    """Of the processor."""


Found = Mapping[str, Sequence[Trained]]
"""By arm, the seeds in order."""


# -- rewards -----------------------------------------------------------------------------------------------------------


def sevens(prompt: str, answer: str) -> float:
    """A reward model that has learnt the wrong thing: the share of an answer's four places that hold a 7."""
    del prompt
    return answer[:4].count("7") / 4


def misleading(stack: ExitStack) -> Any:
    from tests.trainer.ppo.makers import FunctionTerm, reward_of

    del stack
    return reward_of(("model", FunctionTerm(sevens), 1.0))


def with_rules(stack: ExitStack) -> Any:
    """The misleading model and two statements that a judge finds true or not, with given weights."""
    from stagecoach_api.rewards import PropositionReward
    from stagecoach_trainer.rewards.propositions import PropositionsTerm
    from tests.trainer.loop.makers import context
    from tests.trainer.ppo.makers import FunctionTerm, reward_of
    from tests.trainer.rewards.makers import endpoint_of, serve

    endpoint = stack.enter_context(serve(judge_statement))
    statements = [
        {"name": "first", "text": "It begins with the last digit of the prompt.", "weight": 1},
        {"name": "last", "text": "It ends with the last digit of the prompt.", "weight": 1},
    ]
    values = {"endpoint": endpoint_of(endpoint.url), "propositions": statements}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    term = PropositionsTerm(PropositionReward.model_validate(values), "rules", context(folder))
    return reward_of(("model", FunctionTerm(sevens), 1.0), ("rules", term, 1.0))


def with_feedback(stack: ExitStack) -> Any:
    """The misleading model and a judge's mark."""
    from stagecoach_api.rewards import FeedbackReward
    from stagecoach_trainer.rewards.feedback import FeedbackTerm
    from stagecoach_trainer.runtime.context import World
    from tests.trainer.ppo.makers import FunctionTerm, reward_of
    from tests.trainer.rewards.makers import feedback_term, serve

    endpoint = stack.enter_context(serve(mark))
    config = FeedbackReward.model_validate(feedback_term(endpoint.url)["feedback"])
    term = FeedbackTerm(config, "feedback", World())
    return reward_of(("model", FunctionTerm(sevens), 1.0), ("feedback", term, 2.0))


def judge_statement(messages: Sequence[Mapping[str, str]]) -> str:
    """The words of the judge: yes where the statement is true."""
    prompt, answer, statement, *_ = messages[-1]["content"].split("\n")
    digit, said = _quoted(prompt)[-1], _quoted(answer)
    true = said.startswith(digit) if "begins" in statement else len(said) == 4 and said.endswith(digit)
    return "yes" if true else "no"


def mark(messages: Sequence[Mapping[str, str]]) -> str:
    """The words of the judge: 10 times the true reward."""
    from tests.trainer.ppo.makers import echoes

    answer, prompt = messages[-1]["content"].removeprefix("Mark ").split(" as an answer to ")
    return f"{10 * echoes(_quoted(prompt), _quoted(answer)):g}"


def _quoted(text: str) -> str:
    found: str = json.loads(text[text.index('"') : text.rindex('"') + 1])
    return found


# -- arms --------------------------------------------------------------------------------------------------------------

BASE = Arm("the settings above")
MISLED = Arm("misleading reward model", terms=misleading)
JUDGED = (
    Arm("misleading reward model + propositions", terms=with_rules),
    Arm("misleading reward model + AI feedback", terms=with_feedback),
)
SWITCHES = (
    BASE,
    Arm("no entropy bonus", {"policy": {"entropyWeight": 0.0}}),
    Arm("advantages as they are", {"policy": {"normalizeAdvantages": False}}),
    Arm("10 updates of critic warm-up", {"critic": {"warmupUpdates": 10}}),
    Arm("kl.coefficient 0.05", {"kl": {"coefficient": 0.05}}),
    Arm("kl.coefficient 0.5", {"kl": {"coefficient": 0.5}}),
    Arm("kl adaptive, target 2", {"kl": {"coefficient": 0.05, "target": 2.0, "horizon": 640}}),
    MISLED,
    *JUDGED,
)


def settings_of(arm: Arm, updates: int) -> dict[str, Any]:
    values = {name: dict(member) for name, member in SETTINGS.items()} | {"budget": {"steps": updates}}
    for name, change in arm.changes.items():
        values[name] = {**values.get(name, {}), **change}
    return values


def train(training: Training) -> Trained:
    """Train one arm with one seed, and ask it."""
    from stagecoach_trainer.ppo.loop import train_policy
    from tests.trainer.loop.makers import context
    from tests.trainer.ppo.makers import configuration, ppo_job

    began, seed = time.process_time(), training.seed
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job = ppo_job(configuration(**settings_of(training.arm, training.updates)), seed=seed)
        job = replace(job, rewards=(training.arm.terms or true_reward)(stack))
        points = train_policy(job, context(folder, seed=seed)).history
    found = Trained(
        greedy=true_reward_of(job, GREEDY, draws=1),
        sampled=true_reward_of(job, 1.0, DRAWS),
        kl=points[-1]["kl"],
        early=statistics.fmean(point["reward"] for point in points[: max(1, len(points) // 2)]),
        value_loss=statistics.fmean(point["valueLoss"] for point in points[:10]),
        seconds=time.process_time() - began,
    )
    said = f"{training.arm.name}, seed {seed}: {found.greedy:.3f}, sampled {found.sampled:.3f} ({found.seconds:.0f} s)"
    print(said, file=sys.stderr, flush=True)
    return found


def true_reward(stack: ExitStack) -> Any:
    from tests.trainer.ppo.makers import FunctionTerm, echoes, reward_of

    del stack
    return reward_of(("echo", FunctionTerm(echoes), 1.0))


def true_reward_of(job: Any, temperature: float, draws: int) -> float:
    """Return the mean true reward of `draws` answers to each prompt."""
    import torch

    from stagecoach_trainer.generation.sampling import Decoding, sample_answers, uniforms
    from tests.trainer.ppo.makers import END, digit_prompts, echoes

    prompts = [prompt for prompt in digit_prompts() for _ in range(draws)]
    decoding = Decoding(max_new_tokens=4, temperature=temperature, top_p=1.0, ends=(END,))
    numbers = [uniforms((0, number), 4) for number in range(len(prompts))]
    said = sample_answers(job.policy.eval(), [prompt.ids for prompt in prompts], numbers, decoding, torch.device("cpu"))
    texts = [job.tokenizer.decode(answer.ids.tolist(), skip_special_tokens=True) for answer in said]
    return statistics.fmean(
        echoes(str(prompt.messages[-1]["content"]), text) for prompt, text in zip(prompts, texts, strict=True)
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def figures() -> list[Figure]:
    """Measure all of it."""
    return figures_of(measure())


def measure(
    num_seeds: int = len(SEEDS), updates: int = UPDATES, few_updates: int = FEW_UPDATES, path: Path = RESULT
) -> Found:
    """Train every arm and write the result file; return what came of them, the long arm under `seeds`."""
    jobs = [Training(BASE, seed, updates) for seed in SEEDS[:num_seeds]]
    jobs += [Training(arm, seed, few_updates) for arm in SWITCHES for seed in FEW_SEEDS[:num_seeds]]
    results = side_by_side(train, jobs)
    found: dict[str, list[Trained]] = {"seeds": results[: len(SEEDS[:num_seeds])]}
    for job, result in zip(jobs[num_seeds:], results[num_seeds:], strict=True):
        found.setdefault(job.arm.name, []).append(result)
    write_result(path, {name: [asdict(one) for one in trained] for name, trained in found.items()})
    return found


def figures_of(found: Found) -> list[Figure]:
    """Return how many seeds find the optimum, and what a judge is worth where the reward model misleads."""
    ten, misled = found["seeds"], [one.greedy for one in found[MISLED.name]]
    reached = sum(one.greedy >= ENOUGH for one in ten)
    sampled = statistics.median(one.sampled for one in ten)
    name, unit = f"PPO on a toy, likeliest answers at {ENOUGH:.0%} of the optimum", f"seeds of {len(ten)}"
    judged = {arm.name: [one.greedy for one in found[arm.name]] for arm in JUDGED}
    return [
        Figure(name, unit, reached, None, None, str(REACHED), REACHED.met_by(reached)),
        Figure("PPO on a toy, answers at temperature 1", "true reward", sampled, None, None, "–", True),
        *(gain(f"PPO on a toy, {arm}", "true reward", ours, misled, EFFECT) for arm, ours in judged.items()),
    ]


# -- tables ------------------------------------------------------------------------------------------------------------


def seeds_table(trained: Sequence[Trained]) -> str:
    """Return the ten seeds as Markdown."""
    lines = ["| seed | likeliest answers | answers at temperature 1 | CPU seconds |", "|---:|---:|---:|---:|"]
    for seed, one in enumerate(trained):
        lines.append(f"| {seed} | {one.greedy:.3f} | {one.sampled:.3f} | {one.seconds:.0f} |")
    return "\n".join(lines)


def switches_table(found: Found) -> str:
    """Return the switches as Markdown: means over the seeds, and each seed's true reward."""
    lines = [
        "| arm | likeliest answers | each seed | at temperature 1 | KL per answer | reward, first half | value loss |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for arm in SWITCHES:
        trained = found[arm.name]
        each = ", ".join(f"{one.greedy:.2f}" for one in trained)
        greedy, *means = (statistics.fmean(getattr(one, name) for one in trained) for name in MEANS)
        lines.append(f"| {arm.name} | {greedy:.2f} | {each} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, and print the tables and the goals. The options are for trying it out."""
    from bench.__main__ import told

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--few-updates", type=int, default=FEW_UPDATES, help="with a switch turned")
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    found = measure(asked.seeds, asked.updates, asked.few_updates, asked.output)
    print(seeds_table(found["seeds"]), switches_table(found), sep="\n\n")
    return told(figures_of(found))


if __name__ == "__main__":
    sys.exit(main())
