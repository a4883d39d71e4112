"""Chat templates: the named ones, a custom one, or the model's own; set on the tokenizer, which is exported with it.

Training renders with the template that the exported tokenizer contains, so the two cannot differ by a byte.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from stagecoach_api.conversation import Role, Template, TemplateName
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.messages import Message, message_of, parse_tools
from stagecoach_trainer.text.rendering import (
    GENERATED,
    NAMED_TEMPLATES,
    Renderer,
    Segment,
    TrainedTurn,
    render_raw,
    stop_token_ids,
)

__all__ = [
    "GENERATED", "Message", "Renderer", "Segment", "TrainedTurn", "apply_template", "chat_template", "is_special",
    "message_of", "parse_tools", "stop_token_ids",
]  # fmt: skip

TEMPLATES = Path(__file__).parent / "chat_templates"
CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"

ChatTemplate = str | dict[str, str]
"""Jinja, or templates by name (`default`, `tool_use`, …), of which transformers chooses."""


def chat_template(template: Template, own: ChatTemplate | None = None) -> ChatTemplate:
    """Return the Jinja chat template of `template`, including its system prompt.

    `own`: that of the model. Raises UserError if it is wanted and there is none.
    """
    body: ChatTemplate
    if template.jinja is not None:
        body = template.jinja
    elif template.name is not TemplateName.MODEL:
        body = _named(template.name)
    elif own is not None:
        body = own
    else:
        raise UserError(NO_TEMPLATE)
    if template.system is None:
        return body
    if isinstance(body, dict):
        return {name: _with_system(each, template.system) for name, each in body.items()}
    return _with_system(body, template.system)


NO_TEMPLATE = (
    f"template: the model's tokenizer has no chat template; name one of {NAMED_TEMPLATES}, or `custom` with `jinja`, "
    "as in `template: {name: chatml}`"
)


def _with_system(body: str, system: str) -> str:
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': "
        + _jinja_string(system)
        + "}] + messages -%}{%- endif -%}"
        + body
    )


@cache
def _named(name: TemplateName) -> str:
    return (TEMPLATES / f"{name.value}.jinja").read_text(encoding="utf-8").rstrip("\n")


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def apply_template(tokenizer: Any, template: Template | None) -> list[str]:
    """Set the chat template of `template` on the tokenizer; return warnings for the report.

    If `template` is None, the tokenizer keeps its own. ChatML's `<|im_end|>` becomes the end token if the vocabulary
    has it as a special token. Otherwise the markers are encoded as several ordinary tokens, and the tokenizer's own end
    token follows them.
    Raises UserError for a tokenizer without an end token or a template, or a custom template that begins with two BOS
    tokens.
    """
    template = template or Template(name=TemplateName.MODEL)
    warnings: list[str] = []
    if template.name is TemplateName.CHATML:
        if is_special(tokenizer, CHATML_END):
            tokenizer.eos_token = CHATML_END
        if not (is_special(tokenizer, CHATML_START) and is_special(tokenizer, CHATML_END)):
            warnings.append(
                f"the vocabulary has no special tokens {CHATML_START} and {CHATML_END}: each is spelled in several "
                "ordinary tokens; a `tokenizer` stage can add them (`add.specialTokens`)"
            )
    chosen = chat_template(template, tokenizer.chat_template)
    if tokenizer.eos_token is None:
        raise UserError("template: the tokenizer has no end token, so a trained model would never stop; set one")
    tokenizer.chat_template = chosen
    return warnings + _two_bos_tokens(tokenizer, template)


def _two_bos_tokens(tokenizer: Any, template: Template) -> list[str]:
    """Return a warning if the model's own template begins with two BOS tokens. Raises UserError for a custom one."""
    bos = tokenizer.bos_token
    if not bos:
        return []
    try:
        text = render_raw(tokenizer, [message_of(Role.USER, "?")], None, True)
    except UserError:  # a template may need more than one user's turn; records show it
        return []
    if not text.startswith(bos + bos):
        return []
    found = f"template: a conversation begins with the BOS token {bos!r} twice"
    if template.name is TemplateName.MODEL:
        return [f"{found}, as the model's own template renders it"]
    raise UserError(f"{found}; write it once")


def is_special(tokenizer: Any, token: str) -> bool:
    """Return whether `token` is a special token of the vocabulary."""
    return any(added.content == token and added.special for added in tokenizer.added_tokens_decoder.values())
