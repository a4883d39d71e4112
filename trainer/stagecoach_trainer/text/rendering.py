"""Render conversations as text, and find the parts that carry loss.

A turn that the model generates is what the rendering of the conversation up to it adds to the rendering of the prompt.
Where it ends is read from text that the template wrote, never from what a record's author wrote. The rendering is
searched for every part of every turn, so that no template leaves one out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stagecoach_api.conversation import Loss, Role, TemplateName, Turns
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.jinja_reading import reads_field
from stagecoach_trainer.text.messages import Message, message_of, missing_part, num_characters, text_of, with_strings
from stagecoach_trainer.text.spellings import Marks, Piece, added_spellings, special_spellings, split_at

GENERATED = frozenset({Role.ASSISTANT})
"""Roles whose turns the model generates: they follow the generation prompt and end with an end token."""

PROBES = ("Qz7first", "Qz7second", "Qz7third")
"""Texts that replace a record's in renderings that show what a template does."""

END_OF_THOUGHT = "</think>"

SHOWN_BEFORE, SHOWN_AFTER = 24, 24
"""Characters of two renderings that a message shows before and after the place where they part."""

NAMED_TEMPLATES = ", ".join(
    name.value for name in TemplateName if name not in (TemplateName.MODEL, TemplateName.CUSTOM)
)

CANNOT = "the chat template cannot render"

Tools = Sequence[Message] | None


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

    pieces: tuple[Piece, ...]
    """The text to generate, without the end token."""

    end: str | None
    """The end token, which carries loss, too. None for a turn that the model does not generate."""

    num_characters: int
    """Characters of the turn itself, without the template's text around it."""

    @property
    def answer(self) -> str:
        """The text to generate, without the end token."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class CallForm:
    """How a template reads an assistant's turn of calls."""

    arguments_as_text: bool = False
    without_content: bool = False
    """Whether a turn without text has no `content` at all, instead of an empty one."""


CALL_FORMS = (CallForm(), CallForm(without_content=True), CallForm(True), CallForm(True, True))
"""In order of preference: the first one is what servers pass."""


def render_raw(tokenizer: Any, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> str:
    """Return the text that the tokenizer's template makes of messages. Raises UserError with the template's error."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{CANNOT} this conversation: {error}") from error
    return text


class Renderer:
    """Renders conversations with the tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos: str | None = tokenizer.eos_token
        self._spellings = special_spellings(tokenizer)
        self._forms: dict[bool, CallForm] = {}
        self._ends: dict[bool, str] = {}
        self._proved: set[tuple[Any, ...]] = set()

    # -- rendering -----------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, exactly as `tokenizer.apply_chat_template` renders it.

        Alpaca's `input` is a further line of the content, unless the template reads `input`.
        Raises UserError with the template's error, naming the turn.
        """
        prepared = self._prepared(messages, tools)
        try:
            return render_raw(self._tokenizer, prepared, tools, add_generation_prompt)
        except UserError as error:
            turn = self._refused_turn(prepared, tools, str(error))
            raise UserError(str(error).replace("this conversation", turn, 1)) from error

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Return the text that a model is served to answer a conversation.

        Raises UserError naming a turn that the template cannot render or leaves out.
        """
        text = self.render(messages, tools, add_generation_prompt=True)
        self._require_history(messages, tools, text)
        self._require_structure(messages, tools, is_answered=False)
        return text

    def spells_special(self, message: Message | str) -> bool:
        """Return whether the text of a special token occurs in a message or a text."""
        if isinstance(message, str):
            return self._spellings.occur_in(message)
        return self._spellings.occur_in_message(message)

    def _refused_turn(self, messages: Sequence[Message], tools: Tools, problem: str) -> str:
        """Return the name of the first turn without which the template raises no such error."""
        for index in range(len(messages)):
            try:
                render_raw(self._tokenizer, messages[: index + 1], tools, add_generation_prompt=False)
            except UserError as error:
                if str(error) == problem:
                    return _name(messages, index)
        return "this conversation"

    def _prepared(self, messages: Sequence[Message], tools: Tools) -> Sequence[Message]:
        if not any("input" in message or "trained" in message or "tool_calls" in message for message in messages):
            return messages
        return [self._prepared_message(message, tools) for message in messages]

    def _prepared_message(self, message: Message, tools: Tools) -> Message:
        changed: dict[str, Any] = {key: value for key, value in message.items() if key != "trained"}
        if changed.get("input") and not reads_field(self._template(tools), "input"):
            changed["content"] = text_of(changed)
            del changed["input"]
        return self._in_form(changed, self._call_form(tools)) if changed.get("tool_calls") else changed

    def _template(self, tools: Tools) -> str:
        # As `apply_chat_template` chooses of templates by name.
        found: str = self._tokenizer.get_chat_template(None, list(tools) if tools else None)
        return found

    @staticmethod
    def _in_form(message: Message, form: CallForm) -> Message:
        changed = dict(message)
        if form.without_content and not changed.get("content"):
            changed.pop("content", None)
        if form.arguments_as_text:
            changed["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return changed

    def _call_form(self, tools: Tools) -> CallForm:
        """Return the form of calls that the template renders; of several, that of the servers."""
        key = bool(tools)
        if key not in self._forms:
            probe = [message_of(Role.USER, PROBES[0]), _call_of(PROBES[1], PROBES[2])]
            self._forms[key] = next((form for form in CALL_FORMS if self._renders(probe, tools, form)), CALL_FORMS[0])
        return self._forms[key]

    def _renders(self, probe: Sequence[Message], tools: Tools, form: CallForm) -> bool:
        try:
            text = render_raw(self._tokenizer, [*probe[:-1], self._in_form(probe[-1], form)], tools, False)
        except UserError:
            return False
        return missing_part(probe[-1], text, with_reasoning=False) is None

    # -- turns with loss -----------------------------------------------------------------------------------------------

    def trained_turns(self, messages: Sequence[Message], loss: Loss, tools: Tools = None) -> list[TrainedTurn]:
        """Return the turns of a conversation that carry loss, in order.

        Raises UserError naming a turn that the template leaves out; a turn before which the prompt is not a prefix of
        the conversation with it; or one that the model generates and that has no end token.
        """
        turns = [self._trained_turn(messages, index, tools) for index in chosen_turns(messages, loss)]
        if turns:
            last = turns[-1]
            self._require_history(messages[: last.index], tools, last.prompt)
            self._require_structure(messages[: last.index + 1], tools, is_answered=last.end is not None)
        return turns

    def _trained_turn(self, messages: Sequence[Message], index: int, tools: Tools) -> TrainedTurn:
        generated = messages[index]["role"] in GENERATED
        # Only turns that the model generates begin after the generation prompt; others are trained on from their start.
        prompt = self.render(messages[:index], tools, add_generation_prompt=generated)
        whole = self.render(messages[: index + 1], tools)
        if not whole.startswith(prompt):
            raise _no_prefix(messages, index, prompt, whole)
        pieces = self._pieces(messages, index, tools, prompt, whole[len(prompt) :])
        end = None
        if generated:
            pieces, end = self._before_end(messages, index, tools, pieces)
        missing = missing_part(messages[index], "".join(piece.text for piece in pieces), with_reasoning=generated)
        if missing is not None:
            raise _left_out(messages, index, missing)
        return TrainedTurn(index, prompt, pieces, end, num_characters(messages[index]))

    def _pieces(
        self, messages: Sequence[Message], index: int, tools: Tools, prompt: str, rendered: str
    ) -> tuple[Piece, ...]:
        """Return a rendered turn in pieces, so that special tokens that its author spells are pieces of plain text."""
        if not self._spellings.occur_in_message(messages[index]):
            return (Piece(rendered),)
        for marks, hidden in self._spellings.hidings(messages[index]):
            shown = self.render([*messages[:index], hidden], tools)
            if shown.startswith(prompt):
                pieces = marks.pieces(shown[len(prompt) :])
                if "".join(piece.text for piece in pieces) == rendered:
                    return pieces
        raise UserError(
            f"{_name(messages, index)}: its text spells a special token, and the chat template treats the spelling as "
            "its own, so that the text would become part of the template; remove it from the record"
        )

    # -- ends of turns -------------------------------------------------------------------------------------------------

    def _before_end(
        self, messages: Sequence[Message], index: int, tools: Tools, pieces: tuple[Piece, ...]
    ) -> tuple[tuple[Piece, ...], str]:
        """Return the pieces of a turn before its end token, and the token.

        It is that of a plain answer, unless calls follow it: templates may end calls with another token.
        """
        usual = self._usual_end(messages[:index], tools)
        written = [match[0] for piece in pieces if not piece.is_plain for match in self._spellings.found_in(piece.text)]
        for token in dict.fromkeys([usual, self._eos, *written[-1:]]):
            before = split_at(pieces, token) if token else None
            if before is not None and token is not None:
                said = "".join(piece.text for piece in before)
                if not messages[index].get("tool_calls") or missing_part(messages[index], said, True) is None:
                    return before, token
        if usual is not None or written:  # there is an end, but a part of the turn is missing or follows it
            missing = missing_part(messages[index], "".join(piece.text for piece in pieces), with_reasoning=True)
            if missing is not None:
                raise _left_out(messages, index, missing)
        raise UserError(
            f"{_name(messages, index)}: the chat template does not end it with the end token {self._eos!r} or another "
            "special token, so the model would never stop; write {{ eos_token }} after the content"
        )

    def _usual_end(self, prefix: Sequence[Message], tools: Tools) -> str | None:
        """Return the special token with which the template ends a plain answer, or None if there is none."""
        key = bool(tools)
        if key not in self._ends:
            found = self._find_usual_end(prefix, tools)
            if found is None:
                return None
            self._ends[key] = found
        return self._ends[key]

    def _find_usual_end(self, prefix: Sequence[Message], tools: Tools) -> str | None:
        answered = [*prefix, message_of(Role.ASSISTANT, PROBES[0])]
        _, found, last = self.render(answered, tools).rpartition(PROBES[0])
        if not found:
            raise _left_out(answered, len(prefix), "its content")
        # What follows an answer both at the end of a conversation and within one belongs to the answer. Phi-3 closes
        # the conversation, but no answer, with the end token of the vocabulary.
        try:
            more = self.render([*answered, message_of(Role.USER, PROBES[1])], tools).rpartition(PROBES[0])[2]
        except UserError:  # no turn may follow, for this template
            more = last
        for spellings in (self._spellings, added_spellings(self._tokenizer)):
            for text in (os.path.commonprefix([last, more]), last):
                tokens = [match[0] for match in spellings.found_in(text)]
                if tokens:
                    end = self._eos if self._eos in tokens else tokens[0]
                    self._spellings = self._spellings.with_token(end)
                    return end
        return None

    # -- proof that nothing is left out --------------------------------------------------------------------------------

    def _require_history(self, messages: Sequence[Message], tools: Tools, text: str) -> None:
        """Raise UserError if a turn does not occur in `text`, the rendering of a prompt.

        Templates may leave out what the assistant thought before, also where its content spells it: the model is served
        so, too.
        """
        for index, message in enumerate(messages):
            missing = missing_part(message, text, with_reasoning=False)
            if missing is not None and message["role"] in GENERATED:
                missing = missing_part(message, self.render(messages[: index + 1], tools), with_reasoning=False)
                if missing is not None and END_OF_THOUGHT in (message.get("content") or ""):
                    said = {**message, "content": message["content"].rpartition(END_OF_THOUGHT)[2]}
                    missing = missing_part(said, text, with_reasoning=False)
            if missing is not None:
                raise _left_out(messages, index, missing)

    def _require_structure(self, messages: Sequence[Message], tools: Tools, is_answered: bool) -> None:
        """Raise UserError if a template leaves out a turn of such a conversation, whatever its text.

        A short text may occur elsewhere in a rendering. So a conversation of the same structure is rendered whose texts
        are marks; once for each structure.
        """
        key = (bool(tools), is_answered, tuple(map(_structure, messages)))
        if key in self._proved:
            return
        marks = Marks(PROBES[0])
        marked = [with_strings(message, marks.hide, marks.hide) for message in messages]
        named = [_renamed(tool, marks) for tool in tools or ()]
        try:
            text = self.render(marked, named, add_generation_prompt=not is_answered)
        except UserError:  # it renders real texts only; they were found
            return
        for index, message in enumerate(marked):
            is_last = is_answered and index == len(marked) - 1
            if missing_part(message, text, with_reasoning=is_last) is not None:
                raise _left_out(messages, index, "its text, or a part of it")
        if any(tool["function"]["name"] not in text for tool in named):
            raise UserError(
                "the chat template does not render the conversation's `tools`, so the model would never learn which it "
                "may call; use a template that does, or remove them from the records"
            )
        self._proved.add(key)

    # -- whole conversations -------------------------------------------------------------------------------------------

    def segments(self, messages: Sequence[Message], loss: Loss, tools: Tools = None) -> list[Segment]:
        """Split the whole conversation into segments with and without loss; joined, they are `render(messages)`.

        Raises UserError as `trained_turns` does, and if a later turn changes how earlier turns are rendered.
        """
        whole = self.render(messages, tools)
        segments: list[Segment] = []
        done = 0
        for turn in self.trained_turns(messages, loss, tools):
            trained = turn.answer + (turn.end or "")
            if not whole.startswith(turn.prompt + trained):
                raise UserError(f"the chat template renders turn {turn.index} differently once more turns follow it")
            segments += [Segment(whole[done : len(turn.prompt)], False), Segment(trained, True)]
            done = len(turn.prompt) + len(trained)
        return [segment for segment in [*segments, Segment(whole[done:], False)] if segment.text]


def chosen_turns(messages: Sequence[Message], loss: Loss) -> list[int]:
    """Return the indices of the turns that carry loss: those of `loss`, unless a turn has a flag of its own.

    The first turn carries no loss, since nothing precedes it. Raises UserError if its flag wants it to.
    """
    roles = {role.value for role in loss.roles}
    chosen = [index for index, message in enumerate(messages) if message["role"] in roles and index > 0]
    if loss.turns is Turns.LAST:
        chosen = chosen[-1:]
    if messages and messages[0].get("trained"):
        raise UserError(
            f"{_name(messages, 0)}: it is marked as trained, but no text precedes the first turn from which a model "
            "could predict it; remove the mark, or put a turn before it"
        )
    return [index for index, message in enumerate(messages) if message.get("trained", index in chosen)]


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids at which generation must stop: the tokenizer's end token, if any, and those with which its chat
    template ends an answer and a call, where they are others (Gemma, Phi-3, Llama 3)."""
    ends: list[str | None] = []
    if getattr(tokenizer, "chat_template", None) is not None:
        renderer = Renderer(tokenizer)
        question = message_of(Role.USER, PROBES[0])
        for answer in (message_of(Role.ASSISTANT, PROBES[1]), _call_of(PROBES[1], PROBES[2])):
            try:
                ends += [turn.end for turn in renderer.trained_turns([question, answer], Loss())]
            except UserError:  # it has no calls, or needs more than these turns
                continue
    found = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(end) for end in ends if end is not None)]
    return list(dict.fromkeys(token for token in found if token is not None))


def _structure(message: Message) -> tuple[Any, ...]:
    has = tuple(key for key in ("input", "reasoning_content", "name", "tool_call_id") if message.get(key))
    return (message["role"], bool((message.get("content") or "").strip()), has, len(message.get("tool_calls", ())))


def _renamed(tool: Message, marks: Marks) -> dict[str, Any]:
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    renamed = {**function, "name": marks.hide("")}
    return {**tool, "function": renamed} if function is not tool else renamed


def _call_of(name: str, argument: str) -> dict[str, Any]:
    function = {"name": name, "arguments": {argument: argument}}
    return {"role": Role.ASSISTANT.value, "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _name(messages: Sequence[Message], index: int) -> str:
    return f"turn {index} ({messages[index]['role']})"


def _no_prefix(messages: Sequence[Message], index: int, prompt: str, whole: str) -> UserError:
    """Return the error of a turn that does not follow its prompt, with the texts where they part.

    Templates of reasoning models can open a thought in the generation prompt that the rendering of an answer lacks, as
    DeepSeek-R1's does. What such a model should think before a given answer is nothing that a record states.
    """
    same = len(os.path.commonprefix([prompt, whole]))
    served, rendered = (repr(text[max(0, same - SHOWN_BEFORE) : same + SHOWN_AFTER]) for text in (prompt, whole))
    return UserError(
        f"{_name(messages, index)}: the chat template does not render the conversation up to this turn as a prefix of "
        f"the conversation with it: a served model is given …{served}, and the conversation has …{rendered}, so the "
        "model would be served another prompt than it was trained on; use a template whose turns begin with the "
        f"generation prompt: `template: {{name: …}}` with {NAMED_TEMPLATES}, or `custom` with `jinja`"
    )


def _left_out(messages: Sequence[Message], index: int, part: str | None) -> UserError:
    return UserError(
        f"{_name(messages, index)}: the chat template leaves out {part}, so the model would never see it; use a "
        "template that renders it, or remove it from the record"
    )
