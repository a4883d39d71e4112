"""The subset of YAML that run files may use: plain values, each with its line.

Rejected, because the API server would read something else or because a small file could expand to a huge value:
aliases and anchors, tags, duplicate keys, several documents, more than `MAX_DEPTH` levels, `MAX_NODES` values or
`MAX_BYTES` bytes, and values such as `yes` that are text to YAML 1.2 and true to kubectl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from stagecoach_api.fields import FieldPath, format_path
from stagecoach_api.problems import MISSING, InvalidRun, Problem

MAX_BYTES = 1_000_000
"""An object in etcd may have 1.5 MB and is stored as JSON."""
MAX_DEPTH = 32
MAX_NODES = 50_000
"""The largest runs have some thousands; reading this many takes seconds."""
MAX_DIGITS = 40


@dataclass(frozen=True)
class Read:
    """A document and the lines of its parts."""

    value: Any
    lines: Mapping[FieldPath, int]
    """Line, from 1, of every field's name and every list item."""

    problems: tuple[tuple[FieldPath, Problem], ...]
    """Problems that do not prevent reading the document."""


@dataclass
class _State:
    source: str
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: list[tuple[FieldPath, Problem]] = field(default_factory=list)

    def reject(self, path: FieldPath, node_or_mark: Any, value: Any, rule: str, remedy: str) -> None:
        mark = getattr(node_or_mark, "start_mark", node_or_mark)
        problem = Problem(format_path(path), value, rule, remedy, mark.line + 1, self.source)
        self.problems.append((path, problem))


def read_yaml(text: str, source: str = "") -> Read:
    """Read one YAML document. `source` names the file in problems.

    Raises `InvalidRun` if there is no document at all; other problems are in the result's `problems`.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise InvalidRun([_whole(source, f"must have at most {MAX_BYTES:,} bytes, and has {size:,}", "split the run")])
    state = _State(source)
    node = _compose(text, state)
    if node is None:
        rejected = [problem for _, problem in state.problems]
        raise InvalidRun(rejected or [_whole(source, "is empty", "write a TrainingRun")])
    state.lines[()] = node.start_mark.line + 1
    value = _build(node, (), state)
    return Read(value, state.lines, tuple(state.problems))


def _whole(source: str, rule: str, remedy: str) -> Problem:
    return Problem("", MISSING, rule, remedy, None, source)


# -- from text to nodes ------------------------------------------------------------------------------------------------


class _Composer(yaml.SafeLoader):
    """Makes nodes, with every plain scalar untyped, and rejects aliases and deep nesting before they cost anything."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # as the base class has it
    depth = 0
    num_nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it untyped
        if isinstance(event, yaml.AliasEvent):
            raise _Rejected(event.start_mark, f"*{event.anchor}", "aliases are not supported", "write the value out")
        if getattr(event, "anchor", None) is not None:
            raise _Rejected(event.start_mark, f"&{event.anchor}", "anchors are not supported", "remove it")
        if getattr(event, "tag", None) is not None:
            raise _Rejected(event.start_mark, event.tag, "tags are not supported", "remove it")
        if self.depth >= MAX_DEPTH:
            raise _Rejected(event.start_mark, MISSING, f"must have at most {MAX_DEPTH} levels", "flatten it")
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _Rejected(event.start_mark, MISSING, f"must have at most {MAX_NODES:,} values", "split the run")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Rejected(yaml.YAMLError):
    def __init__(self, mark: Any, value: Any, rule: str, remedy: str) -> None:
        self.mark, self.value, self.rule, self.remedy = mark, value, rule, remedy
        super().__init__(rule)


def _compose(text: str, state: _State) -> Node | None:
    """Return the root node; None if there is none or it is rejected."""
    try:
        loader = _Composer(text)
    except yaml.YAMLError as error:
        raise InvalidRun(
            [_whole(state.source, f"contains characters that YAML does not allow: {error}", "remove it")]
        ) from None
    try:
        return loader.get_single_node()
    except _Rejected as error:
        state.reject((), error.mark, error.value, error.rule, error.remedy)
    except yaml.composer.ComposerError as error:
        state.reject((), error.problem_mark, MISSING, "must be one document", "keep one TrainingRun in a file")
    except yaml.MarkedYAMLError as error:
        rule = f"is not valid YAML: {error.problem}" + (f", {error.context}" if error.context else "")
        state.reject((), error.problem_mark or error.context_mark, MISSING, rule, "correct the line or the one above")
    except yaml.YAMLError as error:
        raise InvalidRun(
            [_whole(state.source, f"contains characters that YAML does not allow: {error}", "remove it")]
        ) from None
    finally:
        loader.dispose()
    return None


# -- from nodes to values ----------------------------------------------------------------------------------------------


def _build(node: Node, path: FieldPath, state: _State) -> Any:
    if isinstance(node, MappingNode):
        return _build_mapping(node, path, state)
    if isinstance(node, SequenceNode):
        return _build_list(node, path, state)
    return _build_scalar(node, path, state) if isinstance(node, ScalarNode) else None


def _build_mapping(node: MappingNode, path: FieldPath, state: _State) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            state.reject(path, key_node, MISSING, "a field name must be text", "write `name: value`")
            continue
        key = key_node.value
        place = (*path, key)
        if key in found:
            rule = f"is given twice, first on line {state.lines[place]}"
            state.reject(place, key_node, MISSING, rule, "remove one of the two")
            continue
        if key == "<<" and key_node.style is None:
            state.reject(place, key_node, MISSING, "merge keys are not supported", "write the fields out")
            continue
        state.lines[place] = key_node.start_mark.line + 1
        found[key] = _build(value_node, place, state)
    return found


def _build_list(node: SequenceNode, path: FieldPath, state: _State) -> list[Any]:
    found = []
    for index, item in enumerate(node.value):
        place = (*path, index)
        state.lines[place] = item.start_mark.line + 1
        found.append(_build(item, place, state))
    return found


def _build_scalar(node: ScalarNode, path: FieldPath, state: _State) -> Any:
    if node.style is not None:  # quoted, or a block
        return node.value
    try:
        return parse_scalar(node.value)
    except ValueError as error:
        rule, _, remedy = str(error).partition("; ")
        state.reject(path, node, node.value, rule, remedy)
        return None


_WORDS: dict[str, Any] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
    **dict.fromkeys([".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"], float("inf")),
    **dict.fromkeys(["-.inf", "-.Inf", "-.INF"], float("-inf")),
}
_KUBECTL_BOOLEANS = frozenset({"y", "yes", "on", "n", "no", "off"})
_OCTAL = re.compile(r"^[-+]?0[0-9_]+$")
_DECIMAL = re.compile(r"^[-+]?[0-9][0-9_]*$")
_HEX = re.compile(r"^[-+]?0x[0-9a-fA-F_]+$")
_FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$")
_LARGEST_EXACT_FLOAT = 2.0**53


def parse_scalar(text: str) -> Any:
    """Return the value of a plain scalar, as kubectl and YAML 1.2 both read it; `2e-5` is a float, `1e9` an integer.

    Raises ValueError("rule; remedy") if the two would differ.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text.lower() in _KUBECTL_BOOLEANS:
        raise ValueError(f"`{text}` is text to YAML and a boolean to kubectl; write true or false, or put it in quotes")
    if _OCTAL.match(text):
        raise ValueError("a number with a leading 0 is octal to kubectl; drop the 0, or put it in quotes")
    return text if len(text) > MAX_DIGITS else _parse_number(text)


def _parse_number(text: str) -> Any:
    digits = text.replace("_", "")
    if _DECIMAL.match(text):
        return int(digits)
    if _HEX.match(text):
        return int(digits, 16)
    if _FLOAT.match(text):
        number = float(digits)
        return int(number) if number.is_integer() and abs(number) < _LARGEST_EXACT_FLOAT else number
    return text
