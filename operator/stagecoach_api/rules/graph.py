"""Rules over the graph that the stages make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from stagecoach_api.fields import FieldPath
from stagecoach_api.kinds import DataStage
from stagecoach_api.problems import suggest
from stagecoach_api.references import Split
from stagecoach_api.rules.draft import Draft, DraftStage, Fault, Link

MAX_CYCLES = 16
"""More are not reported at once."""

MODEL_KINDS = ("pretrain", "sft", "dpo", "ppo", "export")
INPUT_KINDS: dict[str, tuple[str, ...]] = {
    "model": MODEL_KINDS,
    "reference": MODEL_KINDS,
    "tokenizer": ("tokenizer", *MODEL_KINDS),
    "base": ("tokenizer", *MODEL_KINDS),
    "vocabulary": ("tokenizer",),
}
"""Kinds of stage that an input's field may name. Every other field reads records."""
RECORD_KINDS = ("data",)
JUDGES: dict[str, tuple[str, ...]] = {"rewards": ("rewardModel",), "critic": ("rewardModel", *MODEL_KINDS)}
"""Fields whose `model` judges: kinds of stage that it may name."""


def stage_names_are_unique(draft: Draft) -> Iterator[Fault]:
    first: dict[str, DraftStage] = {}
    for stage in draft.stages:
        if stage.name is None:
            continue
        if stage.name in first:
            index = first[stage.name].path[-1]
            yield Fault(
                (*stage.path, "name"),
                stage.name,
                f"must be unique, and spec.stages[{index}] has the same name",
                "rename one of the two",
            )
        first.setdefault(stage.name, stage)


def inputs_name_stages_of_the_run(draft: Draft) -> Iterator[Fault]:
    names = list(draft.by_name)
    for stage in draft.stages:
        for link in stage.links:
            if link.target not in names:
                others = [name for name in names if name != stage.name]
                yield Fault(
                    _path_of(link), link.target, "must be the name of a stage of this run", suggest(link.target, others)
                )


def no_stage_waits_for_itself(draft: Draft) -> Iterator[Fault]:
    for stage in draft.stages:
        for link in stage.links:
            if link.target == stage.name:
                yield Fault(
                    _path_of(link), link.target, "must not be the stage itself", "name another stage, or give a `uri`"
                )


def stages_make_no_cycle(draft: Draft) -> Iterator[Fault]:
    """Each circle is told where a stage needs one further down the file: that input is the likeliest mistake."""
    stages = draft.by_name
    order = {name: index for index, name in enumerate(stages)}
    graph = {
        name: {link.target for link in stage.links if link.target in stages and link.target != name}
        for name, stage in stages.items()
    }
    for _ in range(MAX_CYCLES):
        cycle = _find_cycle(graph, order)
        if cycle is None:
            return
        before, after = next((before, after) for before, after in pairwise(cycle) if order[before] > order[after])
        link = next(link for link in stages[after].links if link.target == before)
        shown = " -> ".join(cycle)
        yield Fault(
            _path_of(link),
            before,
            f"stages must not wait for each other in a circle: {shown}",
            "take one of these inputs out",
        )
        graph[after].discard(before)


def _find_cycle(graph: Mapping[str, set[str]], order: Mapping[str, int]) -> list[str] | None:
    """Return stages in the order they would run, the first one again at the end, begun at the first of the file."""
    try:
        TopologicalSorter({name: sorted(before) for name, before in graph.items()}).prepare()
    except CycleError as error:
        circle = list(error.args[1][:-1])
        start = circle.index(min(circle, key=lambda name: order[name]))
        circle = circle[start:] + circle[:start]
        return [*circle, circle[0]]
    return None


def inputs_are_of_the_right_kind(draft: Draft) -> Iterator[Fault]:
    stages = draft.by_name
    for stage in draft.stages:
        for link in stage.links:
            target = stages.get(link.target)
            allowed = _kinds_allowed(link)
            if link.is_input and target is not None and target.kind is not None and target.kind not in allowed:
                fitting = [name for name, other in stages.items() if other.kind in allowed and name != stage.name]
                yield Fault(
                    _path_of(link),
                    link.target,
                    f"must be a stage of kind {' or '.join(allowed)}, and `{link.target}` is a {target.kind} stage",
                    f"name one of {', '.join(fitting)}" if fitting else "add such a stage, or give a `uri`",
                )


def _kinds_allowed(link: Link) -> tuple[str, ...]:
    above = [step for step in link.path if isinstance(step, str)][-2]
    if link.field == "model" and above in JUDGES:
        return JUDGES[above]
    return INPUT_KINDS.get(link.field, RECORD_KINDS)


def parts_that_are_read_have_records(draft: Draft) -> Iterator[Fault]:
    """A data stage that keeps nothing apart has no held-out part; one that keeps all has no training part."""
    stages = draft.by_name
    for stage in draft.stages:
        for link in stage.links:
            source = stages[link.target].config if link.target in stages else None
            if not link.is_input or link.field in INPUT_KINDS or not isinstance(source, DataStage):
                continue
            split = _raw_at(stage, link).get("split", Split.TRAIN)
            if split == Split.HELD_OUT and source.held_out_share == 0.0:
                yield Fault(
                    (*link.path, "split"),
                    split,
                    f"`{link.target}` keeps no records apart",
                    f"give `{link.target}` a `heldOutShare` above 0, or read its `train` part",
                )
            if split == Split.TRAIN and source.held_out_share == 1.0:
                yield Fault(
                    (*link.path, "split"),
                    split,
                    f"`{link.target}` keeps all records apart",
                    f"give `{link.target}` a `heldOutShare` below 1, or read its `heldout` part",
                )


def _raw_at(stage: DraftStage, link: Link) -> dict[str, object]:
    value: object = stage.raw
    for step in link.path[len(stage.path) :]:
        value = value[step]  # type: ignore[index]  # the link was found there
    return dict(value)  # type: ignore[call-overload, no-any-return]


def _path_of(link: Link) -> FieldPath:
    return (*link.path, "stage") if link.is_input else link.path


GRAPH_RULES = (
    stage_names_are_unique,
    inputs_name_stages_of_the_run,
    no_stage_waits_for_itself,
    stages_make_no_cycle,
    inputs_are_of_the_right_kind,
    parts_that_are_read_have_records,
)
