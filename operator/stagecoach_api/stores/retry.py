"""Retries of calls: exponential back-off with jitter, bounded in number and in time."""

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
    """How often, and for how long, a call is retried."""

    # Nine waits, 0.5 + 1 + 2 + 4 + 8 + 16 + 3 × 20 s, of which the jitter leaves three quarters on average.
    max_attempts: int = 10
    """Calls in total. With the waits below, a store may be unavailable for about 70 seconds."""

    first_contact_attempts: int = 4
    """Calls in total while the store has never answered: its address is more likely wrong than the store is down."""

    base_seconds: float = 0.5
    """Wait after the first failure; doubled after each further one."""

    max_seconds: float = 20.0
    """Longest single wait."""

    deadline_seconds: float = 300.0
    """No call is retried later than this after the first one."""

    def wait_seconds(self, failures: int, jitter: float) -> float:
        """Return the wait after `failures` (≥ 1) failures. `jitter`: in [0, 1).

        Half of it is fixed and half is scaled by the jitter, so that the ranks of a run do not retry all at once.
        """
        longest = min(self.max_seconds, self.base_seconds * 2.0 ** (failures - 1))
        return longest * (0.5 + 0.5 * jitter)


@dataclass(frozen=True)
class StorePatience:
    """How long a caller waits for a store."""

    connect_seconds: float = 10.0
    """Limit of a connection's set-up."""

    read_seconds: float = 60.0
    """Limit of the silence while a response is awaited or read."""

    listing_seconds: float | None = None
    """Limit of listing one input, which takes a request per 1,000 objects. If unset: no limit."""

    read_bytes: int | None = None
    """Largest object that is read into memory. If unset: no limit."""

    retries: RetryPolicy = RetryPolicy()


TRANSFERS = StorePatience()
"""For those who transfer data: without it they have nothing else to do."""
CONTROL_PLANE = StorePatience(
    connect_seconds=3.0,
    read_seconds=5.0,
    listing_seconds=30.0,
    read_bytes=32 << 20,
    retries=RetryPolicy(max_attempts=2, first_contact_attempts=2, max_seconds=0.5, deadline_seconds=10.0),
)
"""For those who look things up for many others: they come back later."""


@dataclass(frozen=True)
class Retrier:
    """Retries calls by a policy. Clock, sleep and randomness are parameters, so that tests need not wait."""

    policy: RetryPolicy = RetryPolicy()
    sleep: Callable[[float], None] = time.sleep
    # Monotonic: a correction of the system's clock neither ends the retries nor prolongs them.
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def call(
        self, operation: Callable[[int], T], is_transient: Callable[[Exception], bool], max_attempts: int | None = None
    ) -> T:
        """Return `operation(attempt)`, with attempts counted from 1.

        Raises the last error when attempts or time are used up, and a non-transient error at once. `max_attempts`: if
        None, the policy's.
        """
        limit = max_attempts or self.policy.max_attempts
        started = self.clock()
        attempt = 1
        while True:
            try:
                return operation(attempt)
            except Exception as error:
                wait = self.policy.wait_seconds(attempt, self.jitter())
                # Give up before a wait that would end after the deadline, rather than after it.
                late = self.clock() - started + wait > self.policy.deadline_seconds
                if attempt >= limit or late or not is_transient(error):
                    raise
            self.sleep(wait)
            attempt += 1
