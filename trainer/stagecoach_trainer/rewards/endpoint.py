"""Concurrent requests to a language model served by an OpenAI-compatible endpoint, within a budget.

Equal requests are sent once. Requests use temperature 0. The client retries transient failures (time-out, lost
connection, 429, 5xx) with increasing delays, and honours the server's Retry-After.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from stagecoach_api.names import ENDPOINT_KEY_FILE, ENV_ENDPOINT_KEYS
from stagecoach_api.outcomes import ExitCode
from stagecoach_api.rewards import Endpoint
from stagecoach_trainer.rewards.term import share_of
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import StageError, UserError

Chat = tuple[Mapping[str, str], ...]
"""Messages of a request: role and content."""

MAX_REPLY_TOKENS = 512
"""Token limit of a reply; leaves enough for a model that reasons before it answers."""

MAX_SHOWN = 300
"""Maximum characters of a server's error that a message quotes."""

_NO_ANSWER = "did not return a chat completion; set `url` to the base URL of an OpenAI-compatible API (…/v1)"


class EndpointUnavailable(StageError):
    """An endpoint did not answer after all retries. An infrastructure failure: the attempt may be retried."""

    exit_code = ExitCode.STORAGE


class Judge:
    """Sends requests to one endpoint.

    Args:
        endpoint: Its address, limits and credentials.
        where: The endpoint's field path, for messages.
        world: The ranks: each gets its share of the budget and of the concurrent requests.

    Raises UserError if the key cannot be read.
    """

    def __init__(self, endpoint: Endpoint, where: str, world: World) -> None:
        self._endpoint = endpoint
        self._where = where
        self._key = read_key(endpoint, where)
        self._client = _client(endpoint, self._key)
        self._headers: dict[str, Any] = {} if self._key else {"Authorization": openai.Omit()}
        self._known: dict[bytes, str] = {}
        self._budget = None if endpoint.max_requests is None else share_of(endpoint.max_requests, world)
        self._concurrency = max(1, endpoint.concurrency // world.size)
        self.spent = 0
        """Requests this rank has sent, not counting retries."""

    @contextmanager
    def for_all_ranks(self) -> Iterator[None]:
        """Let this rank use the budget and concurrency of all ranks, which wait for it and have sent no requests
        yet."""
        shares = self._budget, self._concurrency
        self._budget, self._concurrency = self._endpoint.max_requests, self._endpoint.concurrency
        try:
            yield
        finally:
            self._budget, self._concurrency = shares

    def ask(self, chats: Sequence[Chat]) -> list[str]:
        """Return the reply to each chat, in order.

        Raises:
            UserError: The budget does not cover all new requests, or the endpoint rejects one.
            EndpointUnavailable: The endpoint does not answer.
        """
        keys = [_digest(self._endpoint.model, chat) for chat in chats]
        # Equal chats of a batch share one key, so they become one request.
        new = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in self._known}
        self._require_budget(len(new))
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(self._ask, chat) for chat in new.values()]
            try:
                for key, future in zip(new, futures, strict=True):
                    self._known[key] = future.result()
            except BaseException:  # also Ctrl-C: requests that have not started must not be sent
                pool.shutdown(cancel_futures=True)
                raise
        return [self._known[key] for key in keys]

    def _require_budget(self, wanted: int) -> None:
        if self._budget is not None and self.spent + wanted > self._budget:
            raise UserError(
                f"{self._where}.maxRequests: the budget of {self._endpoint.max_requests:,} requests is exhausted: this "
                f"rank has made {self.spent:,} of its {self._budget:,} and needs {wanted:,} more; raise it"
            )
        self.spent += wanted

    def _ask(self, chat: Chat) -> str:
        messages: Any = [dict(message) for message in chat]
        try:
            completion = self._client.chat.completions.create(
                model=self._endpoint.model,
                messages=messages,
                temperature=0.0,
                max_tokens=MAX_REPLY_TOKENS,
                extra_headers=self._headers,
            )
        except openai.OpenAIError as error:
            raise self._explained(error) from None  # the chained exception holds the request, and with it the key
        except ValueError as error:
            raise UserError(f"{self._name}: {_NO_ANSWER}") from error
        return self._content(completion)

    def _content(self, completion: Any) -> str:
        """Return a completion's text. The client does not validate replies, so any JSON is possible."""
        try:
            content = completion.choices[0].message.content
        except (AttributeError, TypeError, IndexError) as error:
            raise UserError(f"{self._name}: {_NO_ANSWER}") from error
        if content is not None and not isinstance(content, str):
            raise UserError(f"{self._name}: {_NO_ANSWER}")
        return content or ""

    @property
    def _name(self) -> str:
        return f"{self._where}: {self._endpoint.url} ({self._endpoint.model})"

    def _explained(self, error: openai.OpenAIError) -> StageError:
        tries = self._endpoint.retries + 1
        if isinstance(error, openai.APITimeoutError):
            seconds = self._endpoint.timeout_seconds
            return EndpointUnavailable(f"{self._name} did not answer within {seconds:g} s, {tries} times")
        if isinstance(error, openai.APIStatusError):
            answer = f"{self._name} answered {error.status_code}: {self._redacted(error.message)}"
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                return EndpointUnavailable(f"{answer}, {tries} times")
            return UserError(f"{answer}; {_remedy(error.status_code)}")
        if isinstance(error, openai.APIConnectionError):
            return EndpointUnavailable(f"{self._name} cannot be reached ({error.__cause__}), {tries} times")
        return UserError(f"{self._name}: {_NO_ANSWER}")

    def _redacted(self, text: str) -> str:
        """Return a server's message, shortened and without the key, which some servers echo."""
        plain = text.replace(self._key, "***") if self._key else text
        return plain if len(plain) <= MAX_SHOWN else plain[: MAX_SHOWN - 1] + "…"


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "set `credentials` to a Secret with a valid key"
    if status == 404:
        return "check `url` (it usually ends in /v1) and `model`"
    return "the endpoint does not support such requests"


def _client(endpoint: Endpoint, key: str | None) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=key or "none",  # the client would otherwise read OPENAI_API_KEY
        base_url=endpoint.url,
        timeout=endpoint.timeout_seconds,
        max_retries=endpoint.retries,
    )


def _digest(model: str, chat: Chat) -> bytes:
    text = json.dumps([model, [dict(message) for message in chat]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def read_key(endpoint: Endpoint, where: str) -> str | None:
    """Return the endpoint's key; None if `credentials` is unset. Raises UserError if the key is missing or invalid."""
    if endpoint.credentials is None:
        return None
    name = endpoint.credentials.secret_name
    folder = os.environ.get(ENV_ENDPOINT_KEYS)
    field = f"{where}.credentials.secretName"
    if not folder:
        raise UserError(
            f"{field}: {name} is not available; set {ENV_ENDPOINT_KEYS} to a folder that contains "
            f"{name}/{ENDPOINT_KEY_FILE}"
        )
    path = Path(folder) / name / ENDPOINT_KEY_FILE
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{field}: {path} cannot be read ({type(error).__name__}); write the key to this file"
        ) from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{field}: {path} does not contain a key: one line of printable ASCII without spaces")
    return key
