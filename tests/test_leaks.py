"""What a server leaves behind after a million requests and a hundred thousand connections.

The promise: nothing. Each run is a process of its own; the second half of the work may add less to
its memory, its objects and its descriptors than the bounds below.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import gc
import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import uringloop
from tests.conftest import refusal
from tests.connections import BufferedPeer, Peer
from tests.support import run_child

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("monitor", ["io_uring", "epoll"], indirect=True),
]

REQUESTS = 1_000_000
CONNECTIONS = 100_000

#: One byte a request, or ten a connection; a leaked object has at least 16.
RSS_GROWTH_MAX_BYTES = 1 << 19
#: What the interpreter itself adds now and then: interned names, specialised code.
BLOCKS_GROWTH_MAX = 500
OBJECTS_GROWTH_MAX = 50

Facts = dict[str, Any]


@pytest.fixture
def monitor(request: pytest.FixtureRequest) -> str:
    """A monitor, if this machine offers it."""
    if reason := refusal(request.param):
        pytest.skip(reason)
    return str(request.param)


def measure() -> Facts:
    """What this process holds, once everything that can be freed is."""
    for _ in range(3):
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    types = collections.Counter(type(held).__qualname__ for held in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "blocks": sys.getallocatedblocks(),
        "types": dict(types),
        "objects": sum(types.values()),
    }


def judge(before: Facts, after: Facts, work: str) -> None:
    """Compare the ends of the two halves."""
    growth = {
        name: after[name] - before[name] for name in ("rss_bytes", "blocks", "objects", "files")
    }
    grown = {
        name: number - before["types"].get(name, 0)
        for name, number in after["types"].items()
        if number > before["types"].get(name, 0)
    }
    text = f"the second half of {work} added {growth}, of these types {grown}"
    assert growth["files"] == 0, text
    assert growth["objects"] < OBJECTS_GROWTH_MAX, text
    assert growth["blocks"] < BLOCKS_GROWTH_MAX, text
    assert growth["rss_bytes"] < RSS_GROWTH_MAX_BYTES, text
    alive = {name: number for name, number in grown.items() if "Transport" in name}
    assert not alive, text


# ---------------------------------------------------------------------------------------- requests


class Echo(Peer):
    """Sends back what it gets, and keeps nothing."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class BufferedEcho(BufferedPeer):
    """The same from its own buffer."""

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(memoryview(self.buffer)[:nbytes])


#: Mostly small ones; now and then one that takes several reads and, perhaps, has to wait.
MESSAGES = [b"x" * 100] * 499 + [b"y" * 300_000]


class Asking(Peer):
    """Asks again when its answer is complete, until it has asked enough."""

    def __init__(self, keep_open: bool | None = None) -> None:
        super().__init__(keep_open)
        self.messages = itertools.cycle(MESSAGES)
        self.missing_bytes = 0

    def ask(self, left: int) -> asyncio.Future[None]:
        self.left = left
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.send()
        return self.done

    def send(self) -> None:
        message = next(self.messages)
        self.missing_bytes = len(message)
        if len(message) > 1000:
            self.transport.writelines([bytearray(message[:1000]), message[1000:]])
        else:
            self.transport.write(message)

    def take(self, size: int) -> None:
        self.missing_bytes -= size
        if not self.missing_bytes:
            self.left -= 1
            if self.left:
                self.send()
            else:
                self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.take(len(data))


class BufferedAsking(BufferedPeer, Asking):
    """The same with a buffer."""

    def buffer_updated(self, nbytes: int) -> None:
        self.take(nbytes)


async def echo_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    writer.close()


def ask_much(monitor: str, requests: int) -> list[Facts]:
    """Many requests over few connections of every kind; what is held after each half."""

    async def main() -> list[Facts]:
        loop = asyncio.get_running_loop()
        plain = await loop.create_server(Echo, "127.0.0.1", 0)
        buffered = await loop.create_server(BufferedEcho, "127.0.0.1", 0)
        streams = await asyncio.start_server(echo_streams, "127.0.0.1", 0)
        askers: list[Asking] = []
        for server, kinds in (
            (plain, [Asking, BufferedAsking] * 4),
            (buffered, [Asking, BufferedAsking] * 4),
            (streams, [Asking] * 2),
        ):
            address = server.sockets[0].getsockname()
            for kind in kinds:
                _, asker = await loop.create_connection(kind, *address)
                askers.append(asker)
        facts = []
        measure()  # what it needs itself is made the first time
        for _ in range(2):
            await asyncio.gather(*(asker.ask(requests // 2 // len(askers)) for asker in askers))
            facts.append(measure())
        for asker in askers:
            asker.transport.close()
            await asker.lost()
        for server in (plain, buffered, streams):
            server.close()
            await server.wait_closed()
        return facts

    return uringloop.run(main(), monitor=monitor)


def test_a_million_requests_leave_nothing_behind(monitor: str) -> None:
    before, after = run_child(ask_much, monitor, REQUESTS, limit=400).value
    judge(before, after, f"{REQUESTS} requests")


# ------------------------------------------------------------------------------------- connections


class Brief(Peer):
    """A client of one request, which then ends in its own way."""

    endings: Iterator[str]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.ending = next(self.endings)
        self.transport.write(b"request")

    def data_received(self, data: bytes) -> None:
        transport = self.transport
        if self.ending == "close":
            transport.close()
        elif self.ending == "abort":
            transport.abort()
        elif self.ending == "half":
            transport.write_eof()
        elif self.ending == "reset":
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.close()
        elif self.ending == "flood":
            transport.write(bytes(300_000))
            transport.write(bytearray(300_000))
            transport.abort()
        else:
            transport.pause_reading()
            transport.resume_reading()
            transport.close()


ENDINGS = ["close", "abort", "half", "reset", "pause", "close", "abort", "half", "close", "flood"]


async def one(kind: type[asyncio.BaseProtocol], address: tuple[str, int]) -> None:
    _, client = await asyncio.get_running_loop().create_connection(
        cast("type[Peer]", kind), *address
    )
    await client.lost()


async def stream(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"request")
    await reader.readexactly(7)
    writer.close()
    await writer.wait_closed()


def connect_much(monitor: str, connections: int) -> list[Facts]:
    """Many connections of one request each; what is held after each half."""

    async def main() -> list[Facts]:
        loop = asyncio.get_running_loop()
        plain = await loop.create_server(Echo, "0.0.0.0", 0, backlog=1000)
        buffered = await loop.create_server(BufferedSmall, "0.0.0.0", 0, backlog=1000)
        ports = [server.sockets[0].getsockname()[1] for server in (plain, buffered)]
        Brief.endings = itertools.cycle(ENDINGS)
        # A port that was just used rests for a minute: many addresses have ports enough.
        hosts = itertools.cycle([f"127.0.{third}.1" for third in range(1, 101)])
        width = 50

        async def lane(count: int) -> None:
            for number in range(count):
                address = (next(hosts), ports[number % 2])
                if number % 10 == 9:
                    await stream(address)
                else:
                    await one((Brief, BufferedBrief)[number % 3 == 0], address)

        facts = []
        measure()  # what it needs itself is made the first time
        for _ in range(2):
            await asyncio.gather(*(lane(connections // 2 // width) for _ in range(width)))
            while cast(Any, loop)._transports:  # the servers' ends of the last ones
                await asyncio.sleep(0.01)
                gc.collect()
            facts.append(measure())
        plain.close()
        buffered.close()
        return facts

    return uringloop.run(main(), monitor=monitor)


class BufferedSmall(BufferedEcho):
    """A buffer of 4 KiB: thousands are made."""

    def __init__(self) -> None:
        super().__init__(bytearray(4096))


class BufferedBrief(BufferedPeer, Brief):
    """The client with a buffer."""

    def __init__(self) -> None:
        super().__init__(bytearray(4096))


def test_a_hundred_thousand_connections_leave_nothing_behind(monitor: str) -> None:
    before, after = run_child(connect_much, monitor, CONNECTIONS, limit=400).value
    judge(before, after, f"{CONNECTIONS} connections")
