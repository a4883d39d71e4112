"""Rules over the graph of stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from stagecoach_api.draft import Draft, DraftStage, Fault, Rule
from stagecoach_api.fields import format_path
from stagecoach_api.problems import suggest

MAX_CYCLES = 16
"""Further cycles are not reported at once."""


def stage_names_are_unique(draft: Draft) -> Iterator[Fault]:
    first: dict[str, DraftStage] = {}
    for stage in draft.stages:
        if stage.name is None:
            continue
        if stage.name in first:
            before = format_path(first[stage.name].path)
            yield Fault(
                (*stage.path, "name"),
                stage.name,
                f"must be unique, and {before} has the same name",
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
                    link.stage_path,
                    link.target,
                    "must be the name of a stage of this run",
                    suggest(link.target, others),
                )


def no_stage_depends_on_itself(draft: Draft) -> Iterator[Fault]:
    for stage in draft.stages:
        for link in stage.links:
            if link.target == stage.name:
                yield Fault(
                    link.stage_path, link.target, "must not be the stage itself", "name another stage, or give a `uri`"
                )


def stages_form_no_cycle(draft: Draft) -> Iterator[Fault]:
    """Each cycle is reported where a stage needs one further down the file: that input is the likeliest mistake."""
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
            link.stage_path,
            before,
            f"stages must not depend on each other in a cycle: {shown}",
            "remove one of these inputs",
        )
        graph[after].discard(before)


def _find_cycle(graph: Mapping[str, set[str]], order: Mapping[str, int]) -> list[str] | None:
    """Return the stages of a cycle in the order they would run; the first in the file is both first and last."""
    try:
        TopologicalSorter({name: sorted(before) for name, before in graph.items()}).prepare()
    except CycleError as error:
        cycle = list(error.args[1][:-1])
        start = cycle.index(min(cycle, key=lambda name: order[name]))
        cycle = cycle[start:] + cycle[:start]
        return [*cycle, cycle[0]]
    return None


def inputs_are_of_the_right_kind(draft: Draft) -> Iterator[Fault]:
    stages = draft.by_name
    for stage in draft.stages:
        for link in stage.links:
            target = stages.get(link.target)
            if not link.is_input or target is None or target.makes is None or target.makes in link.reads:
                continue
            kinds = [kind for artifact, makers in draft.makers.items() if artifact in link.reads for kind in makers]
            fitting = [name for name, other in stages.items() if other.makes in link.reads and name != stage.name]
            yield Fault(
                link.stage_path,
                link.target,
                f"must be a stage of kind {' or '.join(kinds)}, and `{link.target}` is a {target.kind} stage",
                f"name one of {', '.join(fitting)}" if fitting else "add such a stage, or give a `uri`",
            )


GRAPH_RULES: tuple[Rule, ...] = (
    stage_names_are_unique,
    inputs_name_stages_of_the_run,
    no_stage_depends_on_itself,
    stages_form_no_cycle,
    inputs_are_of_the_right_kind,
)
