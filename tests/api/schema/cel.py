"""An independent evaluator of the small part of CEL that the CRD's rules use, on documents as they are written."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.Mod: operator.mod,
}


def holds(rule: str, value: Mapping[str, Any]) -> bool:
    """Evaluate a rule on `self`. Raises KeyError where the API server would report a missing key."""
    text = re.sub(r"!(has\([^()]*\))", r"(not \1)", rule).replace("||", " or ").replace("&&", " and ")
    return bool(_evaluate(ast.parse(text.strip(), mode="eval").body, {"self": value}))


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:  # noqa: PLR0911, PLR0912  # one line per kind of node
    match node:
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(_evaluate(part, names) for part in parts)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_evaluate(part, names) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _evaluate(part, names)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return OPERATORS[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.Call(func=ast.Name(id="has"), args=[ast.Attribute(value=owner, attr=name)]):
            return _evaluate(owner, names).get(name) is not None
        case ast.Call(func=ast.Attribute(value=ast.List(elts=parts), attr="exists_one")):
            return sum(bool(_evaluate(part, names)) for part in parts) == 1
        case ast.Call(func=ast.Attribute(value=items, attr="all"), args=[ast.Name(id=item), condition]):
            return all(_evaluate(condition, {**names, item: value}) for value in _evaluate(items, names))
        case ast.Call(func=ast.Attribute(value=items, attr="exists_one"), args=[ast.Name(id=item), condition]):
            found = [_evaluate(condition, {**names, item: value}) for value in _evaluate(items, names)]
            return sum(map(bool, found)) == 1
        case ast.Attribute(value=owner, attr=name):
            return _evaluate(owner, names)[name]
        case ast.Name(id="true" | "false" as literal):
            return literal == "true"
        case ast.Name(id=name):
            return names[name]
        case ast.Constant(value=str() | int() as value) if not isinstance(value, bool):  # `True` is Python, not CEL
            return value
    raise AssertionError(f"not in the part of CEL that is understood: {ast.dump(node)}")
