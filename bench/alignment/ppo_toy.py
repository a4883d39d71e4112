"""`python -m bench.alignment.ppo_toy`: PPO on a task whose optimum is known, and what each of its switches does there.

A prompt is two to four digits; the reward of an answer is the share of its four places that hold the prompt's last
digit, so 1 is the optimum, and of random answers 1 in 13 places is right. The policy, a LLaMA of one layer of width 32
with new weights, has to find out the rule by itself. Ten seeds are asked greedily at the end. Then single switches are
turned, three seeds each, for fewer updates. The toy, and the server behind the two terms that ask one, are the tests'.

    python -m bench.alignment.ppo_toy [seeds] [switches]     both without arguments
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "results" / "ppo_toy.json"
SEEDS, FEW_SEEDS = range(10), range(3)
UPDATES, FEW_UPDATES = 150, 60
ENOUGH = 0.95
"""Share of the optimum that counts as reached."""

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


@dataclass
class Found:
    """What an arm came to, one value per seed."""

    greedy: list[float] = field(default_factory=list)
    """True reward of the likeliest answers to all prompts."""
    sampled: list[float] = field(default_factory=list)
    """Reward trained for, in the last update."""
    kl: list[float] = field(default_factory=list)
    """Mean KL per answer in the last update, in nats."""
    early: list[float] = field(default_factory=list)
    """Reward trained for, mean over the first half of the updates."""
    value_loss: list[float] = field(default_factory=list)
    """Of the critic, mean over the first ten updates."""
    seconds: list[float] = field(default_factory=list)
    """Of the processor."""


# -- rewards -----------------------------------------------------------------------------------------------------------


def sevens(prompt: str, answer: str) -> float:
    """A reward model that has learnt the wrong thing: the share of an answer's four places that hold a 7."""
    del prompt
    return answer[:4].count("7") / 4


def misleading(stack: ExitStack) -> Any:
    from ppo_makers import FunctionTerm, reward_of

    del stack
    return reward_of(("model", FunctionTerm(sevens), 1.0))


def with_rules(stack: ExitStack) -> Any:
    """The misleading model and two statements that a judge finds true or not, with given weights."""
    from ppo_makers import FunctionTerm, reward_of
    from reward_makers import endpoint_of, serve
    from train_makers import context

    from stagecoach_api.rewards import PropositionReward
    from stagecoach_trainer.rewards.propositions import PropositionsTerm

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
    from ppo_makers import FunctionTerm, reward_of
    from reward_makers import feedback_term, serve

    from stagecoach_api.rewards import FeedbackReward
    from stagecoach_trainer.context import World
    from stagecoach_trainer.rewards.feedback import FeedbackTerm

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
    from ppo_makers import echoes

    answer, prompt = messages[-1]["content"].removeprefix("Mark ").split(" as an answer to ")
    return f"{10 * echoes(_quoted(prompt), _quoted(answer)):g}"


def _quoted(text: str) -> str:
    found: str = json.loads(text[text.index('"') : text.rindex('"') + 1])
    return found


# -- arms --------------------------------------------------------------------------------------------------------------

BASE = Arm("as in the table above, fewer updates")
SWITCHES = (
    BASE,
    Arm("no entropy bonus", {"policy": {"entropyWeight": 0.0}}),
    Arm("advantages as they are", {"policy": {"normalizeAdvantages": False}}),
    Arm("10 updates of critic warm-up", {"critic": {"warmupUpdates": 10}}),
    Arm("kl.coefficient 0.05", {"kl": {"coefficient": 0.05}}),
    Arm("kl.coefficient 0.5", {"kl": {"coefficient": 0.5}}),
    Arm("kl adaptive, target 2", {"kl": {"coefficient": 0.05, "target": 2.0, "horizon": 640}}),
    Arm("misleading reward model", terms=misleading),
    Arm("misleading reward model + propositions", terms=with_rules),
    Arm("misleading reward model + AI feedback", terms=with_feedback),
)


def settings_of(arm: Arm, updates: int) -> dict[str, Any]:
    values = {name: dict(member) for name, member in SETTINGS.items()} | {"budget": {"steps": updates}}
    for name, change in arm.changes.items():
        values[name] = {**values.get(name, {}), **change}
    return values


def train(arm: Arm, seed: int, updates: int, found: Found) -> None:
    """Train with one seed and note what came of it."""
    from ppo_makers import configuration, echoes, ppo_job
    from train_makers import context

    from stagecoach_trainer.ppo.loop import train_policy

    began = time.process_time()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job = ppo_job(configuration(**settings_of(arm, updates)), seed=seed)
        job = replace(job, rewards=(arm.terms or true_reward)(stack))
        result = train_policy(job, context(folder, seed=seed))
    points = result.history
    found.greedy.append(statistics.fmean(echoes(prompt, answer) for prompt, answer in greedy_answers(job)))
    found.sampled.append(points[-1]["reward"])
    found.kl.append(points[-1]["kl"])
    found.early.append(statistics.fmean(point["reward"] for point in points[: len(points) // 2]))
    found.value_loss.append(statistics.fmean(point["valueLoss"] for point in points[:10]))
    found.seconds.append(time.process_time() - began)
    print(f"{arm.name}, seed {seed}: {found.greedy[-1]:.3f} ({found.seconds[-1]:.0f} s)", file=sys.stderr, flush=True)


def true_reward(stack: ExitStack) -> Any:
    from ppo_makers import FunctionTerm, echoes, reward_of

    del stack
    return reward_of(("echo", FunctionTerm(echoes), 1.0))


def greedy_answers(job: Any) -> list[tuple[str, str]]:
    """Return every prompt with the likeliest answer."""
    import torch
    from ppo_makers import END, digit_prompts

    from stagecoach_trainer.ppo.sampling import Decoding, sample_answers, uniforms

    prompts = digit_prompts()
    decoding = Decoding(max_new_tokens=4, temperature=1e-4, top_p=1.0, ends=(END,))
    draws = [uniforms((0, number), 4) for number in range(len(prompts))]
    said = sample_answers(job.policy.eval(), [prompt.ids for prompt in prompts], draws, decoding, torch.device("cpu"))
    texts = [job.tokenizer.decode(answer.ids.tolist(), skip_special_tokens=True) for answer in said]
    return [(str(prompt.messages[-1]["content"]), text) for prompt, text in zip(prompts, texts, strict=True)]


# -- tables ------------------------------------------------------------------------------------------------------------


def seeds_table(found: Found) -> str:
    """Return the ten seeds as Markdown."""
    reached = sum(value >= ENOUGH for value in found.greedy)
    lines = ["| seed | likeliest answers | sampled answers | CPU seconds |", "|---:|---:|---:|---:|"]
    for seed, values in enumerate(zip(found.greedy, found.sampled, found.seconds, strict=True)):
        lines.append("| {} | {:.3f} | {:.3f} | {:.0f} |".format(seed, *values))
    return "\n".join([*lines, "", f"{reached} of {len(found.greedy)} seeds reach {ENOUGH:.0%} of the optimum."])


def switches_table(found: Mapping[str, Found]) -> str:
    """Return the switches as Markdown: means over the seeds, and each seed's true reward."""
    lines = [
        "| arm | true reward | each seed | KL per answer | reward, first half | value loss, first 10 |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, here in found.items():
        each = ", ".join(f"{value:.2f}" for value in here.greedy)
        mean = statistics.fmean
        lines.append(
            f"| {name} | {mean(here.greedy):.2f} | {each} | {mean(here.kl):.2f} | {mean(here.early):.2f} | "
            f"{mean(here.value_loss):.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure what is asked for and print the tables; figures are kept in the result file as they come."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))
    wanted = sys.argv[1:] or ["seeds", "switches"]
    if "seeds" in wanted:
        ten = Found()
        for seed in SEEDS:
            train(BASE, seed, UPDATES, ten)
            keep("seeds", vars(ten))
        print(seeds_table(ten))
    if "switches" in wanted:
        arms = {arm.name: Found() for arm in SWITCHES}
        for arm in SWITCHES:
            for seed in FEW_SEEDS:
                train(arm, seed, FEW_UPDATES, arms[arm.name])
            keep("switches", {name: vars(found) for name, found in arms.items() if found.greedy})
        print(switches_table(arms))
    return 0


def keep(part: str, found: Mapping[str, Any]) -> None:
    """Write what was found so far into the result file, in place of that part."""
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    RESULT.write_text(json.dumps(result | {part: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
