"""The graph of a run: dependencies between stages, and an order in which they can run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches


class GraphError(ValueError):
    """The graph is invalid. `problems` has one sentence for each problem."""

    def __init__(self, problems: Collection[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def topological_order(upstream: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Return the names so that each comes after all those it needs; ties keep the order of `upstream`.

    Raises GraphError, with names that do not exist or with the stages of a cycle.
    """
    problems = dangling_references(upstream)
    if problems:
        raise GraphError(problems)
    order: dict[str, None] = {}
    remaining = list(upstream)
    while remaining:
        # Searched from the start each time, so that ties keep the order of `upstream`, that of the run's file. That is
        # quadratic, which the few stages of a run allow.
        ready = next((name for name in remaining if all(needed in order for needed in upstream[name])), None)
        if ready is None:
            raise GraphError([_cycle_message(find_cycle(remaining, upstream))])
        order[ready] = None
        remaining.remove(ready)
    return tuple(order)


def dangling_references(upstream: Mapping[str, Collection[str]]) -> list[str]:
    """Return one sentence for each input that refers to a stage that does not exist."""
    return [
        f"stage `{name}` needs stage `{needed}`, which does not exist; {_nearest(needed, upstream)}"
        for name, inputs in upstream.items()
        for needed in sorted(inputs)
        if needed not in upstream
    ]


def find_cycle(names: Collection[str], upstream: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Return a cycle among `names`, each of which needs another of them. Every name in it needs the next one."""
    # Every name has a successor among `names`, so this walk must meet a name for the second time.
    path = [next(iter(names))]
    while True:
        following = next(needed for needed in sorted(upstream[path[-1]]) if needed in names)
        if following in path:
            # Without the names that only led into the cycle.
            return tuple(path[path.index(following) :])
        path.append(following)


def ancestors(names: Collection[str], upstream: Mapping[str, Collection[str]]) -> frozenset[str]:
    """Return everything that `names` need, directly or indirectly; names themselves only if another one needs them."""
    reached: set[str] = set()
    queue = [needed for name in names for needed in upstream[name]]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue.extend(upstream[name])
    return frozenset(reached)


def nearest_name(name: str, allowed: Collection[str]) -> str | None:
    """Return the allowed name most similar to `name`. None if none is similar."""
    return next(iter(get_close_matches(name, list(allowed), n=1)), None)


def _nearest(name: str, allowed: Collection[str]) -> str:
    nearest = nearest_name(name, allowed)
    return f"did you mean `{nearest}`?" if nearest else f"there are {', '.join(f'`{item}`' for item in allowed)}"


def _cycle_message(cycle: tuple[str, ...]) -> str:
    if len(cycle) == 1:
        return f"stage `{cycle[0]}` needs itself; remove the input or the `after` that names it"
    arrows = " → ".join([*cycle, cycle[0]])
    return f"the stages form a cycle: {arrows} (each needs the next); remove one of these inputs"
