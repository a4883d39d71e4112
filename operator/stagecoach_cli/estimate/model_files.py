"""What the files of a model state about its size: `config.json` and safetensors headers, in a folder or in a bucket.

Only the beginnings of files are read, some kilobytes of each: a model of any size is looked at without a download.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from stagecoach_api.model_folders import CONFIG, WEIGHTS, WEIGHTS_INDEX
from stagecoach_api.store import NotFound, Store, StoreError, open_store
from stagecoach_cli.estimate.model_size import ModelShape, UnknownSize, shape_of_config

TOKENIZER = "tokenizer.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = MAX_INDEX_BYTES = 64 << 20
"""The largest published vocabularies have half of that, the indexes of thousands of experts a tenth."""
LENGTH_BYTES = 8
FIRST_BYTES = 32 << 10
"""Read of each weights file first: most headers are shorter, so that one request per file is enough."""
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""
CONCURRENCY = 8
"""Weights files that are looked at together: large models have hundreds."""


@dataclass
class ModelFiles:
    """Models on this machine and on S3. Each is looked at once, and a failure is not tried again.

    `endpoint`, `region`: of S3; credentials are those of the AWS SDK. `unreachable`: URIs that did not answer before,
    with the error.
    """

    endpoint: str | None = None
    region: str | None = None
    unreachable: Mapping[str, StoreError] = field(default_factory=dict)
    _seen: dict[str, ModelShape | UnknownSize] = field(default_factory=dict)

    def shape(self, uri: str) -> ModelShape:
        """Return the shape of a model in Hugging Face layout. Raises UnknownSize with the file and the reason."""
        if uri not in self._seen:
            try:
                self._seen[uri] = self._read_shape(uri)
            except UnknownSize as error:
                self._seen[uri] = error
        found = self._seen[uri]
        if isinstance(found, UnknownSize):
            raise found
        return found

    def num_pieces(self, uri: str) -> int:
        """Return the number of tokens in `config.json` or `tokenizer.json`; 0 if neither is there."""
        store = self._open(uri)
        try:
            if store.exists(CONFIG):
                return self.shape(uri).vocabulary
            found = json.loads(_start_of(store, TOKENIZER, MAX_TOKENIZER_BYTES))
            return len(found["model"]["vocab"]) + len(found.get("added_tokens", ()))
        except NotFound:
            return 0
        except StoreError as error:
            raise _unreadable(store, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnknownSize(f"{store.uri}/{TOKENIZER} does not state the vocabulary ({error})") from error

    def _read_shape(self, uri: str) -> ModelShape:
        store = self._open(uri)
        try:
            shape = shape_of_config(json.loads(_start_of(store, CONFIG, MAX_CONFIG_BYTES)))
        except StoreError as error:
            raise _unreadable(store, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnknownSize(f"{store.uri}/{CONFIG} does not state the model's shape ({error})") from error
        return replace(shape, counted=count_parameters(store))

    def _open(self, uri: str) -> Store:
        if uri in self.unreachable:
            raise UnknownSize(f"{uri}: {self.unreachable[uri].message}")
        try:
            return open_store(uri, self.endpoint, self.region)
        except StoreError as error:
            raise UnknownSize(str(error)) from error


def _unreadable(store: Store, error: StoreError) -> UnknownSize:
    return UnknownSize(f"{store.uri}/{error}")


def _start_of(store: Store, name: str, limit: int) -> bytes:
    """Return a whole file that must not have more than `limit` bytes. Raises ValueError if it has."""
    found = store.read_start(name, limit + 1)
    if len(found) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return found


def count_parameters(store: Store) -> float | None:
    """Return the number of values in the safetensors files of a folder, from their headers; None if they cannot be
    read."""
    try:
        try:
            index = json.loads(_start_of(store, WEIGHTS_INDEX, MAX_INDEX_BYTES))
            names = sorted(set(index["weight_map"].values()))
        except NotFound:
            names = [WEIGHTS]
        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="headers") as pool:
            return sum(pool.map(lambda name: _values_in(store, name), names))
    except (StoreError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _values_in(store: Store, name: str) -> float:
    """Return the number of values in a file: a length in 8 bytes, then JSON with each tensor's shape."""
    found = store.read_start(name, FIRST_BYTES)
    end = LENGTH_BYTES + int.from_bytes(found[:LENGTH_BYTES], "little")
    if end > MAX_HEADER_BYTES:
        raise ValueError(f"{name}: not a safetensors file")
    if end > len(found):
        found = store.read_start(name, end)
    header: dict[str, Any] = json.loads(found[LENGTH_BYTES:end])
    return float(sum(math.prod(item["shape"]) for key, item in header.items() if key != "__metadata__"))
