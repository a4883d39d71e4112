"""The progress server: the protocol, and which pod may report for which attempt."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.names import progress_audience, progress_path
from stagecoach_api.progress import ProgressEvent, trainer_status
from stagecoach_operator.kube import PODS, Unavailable
from stagecoach_operator.object_cache import Cache
from stagecoach_operator.progress_reports import ProgressReports
from stagecoach_operator.progress_server import MAX_BODY_BYTES, BadReport, ProgressServer, report_of
from stagecoach_operator.token_review import CONFIGURATION_PATH, KEYS_PATH, InvalidToken, TokenVerifier
from tests.operator.makers import Operator, World, data_stage
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


PRIVATE_KEYS: dict[str, Any] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), KEY),
    "ES256": EC_KEY,
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


@dataclass
class KeysOf:
    """An API server that signs with one key."""

    private: Any
    stated: str | None = None
    """The key's own `alg`."""

    async def read(self, path: str) -> Any:
        if path == CONFIGURATION_PATH:
            return {"issuer": ISSUER}
        name = {"Ed": "EdDSA", "EC": "ES256", "El": "ES256"}.get(type(self.private).__name__[:2], "RS256")
        body = jwt.get_algorithm_by_name(name).to_jwk(self.private.public_key(), as_dict=True)
        return {"keys": [{**body, "kid": "k", **({} if self.stated is None else {"alg": self.stated})}]}


def signed_by(algorithm: str, keys: KeysOf, header: str | None = None) -> Any:
    text = jwt.encode(claims(), PRIVATE_KEYS[algorithm], algorithm, {"kid": "k", "alg": header or algorithm})
    return asyncio.run(TokenVerifier(keys).verify(text, AUDIENCE))  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", PRIVATE_KEYS)
def test_tokens_of_every_algorithm_of_api_servers_are_accepted(algorithm: str) -> None:
    """EKS signs with RS256, kubeadm with RS256 or ES256; a key of ES384 or RS384 was refused."""
    assert signed_by(algorithm, KeysOf(PRIVATE_KEYS[algorithm])).pod_uid == "uid-a-0"
    assert signed_by(algorithm, KeysOf(PRIVATE_KEYS[algorithm], stated=algorithm)).pod_uid == "uid-a-0"


def test_a_key_that_states_its_algorithm_is_used_with_no_other() -> None:
    with pytest.raises(InvalidToken):
        signed_by("RS512", KeysOf(KEY, stated="RS256"))


def test_a_known_token_is_not_checked_again_but_still_expires() -> None:
    now = [time.time()]
    verifier = TokenVerifier(Keys(), clock=lambda: now[0])  # type: ignore[arg-type]
    text = token(claims())

    async def scenario() -> None:
        first = await verifier.verify(text, AUDIENCE)
        assert await verifier.verify(text, AUDIENCE) is first
        with pytest.raises(InvalidToken, match="another audience"):
            await verifier.verify(text, progress_audience("team", "b-1"))
        now[0] += 700
        with pytest.raises(InvalidToken, match="expired"):
            await verifier.verify(text, AUDIENCE)

    asyncio.run(scenario())


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


@pytest.mark.parametrize(
    ("value", "done"), [("inf", 0.0), ("1e300", 0.0), ("nan", 0.0), ("-5", 0.0), ("1e15", 1e15), (12, 12.0)]
)
def test_a_number_that_fits_no_status_is_dropped_and_counted(value: Any, done: float) -> None:
    """The report is a heartbeat all the same: a training with a NaN in its figures does not hang."""
    dropped: Counter[str] = Counter()
    body = json.dumps({"trainerStatus": {"metrics": [{"name": "done", "value": value}]}}).encode()
    assert report_of(body, "uid", 0.0, dropped).done == done
    assert dropped == ({} if done else {"done": 1})


def test_text_of_a_report_is_made_printable() -> None:
    metrics = [{"name": "activity", "value": "tr\ud800ain\u0000\n"}]
    report = report_of(json.dumps({"trainerStatus": {"metrics": metrics}}).encode(), "uid", 0.0)
    assert report.activity == "tr?ain  "


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "done", "total", "inf", "1e300", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["name", "value", "x"]), inner, max_size=3),
    max_leaves=6,
)
METRIC = st.fixed_dictionaries({"name": st.sampled_from(["done", "total", "unit", "activity"]) | JSON, "value": JSON})
REPORT = st.fixed_dictionaries(
    {},
    optional={
        "metrics": st.lists(METRIC, max_size=5) | JSON,
        "progressPercentage": JSON,
        "estimatedRemainingSeconds": JSON,
    },
)


def test_whatever_a_pod_reports_the_server_answers_and_the_turn_does_not_raise(tmp_path: Path) -> None:
    """A report with `done: 1e300` made every later turn of its run raise."""
    world = World(tmp_path)
    world.input("a.txt")
    world.holds.add("a")
    uid = world.submit(data_stage("a"))
    loop = asyncio.new_event_loop()
    operator = loop.run_until_complete(started(world))
    pod_uid = world.api.all_of(PODS)[0]["metadata"]["uid"]

    @settings(max_examples=150, deadline=None)
    @given(REPORT | JSON)
    def holds(status: Any) -> None:
        try:
            report = report_of(json.dumps({"trainerStatus": status}).encode(), pod_uid, world.now)
        except BadReport:
            return
        operator.reconciler.reports.record((uid, "a", 1), report)
        world.now += 30
        loop.run_until_complete(operator.reconciler.reconcile(uid))
        json.dumps(world.api.objects["trainingruns", "team", "demo"], allow_nan=False).encode()

    holds()
    operator.die()
    loop.close()


async def started(world: World) -> Operator:
    """Return an operator whose first attempt is running."""
    operator = Operator(world)
    for _ in range(6):
        await operator.settle()
        world.tick()
    return operator
