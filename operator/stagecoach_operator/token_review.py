"""Verifies projected service account tokens offline: signature, issuer, audience, validity, and the bound pod.

A TokenReview would cost a request per report and need a cluster-wide permission. PyJWT checks signature and claims; the
key determines the algorithm, whatever the token's header requests (RFC 8725, section 3.1).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt

from stagecoach_operator.kube import Kube, KubeError

KEYS_PATH = "/openid/v1/jwks"
CONFIGURATION_PATH = "/.well-known/openid-configuration"
REFRESH_SECONDS = 600.0
SHORTEST_REFRESH_SECONDS = 10.0
"""Minimum interval of fetches for unknown keys: anyone can send tokens that name one."""
LEEWAY_SECONDS = 10.0
MAX_TOKEN_CHARACTERS = 8192
MAX_KNOWN_TOKENS = 4096
"""Tokens whose signature is not checked again: a pod sends the same one for an hour."""
ALGORITHMS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("RSA", ""): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
}
"""Algorithms by type and curve of the key: those of Kubernetes' API servers and of external signers."""


class InvalidToken(Exception):
    """The token is not valid."""


@dataclass(frozen=True)
class Bearer:
    """The pod a token is bound to."""

    namespace: str
    pod_uid: str


@dataclass(frozen=True)
class SigningKey:
    """A public key of the API server, and what it may have signed with."""

    key: jwt.PyJWK
    algorithms: tuple[str, ...]


@dataclass(frozen=True)
class KnownToken:
    """A token whose signature was right."""

    bearer: Bearer
    begins: float
    expires: float
    generation: int
    """Of the keys it was verified with."""


@dataclass
class TokenVerifier:
    """Verifies tokens with the API server's public keys, which are fetched periodically."""

    kube: Kube
    clock: Callable[[], float] = time.time
    _keys: dict[str, SigningKey] = field(default_factory=dict)
    _issuer: str = ""
    _fetched_at: float = float("-inf")
    _generation: int = 0
    _known: OrderedDict[tuple[str, str], KnownToken] = field(default_factory=OrderedDict)

    async def verify(self, token: str, audience: str) -> Bearer:
        """Return the pod the token is bound to. Raises InvalidToken."""
        now = self.clock()
        known = self._known.get((token, audience))
        is_fresh = now - self._fetched_at <= REFRESH_SECONDS
        if known is not None and is_fresh and known.generation == self._generation:
            _check_times(known.begins, known.expires, now)
            return known.bearer
        key = await self._key(key_id_of(token))
        claims = claims_of(token, key, audience, self._issuer)
        begins, expires = _number(claims.get("nbf", 0)), _number(claims.get("exp"))
        _check_times(begins, expires, now)
        bearer = bearer_of(claims)
        self._known[token, audience] = KnownToken(bearer, begins, expires, self._generation)
        if len(self._known) > MAX_KNOWN_TOKENS:
            self._known.popitem(last=False)
        return bearer

    async def _key(self, key_id: str) -> SigningKey:
        now = self.clock()
        age = now - self._fetched_at
        # An unknown key ID may be the first token after the API server's signing key was rotated.
        if age > REFRESH_SECONDS or (key_id not in self._keys and age > SHORTEST_REFRESH_SECONDS):
            await self._fetch(now)
        try:
            return self._keys[key_id]
        except KeyError:
            raise InvalidToken("it is not signed with a key of the API server") from None

    async def _fetch(self, now: float) -> None:
        # Set before the requests: failing ones are limited, too, and concurrent reports do not fetch the keys again.
        self._fetched_at = now
        try:
            configuration = await self.kube.read(CONFIGURATION_PATH)
            keys = await self.kube.read(KEYS_PATH)
        except KubeError as error:
            # During an outage known keys are used: reports are heartbeats, and rejected ones would look like a hang.
            if not self._keys:
                raise InvalidToken(f"the API server's keys cannot be read: {error}") from error
            return
        found = {str(key.get("kid", "")): signing_key(key) for key in keys.get("keys", ())}
        before = self._keys, self._issuer
        self._issuer = str(configuration.get("issuer", ""))
        self._keys = {key_id: key for key_id, key in found.items() if key is not None}
        # A key that was withdrawn must not stay valid through tokens that are known.
        if (set(self._keys), self._issuer) != (set(before[0]), before[1]):
            self._generation += 1


def signing_key(body: Mapping[str, Any]) -> SigningKey | None:
    """Return a JSON Web Key. None if it is of a kind that no API server signs with."""
    kind = str(body.get("kty", "")), str(body.get("crv", ""))
    algorithms = ALGORITHMS.get(kind, ())
    stated = body.get("alg")
    if stated is not None:
        algorithms = tuple(name for name in algorithms if name == stated)
    try:
        return SigningKey(jwt.PyJWK(dict(body), algorithm=algorithms[0]), algorithms) if algorithms else None
    except jwt.PyJWTError:
        return None


def key_id_of(token: str) -> str:
    """Return the name of the key in a token's header. Raises InvalidToken."""
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise InvalidToken("it is not a JSON Web Token")
    try:
        return str(jwt.get_unverified_header(token).get("kid", ""))
    # RecursionError: deeply nested JSON. ValueError: text that is not ASCII.
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise InvalidToken("it is not a JSON Web Token") from None


def claims_of(token: str, key: SigningKey, audience: str, issuer: str) -> dict[str, Any]:
    """Return the claims of a token for this audience. Its validity in time is not checked. Raises InvalidToken."""
    # An empty issuer matches nothing: the configuration that was fetched may lack it.
    if not issuer:
        raise InvalidToken("it has another issuer")
    try:
        return jwt.decode(
            token,
            key.key.key,
            algorithms=key.algorithms,
            audience=audience,
            issuer=issuer,
            # By the verifier's own clock, in `_check_times`.
            options={"verify_exp": False, "verify_nbf": False, "verify_iat": False, "require": ["exp", "aud", "iss"]},
        )
    except jwt.InvalidAudienceError:
        raise InvalidToken("it is for another audience") from None
    except jwt.InvalidIssuerError:
        raise InvalidToken("it has another issuer") from None
    except jwt.InvalidSignatureError:
        raise InvalidToken("its signature is wrong") from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise InvalidToken(f"it cannot be verified ({type(error).__name__})") from None


def bearer_of(claims: Mapping[str, Any]) -> Bearer:
    """Return the pod in the claims. Raises InvalidToken if there is none."""
    bound = claims.get("kubernetes.io")
    pod = bound.get("pod") if isinstance(bound, dict) else None
    if not isinstance(bound, dict) or not isinstance(pod, dict) or not pod.get("uid"):
        raise InvalidToken("it is not bound to a pod")
    return Bearer(str(bound.get("namespace", "")), str(pod["uid"]))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken("its validity is not numeric")
    return float(value)


def _check_times(begins: float, expires: float, now: float) -> None:
    # Written so that NaN is not valid at any time.
    if not now <= expires + LEEWAY_SECONDS:
        raise InvalidToken("it has expired")
    if not now >= begins - LEEWAY_SECONDS:
        raise InvalidToken("it is not valid yet")
