"""The progress server: the protocol, and which pod may report for which attempt."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256

from stagecoach_api.names import progress_audience, progress_path
from stagecoach_api.progress import ProgressEvent, trainer_status
from stagecoach_operator.kube import Unavailable
from stagecoach_operator.object_cache import Cache
from stagecoach_operator.progress_reports import ProgressReports
from stagecoach_operator.progress_server import MAX_BODY_BYTES, BadReport, ProgressServer, report_of
from stagecoach_operator.token_review import CONFIGURATION_PATH, KEYS_PATH, InvalidToken, TokenVerifier
from tests.operator.view_makers import jobset, meta, pod

ISSUER = "https://kubernetes.default.svc"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ATTEMPT = "a-1"
PATH = progress_path("team", ATTEMPT)
AUDIENCE = progress_audience("team", ATTEMPT)
BODY = trainer_status(ProgressEvent(time=1.0, activity="train", done=30, total=100, unit="tokens"), 90.0)


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return encoded(value.to_bytes((value.bit_length() + 7) // 8, "big"))


class Keys:
    """The API server's signing keys."""

    reads = 0

    async def read(self, path: str) -> Any:
        self.reads += 1
        if path == CONFIGURATION_PATH:
            return {"issuer": ISSUER}
        assert path == KEYS_PATH
        public, point = KEY.public_key().public_numbers(), EC_KEY.public_key().public_numbers()
        rsa_key = {"kid": "k1", "kty": "RSA", "e": number(public.e), "n": number(public.n)}
        return {
            "keys": [rsa_key, {"kid": "k2", "kty": "EC", "crv": "P-256", "x": number(point.x), "y": number(point.y)}]
        }


def claims(**changes: Any) -> dict[str, Any]:
    now = time.time()
    bound = {"namespace": "team", "pod": {"name": "a-0", "uid": "uid-a-0"}}
    return {"iss": ISSUER, "aud": [AUDIENCE], "exp": now + 600, "nbf": now - 5, "kubernetes.io": bound, **changes}


def token(payload: dict[str, Any], key: Any = KEY, **header: Any) -> str:
    given = {"alg": "RS256", "kid": "k1", **header}
    signed = f"{encoded(json.dumps(given).encode())}.{encoded(json.dumps(payload).encode())}"
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed.encode(), padding.PKCS1v15(), SHA256())
    else:
        first, second = utils.decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(SHA256())))
        signature = first.to_bytes(32, "big") + second.to_bytes(32, "big")
    return f"{signed}.{encoded(signature)}"


def verify(text: str) -> Any:
    return asyncio.run(TokenVerifier(Keys()).verify(text, AUDIENCE))  # type: ignore[arg-type]


def test_a_valid_token_identifies_its_pod() -> None:
    assert verify(token(claims())).pod_uid == "uid-a-0"
    assert verify(token(claims(), EC_KEY, alg="ES256", kid="k2")).namespace == "team"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("a.b.c", id="not a token"),
        pytest.param(token(claims(), OTHER_KEY), id="another key"),
        pytest.param(token(claims(), kid="k9"), id="an unknown key"),
        pytest.param(token(claims(), alg="none"), id="algorithm none"),
        pytest.param(token(claims(), alg="HS256"), id="a symmetric algorithm"),
        pytest.param(token(claims(), kid="k2", alg="ES256"), id="the wrong kind of key"),
        pytest.param(token(claims(aud=[progress_audience("team", "b-1")])), id="another attempt's"),
        pytest.param(token(claims(aud=None)), id="without an audience"),
        pytest.param(token(claims(iss="https://evil")), id="another issuer"),
        pytest.param(token(claims(exp=time.time() - 60)), id="expired"),
        pytest.param(token(claims(exp=None)), id="without an expiry"),
        pytest.param(token(claims(nbf=time.time() + 600)), id="not valid yet"),
        pytest.param(token(claims(**{"kubernetes.io": {"namespace": "team"}})), id="not bound to a pod"),
        pytest.param(token(claims())[:-4] + "AAAA", id="a changed signature"),
        pytest.param("x" * 10_000, id="far too long"),
    ],
)
def test_an_invalid_token_is_rejected(text: str) -> None:
    with pytest.raises(InvalidToken):
        verify(text)


def test_unknown_keys_are_fetched_at_a_limited_rate() -> None:
    keys, now = Keys(), [1000.0]
    verifier = TokenVerifier(keys, clock=lambda: now[0])  # type: ignore[arg-type]

    async def flood() -> None:
        for _ in range(50):
            with pytest.raises(InvalidToken):
                await verifier.verify(token(claims(), kid="unknown"), AUDIENCE)

    asyncio.run(flood())
    assert keys.reads == 2
    now[0] += 11
    asyncio.run(flood())
    assert keys.reads == 4


def test_without_keys_every_token_is_rejected() -> None:
    class Unreachable:
        async def read(self, path: str) -> Any:
            raise Unavailable(path)

    with pytest.raises(InvalidToken, match="keys cannot be read"):
        asyncio.run(TokenVerifier(Unreachable()).verify(token(claims()), AUDIENCE))  # type: ignore[arg-type]


# -- over the wire -----------------------------------------------------------------------------------------------------


class Bench:
    """A progress server with one live attempt."""

    def __init__(self) -> None:
        self.cache, self.reports = Cache(), ProgressReports()
        self.enqueued: list[str] = []
        self.active = True
        self.cache.put(jobset())
        self.cache.put(pod())
        self.server = ProgressServer(
            self.cache,
            self.reports,
            TokenVerifier(Keys()),  # type: ignore[arg-type]
            self.enqueued.append,
            is_active=lambda: self.active,
        )

    def __call__(self, scenario: Callable[[TestClient[web.Request, web.Application]], Awaitable[None]]) -> None:
        async def run() -> None:
            async with TestClient(TestServer(self.server.app())) as client:
                await scenario(client)

        asyncio.run(run())


async def post(client: Any, payload: dict[str, Any] | None = None, path: str = PATH, body: Any = BODY) -> Any:
    headers = {"Authorization": f"Bearer {token(payload or claims())}"}
    return await client.post(path, headers=headers, **({"data": body} if isinstance(body, bytes) else {"json": body}))


def test_a_report_is_stored_and_the_run_enqueued() -> None:
    bench = Bench()

    async def scenario(client: Any) -> None:
        assert (await post(client)).status == 200

    bench(scenario)
    latest = bench.reports.latest(("run-uid", "a", 1))
    assert latest is not None
    report = latest.report
    assert (report.activity, report.done, report.total, report.unit) == ("train", 30.0, 100.0, "tokens")
    assert (report.percentage, report.remaining_seconds) == (30, 90)
    assert bench.enqueued == ["run-uid"]


def test_only_a_live_pod_of_the_attempt_may_report() -> None:
    bench = Bench()
    bench.cache.put(pod(meta=meta("ended", uid="uid-ended"), phase="Succeeded"))
    bench.cache.put(pod(meta=meta("b-0", uid="uid-b-0"), stage="b"))
    other = progress_path("team", "b-1")

    def of(uid: str, **changes: Any) -> dict[str, Any]:
        return claims(**{"kubernetes.io": {"namespace": "team", "pod": {"uid": uid}}, **changes})

    async def scenario(client: Any) -> None:
        assert (await client.post(PATH, json=BODY)).status == 401
        assert (await post(client, path=other)).status == 401, "the token is for another attempt"
        assert (await post(client, of("uid-stranger"))).status == 403
        assert (await post(client, of("uid-ended"))).status == 403
        assert (await post(client, of("uid-b-0"))).status == 403, "another stage's pod, with this attempt's audience"
        bench.cache.remove("uid-a-1")
        assert (await post(client)).status == 403, "the attempt is gone"

    bench(scenario)
    assert bench.enqueued == []


def test_oversized_malformed_and_frequent_reports_are_rejected() -> None:
    bench = Bench()
    huge = json.dumps({"trainerStatus": {"metrics": [{"name": "x" * MAX_BODY_BYTES, "value": "1"}]}}).encode()

    async def scenario(client: Any) -> None:
        assert (await post(client, body=huge)).status == 413
        assert (await post(client, body=b"not json")).status == 400
        codes = [(await post(client)).status for _ in range(8)]
        assert 200 in codes
        assert codes[-1] == 429

    bench(scenario)


def test_a_standby_answers_503() -> None:
    bench = Bench()
    bench.active = False

    async def scenario(client: Any) -> None:
        answer: aiohttp.ClientResponse = await post(client)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")

    bench(scenario)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b'{"trainerStatus": 1}',
        b'{"trainerStatus": {"metrics": {}}}',
        b'{"trainerStatus": {"metrics": [1]}}',
        b'{"trainerStatus": {"progressPercentage": "much"}}',
        b'{"trainerStatus": {"progressPercentage": Infinity}}',
        b'{"trainerStatus": {"metrics": [{"name": "done", "value": "x"}]}}',
        json.dumps({"trainerStatus": {"metrics": [{"name": "a", "value": "1"}] * 257}}).encode(),
        b"[" * 100_000,
    ],
)
def test_malformed_bodies_raise_bad_report(body: bytes) -> None:
    with pytest.raises(BadReport):
        report_of(body, "uid", 0.0)


def test_reports_of_other_trainers_are_read() -> None:
    """A report as sent by the Kubeflow callback of transformers."""
    body = {"trainerStatus": {"progressPercentage": 42, "metrics": [{"name": "loss", "value": "2.5"}]}}
    report = report_of(json.dumps(body).encode(), "uid", 5.0)
    assert (report.percentage, report.activity, dict(report.metrics)) == (42, "", {"loss": "2.5"})
