"""Conversations as text: templates, roles, and which tokens carry loss. Shared by the kinds that train or measure."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import LongText, Model
from stagecoach_api.constraints import Constraint, equals, given, same


class TemplateName(StrEnum):
    """Templates that render a conversation as text."""

    ALPACA = "alpaca"
    ALPACA_WITH_INPUT = "alpacaWithInput"
    VICUNA = "vicuna"
    CHATML = "chatml"
    HUMAN_BOT = "humanBot"
    MODEL = "model"
    CUSTOM = "custom"


class Template(Model):
    """How conversations are rendered as text, in training and in the chat template of the exported tokenizer."""

    constraints = (
        Constraint(
            same(equals("name", "custom"), given("jinja")),
            "`jinja` belongs to `name: custom`, and only to it",
            "give both or neither",
        ),
    )

    name: TemplateName
    """Template. `alpaca` joins instruction and input with a newline (as in Chinese-Alpaca). `alpacaWithInput` has a
    separate section for the input. `chatml` has tools, their calls and results, and reasoning. `humanBot` is Ziya's
    `<human>:` and `<bot>:`. `model` is that of the model's tokenizer; if it has several, `default`, or `tool_use` for
    records with tools. `custom` uses `jinja`."""

    jinja: LongText | None = None
    """For `custom` only: a Jinja chat template as in transformers, with `messages` in OpenAI's form,
    `add_generation_prompt`, `bos_token`, `eos_token` and `tools`. A turn of the assistant must begin with the
    generation prompt and end with a special token. If unset: a named template is used."""

    system: LongText | None = None
    """System prompt of conversations that have none. If unset: that of the template, if it has one."""


class Role(StrEnum):
    """Author of a turn, as in OpenAI's messages: the assistant's calls are part of its turn, `tool` has a result."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Turns(StrEnum):
    """Which turns of the trained roles carry loss."""

    ALL = "all"
    LAST = "last"


class Loss(Model):
    """Which tokens carry loss."""

    roles: Annotated[tuple[Role, ...], Field(min_length=1, max_length=8)] = (Role.ASSISTANT,)
    """Roles whose turns are trained on. The assistant's turns are trained with their reasoning and tool calls."""

    turns: Turns = Turns.ALL
    """`all` turns of these roles, or only the `last` one of a conversation."""


class TooLong(StrEnum):
    """What happens to a conversation longer than `sequenceLength`."""

    SPLIT = "split"
    DROP = "drop"
    CUT = "cut"
    FAIL = "fail"
