"""The graph of a run: which stage needs which, in what order they can be worked on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches


class GraphError(ValueError):
    """A graph that cannot be worked on; `problems` names every fault."""

    def __init__(self, problems: Collection[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def topological_order(upstream: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Return the names so that each stands behind all it needs; ties keep the order of `upstream`.

    Raises GraphError for a name that does not exist, and for a cycle, which is named.
    """
    problems = dangling(upstream)
    if problems:
        raise GraphError(problems)
    order: dict[str, None] = {}
    remaining = list(upstream)
    while remaining:
        ready = next((name for name in remaining if all(needed in order for needed in upstream[name])), None)
        if ready is None:
            raise GraphError([_cycle_message(find_cycle(remaining, upstream))])
        order[ready] = None
        remaining.remove(ready)
    return tuple(order)


def dangling(upstream: Mapping[str, Collection[str]]) -> list[str]:
    """Return one sentence for every input that names no stage."""
    return [
        f"stage `{name}` needs stage `{needed}`, which does not exist; {_nearest(needed, upstream)}"
        for name, inputs in upstream.items()
        for needed in sorted(inputs)
        if needed not in upstream
    ]


def find_cycle(names: Collection[str], upstream: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Return a cycle among `names`, each of which needs another of them: every name needs the one behind it."""
    path = [next(iter(names))]
    while True:
        following = next(needed for needed in sorted(upstream[path[-1]]) if needed in names)
        if following in path:
            return tuple(path[path.index(following) :])
        path.append(following)


def ancestors(names: Collection[str], upstream: Mapping[str, Collection[str]]) -> frozenset[str]:
    """Return everything that `names` need, directly or not, without `names` themselves unless they need each other."""
    found: set[str] = set()
    queue = [needed for name in names for needed in upstream[name]]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue.extend(upstream[name])
    return frozenset(found)


def nearest_name(name: str, allowed: Collection[str]) -> str | None:
    """Return the allowed name most like `name`. None: none is like it."""
    return next(iter(get_close_matches(name, list(allowed), n=1)), None)


def _nearest(name: str, allowed: Collection[str]) -> str:
    nearest = nearest_name(name, allowed)
    return f"did you mean `{nearest}`?" if nearest else f"there are {', '.join(f'`{item}`' for item in allowed)}"


def _cycle_message(cycle: tuple[str, ...]) -> str:
    if len(cycle) == 1:
        return f"stage `{cycle[0]}` needs itself; remove the input or the `after` that names it"
    arrows = " → ".join([*cycle, cycle[0]])
    return f"the stages need each other in a circle: {arrows} (each needs the next); remove one of these inputs"
