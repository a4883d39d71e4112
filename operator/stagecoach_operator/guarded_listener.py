"""Serves an aiohttp application to clients that may be hostile: connections are limited in number, rate, time and size.

A TLS connection costs memory and its handshake a millisecond of the event loop, before any token can be checked. A
connection is proven once a request on it was accepted; the others are closed first, and soon.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import logging
import socket
import ssl
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from aiohttp import web

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.5
MAX_PEERS = 4096
"""Addresses whose rate is remembered."""
# asyncio allocates this much for every TLS connection (256 KiB), also for those that never send anything.
TLS_BUFFER_BYTES = 16 * 1024
MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 1024
PAUSE_SECONDS = 1.0
"""Pause of accepting when the process has no file descriptors left."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a listener."""

    total: int = 1024
    """Connections at once. A further one replaces an unproven one, else the one that has been idle for longest."""
    unproven: int = 128
    """Connections at once without an accepted request."""
    unproven_per_peer: int = 16
    new_per_peer: float = 5.0
    """Connections per second from one address, on average."""
    burst_per_peer: float = 32.0
    handshake_seconds: float = 5.0
    request_seconds: float = 10.0
    """From the beginning of a connection, or of a request, to the end of the request's headers."""
    idle_seconds: float = 120.0
    """Between two requests."""
    unread_bytes: int = 256 * 1024
    """Bytes received between two requests."""


@dataclass(eq=False)
class Connection:
    """One connection, from before its handshake."""

    peer: str
    since: float
    """When its state changed last (monotonic)."""
    transport: asyncio.Transport | None = None
    handshake: asyncio.Task[None] | None = None
    proven: bool = False
    idle: bool = False
    """Whether it waits for another request, of which nothing has arrived."""
    busy: bool = False
    """Whether a request is handled, which has limits of its own."""
    unread: int = 0

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self.handshake is not None:
            self.handshake.cancel()  # which closes the socket


class LimitedProtocol(asyncio.Protocol):
    """Passes everything on to aiohttp's protocol, and notes when and how much arrives."""

    def __init__(self, inner: asyncio.Protocol, connection: Connection, listener: GuardedListener) -> None:
        self._inner = inner
        self.connection = connection
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connection.transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        connection = self.connection
        connection.unread += len(data)
        if connection.unread > self._listener.limits.unread_bytes:
            self._listener.refused["size"] += 1
            connection.close()
            return
        if connection.idle:
            connection.idle, connection.since = False, self._listener.clock()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.drop(self.connection)
        self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


@dataclass
class GuardedListener:
    """Accepts connections within limits."""

    app: web.Application
    tls: Callable[[], ssl.SSLContext | None] = lambda: None
    """Returns the context for the next connection: certificates may change."""
    limits: ConnectionLimits = ConnectionLimits()
    clock: Callable[[], float] = time.monotonic
    refused: Counter[str] = field(default_factory=Counter)
    """Connections refused or closed, by limit."""
    connections: dict[Connection, None] = field(default_factory=dict)
    """The oldest first."""
    _unproven: Counter[str] = field(default_factory=Counter)
    """Unproven connections by address."""
    _rates: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    """Connections that an address may still open, and when that was calculated."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.app.middlewares.append(self._track)

    async def start(self, host: str, port: int) -> int:
        """Begin to serve; return the port."""
        # One connection costs a quarter of a megabyte otherwise, whether or not it sends anything.
        asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
        self._runner = web.AppRunner(
            self.app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=2 * self.limits.idle_seconds,  # the sweep is earlier, and counts
            max_headers=MAX_HEADERS,
            max_field_size=MAX_HEADER_BYTES,
            lingering_time=0.0,
        )
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=512)
        self._socket.setblocking(False)
        for work in (self._accept(), self._sweep()):
            self._hold(asyncio.get_running_loop().create_task(work))
        return int(self._socket.getsockname()[1])

    async def cleanup(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        for connection in list(self.connections):
            connection.close()
        await self._runner.cleanup()

    # -- accepting -----------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._socket)
            except OSError as error:  # no file descriptors, or the client has gone
                log.warning("progress: a connection cannot be accepted: %s", error)
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            peer = str(address[0])
            reason = self._objection(peer)
            if reason:
                self.refused[reason] += 1
                accepted.close()
                continue
            connection = Connection(peer, self.clock())
            self.connections[connection] = None
            self._unproven[peer] += 1
            connection.handshake = loop.create_task(self._begin(connection, accepted))
            self._hold(connection.handshake)

    async def _begin(self, connection: Connection, accepted: socket.socket) -> None:
        """Make the handshake, and leave the connection to aiohttp."""
        limit, context = self.limits.handshake_seconds, self.tls()
        inner = cast(Callable[[], asyncio.Protocol], self._runner.server)
        try:
            await asyncio.wait_for(
                asyncio.get_running_loop().connect_accepted_socket(
                    lambda: LimitedProtocol(inner(), connection, self),
                    accepted,
                    ssl=context,
                    ssl_handshake_timeout=None if context is None else limit,
                ),
                limit + SWEEP_SECONDS,
            )
        except (OSError, TimeoutError, asyncio.CancelledError):
            self.refused["handshake"] += 1
            self.drop(connection)

    def _objection(self, peer: str) -> str:
        """Return the limit that a new connection from this address would exceed. Empty if it may be accepted."""
        if not self._take(peer):
            return "rate"
        if self._unproven[peer] >= self.limits.unproven_per_peer:
            return "peer"
        if self._unproven.total() >= self.limits.unproven:
            return "" if self._close_first(proven=False) else "total"
        if len(self.connections) >= self.limits.total:
            return "" if self._close_first(proven=False) or self._close_first(proven=True) else "total"
        return ""

    def _close_first(self, proven: bool) -> bool:
        """Close the connection whose state is the oldest; return whether there is one."""
        found = [item for item in self.connections if item.proven is proven and not item.busy]
        if not found:
            return False
        oldest = min(found, key=lambda item: item.since)
        self.refused["replaced"] += 1
        self.drop(oldest)
        oldest.close()
        return True

    def _take(self, peer: str) -> bool:
        """Take one of the connections that an address may open; return whether there was one."""
        now, limits = self.clock(), self.limits
        left, at = self._rates.pop(peer, (limits.burst_per_peer, now))
        left = min(limits.burst_per_peer, left + (now - at) * limits.new_per_peer)
        self._rates[peer] = (left - 1.0 if left >= 1.0 else left, now)
        if len(self._rates) > MAX_PEERS:
            self._rates.popitem(last=False)
        return left >= 1.0

    # -- living --------------------------------------------------------------------------------------------------------

    def drop(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        if self.connections.pop(connection, False) is None and not connection.proven:
            self._release(connection.peer)

    def _release(self, peer: str) -> None:
        self._unproven[peer] -= 1
        if self._unproven[peer] <= 0:
            del self._unproven[peer]

    @web.middleware
    async def _track(self, request: web.Request, handler: Callable[[web.Request], object]) -> web.StreamResponse:
        """Note that a request is handled, and whether its connection is proven by it. Failures close it."""
        transport = request.transport
        protocol = None if transport is None else transport.get_protocol()
        connection = protocol.connection if isinstance(protocol, LimitedProtocol) else None
        if connection is not None:
            connection.busy = True
        try:
            response: web.StreamResponse = await handler(request)  # type: ignore[misc]
        finally:
            if connection is not None:
                connection.busy, connection.idle, connection.unread = False, True, 0
                connection.since = self.clock()
        if response.status >= 400:
            response.force_close()
        elif connection is not None and not connection.proven and connection in self.connections:
            connection.proven = True
            self._release(connection.peer)
        return response

    async def _sweep(self) -> None:
        """Close connections that are later than their limit."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = self.clock()
            for connection in list(self.connections):
                limit = self.limits.idle_seconds if connection.idle else self.limits.request_seconds
                if not connection.busy and now - connection.since > limit:
                    self.refused["idle" if connection.idle else "request"] += 1
                    self.drop(connection)
                    connection.close()

    def _hold(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
