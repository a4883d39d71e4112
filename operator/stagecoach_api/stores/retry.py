"""Calls that are made again: exponential waits with jitter, bounded in number and in time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

OUTAGE_PAUSE_SECONDS = 15.0
"""How long a driver leaves a store alone that did not answer after all retries of a call."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a call is repeated."""

    max_attempts: int = 10
    """Calls in all. With the waits below a store may be away for about 70 seconds."""

    first_contact_attempts: int = 4
    """Calls in all while the store has never answered: then its address is more likely wrong than it is down."""

    base_seconds: float = 0.5
    """Wait after the first failure; doubled after each."""

    max_seconds: float = 20.0
    """Longest single wait."""

    deadline_seconds: float = 300.0
    """No call is repeated later than this after the first."""

    def wait_seconds(self, failures: int, jitter: float) -> float:
        """Return the wait after so many failures (≥ 1): half of it fixed, half scaled by `jitter` in [0, 1), so that
        the ranks of a run do not come back all at once."""
        longest = min(self.max_seconds, self.base_seconds * 2.0 ** (failures - 1))
        return longest * (0.5 + 0.5 * jitter)


@dataclass(frozen=True)
class Retrier:
    """Repeats calls by a policy; clock, sleep and randomness are given, so that tests need not wait."""

    policy: RetryPolicy = RetryPolicy()
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def call(
        self, operation: Callable[[int], T], is_transient: Callable[[Exception], bool], max_attempts: int | None = None
    ) -> T:
        """Return `operation(attempt)`, attempts counted from 1; the last error is raised when attempts or time are used
        up, any error that is not transient at once. `max_attempts`: None takes the policy's."""
        limit = max_attempts or self.policy.max_attempts
        started = self.clock()
        attempt = 1
        while True:
            try:
                return operation(attempt)
            except Exception as error:
                wait = self.policy.wait_seconds(attempt, self.jitter())
                late = self.clock() - started + wait > self.policy.deadline_seconds
                if attempt >= limit or late or not is_transient(error):
                    raise
            self.sleep(wait)
            attempt += 1
