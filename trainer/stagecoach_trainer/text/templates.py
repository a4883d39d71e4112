"""Render conversations as text, and find the parts that carry loss.

Training renders with the same Jinja chat template that the exported tokenizer contains, so the two cannot differ by a
byte. The part of a turn that carries loss is the difference between the conversation so far with the generation prompt
and the same conversation one turn longer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stagecoach_api.conversation import Loss, Role, Template, TemplateName, Turns
from stagecoach_trainer.runtime.errors import UserError

TEMPLATES = Path(__file__).parent / "chat_templates"
CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"

GENERATED = frozenset({Role.ASSISTANT})
"""Roles whose turns the model generates: they follow the generation prompt and end with the end token."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """A part of a rendered conversation."""

    text: str
    trained: bool


@dataclass(frozen=True)
class TrainedTurn:
    """A turn that carries loss."""

    index: int
    """Index of the turn among the conversation's messages."""

    prompt: str
    """The conversation so far with the generation prompt: byte for byte the prompt of a served model."""

    answer: str
    """The text to generate, without the end token."""

    content: str
    """The turn's content, without the template's text around it; part of `answer`."""

    ends: bool
    """Whether the end token follows the answer and carries loss."""


def chat_template(template: Template) -> str:
    """Return the Jinja chat template of `template`, including its system prompt."""
    body = template.jinja if template.jinja is not None else _named(template.name)
    if template.system is None:
        return body
    system = _jinja_string(template.system)
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': " + system + "}] + messages -%}{%- endif -%}" + body
    )


@cache
def _named(name: TemplateName) -> str:
    return (TEMPLATES / f"{name.value}.jinja").read_text(encoding="utf-8").rstrip("\n")


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def apply_template(tokenizer: Any, template: Template) -> list[str]:
    """Set the chat template of `template` on the tokenizer; return warnings for the report.

    ChatML's `<|im_end|>` becomes the end token if the vocabulary has it as a special token. Otherwise the markers are
    encoded as several ordinary tokens, and the tokenizer's own end token follows them.
    Raises UserError for a tokenizer without an end token.
    """
    warnings: list[str] = []
    if template.name is TemplateName.CHATML:
        if is_special(tokenizer, CHATML_END):
            tokenizer.eos_token = CHATML_END
        if not (is_special(tokenizer, CHATML_START) and is_special(tokenizer, CHATML_END)):
            warnings.append(
                f"the vocabulary has no special tokens {CHATML_START} and {CHATML_END}: each is spelled in several "
                "ordinary tokens; a `tokenizer` stage can add them (`add.specialTokens`)"
            )
    if tokenizer.eos_token is None:
        raise UserError("template: the tokenizer has no end token, so a trained model would never stop; set one")
    tokenizer.chat_template = chat_template(template)
    return warnings


def is_special(tokenizer: Any, token: str) -> bool:
    """Return whether `token` is a special token of the vocabulary."""
    return any(added.content == token and added.special for added in tokenizer.added_tokens_decoder.values())


class Renderer:
    """Renders conversations with the tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end: str = tokenizer.eos_token

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation, exactly as `tokenizer.apply_chat_template` renders it.

        Raises UserError with the template's error.
        """
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template cannot render this conversation: {error}") from error
        return text

    def trained_turns(
        self, messages: Sequence[Message], loss: Loss, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[TrainedTurn]:
        """Return the turns of a conversation that carry loss, in order; the first turn never does.

        Raises UserError if the conversation so far is not a prefix of the conversation one turn longer, or a turn that
        the model generates does not end with the end token.
        """
        roles = {role.value for role in loss.roles}
        chosen = [index for index, message in enumerate(messages) if message["role"] in roles and index > 0]
        if loss.turns is Turns.LAST:
            chosen = chosen[-1:]
        return [self._trained_turn(messages, index, tools) for index in chosen]

    def _trained_turn(
        self, messages: Sequence[Message], index: int, tools: Sequence[Mapping[str, Any]] | None
    ) -> TrainedTurn:
        generated = messages[index]["role"] in {role.value for role in GENERATED}
        # Only turns that the model generates begin after the generation prompt; others are trained on from their start.
        prompt = self.render(messages[:index], tools, add_generation_prompt=generated)
        whole = self.render(messages[: index + 1], tools)
        if not whole.startswith(prompt):
            raise UserError(
                f"the chat template does not render the conversation up to turn {index} as a prefix of the "
                "conversation with that turn, so the model would be served another prompt than it was trained on; "
                "change the template so that a turn begins with the generation prompt"
            )
        answer = whole[len(prompt) :]
        content = str(messages[index]["content"])
        if not generated:
            return TrainedTurn(index, prompt, answer, content, ends=False)
        end = answer.rfind(self._end)
        if end < 0:
            raise UserError(
                f"the chat template does not end turn {index} ({messages[index]['role']}) with the end token "
                f"{self._end!r}, so the model would never stop; write {{{{ eos_token }}}} after the content"
            )
        return TrainedTurn(index, prompt, answer[:end], content, ends=True)

    def segments(
        self, messages: Sequence[Message], loss: Loss, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Segment]:
        """Split the whole conversation into segments with and without loss; joined, they are `render(messages)`.

        Raises UserError as `trained_turns` does, and if a later turn changes how earlier turns are rendered.
        """
        whole = self.render(messages, tools)
        segments: list[Segment] = []
        done = 0
        for turn in self.trained_turns(messages, loss, tools):
            trained = turn.answer + (self._end if turn.ends else "")
            if not whole.startswith(turn.prompt + trained):
                raise UserError(f"the chat template renders turn {turn.index} differently once more turns follow it")
            segments += [Segment(whole[done : len(turn.prompt)], False), Segment(trained, True)]
            done = len(turn.prompt) + len(trained)
        return [segment for segment in [*segments, Segment(whole[done:], False)] if segment.text]


def message_of(role: Role, content: str, extra_input: str = "") -> dict[str, str]:
    """Return a turn in the form that chat templates read."""
    message = {"role": role.value, "content": content}
    return {**message, "input": extra_input} if extra_input else message


def parse_tools(tools: str | None) -> list[dict[str, Any]] | None:
    """Return the tool descriptions of a record. Raises UserError unless they are a JSON list of objects."""
    if tools is None or not tools.strip():
        return None
    try:
        descriptions = json.loads(tools)
    except json.JSONDecodeError as error:
        raise UserError(f"`tools` is not JSON: {error}") from error
    if not isinstance(descriptions, list) or not all(isinstance(item, dict) for item in descriptions):
        raise UserError("`tools` must be a JSON list of objects, each describing one tool")
    return descriptions or None
