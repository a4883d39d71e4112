"""Names under which a source writes what every layout has: system prompt, tools, earlier turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping
from stagecoach_trainer.data.contract import Content, Contract
from stagecoach_trainer.data.records import RecordError, Turn
from stagecoach_trainer.data.turns import TurnKeys, describe, optional_string_of, string_of, tools_of

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
TOOL_FIELDS = ("tools", "functions")


@dataclass(frozen=True, slots=True)
class Names:
    """Names of fields that differ from a layout's own, and those with which turns are written."""

    fields: FieldMapping
    turns: TurnKeys | None = None
    """None for the layout's own, or as detected."""

    @property
    def always_read(self) -> frozenset[str]:
        """Fields that every conversation is read from."""
        fields = self.fields
        system = (fields.system,) if fields.system else SYSTEM_FIELDS
        return frozenset((*system, *((fields.tools,) if fields.tools else TOOL_FIELDS)))

    def contract(self, content: Content, *reads: str) -> Contract:
        """Return the contract of a layout that reads these fields, and what every conversation is read from."""
        always = frozenset[str]() if content is Content.TEXT else self.always_read
        return Contract(content, always | frozenset(reads), frozenset(self.fields.ignore))

    def system(self, value: Mapping[str, Any]) -> tuple[Turn, ...]:
        """Return the system prompt as a turn, if there is one. Raises RecordError if two fields differ."""
        names = (self.fields.system,) if self.fields.system else SYSTEM_FIELDS
        found = {name: text for name in names if (text := optional_string_of(value, name))}
        if len(set(found.values())) > 1:
            fields = ", ".join(f"`{name}`" for name in found)
            raise RecordError(f"{fields} differ; name the one to use in `fields.system`")
        return tuple(Turn(Role.SYSTEM, text) for text in list(found.values())[:1])

    def tools(self, value: Mapping[str, Any]) -> str | None:
        """Return the tools as JSON, if there are any. Raises RecordError."""
        return tools_of({"tools": value.get(self.fields.tools)} if self.fields.tools else value)

    def history(self, value: Mapping[str, Any]) -> list[Turn]:
        """Return the earlier turns of an Alpaca record, pairs of question and answer. Raises RecordError."""
        name = self.fields.history or "history"
        pairs = value.get(name)
        if isinstance(pairs, str) and pairs.strip():  # in a table, a list is written as JSON
            try:
                pairs = json.loads(pairs)
            except ValueError as error:
                raise RecordError(f"`{name}` is not JSON: {error}") from error
        if pairs is None or pairs in ("", []):
            return []
        if not isinstance(pairs, list):
            raise RecordError(f"`{name}` must be a list of pairs of question and answer, got {describe(value, name)}")
        turns: list[Turn] = []
        for index, pair in enumerate(pairs):
            if not isinstance(pair, list) or len(pair) != 2:
                raise RecordError(f"`{name}[{index}]` must be a question and its answer, got {pair!r:.60}")
            where = f"{name}[{index}]"
            question, answer = (string_of({where: text}, where) for text in pair)
            turns += [Turn(Role.USER, question), Turn(Role.ASSISTANT, answer)]
        return turns
