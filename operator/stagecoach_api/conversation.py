"""Conversations as text: templates, roles, and which tokens carry loss. Shared by the kinds that train or measure."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import LongText, Model
from stagecoach_api.constraints import Constraint, equals, given, same


class TemplateName(StrEnum):
    """Templates that turn a conversation into text."""

    ALPACA = "alpaca"
    ALPACA_WITH_INPUT = "alpacaWithInput"
    VICUNA = "vicuna"
    CHATML = "chatml"
    HUMAN_BOT = "humanBot"
    CUSTOM = "custom"


class Template(Model):
    """How a conversation becomes text, in training and in the exported tokenizer's chat template alike."""

    constraints = (
        Constraint(
            same(equals("name", "custom"), given("jinja")),
            "`jinja` belongs to `name: custom`, and only to it",
            "give both or neither",
        ),
    )

    name: TemplateName
    """`alpaca` joins instruction and input by a newline (as Chinese-Alpaca does); `alpacaWithInput` gives the input a
    section of its own; `vicuna`; `chatml` with tool and environment roles; `humanBot` is Ziya's `<human>:`/`<bot>:`;
    `custom` takes `jinja`."""

    jinja: LongText | None = None
    """`custom` only: a Jinja chat template as transformers has them, with `messages`, `add_generation_prompt`,
    `bos_token`, `eos_token`, `tools`. It must render the conversation so far as a prefix of the whole. If unset: a
    named template."""

    system: LongText | None = None
    """System prompt put in front of conversations that have none. If unset: the template's own, if it has one."""


class Role(StrEnum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL_CALL = "toolCall"
    ENVIRONMENT = "environment"


class Turns(StrEnum):
    """Turns of a trained role that carry loss."""

    ALL = "all"
    LAST = "last"


class Loss(Model):
    """Which tokens carry loss."""

    roles: Annotated[tuple[Role, ...], Field(min_length=1, max_length=8)] = (Role.ASSISTANT, Role.TOOL_CALL)
    """Roles whose words the model must say. Default: assistant and toolCall."""

    turns: Turns = Turns.ALL
    """`all` turns of these roles, or only the `last` one of a conversation. Default: all."""


class TooLong(StrEnum):
    """What happens to a conversation longer than `sequenceLength`."""

    SPLIT = "split"
    DROP = "drop"
    CUT = "cut"
    FAIL = "fail"
