"""`python -m bench.alignment.ppo_toy`: PPO on a task whose optimum is known, and the effect of its settings there.

A prompt is two to four digits; the reward of an answer is the share of its first four tokens that are the prompt's last
digit, so the optimum is 1, and 1 in 13 tokens of a random answer is right. The policy, a LLaMA of one layer of width 32
with random weights, must discover the rule. At the end it answers the prompts it was trained on: once with its
likeliest answer, and several times at temperature 1, as in training. Ten seeds; then single settings are changed, with
three seeds each and fewer updates. The task, and the server that the two judging terms call, come from the tests.
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
"""Share of the optimum from which it counts as reached."""
DRAWS = 8
"""Number of answers to each prompt at temperature 1."""
GREEDY = 1e-4
"""A temperature at which the likeliest answer is almost certain."""
REACHED = Goal("≥", 9)
"""Seeds, of ten, that must reach the optimum."""
MEANS = ("greedy", "sampled", "kl", "early", "value_loss")
"""Columns of the table of settings, the likeliest answers first."""
EFFECT = Goal("≥", 0.3)
"""True reward that a correct judge must add to a misleading reward model."""

SETTINGS: dict[str, Any] = {
    "batch": {"samples": 64, "microBatchRows": 64},
    "rollout": {"maxNewTokens": 4, "batchRows": 64},
    "policy": {"innerEpochs": 4, "miniBatchSamples": 32, "entropyWeight": 0.1, "gaeLambda": 1.0},
    "critic": {"clip": None},
    "optimizer": {"learningRate": 3e-3, "clip": 1.0},
    "schedule": {"name": "linear"},
    # At the optimum a policy ends no answer, repeats one digit and gets equal rewards: no guard may stop it there.
    "guards": {"minEndedShare": None, "minEntropy": None, "minRewardDeviation": None},
    "checkpoints": {"everySteps": 10**6},
}

Terms = Callable[[ExitStack], Any]
"""Makes the reward; the stack closes what it opens."""


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes to `SETTINGS`, member by member."""
    terms: Terms | None = None
    """The reward; the true one if None."""


@dataclass(frozen=True)
class Training:
    """One arm with one seed."""

    arm: Arm
    seed: int
    updates: int


@dataclass(frozen=True)
class ArmResult:
    """The measurements of one arm with one seed."""

    greedy: float
    """True reward of the likeliest answers to the training prompts."""
    sampled: float
    """True reward of answers to them at temperature 1."""
    kl: float
    """Mean KL per answer in the last update, in nats."""
    early: float
    """Reward used for training, mean over the first half of the updates."""
    value_loss: float
    """The critic's loss, mean over the first ten updates."""
    seconds: float
    """CPU time."""


Found = Mapping[str, Sequence[ArmResult]]
"""The results of every arm, one for each seed in order."""


# -- rewards -----------------------------------------------------------------------------------------------------------


def sevens(prompt: str, answer: str) -> float:
    """A reward model that learned the wrong rule: the share of an answer's first four tokens that are a 7."""
    del prompt
    return answer[:4].count("7") / 4


def misleading(stack: ExitStack) -> Any:
    from tests.trainer.ppo.makers import FunctionTerm, reward_of

    del stack
    return reward_of(("model", FunctionTerm(sevens), 1.0))


def with_rules(stack: ExitStack) -> Any:
    """The misleading model and two propositions that a judge evaluates, with given weights."""
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
    """The misleading model and a judge's score."""
    from stagecoach_api.rewards import FeedbackReward
    from stagecoach_trainer.rewards.feedback import FeedbackTerm
    from stagecoach_trainer.runtime.context import World
    from tests.trainer.ppo.makers import FunctionTerm, reward_of
    from tests.trainer.rewards.makers import feedback_term, serve

    endpoint = stack.enter_context(serve(rating))
    config = FeedbackReward.model_validate(feedback_term(endpoint.url)["feedback"])
    term = FeedbackTerm(config, "feedback", World())
    return reward_of(("model", FunctionTerm(sevens), 1.0), ("feedback", term, 2.0))


def judge_statement(messages: Sequence[Mapping[str, str]]) -> str:
    """The judge's reply: yes if the statement is true."""
    prompt, answer, statement, *_ = messages[-1]["content"].split("\n")
    digit, text = _quoted(prompt)[-1], _quoted(answer)
    true = text.startswith(digit) if "begins" in statement else len(text) == 4 and text.endswith(digit)
    return "yes" if true else "no"


def rating(messages: Sequence[Mapping[str, str]]) -> str:
    """The judge's reply: 10 times the true reward."""
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
VARIANTS = (
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


def train(training: Training) -> ArmResult:
    """Train and evaluate one arm with one seed."""
    from stagecoach_trainer.ppo.loop import train_policy
    from tests.trainer.loop.makers import context
    from tests.trainer.ppo.makers import configuration, ppo_job

    started, seed = time.process_time(), training.seed
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job = ppo_job(configuration(**settings_of(training.arm, training.updates)), seed=seed)
        job = replace(job, rewards=(training.arm.terms or true_reward)(stack))
        points = train_policy(job, context(folder, seed=seed)).history
    found = ArmResult(
        greedy=true_reward_of(job, GREEDY, draws=1),
        sampled=true_reward_of(job, 1.0, DRAWS),
        kl=points[-1]["kl"],
        early=statistics.fmean(point["reward"] for point in points[: max(1, len(points) // 2)]),
        value_loss=statistics.fmean(point["valueLoss"] for point in points[:10]),
        seconds=time.process_time() - started,
    )
    line = f"{training.arm.name}, seed {seed}: {found.greedy:.3f}, sampled {found.sampled:.3f} ({found.seconds:.0f} s)"
    print(line, file=sys.stderr, flush=True)
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
    answers = sample_answers(
        job.policy.eval(), [prompt.ids for prompt in prompts], numbers, decoding, torch.device("cpu")
    )
    texts = [job.tokenizer.decode(answer.ids.tolist(), skip_special_tokens=True) for answer in answers]
    return statistics.fmean(
        echoes(str(prompt.messages[-1]["content"]), text) for prompt, text in zip(prompts, texts, strict=True)
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def figures() -> list[Figure]:
    """Measure every arm."""
    return figures_of(measure())


def measure(
    num_seeds: int = len(SEEDS), updates: int = UPDATES, few_updates: int = FEW_UPDATES, path: Path = RESULT
) -> Found:
    """Train every arm, write the result file and return the results, the ten long runs under `seeds`."""
    jobs = [Training(BASE, seed, updates) for seed in SEEDS[:num_seeds]]
    jobs += [Training(arm, seed, few_updates) for arm in VARIANTS for seed in FEW_SEEDS[:num_seeds]]
    results = side_by_side(train, jobs)
    found: dict[str, list[ArmResult]] = {"seeds": results[: len(SEEDS[:num_seeds])]}
    for job, result in zip(jobs[num_seeds:], results[num_seeds:], strict=True):
        found.setdefault(job.arm.name, []).append(result)
    write_result(path, {name: [asdict(one) for one in trained] for name, trained in found.items()})
    return found


def figures_of(found: Found) -> list[Figure]:
    """Return how many seeds reach the optimum, and the gain of a judge over a misleading reward model."""
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


def seeds_table(trained: Sequence[ArmResult]) -> str:
    """Return a Markdown table of the ten seeds."""
    lines = ["| seed | likeliest answers | answers at temperature 1 | CPU seconds |", "|---:|---:|---:|---:|"]
    for seed, one in enumerate(trained):
        lines.append(f"| {seed} | {one.greedy:.3f} | {one.sampled:.3f} | {one.seconds:.0f} |")
    return "\n".join(lines)


def variants_table(found: Found) -> str:
    """Return a Markdown table of the settings: means over the seeds, and each seed's true reward."""
    lines = [
        "| arm | likeliest answers | each seed | at temperature 1 | KL per answer | reward, first half | value loss |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for arm in VARIANTS:
        trained = found[arm.name]
        each = ", ".join(f"{one.greedy:.2f}" for one in trained)
        greedy, *means = (statistics.fmean(getattr(one, name) for one in trained) for name in MEANS)
        lines.append(f"| {arm.name} | {greedy:.2f} | {each} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, then print the tables and the goals. The options make shorter trials possible."""
    from bench.__main__ import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--few-updates", type=int, default=FEW_UPDATES, help="updates of each variant")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    found = measure(options.seeds, options.updates, options.few_updates, options.output)
    print(seeds_table(found["seeds"]), variants_table(found), sep="\n\n")
    return report(figures_of(found))


if __name__ == "__main__":
    sys.exit(main())
