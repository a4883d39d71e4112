"""Encode text as the exported tokenizer encodes it when the model is served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from stagecoach_trainer.batches.rows import Ids
from stagecoach_trainer.text.vocabulary import encode_batch


class Encoder:
    """A tokenizer that can also encode the continuation of a text.

    SentencePiece prepends a space to every text. An answer is encoded separately from its prompt and must not get one,
    or the decoded text would differ from the rendered text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Encode rendered prompts exactly as `apply_chat_template(tokenize=True)` does: special tokens are recognised,
        and none is added."""
        return encode_batch(self._tokenizer, texts, parse_special=True)

    def documents(self, texts: Sequence[str]) -> list[Ids]:
        """Encode whole texts; the spelling of a special token in them is ordinary text."""
        return encode_batch(self._tokenizer, texts)

    def continuations(self, texts: Sequence[str], parse_special: bool = False) -> list[Ids]:
        """Encode texts that follow other texts, without the space that is prepended to a text of its own."""
        backend = self._tokenizer.backend_tokenizer
        # Swapping the steps of the one back end spares a second copy of a large vocabulary.
        before = (backend.normalizer, backend.pre_tokenizer)
        backend.normalizer, backend.pre_tokenizer = self._without_prefix
        try:
            return encode_batch(self._tokenizer, texts, parse_special)
        finally:
            backend.normalizer, backend.pre_tokenizer = before

    def id_of(self, token: str) -> int:
        """Return the id of a token of the vocabulary."""
        return int(self._tokenizer.convert_tokens_to_ids(token))

    @cached_property
    def _without_prefix(self) -> tuple[Any, Any]:
        backend = self._tokenizer.backend_tokenizer
        return _copy_without_prefix(backend.normalizer), _copy_without_prefix(backend.pre_tokenizer)


def _copy_without_prefix(step: Any) -> Any:
    """Return a copy of a normaliser or pre-tokenizer that prepends no space; None if nothing remains of it."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

    if step is None:
        return None
    state = without_prefix(json.loads(step.__getstate__()))
    if state is None:
        return None
    # Read as part of an empty tokenizer: most steps cannot be copied, because their classes require arguments.
    part = "normalizer" if isinstance(step, Normalizer) else "pre_tokenizer"
    nothing = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return getattr(Tokenizer.from_str(json.dumps({**nothing, part: state})), part)


def without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `tokenizer.json` entry of a normaliser or pre-tokenizer, changed so that it prepends no space.

    None if the step does nothing else.
    """
    if step is None:
        return None
    kind = step.get("type")
    if kind == "Prepend":  # does nothing but prepend
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
