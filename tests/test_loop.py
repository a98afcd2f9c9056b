"""The whole of asyncio's Unix event loop, on our loop and on each monitor.

The promise: what an application may expect of asyncio it gets here, byte for byte; where a rule of
asyncio is subtle, the same scenario runs on asyncio itself in the same process, and the two records
must be equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

import uringloop
from tests import support
from tests.conftest import MONITORS
from tests.support import run
from uringloop import loop as loop_module

Loop = uringloop.EventLoop
Record = list[Any]

BUFFER_BYTES = loop_module._STREAM_READ_MAX_BYTES
MIB = 1 << 20
SIZES = (1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, MIB)
NUMBERS = itertools.count()


def payload(size_bytes: int) -> bytes:
    """Bytes that differ everywhere and are the same in every run."""
    return random.Random(size_bytes).randbytes(size_bytes)


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def same_on_asyncio(loop: Loop, scenario: Callable[[], Awaitable[Record]]) -> Record:
    """Run a scenario on asyncio's loop, then on ours; the records, equal, are returned once."""

    async def bounded() -> Record:
        return await scenario()

    stock = asyncio.SelectorEventLoop()
    try:
        expected = run(stock, bounded())
    finally:
        stock.close()
    assert run(loop, bounded()) == expected
    return expected


class Peer(asyncio.Protocol):
    """One side of a connection: writes down what happens to it."""

    transport: asyncio.Transport

    def __init__(self, keep_open: bool | None = None) -> None:
        self.keep_open = keep_open
        self.events: list[str] = []
        self.data = bytearray()
        self.sizes: list[int] = []
        self.error: Exception | None = None
        self.changed = asyncio.Event()

    def note(self, event: str) -> None:
        self.events.append(event)
        self.changed.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.note("connection_made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.sizes.append(len(data))
        self.changed.set()

    def eof_received(self) -> bool | None:
        self.note("eof_received")
        return self.keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.note(f"connection_lost {type(exc).__name__}")

    def pause_writing(self) -> None:
        self.note("pause_writing")

    def resume_writing(self) -> None:
        self.note("resume_writing")

    @property
    def is_lost(self) -> bool:
        return bool(self.events) and self.events[-1].startswith("connection_lost")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the record fulfils a condition."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def lost(self) -> None:
        await self.until(lambda: self.is_lost)

    async def received(self, size_bytes: int) -> None:
        await self.until(lambda: len(self.data) >= size_bytes)

    async def has(self, event: str) -> None:
        await self.until(lambda: event in self.events)

    @property
    def story(self) -> Record:
        """The record that two loops are compared by."""
        return [*self.events, len(self.data), digest(self.data)]


class Echo(Peer):
    """Sends back what it gets."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


class BufferedPeer(Peer, asyncio.BufferedProtocol):
    """A Peer that offers its own buffer."""

    def __init__(self, keep_open: bool | None = None) -> None:
        super().__init__(keep_open)
        self.buffer = bytearray(64 * 1024)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


class BufferedEcho(BufferedPeer):
    """Sends back what it gets."""

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        self.transport.write(self.buffer[:nbytes])


def settle(future: asyncio.Future[Any], result: object = None) -> None:
    """Set a future's result unless it has one: level-triggered callbacks come again."""
    if not future.done():
        future.set_result(result)


async def turns_until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something is so that has no event of its own."""
    while not condition():
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def connected(
    make_client: Callable[[], Any] = Peer,
    make_server: Callable[[], Any] = Peer,
    *,
    server_ssl: ssl.SSLContext | None = None,
    client_ssl: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[Any, Any]]:
    """A client protocol and the server protocol it is connected to, over TCP."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    def factory() -> Any:
        protocol = make_server()
        accepted.put_nowait(protocol)
        return protocol

    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=server_ssl)
    port = server.sockets[0].getsockname()[1]
    kwargs: dict[str, Any] = {"ssl": client_ssl}
    if client_ssl:
        kwargs["server_hostname"] = "localhost"
    transport, client = await loop.create_connection(make_client, "127.0.0.1", port, **kwargs)
    peer = await accepted.get()
    await peer.has("connection_made")
    try:
        yield client, peer
    finally:
        server.close()
        for side in (transport, peer.transport):
            if not side.is_closing():
                side.abort()


@contextlib.asynccontextmanager
async def accepted_by_hand() -> AsyncIterator[tuple[Peer, socket.socket]]:
    """A client protocol connected to a plain socket that the test works itself."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport, client = await loop.create_connection(Peer, *listener.getsockname())
        sock, _ = listener.accept()
    with sock:
        sock.setblocking(False)
        yield client, sock
    if not transport.is_closing():
        transport.abort()


# -------------------------------------------------------------------------------- TCP, every way in


async def echo_through(server: Callable[[], Peer], client: Callable[[], Peer], data: bytes) -> None:
    async with connected(client, server) as (near, far):
        near.transport.write(data)
        near.transport.write_eof()
        await near.lost()
        await far.lost()
        assert digest(far.data) == digest(near.data) == digest(data)
        ends = ["eof_received", "connection_lost NoneType"]
        assert [event for event in near.events if "writing" not in event][1:] == ends
        assert [event for event in far.events if "writing" not in event][1:] == ends


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_protocol_gets_every_byte_in_both_directions(loop: Loop, size_bytes: int) -> None:
    run(loop, echo_through(Echo, Peer, payload(size_bytes)))


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_buffered_protocol_gets_every_byte_in_both_directions(
    loop: Loop, size_bytes: int
) -> None:
    run(loop, echo_through(BufferedEcho, BufferedPeer, payload(size_bytes)))


@pytest.mark.parametrize("size_bytes", SIZES)
def test_streams_carry_every_byte_in_both_directions(loop: Loop, size_bytes: int) -> None:
    data = payload(size_bytes)
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(MIB):
            seen.extend(chunk)
            writer.write(chunk)
            await writer.drain()
        writer.close()

    async def main() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        reading = asyncio.ensure_future(reader.read())
        writer.write(data)
        writer.write_eof()
        answer = await reading
        writer.close()
        await writer.wait_closed()
        server.close()
        return answer

    assert digest(run(loop, main())) == digest(data) == digest(seen)


def test_what_is_received_is_bytes_that_later_reads_do_not_touch(loop: Loop) -> None:
    class Keeper(Peer):
        kept: list[bytes]

        def data_received(self, data: bytes) -> None:
            self.kept = [*getattr(self, "kept", []), data]
            super().data_received(data)

    async def main() -> list[bytes]:
        async with connected(Keeper, Peer) as (near, far):
            for number in range(20):
                far.transport.write(bytes([number]) * 1000)
                await near.received(1000 * (number + 1))
            return list(near.kept)

    kept = run(loop, main())
    assert {type(data) for data in kept} == {bytes}
    assert b"".join(kept) == b"".join(bytes([number]) * 1000 for number in range(20))


def test_one_read_takes_a_whole_message_of_100_kib(loop: Loop) -> None:
    async def main() -> list[int]:
        async with accepted_by_hand() as (near, sock):
            near.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, MIB
            )
            near.transport.pause_reading()
            await asyncio.get_running_loop().sock_sendall(sock, payload(100 * 1024))
            near.transport.resume_reading()
            await near.received(100 * 1024)
            return near.sizes

    assert run(loop, main()) == [100 * 1024]


def test_a_slow_reader_pauses_the_writer_and_gets_all_20_mib(loop: Loop) -> None:
    chunk, count = payload(256 * 1024), 80

    class Writer(Peer):
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

    async def main() -> None:
        async with connected(Writer, Peer) as (near, far):
            far.transport.pause_reading()
            asyncio.get_running_loop().call_later(0.02, far.transport.resume_reading)
            _, high = near.transport.get_write_buffer_limits()
            most = 0
            for _ in range(count):
                await near.may_write.wait()
                near.transport.write(chunk)
                most = max(most, near.transport.get_write_buffer_size())
                if most > high:
                    assert "pause_writing" in near.events
            near.transport.write_eof()
            await far.has("eof_received")
            assert high < most <= high + len(chunk)
            assert far.data == chunk * count
            await near.lost()
            turns = [event for event in near.events if "writing" in event]
            assert turns[:2] == ["pause_writing", "resume_writing"]
            assert turns == turns[:2] * (len(turns) // 2)

    run(loop, main())


def test_a_paused_reader_gets_nothing_until_it_resumes(loop: Loop) -> None:
    async def main() -> None:
        async with connected() as (near, far):
            assert near.transport.is_reading()
            near.transport.pause_reading()
            near.transport.pause_reading()
            assert not near.transport.is_reading()
            far.transport.write(b"early")
            await asyncio.sleep(0.03)
            assert not near.data
            near.transport.resume_reading()
            await near.received(5)
            assert near.transport.is_reading()

    run(loop, main())


def test_pausing_inside_data_received_holds_back_what_follows(loop: Loop) -> None:
    class OneAtATime(Peer):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.pause_reading()

    async def main() -> None:
        async with connected(OneAtATime, Peer) as (near, far):
            data = payload(2 * MIB)
            far.transport.write(data)
            await near.until(lambda: len(near.sizes) == 1)
            await asyncio.sleep(0.02)
            assert len(near.sizes) == 1
            while len(near.data) < len(data):
                count = len(near.sizes)
                near.transport.resume_reading()
                await near.until(lambda: len(near.sizes) > count)  # noqa: B023
            assert near.data == data

    run(loop, main())


def test_a_half_closed_connection_still_carries_the_answer(loop: Loop) -> None:
    answer = payload(MIB)

    async def main() -> None:
        async with connected(Peer, lambda: Peer(keep_open=True)) as (near, far):
            near.transport.write_eof()
            await far.has("eof_received")
            await asyncio.sleep(0.01)
            assert not far.is_lost
            far.transport.write(answer)
            far.transport.close()
            await near.lost()
            assert near.data == answer
            assert near.error is far.error is None

    run(loop, main())


def test_close_sends_what_was_written(loop: Loop) -> None:
    async def main() -> None:
        async with connected() as (near, far):
            far.transport.pause_reading()
            near.transport.write(payload(6 * MIB))
            assert near.transport.get_write_buffer_size() > 0
            near.transport.close()
            assert near.transport.is_closing()
            far.transport.resume_reading()
            await far.has("eof_received")
            assert digest(far.data) == digest(payload(6 * MIB))

    run(loop, main())


def test_abort_throws_away_what_was_not_sent(loop: Loop) -> None:
    async def main() -> None:
        async with connected() as (near, far):
            far.transport.pause_reading()
            near.transport.write(payload(16 * MIB))
            near.transport.abort()
            await near.lost()
            assert near.error is None
            far.transport.resume_reading()
            await far.lost()
            assert len(far.data) < 16 * MIB

    run(loop, main())


def test_a_reset_by_the_peer_is_reported_as_such(loop: Loop) -> None:
    async def scenario() -> Record:
        async with accepted_by_hand() as (near, sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            await near.lost()
            return near.story

    assert "connection_lost ConnectionResetError" in same_on_asyncio(loop, scenario)


def test_a_reset_in_the_middle_of_a_large_write_is_reported_too(loop: Loop) -> None:
    async def main() -> None:
        async with accepted_by_hand() as (near, sock):
            near.transport.pause_reading()
            near.transport.write(payload(16 * MIB))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            await near.lost()
            assert isinstance(near.error, (ConnectionResetError, BrokenPipeError))

    run(loop, main())


def test_nagle_is_off_on_both_ends(loop: Loop) -> None:
    async def main() -> list[int]:
        async with connected() as pair:
            return [
                side.transport.get_extra_info("socket").getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NODELAY
                )
                for side in pair
            ]

    assert all(run(loop, main()))


def test_nagle_is_off_on_a_listener_made_without_a_protocol(loop: Loop) -> None:
    """asyncio looks for IPPROTO_TCP, which `socket.socket()` does not set; uvicorn listens so."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        accepted = loop.create_future()

        class Accepted(Peer):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                settle(accepted, transport.get_extra_info("socket"))

        with socket.socket() as listener, socket.socket() as client:
            assert listener.proto == client.proto == 0
            listener.bind(("127.0.0.1", 0))
            server = await loop.create_server(Accepted, sock=listener)
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            transport, _ = await loop.create_connection(Peer, sock=client)
            facts = [
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for sock in (await accepted, transport.get_extra_info("socket"))
            ]
            transport.abort()
            server.close()
            await asyncio.sleep(0.01)
        return sum(facts)

    assert run(loop, main()) == 2


def test_a_closed_connection_is_seen_by_the_peer_at_once(loop: Loop) -> None:
    async def main() -> float:
        async with accepted_by_hand() as (near, sock):
            await asyncio.sleep(0.01)  # its watch is armed in the kernel by now
            near.transport.close()
            started = time.monotonic()
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
            return time.monotonic() - started

    assert run(loop, main()) < 0.5


def test_a_closed_server_refuses_and_its_port_is_free(loop: Loop) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Peer, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        await asyncio.sleep(0.01)
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)

    run(loop, main())


def test_300_clients_that_connect_at_once_to_a_small_backlog_are_all_served(loop: Loop) -> None:
    count = 300
    path = f"\0uringloop-storm-{os.getpid()}-{next(NUMBERS)}"
    answers: list[bytes] = []

    def client() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)  # waits for a place in the backlog
            sock.settimeout(10)
            sock.sendall(b"ping")
            answers.append(sock.recv(4))

    async def main() -> None:
        server = await asyncio.get_running_loop().create_unix_server(Echo, path, backlog=4)
        threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.002)
        server.close()

    run(loop, main())
    assert answers == [b"ping"] * count


def test_300_tcp_connections_made_in_one_turn_are_all_served(loop: Loop) -> None:
    async def main() -> list[bytes]:
        server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, backlog=400)
        address = server.sockets[0].getsockname()

        async def ask(number: int) -> bytes:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"%03d" % number)
            answer = await reader.readexactly(3)
            writer.close()
            await writer.wait_closed()
            return answer

        answers = await asyncio.gather(*map(ask, range(300)))
        server.close()
        return answers

    assert run(loop, main()) == [b"%03d" % number for number in range(300)]


def exchange_in_small_and_large(sock: socket.socket, rounds: int) -> int:
    """With an echo server; how many bytes that were."""
    sizes = [1, 100, 100, 100, 2048, 20_000, 50_000] * rounds
    with sock.makefile("rb") as file:
        for size in sizes:
            sock.sendall(data := payload(size))
            assert file.read(size) == data
    return sum(sizes)


OUT_OF_DESCRIPTORS = """
import asyncio, json, os, resource, sys
import uringloop

class Echo(asyncio.Protocol):
    count = 0
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        Echo.count += len(data)
        self.transport.write(data)

async def main():
    loop, refused, turns = asyncio.get_running_loop(), [], []
    def handler(loop, context):
        if not refused:
            turns.append(loop.statistics().turns)
            loop.call_later(0.5, lambda: turns.append(loop.statistics().turns))
        refused.append(context["message"])
    loop.set_exception_handler(handler)
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=20)
    done = loop.create_future()
    loop.add_reader(0, lambda: (loop.remove_reader(0), done.set_result(None)))
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, used + 8))
    print(server.sockets[0].getsockname()[1], flush=True)
    await done
    server.close()
    turned = turns[1] - turns[0]
    print(json.dumps({"refused": sorted(set(refused)), "turns": turned, "bytes": Echo.count}))

uringloop.run(main(), monitor=sys.argv[1])
"""


@pytest.mark.parametrize(
    "monitor",
    [*MONITORS, "io_uring readiness", "io_uring ring", "io_uring sends"],
    indirect=True,
)
def test_a_server_out_of_descriptors_says_so_goes_on_for_its_clients_and_recovers(
    monitor: str,
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", OUT_OF_DESCRIPTORS, monitor],
        env=support.child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child, contextlib.ExitStack() as clients:
        assert child.stdout
        port = int(child.stdout.readline())
        busy = clients.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        exchange_in_small_and_large(busy, rounds=2)
        asked = []
        for _ in range(14):
            sock = clients.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            sock.sendall(b"ping")
            asked.append(sock)
        served, waiting = [], []
        for sock in asked:
            sock.settimeout(0.05)
            try:
                served.append(sock.recv(4))
                sock.close()
            except TimeoutError:
                waiting.append(sock)
        assert served == [b"ping"] * len(served)
        assert len(served) >= 5, "the limit was to let some in"
        assert waiting, "the limit was to keep some out"
        exchanged = 2 * exchange_in_small_and_large(busy, rounds=2)
        for sock in waiting:
            sock.settimeout(10)
            assert sock.recv(4) == b"ping"
        out, _ = child.communicate(timeout=10)
    report = json.loads(out)
    assert report["refused"] == ["socket.accept() out of system resource"]
    assert report["turns"] < 1000, "it spun while it had no descriptors"
    assert report["bytes"] == exchanged + 4 * len(asked)


# ---------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that is its own authority, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 7"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *command.split(), *names, *files], check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def server_ssl(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """The server's side of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.fixture
def client_ssl(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """The client's side; it verifies the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificate[0])
    return context


@pytest.mark.parametrize("size_bytes", [1, 16 * 1024 - 1, 16 * 1024 + 1, MIB])
def test_tls_carries_every_byte_in_both_directions(
    loop: Loop, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, size_bytes: int
) -> None:
    data = payload(size_bytes)

    async def main() -> None:
        kwargs = {"server_ssl": server_ssl, "client_ssl": client_ssl}
        async with connected(Peer, Echo, **kwargs) as (near, far):
            assert near.transport.get_extra_info("peercert")["subject"]
            near.transport.write(data)
            await near.received(size_bytes)
            near.transport.close()
            await near.lost()
            await far.lost()
            assert digest(near.data) == digest(far.data) == digest(data)
            assert near.error is far.error is None

    run(loop, main())


def test_a_client_that_does_not_trust_the_certificate_gets_the_reason(
    loop: Loop, server_ssl: ssl.SSLContext
) -> None:
    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        server = await asyncio.get_running_loop().create_server(
            Peer, "127.0.0.1", 0, ssl=server_ssl
        )
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname="localhost"
            )
        server.close()

    run(loop, main())


@pytest.mark.parametrize("size_bytes", [1, MIB])
def test_a_stream_may_turn_to_tls_on_the_way(
    loop: Loop, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, size_bytes: int
) -> None:
    data = payload(size_bytes)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        await writer.start_tls(server_ssl)
        writer.write(await reader.readexactly(size_bytes))
        await writer.drain()
        writer.close()

    async def main() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go\n"
        await writer.start_tls(client_ssl, server_hostname="localhost")
        assert writer.get_extra_info("cipher")
        writer.write(data)
        answer = await reader.readexactly(size_bytes)
        writer.close()
        await writer.wait_closed()
        server.close()
        return answer

    assert digest(run(loop, main())) == digest(data)


def test_start_tls_hands_the_protocol_over_to_the_new_transport(
    loop: Loop, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected() as (near, far):
            client, server = await asyncio.gather(
                loop.start_tls(near.transport, near, client_ssl, server_hostname="localhost"),
                loop.start_tls(far.transport, far, server_ssl, server_side=True),
            )
            assert client
            assert server
            client.write(b"to the server")
            server.write(b"to the client")
            await near.received(13)
            await far.received(13)
            assert (near.data, far.data) == (b"to the client", b"to the server")
            client.close()
            await near.lost()
            await far.lost()

    run(loop, main())


# ---------------------------------------------------------------------------------------- datagrams


class Datagrams(asyncio.DatagramProtocol):
    """Writes down datagrams and errors."""

    transport: asyncio.DatagramTransport

    def __init__(self) -> None:
        self.got: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
        self.errors: asyncio.Queue[Exception] = asyncio.Queue()
        self.is_lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.put_nowait((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.put_nowait(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost.set()


@contextlib.asynccontextmanager
async def datagrams(**kwargs: Any) -> AsyncIterator[Datagrams]:
    """A datagram endpoint, closed in the end."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Datagrams, **kwargs)
    yield protocol
    transport.close()
    await protocol.is_lost.wait()


@pytest.mark.parametrize("size_bytes", [1, 1472, 60_000, 65_507])
@pytest.mark.parametrize("is_connected", [False, True], ids=["unconnected", "connected"])
def test_udp_carries_datagrams_whole(loop: Loop, size_bytes: int, is_connected: bool) -> None:
    data = payload(size_bytes)

    async def main() -> None:
        async with datagrams(local_addr=("127.0.0.1", 0)) as far:
            address = far.transport.get_extra_info("sockname")
            peer = {"remote_addr": address} if is_connected else {"local_addr": ("127.0.0.1", 0)}
            async with datagrams(**peer) as near:
                near.transport.sendto(data, None if is_connected else address)
                got, sender = await far.got.get()
                assert got == data
                assert sender == near.transport.get_extra_info("sockname")
                far.transport.sendto(got, sender)
                assert await near.got.get() == (data, address)

    run(loop, main())


def test_a_refused_datagram_reaches_error_received(loop: Loop) -> None:
    async def main() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            address = sock.getsockname()
        async with datagrams(remote_addr=address) as near:
            near.transport.sendto(b"anybody?")
            assert isinstance(await near.errors.get(), ConnectionRefusedError)

    run(loop, main())


def test_a_burst_of_datagrams_keeps_its_order(loop: Loop) -> None:
    async def main() -> list[bytes]:
        async with datagrams(local_addr=("127.0.0.1", 0)) as far:
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                for number in range(50):
                    sock.sendto(b"%d" % number, far.transport.get_extra_info("sockname"))
            return [(await far.got.get())[0] for _ in range(50)]

    assert run(loop, main()) == [b"%d" % number for number in range(50)]


def test_a_unix_datagram_of_more_than_64_kib_arrives_whole(loop: Loop, tmp_path: Path) -> None:
    data = payload(100 * 1024)
    path = str(tmp_path / "datagrams")

    async def main() -> bytes:
        async with datagrams(local_addr=path, family=socket.AF_UNIX) as far:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(data, path)
            return (await far.got.get())[0]

    assert digest(run(loop, main())) == digest(data)


# --------------------------------------------------------------------------- unix sockets and pipes


def test_unix_streams_carry_every_byte(loop: Loop, tmp_path: Path) -> None:
    path, data = str(tmp_path / "stream"), payload(MIB)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(Echo, path)
        transport, near = await loop.create_unix_connection(Peer, path)
        transport.write(data)
        transport.write_eof()
        await near.lost()
        server.close()
        assert digest(near.data) == digest(data)

    run(loop, main())


@contextlib.asynccontextmanager
async def piped() -> AsyncIterator[tuple[Peer, asyncio.WriteTransport, Peer]]:
    """A pipe's reading protocol, its writing transport and that one's protocol."""
    loop = asyncio.get_running_loop()
    read_fd, write_fd = os.pipe()
    reading, reader = await loop.connect_read_pipe(Peer, os.fdopen(read_fd, "rb", 0))
    writing, writer = await loop.connect_write_pipe(Peer, os.fdopen(write_fd, "wb", 0))
    yield reader, writing, writer
    reading.close()
    if not writing.is_closing():
        writing.abort()


@pytest.mark.parametrize("size_bytes", [1, 64 * 1024 + 1, 3 * MIB])
def test_pipes_carry_every_byte_and_the_end(loop: Loop, size_bytes: int) -> None:
    async def main() -> None:
        async with piped() as (reader, writing, writer):
            writing.write(payload(size_bytes))
            writing.write_eof()
            await reader.lost()
            await writer.lost()
            assert digest(reader.data) == digest(payload(size_bytes))
            assert reader.events[-2:] == ["eof_received", "connection_lost NoneType"]

    run(loop, main())


def test_a_pipe_without_a_reader_breaks(loop: Loop) -> None:
    async def main() -> None:
        async with piped() as (reader, writing, writer):
            reader.transport.pause_reading()
            writing.write(payload(MIB))
            reader.transport.close()
            await writer.lost()
            assert isinstance(writer.error, BrokenPipeError)
            assert writing.is_closing()

    run(loop, main())


def test_a_paused_pipe_holds_its_data_back(loop: Loop) -> None:
    async def main() -> None:
        async with piped() as (reader, writing, _):
            reader.transport.pause_reading()
            writing.write(b"early")
            await asyncio.sleep(0.02)
            assert not reader.data
            reader.transport.resume_reading()
            await reader.received(5)

    run(loop, main())


# ------------------------------------------------------------------------------------- subprocesses

PIPE = asyncio.subprocess.PIPE


def test_a_subprocess_talks_through_its_pipes(loop: Loop) -> None:
    async def main() -> tuple[bytes, bytes, int | None]:
        process = await asyncio.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert process.returncode is None
        out, err = await process.communicate(payload(MIB))
        return out, err, process.returncode

    assert run(loop, main()) == (payload(MIB), b"", 0)


def test_a_subprocess_answers_line_by_line(loop: Loop) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE)
        assert process.stdin
        assert process.stdout
        for line in (b"one\n", b"two\n"):
            process.stdin.write(line)
            await process.stdin.drain()
            assert await process.stdout.readline() == line
        process.stdin.close()
        assert await process.stdout.read() == b""
        assert await process.wait() == 0

    run(loop, main())


def test_a_shell_gives_its_exit_code_and_both_outputs(loop: Loop) -> None:
    async def main() -> tuple[bytes, bytes, int | None]:
        process = await asyncio.create_subprocess_shell(
            "echo out; echo err >&2; exit 7", stdout=PIPE, stderr=PIPE
        )
        out, err = await process.communicate()
        return out, err, process.returncode

    assert run(loop, main()) == (b"out\n", b"err\n", 7)


def test_a_killed_subprocess_reports_its_signal(loop: Loop) -> None:
    async def main() -> list[int]:
        codes = []
        for end in ("terminate", "kill"):
            process = await asyncio.create_subprocess_exec("sleep", "60")
            getattr(process, end)()
            codes.append(await process.wait())
        return codes

    assert run(loop, main()) == [-signal.SIGTERM, -signal.SIGKILL]


def test_many_subprocesses_at_once_give_each_its_own_answer(loop: Loop) -> None:
    async def answer(number: int) -> tuple[bytes, int | None]:
        process = await asyncio.create_subprocess_shell(
            f"echo {number}; exit {number}", stdout=PIPE
        )
        out, _ = await process.communicate()
        return out, process.returncode

    async def main() -> list[tuple[bytes, int | None]]:
        return await asyncio.gather(*map(answer, range(12)))

    assert run(loop, main()) == [(b"%d\n" % number, number) for number in range(12)]


def test_a_subprocess_runs_on_a_loop_of_another_thread(make_loop: Callable[[], Loop]) -> None:
    answers: list[bytes] = []

    async def main() -> bytes:
        process = await asyncio.create_subprocess_exec("echo", "hello", stdout=PIPE)
        return (await process.communicate())[0]

    def work() -> None:
        answers.append(run(make_loop(), main()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert answers == [b"hello\n"]


def test_a_subprocess_that_cannot_start_leaves_nothing_behind(loop: Loop) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await asyncio.create_subprocess_exec("/no/such/program", stdin=PIPE, stdout=PIPE)

    run(loop, main())


# --------------------------------------------------------------- signals, threads, executors, names


def test_a_signal_handler_runs_with_its_arguments_until_removed(loop: Loop) -> None:
    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        got: asyncio.Queue[object] = asyncio.Queue()
        loop.add_signal_handler(signal.SIGUSR1, got.put_nowait, "SIGUSR1")
        sender = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
        sender.start()  # it meets the loop idle in its wait
        answers: list[object] = [await got.get()]
        sender.join()
        answers += [loop.remove_signal_handler(signal.SIGUSR1) for _ in range(2)]
        return answers

    assert run(loop, main()) == ["SIGUSR1", True, False]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_every_signal_of_a_quick_row_wakes_its_handler(loop: Loop) -> None:
    async def main() -> set[int]:
        loop = asyncio.get_running_loop()
        got: set[int] = set()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            loop.add_signal_handler(number, got.add, int(number))
            os.kill(os.getpid(), number)
        await turns_until(lambda: len(got) == 3)
        for signal_number in got:
            loop.remove_signal_handler(signal_number)
        return got

    assert run(loop, main()) == {signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


def test_call_soon_threadsafe_wakes_an_idle_loop_at_once(loop: Loop) -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        delays = []
        for _ in range(20):
            woken = loop.create_future()

            def work(woken: asyncio.Future[float] = woken) -> None:
                time.sleep(0.002)  # the loop sleeps by now
                loop.call_soon_threadsafe(woken.set_result, time.monotonic())

            thread = threading.Thread(target=work)
            thread.start()
            delays.append(-(await woken) + time.monotonic())
            thread.join()
        return delays

    assert statistics.median(run(loop, main())) < 0.05


def test_calls_from_many_threads_all_arrive(loop: Loop) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        got: list[int] = []

        def work(first: int) -> None:
            for number in range(first, first + 500):
                loop.call_soon_threadsafe(got.append, number)

        await asyncio.gather(*(asyncio.to_thread(work, first) for first in range(0, 4000, 500)))
        await asyncio.sleep(0.001)
        return got

    got = run(loop, main())
    assert sorted(got) == list(range(4000))
    assert [number for number in got if number < 500] == list(range(500))


def test_an_executor_returns_results_and_errors(loop: Loop) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, divmod, 1, 0)
        return await loop.run_in_executor(None, threading.get_ident)

    assert run(loop, main()) != threading.get_ident()


def test_names_are_looked_up_both_ways(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        assert [entry[4] for entry in found] == [("127.0.0.1", 80)]
        named = await loop.getaddrinfo("localhost", 80, family=socket.AF_INET)
        assert {entry[4][0] for entry in named} == {"127.0.0.1"}
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        assert await loop.getnameinfo(("127.0.0.1", 80), numeric) == ("127.0.0.1", "80")
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("127.0.0.1", 80, family=socket.AF_UNIX)

    run(loop, main())


# ------------------------------------------------------------------------------ sock_* and sendfile


@contextlib.contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that do not block."""
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


def test_sock_connect_and_accept_make_a_connection_that_carries_bytes(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        data = payload(2 * MIB)
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as near:
            listener.setblocking(False)
            near.setblocking(False)
            accepting = asyncio.ensure_future(loop.sock_accept(listener))
            await asyncio.sleep(0)
            await loop.sock_connect(near, listener.getsockname())
            far, address = await accepting
            with far:
                assert address == near.getsockname()
                sending = asyncio.ensure_future(loop.sock_sendall(near, data))
                got = bytearray()
                while len(got) < len(data):
                    got += await loop.sock_recv(far, MIB)
                await sending
                assert digest(got) == digest(data)

    run(loop, main())


def test_sock_recv_waits_for_data_and_sees_the_end(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (left, right):
            loop.call_later(0.01, right.send, b"late")
            assert await loop.sock_recv(left, 100) == b"late"
            buffer = bytearray(10)
            loop.call_later(0.01, right.send, b"again")
            assert await loop.sock_recv_into(left, buffer) == 5
            assert buffer[:5] == b"again"
            loop.call_later(0.01, right.close)
            assert await loop.sock_recv(left, 100) == b""

    run(loop, main())


def test_a_cancelled_sock_recv_loses_no_byte(loop: Loop) -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        with socket_pair() as (left, right):
            for _ in range(50):
                task = asyncio.ensure_future(loop.sock_recv(left, 1))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            right.send(b"kept")
            return await loop.sock_recv(left, 100)

    assert run(loop, main()) == b"kept"


def test_sock_recvfrom_and_sendto_carry_datagrams(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with (
            socket.socket(type=socket.SOCK_DGRAM) as near,
            socket.socket(type=socket.SOCK_DGRAM) as far,
        ):
            for sock in (near, far):
                sock.setblocking(False)
                sock.bind(("127.0.0.1", 0))
            receiving = asyncio.ensure_future(loop.sock_recvfrom(far, 65536))
            await asyncio.sleep(0.01)
            assert await loop.sock_sendto(near, payload(60_000), far.getsockname()) == 60_000
            assert await receiving == (payload(60_000), near.getsockname())
            buffer = bytearray(100)
            into = asyncio.ensure_future(loop.sock_recvfrom_into(near, buffer))
            await asyncio.sleep(0.01)
            await loop.sock_sendto(far, b"back", near.getsockname())
            assert await into == (4, far.getsockname())
            assert buffer[:4] == b"back"

    run(loop, main())


def test_a_refused_sock_connect_says_so(loop: Loop) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
        with socket.socket() as sock:
            sock.setblocking(False)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.get_running_loop().sock_connect(sock, address)

    run(loop, main())


@pytest.fixture
def large_file(tmp_path: Path) -> Iterator[BinaryIO]:
    """3 MiB and a bit, open."""
    path = tmp_path / "large"
    path.write_bytes(payload(3 * MIB + 17))
    with path.open("rb") as file:
        yield file


def test_sendfile_sends_a_file_through_a_transport(loop: Loop, large_file: BinaryIO) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected() as (near, far):
            near.transport.write(b"head")
            assert await loop.sendfile(near.transport, large_file) == 3 * MIB + 17
            near.transport.write(b"tail")
            assert await loop.sendfile(near.transport, large_file, 5, 100) == 100
            near.transport.close()
            await far.lost()
            file = payload(3 * MIB + 17)
            assert digest(far.data) == digest(b"head" + file + b"tail" + file[5:105])

    run(loop, main())


def test_sendfile_falls_back_over_tls(
    loop: Loop, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, large_file: BinaryIO
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected(server_ssl=server_ssl, client_ssl=client_ssl) as (near, far):
            with pytest.raises(RuntimeError, match="fallback"):
                await loop.sendfile(near.transport, large_file, fallback=False)
            assert await loop.sendfile(near.transport, large_file) == 3 * MIB + 17
            await far.received(3 * MIB + 17)
            assert digest(far.data) == digest(payload(3 * MIB + 17))
            near.transport.close()
            await far.lost()

    run(loop, main())


def test_sock_sendfile_sends_a_file_through_a_socket(loop: Loop, large_file: BinaryIO) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (left, right):
            sending = asyncio.ensure_future(loop.sock_sendfile(left, large_file))
            got = bytearray()
            while len(got) < 3 * MIB + 17:
                got += await loop.sock_recv(right, MIB)
            assert await sending == 3 * MIB + 17
            assert digest(got) == digest(payload(3 * MIB + 17))

    run(loop, main())


# ------------------------------------------------------------------------ add_reader and add_writer


def test_a_reader_is_called_every_turn_while_there_is_data(loop: Loop) -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        got = bytearray()
        with socket_pair() as (left, right):
            loop.add_reader(left, lambda: got.extend(left.recv(1)))
            right.send(b"level")
            async with asyncio.timeout(5):
                await turns_until(lambda: len(got) == 5)
            await asyncio.sleep(0.01)
            assert loop.remove_reader(left) is True
            assert loop.remove_reader(left) is False
        return bytes(got)

    assert run(loop, main()) == b"level"


def test_1000_readers_added_in_one_callback_are_called_in_their_order(
    loop: Loop, many_files: None
) -> None:
    """More than the ring's queue has places."""

    async def main() -> None:
        called = []

        def take(number: int, sock: socket.socket) -> None:
            called.append((number, sock.recv(10)))
            loop.remove_reader(sock)

        def add_all() -> None:
            for number, (near, _) in enumerate(pairs):
                loop.add_reader(near, take, number, near)

        with contextlib.ExitStack() as stack:
            pairs = [socket.socketpair() for _ in range(1000)]
            for number, (near, far) in enumerate(pairs):
                stack.enter_context(near)
                stack.enter_context(far)
                far.send(b"%d" % number)
            loop.call_soon(add_all)
            while len(called) < len(pairs):
                await asyncio.sleep(0)
        assert called == [(number, b"%d" % number) for number in range(1000)]

    run(loop, main())


def test_a_writer_is_called_every_turn_while_there_is_room(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls: list[int] = []
        with socket_pair() as (left, right):
            loop.add_writer(left, calls.append, 1)
            await turns_until(lambda: len(calls) >= 5)
            with contextlib.suppress(BlockingIOError):
                while True:
                    left.send(bytes(65536))
            await asyncio.sleep(0)  # what was collected before the socket was full
            count = len(calls)
            await asyncio.sleep(0.02)
            assert len(calls) <= count + 1
            count = len(calls)
            with contextlib.suppress(BlockingIOError):
                while True:
                    right.recv(MIB)
            await turns_until(lambda: len(calls) > count)
            assert loop.remove_writer(left) is True
            assert loop.remove_writer(left) is False

    run(loop, main())


def test_reader_and_writer_of_one_socket_are_independent(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (left, right):
            reads: list[bytes] = []
            writes: list[int] = []
            loop.add_reader(left, lambda: reads.append(left.recv(100)))
            loop.add_writer(left, writes.append, 1)
            await asyncio.sleep(0.005)
            assert writes
            assert not reads
            loop.remove_writer(left)
            count = len(writes)
            right.send(b"data")
            await asyncio.sleep(0.01)
            assert len(writes) == count
            assert reads == [b"data"]
            loop.remove_reader(left)
            right.send(b"more")
            await asyncio.sleep(0.01)
            assert reads == [b"data"]

    run(loop, main())


def test_a_new_reader_takes_the_place_of_the_old_one(loop: Loop) -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        calls: list[str] = []
        with socket_pair() as (left, right):

            def read(name: str) -> None:
                calls.append(name)
                left.recv(100)

            loop.add_reader(left, read, "old")
            await asyncio.sleep(0)
            loop.add_reader(left, read, "new")
            right.send(b"x")
            await asyncio.sleep(0.01)
            loop.remove_reader(left)
        return calls

    assert run(loop, main()) == ["new"]


def test_a_reader_removed_by_an_earlier_callback_of_the_turn_is_not_called(loop: Loop) -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        calls: list[str] = []
        with socket_pair() as (one, one_peer), socket_pair() as (two, two_peer):

            def first_wins(name: str) -> None:
                calls.append(name)
                loop.remove_reader(one)
                loop.remove_reader(two)

            loop.add_reader(one, first_wins, "one of them")
            loop.add_reader(two, first_wins, "one of them")
            one_peer.send(b"x")
            two_peer.send(b"x")
            await asyncio.sleep(0.02)
        return calls

    assert run(loop, main()) == ["one of them"]


def test_a_descriptor_number_that_is_used_again_watches_the_new_file(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in range(20):
            with socket_pair() as (left, right):
                got = loop.create_future()
                loop.add_reader(left.fileno(), settle, got)
                await asyncio.sleep(0)
                assert not got.done()
                right.send(b"%d" % number)
                await got
                loop.remove_reader(left.fileno())

    run(loop, main())


def test_bad_descriptors_are_refused_as_asyncio_refuses_them(loop: Loop, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")

    async def scenario() -> Record:
        loop = asyncio.get_running_loop()
        record: Record = []

        def attempt(what: str, fd: Any) -> None:
            calls: list[tuple[Any, ...]] = [
                (loop.add_reader, fd, print),
                (loop.add_writer, fd, print),
                (loop.remove_reader, fd),
                (loop.remove_writer, fd),
            ]
            for method, *args in calls:
                try:
                    result = method(*args)
                except (OSError, RuntimeError, ValueError, TypeError) as exc:
                    result = (type(exc), getattr(exc, "errno", None))
                record.append((what, method.__name__, result))

        async with connected() as (near, _):
            attempt("transport", near.transport.get_extra_info("socket").fileno())
        with file.open("rb") as regular:
            attempt("regular file", regular.fileno())
        folder = os.open(tmp_path, os.O_RDONLY)
        attempt("folder", folder)
        os.close(folder)
        with open("/dev/null") as null:
            attempt("/dev/null", null)
        left, right = socket.socketpair()
        closed = left.fileno()
        left.close()
        right.close()
        attempt("closed", closed)
        attempt("closed socket", left)
        attempt("negative", -1)
        attempt("no file", "nonsense")
        return record

    record = same_on_asyncio(loop, scenario)
    assert ("transport", "add_reader", (RuntimeError, None)) in record
    assert ("regular file", "add_reader", (PermissionError, 1)) in record
    assert ("closed", "add_reader", (OSError, 9)) in record


def test_a_refused_descriptor_leaves_its_number_usable(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with open(os.devnull, "rb") as null, pytest.raises(PermissionError):
            loop.add_reader(null, print)
        with socket_pair() as (left, right):
            got = loop.create_future()
            loop.add_reader(left, lambda: settle(got, left.recv(1)))
            right.send(b"x")
            assert await got == b"x"
            loop.remove_reader(left)

    run(loop, main())


# --------------------------------------------------------------------------------- timers and turns


def test_a_sleep_of_200_us_is_never_early(loop: Loop) -> None:
    async def main() -> list[int]:
        slept = []
        for _ in range(200):
            started = time.monotonic_ns()
            await asyncio.sleep(200e-6)
            slept.append(time.monotonic_ns() - started)
        return slept

    slept = run(loop, main())
    assert min(slept) >= 200_000
    assert statistics.median(slept) < 50_000_000


def test_an_idle_wait_ends_with_its_timer_and_not_before(loop: Loop) -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        started, turns = loop.time(), cast("Loop", loop).statistics().turns
        await asyncio.sleep(0.05)
        return loop.time() - started, cast("Loop", loop).statistics().turns - turns

    slept, turns = run(loop, main())
    assert 0.05 <= slept < 5
    assert turns < 10


def test_timers_fire_in_the_order_of_their_times(loop: Loop) -> None:
    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        fired: list[object] = []
        now = loop.time()
        for delay_ms in (9, 1, 5, 3, 7):
            loop.call_at(now + delay_ms / 1000, fired.append, delay_ms)
        loop.call_later(0.004, fired.append, "cancelled").cancel()
        loop.call_soon(fired.append, "soon")
        loop.call_later(-1, fired.append, "past")
        await asyncio.sleep(0.015)
        return fired

    assert run(loop, main()) == ["soon", "past", 1, 3, 5, 7, 9]


def test_a_far_timer_does_not_upset_the_wait(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        handles = [loop.call_later(delay, print) for delay in (1e5, 1e9, 1e12)]
        await asyncio.sleep(0.002)
        for handle in handles:
            handle.cancel()

    run(loop, main())


def test_25_000_callbacks_that_reschedule_themselves_do_not_starve_a_reader(loop: Loop) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        turns = 0
        got = loop.create_future()

        def again() -> None:
            if not got.done():
                loop.call_soon(again)

        def count() -> None:
            nonlocal turns
            turns += 1
            if turns == 2:
                right.send(b"x")
            if turns < 50 and not got.done():
                loop.call_soon(count)

        with socket_pair() as (left, right):
            loop.add_reader(left, lambda: settle(got, turns))
            loop.call_soon(count)
            for _ in range(25_000):
                loop.call_soon(again)
            seen = await got
            loop.remove_reader(left)
        return int(seen)

    assert run(loop, main()) in (2, 3)


def depth() -> int:
    """How many frames stand on the stack."""
    frame, count = sys._getframe(), 0
    while frame := frame.f_back:  # type: ignore[assignment]
        count += 1
    return count


def test_25_000_mutual_wake_ups_do_not_grow_the_stack(loop: Loop) -> None:
    async def bounce(mine: asyncio.Queue[int], other: asyncio.Queue[int]) -> set[int]:
        depths = set()
        for _ in range(12_500):
            number = await mine.get()
            if number % 1000 < 2:
                depths.add(depth())
            other.put_nowait(number + 1)
        return depths

    async def main() -> tuple[set[int], int]:
        one: asyncio.Queue[int] = asyncio.Queue()
        two: asyncio.Queue[int] = asyncio.Queue()
        one.put_nowait(0)
        left, right = await asyncio.gather(bounce(one, two), bounce(two, one))
        return left | right, one.get_nowait()

    depths, last = run(loop, main())
    assert last == 25_000
    assert len(depths) == 1


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks_start_at_once(loop: Loop) -> None:
    async def main() -> list[str]:
        order: list[str] = []

        async def work() -> str:
            order.append("started")
            await asyncio.sleep(0)
            order.append("went on")
            return "done"

        task = asyncio.get_running_loop().create_task(work())
        order.append("created")
        order.append(await task)
        async with connected(Peer, Echo) as (near, _):
            near.transport.write(b"eager")
            await near.received(5)
        return order

    loop.set_task_factory(vars(asyncio)["eager_task_factory"])
    assert run(loop, main()) == ["started", "created", "went on", "done"]


# --------------------------------------------------------------------------------------- debug mode


def test_debug_mode_names_a_slow_callback(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(time.sleep, 0.03)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.set_debug(True)
    loop.slow_callback_duration = 0.02
    run(loop, main())
    assert [
        record
        for record in caplog.records
        if "sleep" in record.message and "took" in record.message
    ]


def test_debug_mode_refuses_call_soon_from_another_thread(loop: Loop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(RuntimeError, match="Non-thread-safe"):
            await asyncio.to_thread(loop.call_soon, print)
        with pytest.raises(RuntimeError, match="Non-thread-safe"):
            await asyncio.to_thread(loop.call_later, 1, print)

    loop.set_debug(True)
    run(loop, main())


def test_debug_mode_carries_bytes_too(loop: Loop) -> None:
    loop.set_debug(True)
    loop.slow_callback_duration = 10
    run(loop, echo_through(Echo, Peer, payload(MIB)))


@pytest.mark.parametrize("kind", ["stream", "datagram", "read pipe", "write pipe"])
def test_an_unclosed_transport_warns(make_loop: Callable[[], Loop], kind: str) -> None:
    loop = make_loop()
    left, right = socket.socketpair()
    read_fd, write_fd = os.pipe()

    async def make() -> Any:
        if kind == "stream":
            return await loop.create_connection(Peer, sock=left)
        if kind == "datagram":
            return await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
        if kind == "read pipe":
            return await loop.connect_read_pipe(Peer, os.fdopen(read_fd, "rb", 0, closefd=False))
        return await loop.connect_write_pipe(Peer, os.fdopen(write_fd, "wb", 0, closefd=False))

    transport, protocol = loop.run_until_complete(make())
    loop.close()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del transport, protocol
        gc.collect()
    assert any("unclosed transport" in str(warning.message) for warning in warned)
    os.close(read_fd)
    os.close(write_fd)
    left.close()
    right.close()


def test_an_unclosed_loop_warns_and_frees_its_descriptors(monitor: str) -> None:
    holder = [uringloop.new_event_loop(monitor=monitor)]

    def drop() -> None:
        holder.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        drop()


# -------------------------------------------------------------- the same scenario on asyncio itself


def test_callbacks_run_in_the_contexts_that_asyncio_uses(loop: Loop) -> None:
    async def scenario() -> Record:
        var = contextvars.ContextVar("var", default="none")

        class InContext(Peer):
            def __init__(self, side: str) -> None:
                super().__init__()
                self.side = side
                self.record: Record = []

            def write_down(self, event: str) -> None:
                self.record.append((event, var.get()))
                var.set(f"{self.side} {event}")

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.write_down("connection_made")
                super().connection_made(transport)

            def data_received(self, data: bytes) -> None:
                self.write_down(f"data_received {len(data)}")
                super().data_received(data)

            def eof_received(self) -> bool | None:
                self.write_down("eof_received")
                return super().eof_received()

            def connection_lost(self, exc: Exception | None) -> None:
                self.write_down("connection_lost")
                super().connection_lost(exc)

        var.set("before")
        client, server = (lambda: InContext("client")), (lambda: InContext("server"))
        async with connected(client, server) as (near, far):
            var.set("connected")
            for count in (1, 2):
                far.transport.write(bytes(1))
                await near.received(count)
            near.transport.pause_reading()
            var.set("paused")
            near.transport.resume_reading()
            for count in (3, 4):
                far.transport.write(bytes(1))
                await near.received(count)
            var.set("closing")
            near.transport.write(bytes(3))
            await far.received(3)
            near.transport.close()
            await near.lost()
            await far.lost()
            return [*near.record, *far.record]

    record = same_on_asyncio(loop, scenario)
    assert len([event for event, _ in record if event == "data_received 1"]) == 4
    assert len({value for event, value in record if event.startswith("data_received")}) > 2


def test_datagrams_pipes_and_readers_run_in_the_contexts_that_asyncio_uses(loop: Loop) -> None:
    async def scenario() -> Record:
        loop = asyncio.get_running_loop()
        var = contextvars.ContextVar("var", default="none")
        seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

        def note(event: str) -> None:
            seen.put_nowait((event, var.get()))
            var.set(f"after {event}")

        class Datagram(Datagrams):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                note("datagram")

        record: Record = []
        var.set("before")
        transport, _ = await loop.create_datagram_endpoint(Datagram, local_addr=("127.0.0.1", 0))
        var.set("later")
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            for _ in range(2):
                sock.sendto(b"x", transport.get_extra_info("sockname"))
                record.append(await seen.get())
        transport.close()
        with socket_pair() as (left, right):

            def read() -> None:
                left.recv(1)
                note("reader")

            loop.add_reader(left, read)
            var.set("even later")
            for _ in range(2):
                right.send(b"x")
                record.append(await seen.get())
            loop.remove_reader(left)
        return record

    record = same_on_asyncio(loop, scenario)
    assert [event for event, _ in record] == ["datagram", "datagram", "reader", "reader"]


def handled(record: Record) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An exception handler that writes down what it is told."""

    def handler(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        text = context["message"].split("(")[0].split(" at 0x")[0]
        record.append((text, type(context.get("exception")).__name__))

    return handler


class Faulty(Peer):
    """Raises in the callbacks it is told to."""

    fails: tuple[str, ...] = ()

    def fail_in(self, name: str) -> None:
        self.note(name)
        if name in self.fails:
            raise ValueError(name)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.fail_in("made")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.fail_in("data")

    def eof_received(self) -> bool | None:
        super().eof_received()
        self.fail_in("eof")
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.fail_in("lost")

    @property
    def is_lost(self) -> bool:
        return "lost" in self.events


@pytest.mark.parametrize("where", ["made", "data", "eof", "lost"])
def test_a_protocol_that_raises_is_treated_as_by_asyncio(loop: Loop, where: str) -> None:
    class Failing(Faulty):
        fails = (where,)

    async def scenario() -> Record:
        record: Record = []
        asyncio.get_running_loop().set_exception_handler(handled(record))
        async with connected(Failing, Peer) as (near, far):
            far.transport.write(b"data")
            await near.received(4)
            far.transport.close()
            await near.lost()
            await far.lost()
            await asyncio.sleep(0)
            return [*record, *near.story, *far.story]

    record = same_on_asyncio(loop, scenario)
    assert any(entry[1] == "ValueError" for entry in record if isinstance(entry, tuple))


@pytest.mark.parametrize("buffer", [None, bytearray()], ids=["no buffer", "empty buffer"])
def test_a_useless_buffer_is_treated_as_by_asyncio(loop: Loop, buffer: Any) -> None:
    class Useless(BufferedPeer):
        def get_buffer(self, sizehint: int) -> bytearray:
            return cast("bytearray", buffer)

    async def scenario() -> Record:
        record: Record = []
        asyncio.get_running_loop().set_exception_handler(handled(record))
        async with connected(Useless, Peer) as (near, far):
            far.transport.write(b"data")
            await near.lost()
            return [*record, *near.story]

    assert same_on_asyncio(loop, scenario)[0][0].startswith("Fatal error")


def test_errors_of_callbacks_and_tasks_reach_the_exception_handler(loop: Loop) -> None:
    async def scenario() -> Record:
        record: Record = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(handled(record))
        loop.call_soon(int, "no number")
        loop.call_later(0.001, int, "no number either")
        with socket_pair() as (left, right):
            loop.add_reader(left, lambda: int(left.recv(10)))
            right.send(b"not this")
            await asyncio.sleep(0.02)
            loop.remove_reader(left)

        async def fail() -> None:
            raise KeyError

        task = loop.create_task(fail())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        gc.collect()
        return sorted(record)

    record = same_on_asyncio(loop, scenario)
    assert [error for _, error in record] == ["ValueError", "ValueError", "ValueError", "KeyError"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio checks it since Python 3.12")
def test_one_socket_cannot_have_two_transports(loop: Loop) -> None:
    """asyncio's rule since 3.12; before, the second one quietly took the reads of the first."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        left, right = socket.socketpair()
        with right:
            transport, near = await loop.create_connection(Peer, sock=left)
            with pytest.raises(RuntimeError, match="is used by transport"):
                await loop.create_connection(Peer, sock=left)
            transport.abort()
            await near.lost()

    run(loop, main())


def test_an_exit_raised_in_a_callback_leaves_the_loop(loop: Loop) -> None:
    class Leaving(Peer):
        def data_received(self, data: bytes) -> None:
            raise KeyboardInterrupt

    left, right = socket.socketpair()

    async def main() -> None:
        await asyncio.get_running_loop().create_connection(Leaving, sock=left)
        await asyncio.sleep(10)

    with left, right:
        right.send(b"x")
        task = loop.create_task(main())
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        task.cancel()

        async def end() -> None:
            await asyncio.wait([task])
            for transport in list(loop._transports.values()):
                transport.abort()

        run(loop, end())


async def closes_at_once() -> Record:
    async with connected() as (near, far):
        near.transport.close()
        await near.lost()
        await far.lost()
        return [*near.story, *far.story]


async def writes_then_closes() -> Record:
    async with connected() as (near, far):
        near.transport.write(payload(300_000))
        near.transport.close()
        await near.lost()
        await far.lost()
        return [near.events[-1], *far.story]


async def ends_both_ways() -> Record:
    keeps = lambda: Peer(keep_open=True)  # noqa: E731
    async with connected(keeps, keeps) as (near, far):
        near.transport.write_eof()
        far.transport.write_eof()
        await near.has("eof_received")
        await far.has("eof_received")
        facts = [side.transport.is_closing() for side in (near, far)]
        near.transport.write_eof()
        with contextlib.suppress(RuntimeError):
            near.transport.write(b"too late")
            facts.append("wrote after its end")
        near.transport.close()
        far.transport.close()
        await near.lost()
        await far.lost()
        return [*facts, *near.story, *far.story]


async def aborts() -> Record:
    async with connected() as (near, far):
        near.transport.write(b"data")
        await far.received(4)
        near.transport.abort()
        near.transport.abort()
        near.transport.close()
        await near.lost()
        await far.lost()
        return [*near.story, *far.story]


async def writes_after_the_peer_is_gone() -> Record:
    async with connected(lambda: Peer(keep_open=True), Peer) as (near, far):
        far.transport.abort()
        await near.has("eof_received")
        for _ in range(8):
            near.transport.write(b"anybody?")
            await asyncio.sleep(0.005)
        await near.lost()
        near.transport.write(b"nobody")
        return [*near.story, near.transport.get_write_buffer_size()]


async def changes_its_protocol() -> Record:
    async with connected() as (near, far):
        far.transport.write(b"one")
        await near.received(3)
        buffered = BufferedPeer()
        buffered.connection_made(near.transport)
        near.transport.set_protocol(buffered)
        far.transport.write(b"two")
        await buffered.received(3)
        near.transport.set_protocol(near)
        far.transport.write(b"three")
        await near.received(8)
        far.transport.close()
        await near.lost()
        return [near.story, buffered.story, near.transport.get_protocol() is near]


async def is_refused() -> Record:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    try:
        await asyncio.open_connection(*address)
    except OSError as exc:
        return [type(exc), exc.errno]
    return ["connected"]


async def is_cancelled_while_it_connects() -> Record:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.ensure_future(
            asyncio.get_running_loop().create_connection(Peer, *listener.getsockname())
        )
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return [task.cancelled()]


async def closes_its_server() -> Record:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Peer, "127.0.0.1", 0, start_serving=False)
    facts: Record = [server.is_serving()]
    await server.start_serving()
    facts.append(server.is_serving())
    serving = asyncio.ensure_future(server.serve_forever())
    await asyncio.sleep(0)
    serving.cancel()
    await asyncio.wait([serving])
    server.close()
    await server.wait_closed()
    return [*facts, server.is_serving(), len(server.sockets), serving.cancelled()]


async def has_one_turn_per_sleep() -> Record:
    loop = asyncio.get_running_loop()
    order: Record = []

    async def step(name: str) -> None:
        for number in range(3):
            order.append((name, number))
            await asyncio.sleep(0)

    loop.call_soon(order.append, "soon")
    await asyncio.gather(step("a"), step("b"))
    return order


async def sets_its_write_limits() -> Record:
    async with connected() as (near, far):
        facts: Record = [near.transport.get_write_buffer_limits()]
        near.transport.set_write_buffer_limits(high=100)
        facts.append(near.transport.get_write_buffer_limits())
        far.transport.pause_reading()
        near.transport.write(payload(70_000))
        facts.append(near.transport.get_write_buffer_size())
        near.transport.write(payload(16 * MIB))
        facts += [near.events, near.transport.get_write_buffer_size() > 0]
        far.transport.resume_reading()
        await far.received(70_000 + 16 * MIB)
        await near.has("resume_writing")
        near.transport.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
        near.transport.close()
        await far.lost()
        return [*facts, far.data[-3:], len(far.data)]


async def reports_what_it_is() -> Record:
    async with connected() as (near, far):
        facts = [
            near.transport.get_extra_info("sockname") == far.transport.get_extra_info("peername"),
            type(near.transport.get_extra_info("socket")),
            near.transport.get_extra_info("nothing", "default"),
            isinstance(near.transport, asyncio.Transport),
            near.transport.can_write_eof(),
            asyncio.get_running_loop().call_soon(int).__class__,
        ]
        near.transport.close()
        await far.lost()
        return facts


SCENARIOS = [
    closes_at_once,
    writes_then_closes,
    ends_both_ways,
    aborts,
    writes_after_the_peer_is_gone,
    changes_its_protocol,
    is_refused,
    is_cancelled_while_it_connects,
    closes_its_server,
    has_one_turn_per_sleep,
    sets_its_write_limits,
    reports_what_it_is,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_program_cannot_tell_it_from_asyncio_when_it(
    loop: Loop, scenario: Callable[[], Awaitable[Record]]
) -> None:
    assert same_on_asyncio(loop, scenario)
