"""Text as token ids, as the exported tokenizer will encode it when the model is served."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.text.vocabulary import encode_batch


class Encoder:
    """A tokenizer with a second face: one that goes on in the middle of a text.

    SentencePiece puts a blank in front of a text, once. An answer is encoded apart from its prompt and must get none,
    or the decoded text would differ from the rendered one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.special_texts: tuple[str, ...] = tuple(
            sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.content)
        )

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Encode rendered prompts exactly as `apply_chat_template(tokenize=True)` does: special tokens are read as
        such, none is added."""
        return encode_batch(self._tokenizer, texts, parse_special=True)

    def documents(self, texts: Sequence[str]) -> list[Ids]:
        """Encode whole texts; what looks like a special token in them is ordinary text."""
        return encode_batch(self._tokenizer, texts)

    def continuations(self, texts: Sequence[str], parse_special: bool = False) -> list[Ids]:
        """Encode texts that follow others, without the blank that would begin a text."""
        backend = self._tokenizer.backend_tokenizer
        before = (backend.normalizer, backend.pre_tokenizer)
        backend.normalizer, backend.pre_tokenizer = self._without_prefix
        try:
            return encode_batch(self._tokenizer, texts, parse_special)
        finally:
            backend.normalizer, backend.pre_tokenizer = before

    def contains_special(self, text: str) -> bool:
        """Return whether the text of a special token occurs in `text`."""
        return any(token in text for token in self.special_texts)

    @cached_property
    def _without_prefix(self) -> tuple[Any, Any]:
        backend = self._tokenizer.backend_tokenizer
        return _changed(backend.normalizer), _changed(backend.pre_tokenizer)


def _changed(step: Any) -> Any:
    """Return a copy of a normaliser or pre-tokenizer that puts no blank in front of a text."""
    if step is None:
        return None
    state = without_prefix(json.loads(step.__getstate__()))
    if state is None:
        return None
    changed = copy.deepcopy(step)
    changed.__setstate__(json.dumps(state).encode())
    return changed


def without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normaliser or pre-tokenizer, as `tokenizer.json` has them, that puts no blank in front of a text."""
    if step is None:
        return None
    kind = step.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    if kind == "Sequence":
        part = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [changed for item in step[part] if (changed := without_prefix(item)) is not None]
        return {**step, part: kept} if kept else None
    return step
