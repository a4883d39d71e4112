"""LLaMA-Factory's `dataset_info.json`: which file of a folder is a data set, and how its records are laid out.

The file is a closed contract too: an entry with a key that is not known, or that names a set of a hub, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach_api.references import FieldMapping, Format, RecordSource
from stagecoach_trainer.data.messages import listed
from stagecoach_trainer.data.turns import MESSAGES_TURNS, SHAREGPT_TURNS, TurnKeys
from stagecoach_trainer.runtime.errors import UserError

DATASET_INFO = "dataset_info.json"

HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "ranking", "num_samples", "split", "subset", "folder")
COLUMN_KEYS = ("prompt", "query", "response", "history", "messages", "system", "tools", "chosen", "rejected", "kto_tag")
MEDIA_COLUMNS = ("images", "videos", "audios")
TAG_KEYS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
"""Names of LLaMA-Factory's tags and their defaults."""


@dataclass(frozen=True)
class NamedSet:
    """A data set that an entry describes."""

    file: str
    """Relative to the folder."""

    source: RecordSource
    """The source with the entry's format, fields and number of samples."""

    keys: TurnKeys | None
    """Names of the fields of turns. None for a layout without turns."""


def named_set(folder: Path, source: RecordSource) -> NamedSet:
    """Return the data set that `source.dataset` names. Raises UserError for a missing, remote or unknown entry."""
    entries = read_entries(folder)
    where = f"{source.uri}/{DATASET_INFO}"
    if entries is None:
        raise UserError(
            f"{source.uri}: `dataset: {source.dataset}` needs LLaMA-Factory's {DATASET_INFO} in this folder; name the "
            "folder that has it, or leave `dataset` out and name the data file"
        )
    if source.dataset is None or source.dataset not in entries:
        raise UserError(f"{where}: there is no data set {source.dataset!r}; it has {listed(sorted(entries))}")
    return _NamedEntry(entries[source.dataset], f"{where}: {source.dataset}").resolve(source)


def read_entries(folder: Path) -> Mapping[str, Mapping[str, Any]] | None:
    """Return the entries of LLaMA-Factory's file in a folder. None if there is none, or a file of that name by others.

    `datasets` writes a `dataset_info.json`, too, which describes columns.
    """
    try:
        entries = json.loads((folder / DATASET_INFO).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    if not isinstance(entries, Mapping) or not entries:
        return None
    named = all(isinstance(entry, Mapping) and {"file_name", *HUB_KEYS} & set(entry) for entry in entries.values())
    return entries if named else None


@dataclass(frozen=True)
class _NamedEntry:
    entry: Mapping[str, Any]
    where: str

    def resolve(self, source: RecordSource) -> NamedSet:
        self._check_keys()
        columns = self._mapping("columns", (*COLUMN_KEYS, *MEDIA_COLUMNS))
        media = [name for name in MEDIA_COLUMNS if columns.get(name)]
        if media:
            raise UserError(
                f"{self.where}: `columns.{media[0]}`: media are not read; remove it, or train on text alone"
            )
        formatting = self._one_of("formatting", ("alpaca", "sharegpt", "openai"), "alpaca")
        format_ = self._format(formatting, columns)
        given = {"format": format_, "fields": self._fields(formatting, columns, source.fields)}
        chosen = source.model_copy(update=given | self._num_samples(source))
        return NamedSet(self._file(), chosen, None if formatting == "alpaca" else self._keys(formatting))

    def _check_keys(self) -> None:
        hub = [key for key in HUB_KEYS if self.entry.get(key)]
        if hub and not self.entry.get("file_name"):
            raise UserError(
                f"{self.where}: `{hub[0]}` names a set of a hub; stages have no network, so download it and give its "
                "`file_name`"
            )
        unknown = sorted(set(self.entry) - set(ENTRY_KEYS) - set(HUB_KEYS))
        if unknown:
            raise UserError(f"{self.where}: unknown keys {listed(unknown)}; allowed are {', '.join(ENTRY_KEYS)}")
        for key, allowed in (("split", "train"), ("subset", None), ("folder", None)):
            if self.entry.get(key) not in (None, "", allowed):
                raise UserError(
                    f"{self.where}: `{key}: {self.entry[key]}` selects a part of a set of a hub; a file has no parts, "
                    "so remove it and give the part's own `file_name`"
                )

    def _file(self) -> str:
        name = self.entry.get("file_name")
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{self.where}: `file_name` must be a file or folder below this folder, got {name!r}")
        return name

    def _format(self, formatting: str, columns: Mapping[str, str]) -> Format:
        if not isinstance(self.entry.get("ranking", False), bool):
            raise UserError(f"{self.where}: `ranking` must be true or false, got {self.entry['ranking']!r:.40}")
        if self.entry.get("ranking"):
            return Format.PAIRS
        if columns.get("kto_tag"):
            return Format.LABELS
        return {"alpaca": Format.ALPACA, "sharegpt": Format.SHAREGPT, "openai": Format.MESSAGES}[formatting]

    def _fields(self, formatting: str, columns: Mapping[str, str], own: FieldMapping) -> FieldMapping:
        """Return the names of fields: the entry's, with LLaMA-Factory's defaults, and what the source leaves out."""
        named = {name: columns.get(name) for name in ("history", "system", "tools", "chosen", "rejected")}
        named["label"] = columns.get("kto_tag")
        if formatting == "alpaca":
            prompt, output = columns.get("prompt", "instruction"), columns.get("response", "output")
            named |= {"instruction": prompt, "input": columns.get("query", "input"), "output": output}
            if self.entry.get("ranking") or named["label"]:
                named |= {"prompt": prompt, "completion": output}
        else:
            named["messages"] = columns.get("messages", "conversations")
            if self.entry.get("ranking"):
                named["prompt"] = named["messages"]
        return FieldMapping(**{name: text for name, text in named.items() if text}, ignore=own.ignore)

    def _keys(self, formatting: str) -> TurnKeys:
        tags = TAG_KEYS | self._mapping("tags", tuple(TAG_KEYS))
        if not self.entry.get("tags"):
            return MESSAGES_TURNS if formatting == "openai" else SHAREGPT_TURNS
        standard = SHAREGPT_TURNS.roles
        roles = {tags[key]: standard[default] for key, default in TAG_KEYS.items() if default in standard}
        calls = frozenset({tags["function_tag"]})
        return TurnKeys(tags["role_tag"], tags["content_tag"], roles, calls)

    def _mapping(self, key: str, allowed: tuple[str, ...]) -> dict[str, str]:
        found = self.entry.get(key) or {}
        if not isinstance(found, Mapping) or not all(isinstance(text, str) for text in found.values() if text):
            raise UserError(f"{self.where}: `{key}` must be an object of names, got {found!r:.60}")
        unknown = sorted(set(found) - set(allowed))
        if unknown:
            raise UserError(f"{self.where}: unknown `{key}` {listed(unknown)}; allowed are {', '.join(allowed)}")
        return {name: text for name, text in found.items() if text}

    def _one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.entry.get(key) or default
        if value not in allowed:
            raise UserError(f"{self.where}: unknown `{key}` {value!r:.40}; allowed are {', '.join(allowed)}")
        return str(value)

    def _num_samples(self, source: RecordSource) -> dict[str, int]:
        """Return the smaller of both limits. LLaMA-Factory draws that many at random; here they are the first."""
        number = self.entry.get("num_samples")
        if number is None:
            return {}
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"{self.where}: `num_samples` must be a whole number from 1 on, got {number!r:.40}")
        return {"max_samples": min(number, source.max_samples or number)}
