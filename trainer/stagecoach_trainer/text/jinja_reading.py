"""What a chat template reads, from its syntax tree."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def reads_field(template: str, name: str) -> bool:
    """Return whether a Jinja template reads the field `name` of anything: `x.name`, `x['name']` or `x.get('name')`.

    False for a template that does not parse; rendering it raises the error.
    """
    from jinja2 import TemplateSyntaxError, nodes

    try:
        tree = _environment().parse(template)
    except TemplateSyntaxError:
        return False
    attributes = any(node.attr == name for node in tree.find_all(nodes.Getattr))
    items = (node.arg for node in tree.find_all(nodes.Getitem))
    arguments = (
        node.args[0]
        for node in tree.find_all(nodes.Call)
        if node.args and isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
    )
    constants = (node for node in (*items, *arguments) if isinstance(node, nodes.Const))
    return attributes or any(node.value == name for node in constants)


@cache
def _environment() -> Any:
    """Return an environment that parses what transformers' does: loop controls, and blocks of generated text."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GeneratedText(Extension):
        tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 gives it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return ImmutableSandboxedEnvironment(extensions=[GeneratedText, loopcontrols])
