"""Streams under load: every byte arrives once and in order, whatever the sizes and the weather.

The promise: both ends compare SHA-256 of what was meant with what came, around every buffer's edge,
in every send mode, on asyncio's own loop as on ours; a failure names the seed that repeats it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest

import uringloop
from tests.conftest import MONITORS, loop_named
from tests.connections import (
    MIB,
    TOO_MUCH,
    BufferedPeer,
    Peer,
    digest,
    payload,
    read,
    read_now,
    read_to_end,
    turns,
    wired,
)
from tests.support import run

AnyLoop = asyncio.AbstractEventLoop

BUFFERS_KIB = (64, 120, 128, 256)
SIZES = sorted({1, MIB, *(kib * 1024 + by for kib in BUFFERS_KIB for by in (-1, 0, 1))})
STYLES = ("Protocol", "BufferedProtocol", "streams")
STYLED = pytest.mark.parametrize("style", STYLES)
LOOPS = ("stock", *MONITORS, "io_uring ring")
MODES = [f"{monitor} {mode}" for monitor in MONITORS for mode in ("now", "callback", "turn")]
MODES.append("io_uring sends")


@pytest.fixture(params=LOOPS)
def any_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyLoop]:
    """asyncio's own loop, which shows that the test is right, and ours on each monitor."""
    yield from loop_named(request.param, monkeypatch)


@pytest.fixture(params=["stock", *MODES])
def sending_loop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AnyLoop]:
    """asyncio's own loop, and ours on each monitor in each send mode."""
    yield from loop_named(request.param, monkeypatch)


# ------------------------------------------------------------------------------ echo in every style


class Echo(Peer):
    """Sends back what it gets, and ends when its peer does."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


class BufferedEcho(BufferedPeer):
    """The same from its own buffer, which the next read overwrites."""

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        self.transport.write(memoryview(self.buffer)[:nbytes])


class StreamEnd:
    """One end of a connection with streams, told as a Peer is."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = asyncio.Event()

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(256 * 1024):
            self.data += piece
            writer.write(piece)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
        self.ended.set()


@contextlib.asynccontextmanager
async def echo_server(style: str) -> AsyncIterator[tuple[tuple[str, int], asyncio.Queue[Any]]]:
    """A server; its address, and its ends of the connections as they come."""
    loop = asyncio.get_running_loop()
    made: asyncio.Queue[Any] = asyncio.Queue()

    def factory() -> Any:
        end = {"Protocol": Echo, "BufferedProtocol": BufferedEcho}[style]()
        made.put_nowait(end)
        return end

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.put_nowait(end := StreamEnd())
        await end.echo(reader, writer)

    if style == "streams":
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    else:
        server = await loop.create_server(factory, "127.0.0.1", 0, backlog=1000)
    yield server.sockets[0].getsockname(), made
    server.close()
    await server.wait_closed()


async def exchange(style: str, address: tuple[str, int], data: bytes) -> bytes:
    """Send everything and the end; what came back."""
    loop = asyncio.get_running_loop()
    if style == "streams":
        reader, writer = await asyncio.open_connection(*address, limit=MIB)
        reading = asyncio.ensure_future(reader.read())
        writer.write(data)
        writer.write_eof()
        answer = await reading
        writer.close()
        await writer.wait_closed()
        return answer
    make = {"Protocol": Peer, "BufferedProtocol": BufferedPeer}[style]
    transport, near = await loop.create_connection(make, *address)
    transport.write(data)
    transport.write_eof()
    await near.lost()
    assert near.error is None
    return bytes(near.data)


async def exchange_every_size(style: str) -> None:
    async with echo_server(style) as (address, made):
        for size in SIZES:
            data = payload(size)
            answer = await exchange(style, address, data)
            end = made.get_nowait()
            if style == "streams":
                await end.ended.wait()
            else:
                await end.lost()
            assert digest(answer) == digest(end.data) == digest(data), f"{size} bytes"


@STYLED
def test_every_size_around_every_buffer_goes_there_and_back(
    sending_loop: AnyLoop, style: str
) -> None:
    run(sending_loop, exchange_every_size(style))


@STYLED
def test_debug_mode_carries_every_size_too(any_loop: AnyLoop, style: str) -> None:
    any_loop.set_debug(True)
    cast(Any, any_loop).slow_callback_duration = 10
    run(any_loop, exchange_every_size(style))


@STYLED
def test_messages_of_every_size_follow_each_other_on_one_connection(
    any_loop: AnyLoop, style: str
) -> None:
    """Lock-step, so each answer has come before the next question."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with echo_server(style) as (address, made):
            with socket.create_connection(address) as sock:
                sock.setblocking(False)
                for size in SIZES:
                    sending = asyncio.ensure_future(loop.sock_sendall(sock, data := payload(size)))
                    assert digest(await read(sock, size)) == digest(data), f"{size} bytes"
                    await sending
            end = await made.get()
            if style == "streams":
                await end.ended.wait()
            else:
                await end.lost()
            assert digest(end.data) == digest(b"".join(map(payload, SIZES)))

    run(any_loop, main())


# --------------------------------------------------------------------------------- many connections


@pytest.mark.parametrize("style", ["Protocol", "BufferedProtocol"])
def test_1000_connections_at_once_get_each_their_own_bytes(
    any_loop: AnyLoop, many_files: None, style: str
) -> None:
    """Three rounds on every connection, of sizes that differ; then all end at once."""

    def make() -> Peer:
        return Peer() if style == "Protocol" else BufferedPeer(bytearray(4096))

    async def one(address: tuple[str, int], seed: int) -> None:
        transport, near = await asyncio.get_running_loop().create_connection(make, *address)
        for number in range(3):
            data = payload(100 + seed * 7 % 3000, seed + number)
            del near.data[:]
            transport.write(data)
            await near.received(len(data))
            assert near.data == data
        transport.close()
        await near.lost()

    async def main() -> int:
        async with echo_server(style) as (address, made):
            await asyncio.gather(*(one(address, seed) for seed in range(1000)))
            for _ in range(made.qsize()):
                end = made.get_nowait()
                await end.lost()
                assert end.error is None
                made.put_nowait(end)
            return made.qsize()

    assert run(any_loop, main(), limit=60) == 1000


# ------------------------------------------------------------------------------------- slow readers


class Writer(Peer):
    """Writes while it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = asyncio.Event()
        self.may_write.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.may_write.clear()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.may_write.set()


async def stream_slowly(style: str, chunk: bytes, count: int) -> None:
    """Send a chunk many times to a reader that rests after every MiB."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    done = asyncio.Event()
    total = len(chunk) * count
    rests = 0

    class Slow(Peer):
        def data_received(self, data: bytes) -> None:
            nonlocal rests
            received.extend(data)
            if len(received) >= (rests + 1) * MIB:
                rests += 1
                self.transport.pause_reading()
                loop.call_later(0.001, self.transport.resume_reading)

        def connection_lost(self, exc: Exception | None) -> None:
            assert exc is None
            done.set()

    class BufferedSlow(BufferedPeer, Slow):
        data_received = Slow.data_received

    async def read_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal rests
        while piece := await reader.read(MIB):
            received.extend(piece)
            if len(received) >= (rests + 1) * MIB:
                rests += 1
                await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
        done.set()

    if style == "streams":
        server = await asyncio.start_server(read_slowly, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(count):
            writer.write(chunk)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
    else:
        make = Slow if style == "Protocol" else BufferedSlow
        server = await loop.create_server(make, "127.0.0.1", 0)
        transport, near = await loop.create_connection(Writer, *server.sockets[0].getsockname())
        _, high = transport.get_write_buffer_limits()
        for _ in range(count):
            await near.may_write.wait()
            transport.write(chunk)
            assert transport.get_write_buffer_size() <= high + len(chunk)
        transport.close()
        await near.lost()
        assert "pause" in near.events
    await done.wait()
    server.close()
    await server.wait_closed()
    assert rests >= total // MIB // 2
    assert digest(received) == digest(chunk * count)


@STYLED
def test_a_slow_reader_gets_all_of_12_mib(sending_loop: AnyLoop, style: str) -> None:
    run(sending_loop, stream_slowly(style, payload(MIB + 1), 12), limit=30)


@pytest.mark.slow
@STYLED
def test_a_slow_reader_gets_all_of_100_mib(any_loop: AnyLoop, style: str) -> None:
    run(any_loop, stream_slowly(style, payload(256 * 1024), 400), limit=120)


# ---------------------------------------------------------------------------------- narrow sockets

#: Both ways to receive, and all to send, under readiness and requests of the ring.
ENGINES = pytest.mark.parametrize(
    "any_loop",
    ["stock", "epoll", *(f"io_uring {mode}" for mode in ("readiness", "auto", "ring", "sends"))],
    indirect=True,
)


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets that hold a few KiB: nearly every send is short."""
    with socket.socket() as listener:
        near = socket.socket()
        for sock in (listener, near):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        near.connect(listener.getsockname())
        far, _ = listener.accept()  # with the listener's sizes
    far.setblocking(False)
    return near, far


@ENGINES
@pytest.mark.parametrize("seed", [1, 2])
def test_messages_of_random_sizes_pass_narrow_sockets_both_ways(
    any_loop: AnyLoop, seed: int
) -> None:
    async def main() -> None:
        source = random.Random(seed)
        sizes = [1, MIB, *(int(2 ** source.uniform(0, 20)) for _ in range(20))]
        source.shuffle(sizes)
        near, far = narrow_pair()
        with far:
            _, echo = await any_loop.create_connection(Echo, sock=near)

            async def send() -> None:
                for number, size in enumerate(sizes):
                    await any_loop.sock_sendall(far, payload(size, number))
                far.shutdown(socket.SHUT_WR)

            sending = asyncio.create_task(send())
            answer = await read_to_end(far)
            await sending
            await echo.lost()
        meant = b"".join(payload(size, number) for number, size in enumerate(sizes))
        assert digest(answer) == digest(echo.data) == digest(meant), f"seed {seed}"

    run(any_loop, main(), limit=30)


async def hold_back(total_bytes: int, waits_for: str) -> None:
    """Write to a peer that at first reads nothing, then everything; what waits stays bounded. The
    ring sends only what nothing is ahead of.
    """
    loop = asyncio.get_running_loop()
    source = random.Random(1)
    data = payload(100_000)
    meant, came = hashlib.sha256(), hashlib.sha256()
    near, far = narrow_pair()
    transport, writer = await loop.create_connection(Writer, sock=near)
    _, high = transport.get_write_buffer_limits()

    async def write() -> None:
        left = total_bytes
        while left:
            await writer.may_write.wait()
            while waits_for == "all of it" and transport.get_write_buffer_size():
                await asyncio.sleep(0)
            start, size = source.randrange(1000), source.choice([1, 1000, 10_000, 99_000])
            chunk = data[start : start + min(size, left)]
            transport.write(chunk)
            assert transport.get_write_buffer_size() <= high + len(chunk)
            meant.update(chunk)
            left -= len(chunk)
            await turns(source.randrange(2))
        transport.close()

    with far:
        writing = asyncio.create_task(write())
        await writer.has("pause")
        await turns(100)
        assert not writing.done()
        while piece := await loop.sock_recv(far, 256 * 1024):
            came.update(piece)
        await writing
        await writer.lost()
    assert came.digest() == meant.digest()
    assert writer.error is None


@ENGINES
@pytest.mark.parametrize("waits_for", ["room", "all of it"])
@pytest.mark.parametrize("total_mib", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_peer_that_reads_nothing_for_a_while_gets_everything(
    any_loop: AnyLoop, total_mib: int, waits_for: str
) -> None:
    run(any_loop, hold_back(total_mib * MIB, waits_for), limit=3 * total_mib)


# ---------------------------------------------------------------------------------- the send modes


def test_many_small_writes_in_one_turn_keep_their_order(sending_loop: AnyLoop) -> None:
    """From several callbacks, to several connections, in all the ways to write; out of one buffer
    that is filled anew each time, which asyncio does not allow.
    """
    is_ours = isinstance(sending_loop, uringloop.EventLoop)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(wired(Peer)) for _ in range(20)]
            buffer = bytearray(4)

            def write(number: int) -> None:
                for protocol, _ in ends:
                    buffer[:] = b"%04d" % number
                    protocol.transport.write(buffer if is_ours else bytes(buffer))
                    buffer[:] = b"%04d" % (number + 1)
                    view = memoryview(buffer if is_ours else bytes(buffer))
                    protocol.transport.writelines([view[:2], view[2:]])
                    buffer[:] = b"oops"
                    protocol.transport.write(b"%04d" % (number + 2))

            for number in range(0, 300, 3):
                loop.call_soon(write, number)
            expected = b"".join(b"%04d" % number for number in range(300))
            for _, sock in ends:
                assert await read(sock, len(expected)) == expected

    run(sending_loop, main())


@pytest.mark.parametrize("size_bytes", [10, 70_000, 3 * MIB])
@pytest.mark.parametrize("end", ["close", "write_eof"])
def test_an_end_in_the_same_callback_comes_after_what_was_written(
    sending_loop: AnyLoop, end: str, size_bytes: int
) -> None:
    data = payload(size_bytes)

    class Brief(Peer):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.write(data)
            getattr(self.transport, end)()

    async def main() -> None:
        async with wired(Brief, "tcp") as (protocol, sock):
            assert digest(await read_to_end(sock)) == digest(data)
            sock.close()
            await protocol.lost()
            assert protocol.error is None

    run(sending_loop, main())


def test_an_abort_in_the_same_callback_does_no_harm(sending_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(b"perhaps")
            protocol.transport.abort()
            protocol.transport.write(b"never")
            assert protocol.transport.get_write_buffer_size() == 0
            assert await read_to_end(sock) in (b"", b"perhaps")
            await protocol.lost()
            return protocol.events

    assert run(sending_loop, main()) == ["made", "lost"]


def test_writing_in_connection_lost_does_no_harm(sending_loop: AnyLoop) -> None:
    class Stubborn(Peer):
        def connection_lost(self, exc: Exception | None) -> None:
            self.transport.write(b"never")
            self.transport.writelines([b"never"] * bool(exc))
            super().connection_lost(exc)

    async def main() -> bytes:
        async with wired(Stubborn) as (protocol, sock):
            protocol.transport.write(b"last words")
            protocol.transport.close()
            data = await read_to_end(sock)
            await protocol.lost()
            return data

    assert run(sending_loop, main()) == b"last words"


def test_a_large_write_is_tried_at_once_in_every_mode(sending_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.write(b"small ")
            protocol.transport.write(bytes(70_000))
            assert protocol.transport.get_write_buffer_size() == 0
            assert protocol.events == ["made"]
            assert len(await read(sock, 70_006)) == 70_006

    run(sending_loop, main())


def test_what_waits_is_counted_until_it_has_left(sending_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            for _ in range(3):
                protocol.transport.write(b"0123456789")
            first = read_now(sock)
            assert len(first) + protocol.transport.get_write_buffer_size() == 30
            await turns(2)
            assert protocol.transport.get_write_buffer_size() == 0
            assert first + read_now(sock) == b"0123456789" * 3
            protocol.transport.write(b"0123456789")
            protocol.transport.write(bytes(TOO_MUCH))
            queued = protocol.transport.get_write_buffer_size()
            assert len(read_now(sock)) + queued == TOO_MUCH + 10

    run(sending_loop, main())


def test_what_was_written_has_left_when_the_loop_stops(sending_loop: AnyLoop) -> None:
    """As it has with asyncio: a program may write and end."""
    near, far = socket.socketpair()
    far.setblocking(False)

    async def main() -> Any:
        transport, _ = await asyncio.get_running_loop().create_connection(Peer, sock=near)
        transport.write(b"written and ")
        transport.write(b"gone")
        return transport

    with far:
        transport = sending_loop.run_until_complete(main())
        assert read_now(far) == b"written and gone"

        def write_and_stop() -> None:
            transport.write(b"once more")
            sending_loop.stop()

        sending_loop.call_soon(write_and_stop)
        sending_loop.run_forever()
        assert read_now(far) == b"once more"
        transport.abort()
        sending_loop.run_until_complete(turns())


def test_a_peer_that_is_gone_is_noticed_by_a_small_write(sending_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.pause_reading()
            sock.close()
            protocol.transport.write(b"anybody?")
            await protocol.lost()
            return protocol.events

    assert run(sending_loop, main()) == ["made", "lost BrokenPipeError"]


# ------------------------------------------------------------------------------------------ weather


class Weather:
    """What happens to one end of a connection; every choice comes from its seeded generator."""

    def __init__(self, seed: int, name: str) -> None:
        self.name = name
        self.source = source = random.Random(f"{seed} {name}")
        self.written = bytearray()
        self.received = bytearray()
        self.losses: list[Exception | None] = []
        self.eofs = 0
        self.lost = asyncio.Event()
        self.heard_end = asyncio.Event()
        self.end = source.choice(["eof", "eof", "eof", "close", "abort"])
        self.transport: Any = None
        self.made = asyncio.Event()
        self.is_ours = isinstance(asyncio.get_running_loop(), uringloop.EventLoop)

    def protocol(self) -> asyncio.BaseProtocol:
        kind = self.source.choice([Weathered, BufferedWeathered])
        return kind(self)

    def write(self) -> None:
        """One write of some size in some form; large ones are rare."""
        size = int(10 ** self.source.uniform(0, 5.5))
        data = self.source.randbytes(size)
        self.written += data
        form = self.source.randrange(4)
        if form == 0:
            self.transport.write(data)
        elif form == 1:
            buffer = bytearray(data)
            self.transport.write(buffer)
            if self.is_ours or self.transport.get_write_buffer_size() == 0:
                buffer[:] = bytes(size)  # asyncio may still need what it has queued
        elif form == 2:
            self.transport.write(memoryview(data))
        else:
            cut = self.source.randint(0, size)
            self.transport.writelines(piece for piece in (data[:cut], data[cut:]) if piece)

    async def live(self) -> None:
        """Write, pause, resume and change the protocol until the end."""
        await self.made.wait()
        for _ in range(self.source.randint(0, 25)):
            if self.transport.is_closing():
                break
            action = self.source.randrange(8)
            if action < 3:
                self.write()
            elif action == 3:
                self.transport.pause_reading()
            elif action == 4:
                self.transport.resume_reading()
            elif action == 5:
                self.transport.set_protocol(self.protocol())
            elif action == 6:
                high = self.source.choice([0, 1000, 65_536, MIB])
                self.transport.set_write_buffer_limits(high)
            for _ in range(self.source.randrange(4)):
                await asyncio.sleep(0)
        self.transport.resume_reading()
        if self.end == "eof":
            with contextlib.suppress(OSError):  # asyncio lets it out when the peer is gone
                self.transport.write_eof()
            await self.heard_end.wait()
            self.transport.close()
        elif self.end == "close":
            self.transport.close()
        else:
            self.transport.abort()
        await self.lost.wait()


class Weathered(asyncio.Protocol):
    """Tells its Weather what happens."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.weather.transport = transport
        self.weather.made.set()

    def data_received(self, data: bytes) -> None:
        assert not self.weather.eofs, "data after the end"
        assert not self.weather.losses, "data after the loss"
        self.weather.received += data

    def eof_received(self) -> bool:
        self.weather.eofs += 1
        self.weather.heard_end.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.weather.losses.append(exc)
        self.weather.heard_end.set()
        self.weather.lost.set()


class BufferedWeathered(Weathered, asyncio.BufferedProtocol):
    """The same with a buffer of some size."""

    def __init__(self, weather: Weather) -> None:
        super().__init__(weather)
        self.buffer = bytearray(weather.source.choice([1000, 4096, 65_536, 256 * 1024]))

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


def test_two_writes_around_a_flush_leave_once_beside_another_thread(
    loop: uringloop.EventLoop,
) -> None:
    """Beside another thread a turn's answers leave without the GIL, whatever happened before."""
    until = threading.Event()
    other = threading.Thread(target=until.wait)

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            for _ in range(3):
                time.sleep(0.002)  # noqa: ASYNC251 - a turn that takes longer than the GIL is kept
                await asyncio.sleep(0)
                protocol.transport.write(b"a")
                protocol.transport.set_write_buffer_limits()
                protocol.transport.write(b"b")
                protocol.transport.set_write_buffer_limits()
                protocol.transport.write(b"c")
            protocol.transport.close()
            return await read_to_end(sock)

    other.start()
    try:
        assert run(loop, main()) == b"abcabcabc"
    finally:
        until.set()
        other.join()


def check(one: Weather, other: Weather) -> None:
    """What must be so whatever the weather was."""
    assert len(one.losses) == 1, "connection_lost comes once"
    assert isinstance(one.losses[0], ConnectionError | None)
    assert one.received == other.written[: len(one.received)], "it is what was written, in order"
    if one.end == other.end == "eof":
        assert len(one.received) == len(other.written), "nothing is missing"
        assert one.losses == [None]


async def weather(seed: int, connections: int) -> None:
    loop = asyncio.get_running_loop()
    waiting: list[Weather] = []
    server = await loop.create_server(lambda: waiting.pop(0).protocol(), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    lives, pairs = [], []
    for number in range(connections):
        near, far = Weather(seed, f"client {number}"), Weather(seed, f"server {number}")
        waiting.append(far)
        await loop.create_connection(near.protocol, *address)
        await far.made.wait()
        lives += [asyncio.ensure_future(near.live()), asyncio.ensure_future(far.live())]
        pairs += [(near, far), (far, near)]
    await asyncio.gather(*lives)
    server.close()
    await server.wait_closed()
    for one, other in pairs:
        try:
            check(one, other)
        except AssertionError as exc:
            ends = f"{one.name} ({one.end}) and {other.name} ({other.end})"
            raise AssertionError(f"{ends}: {exc}") from exc


def run_weather(loop: AnyLoop, seed: int, connections: int, limit: float = 20) -> None:
    try:
        run(loop, weather(seed, connections), limit)
    except (AssertionError, TimeoutError) as exc:
        raise AssertionError(f"seed {seed}: {exc!r}") from exc


@pytest.mark.parametrize("seed", [1, 2])
def test_random_weather_does_no_harm(sending_loop: AnyLoop, seed: int) -> None:
    """Pauses, resumptions, half-closes, closes, aborts, new protocols and limits."""
    run_weather(sending_loop, seed, connections=12)


@pytest.mark.parametrize("seed", [3])
def test_random_weather_does_no_harm_in_debug_mode(any_loop: AnyLoop, seed: int) -> None:
    any_loop.set_debug(True)
    cast(Any, any_loop).slow_callback_duration = 10
    run_weather(any_loop, seed, connections=12)


def test_lines_written_while_no_loop_runs_leave_at_once(sending_loop: AnyLoop) -> None:
    near, far = socket.socketpair()
    with far:
        made = run(sending_loop, sending_loop.create_connection(Peer, sock=near))
        made[0].writelines([b"at", b" once"])
        assert far.recv(100) == b"at once"
        made[0].abort()
        run(sending_loop, turns())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_much_random_weather_does_no_harm(sending_loop: AnyLoop, seed: int) -> None:
    run_weather(sending_loop, seed, connections=40, limit=120)
