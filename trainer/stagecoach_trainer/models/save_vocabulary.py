"""Write a model's vocabulary as transformers' `AutoTokenizer` opens it, and prove that it gives the same ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.text.probes import first_difference, probe_texts, state_of
from stagecoach_trainer.text.vocabulary import (
    CONFIG_FILE,
    PLAIN_CLASSES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    open_publicly,
)

VOCABULARY_FILES = (
    "tokenizer.model",
    TOKENIZER_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def save_vocabulary(tokenizer: Any, source: Path, output: Path) -> None:
    """Copy the vocabulary's files from `source`, with the chat templates and the end token of `tokenizer`.

    `tokenizer.json` is rewritten if it differs from what `tokenizer` computes: some classes of transformers change it
    when they load it, and other programs read the file itself. If AutoTokenizer would open the folder as another
    vocabulary, `tokenizer_class` is set to a class with which it does not.
    Raises UserError if no class gives the ids, the special tokens and the chat template of `tokenizer`.
    """
    for name in VOCABULARY_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if not (output / TOKENIZER_FILE).is_file():
        tokenizer.save_pretrained(str(output))
    _write_state(tokenizer, output / TOKENIZER_FILE)
    _write_end_token(tokenizer, output)
    tokenizer.save_chat_templates(str(output), {}, None, save_jinja_files=True)
    _choose_class(tokenizer, output)


def _write_state(tokenizer: Any, file: Path) -> None:
    from tokenizers import Tokenizer

    used = state_of(tokenizer.backend_tokenizer)
    if state_of(Tokenizer.from_file(str(file))) != used:  # an unchanged file keeps its bytes
        file.write_text(used, encoding="utf-8")


def _write_end_token(tokenizer: Any, output: Path) -> None:
    _change_json(output / CONFIG_FILE, {"eos_token": tokenizer.eos_token}, drop=("chat_template",))
    if (output / SPECIAL_TOKENS_FILE).is_file():
        _change_json(output / SPECIAL_TOKENS_FILE, {"eos_token": tokenizer.eos_token})


def _choose_class(tokenizer: Any, output: Path) -> None:
    stated = _read_json(output / CONFIG_FILE).get("tokenizer_class")
    problem = difference_from(tokenizer, output)
    for name in (type(tokenizer).__name__, *sorted(PLAIN_CLASSES)):
        if problem is None:
            return
        _change_json(output / CONFIG_FILE, {"tokenizer_class": name})
        if difference_from(tokenizer, output) is None:
            return
    _change_json(output / CONFIG_FILE, {"tokenizer_class": stated})
    if problem is not None:
        raise UserError(
            f"{output}: transformers' AutoTokenizer opens the vocabulary otherwise than it is used here: {problem}. "
            "The model's family prescribes a tokenizer of its own; give a vocabulary that AutoTokenizer opens next to "
            "the model's config.json"
        )


def difference_from(tokenizer: Any, folder: Path) -> str | None:
    """Return how the vocabulary in `folder`, opened by AutoTokenizer, differs from `tokenizer`; None if it does not."""
    try:
        opened = open_publicly(folder)
    except UserError as error:
        return str(error)
    for name in SPECIAL_IDS:
        if getattr(opened, name) != getattr(tokenizer, name):
            return f"{name} is {getattr(opened, name)} instead of {getattr(tokenizer, name)}"
    if _templates(opened) != _templates(tokenizer):
        return "it has another chat template"
    if opened.get_vocab() != tokenizer.get_vocab():
        return f"it has {len(opened)} tokens instead of {len(tokenizer)}, or other ids"
    if state_of(opened.backend_tokenizer) == state_of(tokenizer.backend_tokenizer):
        return None
    return first_difference(tokenizer, opened, probe_texts(tokenizer))


def _templates(tokenizer: Any) -> Mapping[str, str] | None:
    found: str | Mapping[str, str] | None = tokenizer.chat_template
    return {"default": found} if isinstance(found, str) else found


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value


def _change_json(path: Path, changes: Mapping[str, Any], drop: tuple[str, ...] = ()) -> None:
    value = _read_json(path)
    meant = {key: item for key, item in changes.items() if _content(value.get(key)) != item}
    changed = {key: item for key, item in {**value, **meant}.items() if key not in drop}
    if changed != value:  # an unchanged file keeps its bytes
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    """Return the text of a token that a configuration describes by an object."""
    return token["content"] if isinstance(token, dict) and "content" in token else token
