"""Hostile clients of the progress server: half-open, slow, large and many connections are closed, and cost little."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from stagecoach_operator.guarded_listener import ConnectionLimits, GuardedListener
from tests.operator.certificates import Certificates, make_certificates

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
QUICK = ConnectionLimits(
    handshake_seconds=0.6, request_seconds=0.6, idle_seconds=0.6, new_per_peer=1e6, burst_per_peer=1e6
)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def serve(
    limits: ConnectionLimits,
    scenario: Callable[[GuardedListener, int], Awaitable[None]],
    certificates: Certificates | None = None,
) -> None:
    """Run a scenario against a server whose requests succeed, except those at `/refused`."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=401 if request.path == "/refused" else 200)

    async def run() -> None:
        app = web.Application(client_max_size=1024)
        app.router.add_post("/{path:.*}", handle)
        context = None if certificates is None else certificates.server_context()
        listener = GuardedListener(app, lambda: context, limits)
        port = await listener.start("127.0.0.1", 0)
        try:
            await asyncio.wait_for(scenario(listener, port), 20)
        finally:
            await listener.cleanup()
        assert listener.connections == {}
        assert listener._unproven.total() == 0

    asyncio.run(run())


async def connect(
    port: int, sent: bytes = b"", context: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(sent)
    await writer.drain()
    return reader, writer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait until the server has closed a connection without an answer."""
    with contextlib.suppress(OSError):
        return await reader.read() == b""
    return True


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD + b"Content-Le"], ids=["nothing", "a line", "a header"])
def test_a_connection_without_a_request_is_closed(sent: bytes, certificates: Certificates) -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        reader, _ = await connect(port, sent, certificates.client_context())
        assert await is_closed(reader)
        assert listener.refused["request"] == 1

    serve(QUICK, scenario, certificates)


def test_a_connection_without_a_handshake_is_closed(certificates: Certificates) -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        reader, _ = await connect(port, b"\x16\x03")
        assert await is_closed(reader)
        while listener.connections:
            await asyncio.sleep(0.01)
        assert listener.refused["handshake"] == 1

    serve(QUICK, scenario, certificates)


def test_one_address_keeps_few_connections_open_however_many_it_opens(certificates: Certificates) -> None:
    """3,000 half-open TLS connections took 928 MB, for ever."""

    async def scenario(listener: GuardedListener, port: int) -> None:
        context = certificates.client_context()
        kept: list[object] = []

        async def half_open() -> None:
            with contextlib.suppress(OSError):
                kept.append(await connect(port, HEAD, context))

        most = 0
        for _ in range(10):
            await asyncio.gather(*(half_open() for _ in range(20)))
            most = max(most, len(listener.connections))
        assert most == listener.limits.unproven_per_peer
        assert listener.refused["peer"] >= 100

    serve(ConnectionLimits(new_per_peer=1e6, burst_per_peer=1e6), scenario, certificates)


def test_an_address_opens_few_connections_per_second() -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        for _ in range(20):
            reader, writer = await connect(port, HEAD + b"\r\n")
            with contextlib.suppress(OSError):
                await reader.read(1)
            writer.close()
        assert listener.refused["rate"] >= 10

    serve(ConnectionLimits(burst_per_peer=5, new_per_peer=0.1), scenario)


def test_a_proven_connection_stays_when_others_fill_the_server() -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        reader, writer = await connect(port, HEAD + b"Content-Length: 0\r\n\r\n")
        assert b"200" in await reader.readline()
        kept = [await connect(port, HEAD) for _ in range(6)]
        await asyncio.sleep(0.05)
        assert len(listener.connections) <= 4
        assert listener.refused["replaced"] >= 3, "the oldest without a request make room"
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        text = await reader.readuntil(b"200")
        assert text
        assert kept

    limits = ConnectionLimits(total=4, unproven=3, unproven_per_peer=100, new_per_peer=1e6, burst_per_peer=1e6)
    serve(limits, scenario)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(4):
                async with session.post(f"http://127.0.0.1:{port}/") as answer:
                    assert answer.status == 200
                await asyncio.sleep(0.05)
            assert len(listener.connections) == 1, "all requests used one connection"
            while listener.connections:
                await asyncio.sleep(0.05)
        assert listener.refused["idle"] == 1

    serve(QUICK, scenario)


def test_endless_headers_and_bodies_are_cut_off() -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        for head in (HEAD, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"):
            reader, writer = await connect(port, head)
            with contextlib.suppress(OSError):
                for number in range(500):
                    piece = b"a" * 2000
                    writer.write(b"%d: %s\r\n" % (number, piece) if head is HEAD else b"7d0\r\n" + piece + b"\r\n")
                    await writer.drain()
            with contextlib.suppress(OSError):
                await reader.read()
            assert reader.at_eof() or reader.exception() is not None

    serve(ConnectionLimits(unread_bytes=32_000), scenario)


def test_a_refused_request_closes_its_connection() -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        reader, _ = await connect(port, b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" * 50)
        text = await reader.read()
        assert text.count(b"HTTP/1.1 401") == 1, "requests after a refused one are not looked at"

    serve(ConnectionLimits(), scenario)


def test_a_request_on_a_kept_connection_costs_no_handshake(certificates: Certificates) -> None:
    async def scenario(listener: GuardedListener, port: int) -> None:
        connector = aiohttp.TCPConnector(ssl=certificates.client_context())
        async with aiohttp.ClientSession(connector=connector) as session:
            url = f"https://127.0.0.1:{port}/"
            began = 0.0
            for number in range(220):
                if number == 20:
                    began = time.process_time()
                async with session.post(url, data=b"x" * 400) as answer:
                    assert answer.status == 200
            # Client and server together; a handshake alone takes them 3 ms.
            assert (time.process_time() - began) / 200 < 0.002
            assert len(listener.connections) == 1

    serve(ConnectionLimits(), scenario, certificates)
