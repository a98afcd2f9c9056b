"""Both ends of a connection for tests of stream transports: a transport and a plain socket.

The promise: the peer of a transport under test is a socket that the test works itself, so what a
test sees of the transport is what the kernel carried, and nothing is left open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

MIB = 1 << 20

#: More than any socket of ours takes at once, sender's and receiver's buffers together.
TOO_MUCH = 32 * MIB


def payload(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that differ everywhere and are the same in every run."""
    return random.Random(size_bytes + seed).randbytes(size_bytes)


def digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class Peer(asyncio.Protocol):
    """A protocol that writes down what happens to it."""

    transport: asyncio.Transport

    def __init__(self, keep_open: bool | None = None) -> None:
        self.keep_open = keep_open
        self.events: list[str] = []
        self.data = bytearray()
        self.error: Exception | None = None
        self._changed = asyncio.Event()

    def note(self, event: str) -> None:
        """Write an event down; whoever waits looks again."""
        self.events.append(event)
        self._changed.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.note("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._changed.set()

    def eof_received(self) -> bool | None:
        self.note("eof")
        return self.keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.note("lost" if exc is None else f"lost {type(exc).__name__}")

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    @property
    def is_lost(self) -> bool:
        return any(event.startswith("lost") for event in self.events)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until the record fulfils a condition."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def lost(self) -> None:
        await self.until(lambda: self.is_lost)

    async def received(self, size_bytes: int) -> None:
        await self.until(lambda: len(self.data) >= size_bytes)

    async def has(self, event: str) -> None:
        await self.until(lambda: event in self.events)


class BufferedPeer(Peer, asyncio.BufferedProtocol):
    """A Peer that offers its own buffer, by default of 64 KiB."""

    def __init__(self, buffer: Any = None, keep_open: bool | None = None) -> None:
        super().__init__(keep_open)
        self.buffer = bytearray(64 * 1024) if buffer is None else buffer

    def get_buffer(self, sizehint: int) -> Any:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self.buffer).cast("B")[:nbytes]))


AnyPeer = TypeVar("AnyPeer", bound=Peer)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


PAIRS: dict[str, Callable[[], tuple[socket.socket, socket.socket]]] = {
    "unix": socket.socketpair,
    "tcp": tcp_pair,
}


@contextlib.asynccontextmanager
async def wired(
    make_protocol: Callable[[], AnyPeer], kind: str = "unix", first: bytes = b""
) -> AsyncIterator[tuple[AnyPeer, socket.socket]]:
    """A connected protocol, and the socket at the other end, which may have sent something first.

    In the end the transport is aborted and its loss is awaited.
    """
    near, far = PAIRS[kind]()
    with far:
        far.setblocking(False)
        if first:
            far.send(first)
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.create_connection(make_protocol, sock=near)
        try:
            yield protocol, far
        finally:
            await end(transport)


async def end(transport: asyncio.BaseTransport) -> None:
    """Abort a transport that is not lost yet; its socket is closed afterwards."""
    either = cast("asyncio.Transport", transport)
    if either.get_protocol() is not None:  # asyncio <= 3.13 cannot abort what was flushed and lost
        either.abort()
    await turns()


@contextlib.asynccontextmanager
async def served(
    make_protocol: Callable[[], AnyPeer], **kwargs: Any
) -> AsyncIterator[tuple[AnyPeer, socket.socket]]:
    """A protocol that a TCP server made, and the socket of its client."""
    loop = asyncio.get_running_loop()
    made: asyncio.Queue[AnyPeer] = asyncio.Queue()

    def factory() -> AnyPeer:
        protocol = make_protocol()
        made.put_nowait(protocol)
        return protocol

    server = await loop.create_server(factory, "127.0.0.1", 0, **kwargs)
    with socket.create_connection(server.sockets[0].getsockname()) as sock:
        sock.setblocking(False)
        protocol = await made.get()
        await protocol.has("made")
        try:
            yield protocol, sock
        finally:
            server.close()
            await end(protocol.transport)


async def send_and_see(protocol: Peer, sock: socket.socket, count: int) -> None:
    """Send single bytes, each received before the next is sent."""
    for _ in range(count):
        size = len(protocol.data) + 1
        sock.send(b"x")
        await protocol.received(size)


async def read(sock: socket.socket, size_bytes: int) -> bytes:
    """Exactly so many bytes of a socket; fewer mean that it ended."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size_bytes and (
        piece := await loop.sock_recv(sock, min(MIB, size_bytes - len(data)))
    ):
        data += piece
    return bytes(data)


async def read_to_end(sock: socket.socket) -> bytes:
    """What a socket has until its peer ends."""
    return await read(sock, 1 << 40)


def read_now(sock: socket.socket) -> bytes:
    """What a non-blocking socket has at this moment."""
    data = bytearray()
    with contextlib.suppress(BlockingIOError):
        while piece := sock.recv(MIB):
            data += piece
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its peer is reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextlib.contextmanager
def number_given_to(stranger: socket.socket, near: socket.socket) -> Iterator[int]:
    """Closes a socket behind its transport's back; another one has its number for a while."""
    number = near.fileno()
    near.close()
    os.dup2(stranger.fileno(), number)
    try:
        yield number
    finally:
        os.close(number)


async def turns(count: int = 5) -> None:
    """Let the loop turn a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


def make_certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's side of TLS for "localhost"; its certificate is its own
    authority.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command to make a certificate with")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 7"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *command.split(), *names, *files], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(certificate)
    return server, client
