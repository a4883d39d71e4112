"""Calls the operator's own progress server through its Service, as a pod would.

Whether the single running attempt is silent or its reports are lost does not follow from the silence. A call through
DNS, Service, TLS and server that arrives shows that the reports would, too.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable

from stagecoach_api.names import progress_path
from stagecoach_operator.progress_reports import ProgressReports
from stagecoach_operator.settings import Settings

log = logging.getLogger(__name__)

CHECK_SECONDS = 60.0
TIMEOUT_SECONDS = 5.0
TRIES = 6
"""The Service selects standbys as well, which answer 503: with two replicas, one of 64 checks fails by chance."""
UNAUTHORIZED = 401
"""Answer of the active replica to a call without a token."""


async def keep_checking(
    settings: Settings,
    reports: ProgressReports,
    authorities: Callable[[], str | None],
    clock: Callable[[], float] = time.time,
) -> None:
    """Check every minute, for ever, whether this process is reached. `authorities`: returns what pods trust now."""
    while settings.progress_url is not None:
        if await is_reached(settings.progress_url, authorities()):
            reports.reached(clock())
        else:
            log.warning("a call to %s did not arrive here", settings.progress_url)
        await asyncio.sleep(CHECK_SECONDS)


async def is_reached(url: str, certificate: str | None) -> bool:
    """Return whether a call to the Service reaches the active replica, which is this one."""
    import aiohttp

    target = url.rstrip("/") + progress_path("self-check", "self-check")
    tls: ssl.SSLContext | bool = True if certificate is None else ssl.create_default_context(cadata=certificate)
    # A new connection for each try: the Service chooses the replica per connection.
    connector = aiohttp.TCPConnector(force_close=True, ssl=tls)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for _ in range(TRIES):
            try:
                async with session.post(target, json={}) as answer:
                    if answer.status == UNAUTHORIZED:
                        return True
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("%s: %s: %s", target, type(error).__name__, error)
                return False
    return False
