"""Errors, paths and the rate limit of the API server's client."""

from __future__ import annotations

import pytest

from stagecoach_operator.kube import (
    JOBSETS,
    PODS,
    AlreadyExists,
    Conflict,
    Invalid,
    KubeError,
    NotServed,
    ObjectNotFound,
    RequestForbidden,
    TokenBucket,
    Unavailable,
    error_of,
)


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (404, '{"kind": "Status", "reason": "ObjectNotFound", "message": "no such pod"}', ObjectNotFound),
        (404, "404 page not found\n", NotServed),
        (409, '{"kind": "Status", "reason": "AlreadyExists"}', AlreadyExists),
        (409, '{"kind": "Status", "reason": "Conflict"}', Conflict),
        (410, '{"kind": "Status", "reason": "Expired"}', Conflict),
        (403, '{"kind": "Status", "message": "exceeded quota"}', RequestForbidden),
        (422, '{"kind": "Status", "message": "spec.x: Invalid value"}', Invalid),
        (429, "", Unavailable),
        (500, "oops", Unavailable),
        (503, "", Unavailable),
    ],
)
def test_an_error_response_is_classified(status: int, text: str, kind: type[KubeError]) -> None:
    assert type(error_of(status, text)) is kind


def test_retry_after_is_read() -> None:
    error = error_of(429, "", "7")
    assert isinstance(error, Unavailable)
    assert error.retry_after == 7.0


def test_paths_follow_the_api_conventions() -> None:
    assert PODS.path("team", "p", "status") == "/api/v1/namespaces/team/pods/p/status"
    assert JOBSETS.path(None) == "/apis/jobset.x-k8s.io/v1alpha2/jobsets"


def test_writes_are_rate_limited_after_a_burst() -> None:
    now = [0.0]
    bucket = TokenBucket(rate=10.0, burst=3.0, clock=lambda: now[0])
    assert [bucket.wait_seconds() for _ in range(3)] == [0.0] * 3
    assert bucket.wait_seconds() == pytest.approx(0.1)
    now[0] = 10.0
    assert bucket.wait_seconds() == 0.0
