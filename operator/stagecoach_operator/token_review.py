"""Verifies projected service account tokens offline: signature, issuer, audience, validity, and the bound pod.

A TokenReview would cost a request per report and need a cluster-wide permission. RFC 7519 and 7515. Only the algorithms
API servers sign with are accepted, whatever the token's header requests.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stagecoach_operator.kube import Kube, KubeError

KEYS_PATH = "/openid/v1/jwks"
CONFIGURATION_PATH = "/.well-known/openid-configuration"
REFRESH_SECONDS = 600.0
SHORTEST_REFRESH_SECONDS = 10.0
"""Minimum interval of fetches for unknown keys: anyone can send tokens that name one."""
LEEWAY_SECONDS = 10.0
MAX_TOKEN_CHARACTERS = 8192


class InvalidToken(Exception):
    """The token is not valid."""


@dataclass(frozen=True)
class Bearer:
    """The pod a token is bound to."""

    namespace: str
    pod_uid: str


@dataclass
class TokenVerifier:
    """Verifies tokens with the API server's public keys, which are fetched periodically."""

    kube: Kube
    clock: Callable[[], float] = time.time
    _keys: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _issuer: str = ""
    _fetched_at: float = float("-inf")

    async def verify(self, token: str, audience: str) -> Bearer:
        """Return the pod the token is bound to. Raises InvalidToken."""
        header, claims, signed, signature = split_token(token)
        key = await self._key(str(header.get("kid", "")))
        if not has_signed(key, str(header.get("alg", "")), signed, signature):
            raise InvalidToken("its signature is wrong")
        return bearer(claims, audience, self._issuer, self.clock())

    async def _key(self, key_id: str) -> Mapping[str, Any]:
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
        self._issuer = str(configuration.get("issuer", ""))
        self._keys = {str(key.get("kid", "")): key for key in keys.get("keys", ())}


def split_token(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Return header, claims, signed bytes and signature. Raises InvalidToken."""
    parts = token.split(".")
    if len(token) > MAX_TOKEN_CHARACTERS or len(parts) != 3:
        raise InvalidToken("it is not a JSON Web Token")
    try:
        header, claims = (json.loads(_decoded(part)) for part in parts[:2])
        signature = _decoded(parts[2])
    except (ValueError, binascii.Error, RecursionError):
        raise InvalidToken("it is not a JSON Web Token") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise InvalidToken("it is not a JSON Web Token")
    return header, claims, f"{parts[0]}.{parts[1]}".encode(), signature


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def bearer(claims: Mapping[str, Any], audience: str, issuer: str, now: float) -> Bearer:
    """Return the pod in the claims. Raises InvalidToken unless they are valid for this audience now."""
    # A string or a list of strings (RFC 7519, section 4.1.3).
    audiences = claims.get("aud")
    if audience not in (audiences if isinstance(audiences, list) else [audiences]):
        raise InvalidToken("it is for another audience")
    # An empty issuer matches nothing: the configuration that was fetched may lack it.
    if not issuer or claims.get("iss") != issuer:
        raise InvalidToken("it has another issuer")
    expires, begins = claims.get("exp"), claims.get("nbf", 0)
    if not isinstance(expires, int | float) or now > expires + LEEWAY_SECONDS:
        raise InvalidToken("it has expired")
    if not isinstance(begins, int | float) or now < begins - LEEWAY_SECONDS:
        raise InvalidToken("it is not valid yet")
    bound = claims.get("kubernetes.io")
    pod = bound.get("pod") if isinstance(bound, dict) else None
    if not isinstance(bound, dict) or not isinstance(pod, dict) or not pod.get("uid"):
        raise InvalidToken("it is not bound to a pod")
    return Bearer(str(bound.get("namespace", "")), str(pod["uid"]))


def has_signed(key: Mapping[str, Any], algorithm: str, signed: bytes, signature: bytes) -> bool:
    """Return whether the signature of these bytes was made with a JSON Web Key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        # The key determines the algorithm, so that a header cannot choose how a key is used (RFC 8725, section 3.1).
        if algorithm == "RS256" and key.get("kty") == "RSA":
            numbers = rsa.RSAPublicNumbers(_number(key["e"]), _number(key["n"]))
            numbers.public_key().verify(signature, signed, padding.PKCS1v15(), SHA256())
            return True
        if algorithm == "ES256" and key.get("kty") == "EC" and key.get("crv") == "P-256" and len(signature) == 64:
            point = ec.EllipticCurvePublicNumbers(_number(key["x"]), _number(key["y"]), ec.SECP256R1())
            # JWS concatenates r and s, 32 bytes each (RFC 7518, section 3.4); `cryptography` expects them in DER.
            halves = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
            point.public_key().verify(utils.encode_dss_signature(*halves), signed, ec.ECDSA(SHA256()))
            return True
    except (InvalidSignature, KeyError, ValueError):
        return False
    return False


def _number(text: str) -> int:
    return int.from_bytes(_decoded(text), "big")
