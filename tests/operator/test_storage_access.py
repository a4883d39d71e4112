"""The operator uses its own credentials exactly where its settings allow it, however an endpoint is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.spec import Storage
from stagecoach_operator.settings import Settings
from stagecoach_operator.storage_access import AllowedStorage, endpoint_weakness, normalised, place_of

SETTINGS = Settings(
    trainer_image="trainer:1",
    trainer_code="code",
    storage=Storage(uri="s3://own/runs", inputs="s3://inputs/x", endpoint="https://s3.example.com"),
    allowed_storage=(
        AllowedStorage(buckets=("team-*",)),
        AllowedStorage(endpoint="http://10.0.0.7:9000", buckets=("lab",)),
    ),
)


@pytest.mark.parametrize(
    ("uri", "endpoint", "allowed"),
    [
        ("s3://own/else", "https://s3.example.com", True),
        ("s3://inputs/else", "https://S3.EXAMPLE.com:443/", True),
        ("s3://other/x", "https://s3.example.com", False),
        ("s3://own/x", None, False),
        ("s3://own/x", "http://s3.example.com", False),
        ("s3://own/x", "https://s3.example.com:8443", False),
        ("s3://own/x", "https://s3.example.com.evil.org", False),
        ("s3://own/x", "https://user@s3.example.com", False),
        ("s3://own/x", "https://evil.org\\@s3.example.com", False),
        ("s3://own/x", "https://evil.org#@s3.example.com", False),
        ("s3://own/x", "https://evil.org/https://s3.example.com", False),
        ("s3://team-7/x", None, True),
        ("s3://team-7/x", "", True),
        ("s3://ateam-7/x", None, False),
        ("s3://lab/x", "http://10.0.0.7:9000", True),
        ("s3://lab/x", "http://10.0.0.7", False),
        ("file:///var/lib", None, False),
    ],
)
def test_credentials_go_to_the_own_storage_and_what_is_allowed(uri: str, endpoint: str | None, allowed: bool) -> None:
    assert SETTINGS.allows_place(place_of(uri, endpoint)) is allowed


def test_without_a_storage_of_its_own_the_operator_signs_for_nobody() -> None:
    bare = Settings(trainer_image="trainer:1", trainer_code="code")
    assert not bare.allows_place(place_of("s3://any/x", None))
    assert not bare.allows_place(place_of("/", None))


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://s3.example.com",
        "https://127.0.0.1",
        "https://10.1.2.3:9000",
        "https://169.254.169.254",
        "https://[::1]",
        "https://[fd00::1]",
        "https://[::ffff:10.0.0.1]",
        "https://2130706433",
        "https://0x7f.1",
        "https://localhost",
        "https://minio",
        "https://minio.storage.svc",
        "https://minio.storage.svc.cluster.local.",
        "https://metadata.google.internal",
        "https://user:password@s3.example.com",
        "https://[broken",
        "ftp://s3.example.com",
        "https://",
    ],
)
def test_unencrypted_and_inner_endpoints_are_refused_unless_allowed(endpoint: str) -> None:
    assert endpoint_weakness(endpoint)


@pytest.mark.parametrize("endpoint", ["https://s3.example.com", "https://8.8.8.8:9000", "https://s3.eu.example.org/x"])
def test_public_encrypted_endpoints_are_not_weak(endpoint: str) -> None:
    assert endpoint_weakness(endpoint) == ""


@given(st.text(alphabet="htps:/.@#?[]\\-x3e%0", max_size=40))
def test_any_text_can_be_asked_about_and_its_normal_form_is_stable(endpoint: str) -> None:
    assert isinstance(endpoint_weakness(endpoint), str)
    assert normalised(normalised(endpoint)) == normalised(endpoint) or normalised(endpoint) == ""
    if not SETTINGS.allows_place(place_of("s3://own/x", endpoint)):
        return
    assert normalised(endpoint) == "https://s3.example.com"
