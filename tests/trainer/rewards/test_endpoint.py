"""Judges served by a real HTTP server: the requests, transient failures and permanent ones."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api import rewards as api
from stagecoach_api.names import ENV_ENDPOINT_KEYS
from stagecoach_api.outcomes import Cause, cause_of_exit
from stagecoach_trainer.rewards.endpoint import Chat, EndpointUnavailable, Judge
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.errors import UserError
from tests.trainer.rewards.makers import Behaviour, Endpoint, TinyJudge, endpoint_of, serve

pytestmark = pytest.mark.slow

SECRET = "sk-very-secret"  # noqa: S105


@pytest.fixture(scope="module")
def tiny() -> TinyJudge:
    return TinyJudge()


@pytest.fixture
def endpoint(tiny: TinyJudge) -> Iterator[Endpoint]:
    with serve(tiny.yes_or_no) as running:
        yield running


def question(text: str) -> Chat:
    return ({"role": "user", "content": text},)


def judge_of(url: str, world: World | None = None, **settings: Any) -> Judge:
    return Judge(
        api.Endpoint.model_validate(endpoint_of(url, **settings)), "rewards[0].feedback.endpoint", world or World()
    )


def keep_key(root: Path, monkeypatch: pytest.MonkeyPatch, text: str = SECRET + "\n") -> None:
    (root / "judge-key").mkdir()
    (root / "judge-key" / "apiKey").write_text(text)
    monkeypatch.setenv(ENV_ENDPOINT_KEYS, str(root))


def test_replies_are_the_models_own_in_order(endpoint: Endpoint, tiny: TinyJudge) -> None:
    texts = [f"is {word} an animal" for word in ("a fox", "a dog", "日", "月", "word", "task", *"abcdefghij")]
    replies = judge_of(endpoint.url).ask([question(text) for text in texts])
    assert replies == [tiny.yes_or_no([{"role": "user", "content": text}]) for text in texts]
    assert set(replies) == {"yes", "no"}
    assert all(body["temperature"] == 0 and body["model"] == "judge" for body in endpoint.bodies)


def test_equal_requests_are_sent_once(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint.url)
    first = judge.ask([question("a"), question("b"), question("a")])
    assert judge.ask([question("b"), question("a")]) == [first[1], first[0]]
    assert endpoint.num_requests == judge.spent == 2


def test_no_more_requests_are_under_way_than_allowed(endpoint: Endpoint) -> None:
    endpoint.behaviours = [Behaviour(seconds=0.05) for _ in range(12)]
    judge_of(endpoint.url, concurrency=3).ask([question(str(number)) for number in range(12)])
    assert endpoint.most_at_once == 3


# -- failures in passing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Behaviour(status=429), id="too many requests"),
        pytest.param(Behaviour(status=500), id="an error of the server"),
        pytest.param(Behaviour(status=503), id="a server that starts"),
        pytest.param(Behaviour(seconds=1.0), id="a request that takes too long"),
    ],
)
def test_transient_failures_are_retried(endpoint: Endpoint, tiny: TinyJudge, behaviour: Behaviour) -> None:
    endpoint.behaviours = [behaviour]
    judge = judge_of(endpoint.url, timeoutSeconds=0.5, retries=2)
    assert judge.ask([question("a")]) == [tiny.yes_or_no([{"role": "user", "content": "a"}])]
    assert endpoint.num_requests == 2
    assert judge.spent == 1


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (Behaviour(status=429), "answered 429: "),
        (Behaviour(status=500), "answered 500: "),
        (Behaviour(seconds=0.6), "did not answer within 0.2 s, 2 times"),
    ],
)
def test_persistent_failures_are_infrastructure_failures(
    endpoint: Endpoint, behaviour: Behaviour, expected: str
) -> None:
    endpoint.behaviours = [behaviour] * 2
    with pytest.raises(EndpointUnavailable) as caught:
        judge_of(endpoint.url, timeoutSeconds=0.2, retries=1).ask([question("a")])
    assert expected in str(caught.value)
    assert str(caught.value).startswith("rewards[0].feedback.endpoint: http://127.0.0.1:")
    assert cause_of_exit(caught.value.exit_code) is Cause.INFRASTRUCTURE
    assert endpoint.num_requests == 2


def test_an_unreachable_endpoint_is_reported() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(EndpointUnavailable, match=r"cannot be reached \(.*refused.*\), 1 times"):
            judge_of(f"http://127.0.0.1:{port}/v1", retries=0).ask([question("a")])


# -- failures that stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (Behaviour(status=401), "answered 401: .*set `credentials` to a Secret with a valid key"),
        (Behaviour(status=404), "answered 404: .*check `url`"),
        (Behaviour(status=400), "answered 400: .*does not support such requests"),
        (Behaviour(body="<html>hello</html>", kind="text/html"), "did not return a chat completion"),
        (Behaviour(body="{"), "did not return a chat completion"),
        (Behaviour(body="[]"), "did not return a chat completion"),
        (Behaviour(body='{"choices": []}'), "did not return a chat completion"),
        (Behaviour(body='{"choices": [{"message": {"content": 3}}]}'), "did not return a chat completion"),
    ],
)
def test_rejected_requests_are_user_errors_and_not_retried(
    endpoint: Endpoint, behaviour: Behaviour, expected: str
) -> None:
    endpoint.behaviours = [behaviour]
    with pytest.raises(UserError, match=expected):
        judge_of(endpoint.url, retries=3).ask([question("a")])
    assert endpoint.num_requests == 1


def test_a_reply_without_text_is_empty(endpoint: Endpoint) -> None:
    endpoint.behaviours = [Behaviour(body='{"choices": [{"message": {"role": "assistant", "content": null}}]}')]
    assert judge_of(endpoint.url).ask([question("a")]) == [""]


# -- budget ------------------------------------------------------------------------------------------------------------


def test_an_exhausted_budget_ends_the_stage_before_any_request(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint.url, maxRequests=3)
    judge.ask([question("a"), question("b")])
    with pytest.raises(
        UserError, match=r"maxRequests: the budget of 3 requests is exhausted: .* made 2 of its 3 and needs 2 more"
    ):
        judge.ask([question("a"), question("c"), question("d")])
    assert endpoint.num_requests == 2
    judge.ask([question("c"), question("a")])
    assert judge.spent == 3


def test_ranks_share_the_budget(endpoint: Endpoint) -> None:
    shares = []
    for rank in range(3):
        judge = judge_of(endpoint.url, World(rank=rank, size=3), maxRequests=8)
        with pytest.raises(UserError, match=r"has made 0 of its (2|3) and needs 4 more"):
            judge.ask([question(f"{rank}{number}") for number in range(4)])
        judge.spent = 0
        for number in range(4):
            try:
                judge.ask([question(f"{rank}{number}")])
            except UserError:
                break
        shares.append(judge.spent)
    assert shares == [3, 3, 2]


def test_a_rank_that_asks_for_all_ranks_may_use_all_their_shares(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint.url, World(rank=0, size=3), maxRequests=8, concurrency=6)
    with judge.for_all_ranks():
        judge.ask([question(str(number)) for number in range(8)])
        with pytest.raises(UserError, match="has made 8 of its 8 and needs 1 more"):
            judge.ask([question("one more")])
    assert endpoint.num_requests == judge.spent == 8
    with pytest.raises(UserError, match="has made 8 of its 3"):
        judge.ask([question("one more")])


# -- keys --------------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_nowhere_else_to_be_seen(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep_key(tmp_path, monkeypatch)
    caplog.set_level(logging.DEBUG)
    endpoint.behaviours = [Behaviour(), Behaviour(status=401)]
    judge = judge_of(endpoint.url, secret="judge-key")  # noqa: S106  # a name
    judge.ask([question("a")])
    with pytest.raises(UserError) as caught:
        judge.ask([question("b")])
    assert [headers["Authorization"] for headers in endpoint.headers] == [f"Bearer {SECRET}"] * 2
    assert "no: Bearer ***" in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text + repr(vars(caught.value))
    assert caught.value.__cause__ is None


def test_without_credentials_no_key_is_sent_not_even_the_environments(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    judge_of(endpoint.url).ask([question("a")])
    assert "Authorization" not in endpoint.headers[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "does not contain a key"),
        ("two parts", "does not contain a key"),
        ("a\nb", "does not contain a key"),
        ("密", "does not contain a key"),
        (None, r"judge-key/apiKey cannot be read \(FileNotFoundError\)"),
    ],
)
def test_an_invalid_key_is_reported_before_any_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: str
) -> None:
    keep_key(tmp_path, monkeypatch, text or "")
    if text is None:
        (tmp_path / "judge-key" / "apiKey").unlink()
    with pytest.raises(UserError, match=r"endpoint\.credentials\.secretName: .*" + expected):
        judge_of("http://127.0.0.1:9/v1", secret="judge-key")  # noqa: S106


def test_without_a_folder_of_keys_the_message_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_ENDPOINT_KEYS, raising=False)
    with pytest.raises(UserError, match="set STAGECOACH_ENDPOINT_KEYS to a folder that contains judge-key/apiKey"):
        judge_of("http://127.0.0.1:9/v1", secret="judge-key")  # noqa: S106
