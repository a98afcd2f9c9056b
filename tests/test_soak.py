"""A little of everything for a long time: streams, TLS, datagrams, sock_*, ends of every kind.

The promise: the second half adds nothing to what the process holds, peers see the end of a closed
connection as soon as in the beginning, and the kernel neither started a thread for us nor found
its completion queue full. URINGLOOP_TEST_SOAK_S=3600 makes it an hour; it uses a tenth of a core.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import uringloop
from tests.connections import (
    Peer,
    make_certificate,
    payload,
    read,
    reset,
    send_and_see,
    turns,
    wired,
)
from tests.support import ring_files, run_child
from tests.test_leaks import (
    ENDINGS,
    Brief,
    BufferedBrief,
    BufferedEcho,
    Echo,
    Facts,
    echo_streams,
    judge,
    measure,
    one,
)

SOAK_S = float(os.environ.get("URINGLOOP_TEST_SOAK_S", "10"))
SHARE_OF_A_CORE = 0.1

#: The median of the last rounds, with both ends in one busy loop.
END_SEEN_MAX_S = 0.05

KIB = 1024

Address = tuple[str, int]


def check_kernel() -> None:
    """No thread was added to this process, and every completion has found its place."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if name.startswith("iou-")], names
    for fd in ring_files():
        waiting = Path(f"/proc/self/fdinfo/{fd}").read_text().partition("CqOverflowList:")[2]
        assert "user_data" not in waiting


# ---------------------------------------------------------------------------------- what is done


async def echoed(sock: socket.socket, data: bytes) -> None:
    sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(sock, data))
    assert await read(sock, len(data)) == data
    await sending


async def echoed_by_streams(ends: Any, data: bytes) -> None:
    reader, writer = ends
    writer.write(data)
    assert await reader.readexactly(len(data)) == data


async def talk_once(address: Address, data: bytes) -> None:
    """Small messages, for which the monitor receives; a large one, for which it does not; small."""
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        for size_bytes in (100, 100, 100, 100, 100 * KIB, 1, 2000, 10 * KIB):
            await echoed(sock, data[:size_bytes])


async def cancel_often(source: random.Random) -> None:
    """Reads that are cancelled, and not one byte is lost by it."""
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        for number in range(10):
            reading = asyncio.create_task(loop.sock_recv(near, 100))
            await turns(source.randrange(3))
            reading.cancel()
            await asyncio.wait([reading])
            await loop.sock_sendall(far, b"%d" % number)
            assert await loop.sock_recv(near, 100) == b"%d" % number
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(loop.sock_recv_into(near, bytearray(10)), 0.0001)


async def accept_and_reset() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sock:
        listener.setblocking(False)
        sock.setblocking(False)
        await loop.sock_connect(sock, listener.getsockname())
        accepted, _ = await loop.sock_accept(listener)
        waiting = asyncio.create_task(loop.sock_recv(sock, 1))
        await turns(2)
        reset(accepted)
        with pytest.raises(ConnectionResetError):
            await waiting


class DatagramEcho(asyncio.DatagramProtocol):
    """Sends each datagram back."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


async def ask_by_datagrams(sock: socket.socket, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(DatagramEcho, local_addr=("127.0.0.1", 0))
    for size_bytes in (1, KIB, 9 * KIB):
        await loop.sock_sendto(sock, data[:size_bytes], transport.get_extra_info("sockname"))
        answer, _ = await loop.sock_recvfrom(sock, 10 * KIB)
        assert answer == data[:size_bytes]
    transport.close()


async def end_seen_after_s() -> float:
    """How long a peer waits for the end of a transport that is closed while it receives."""
    loop = asyncio.get_running_loop()
    async with wired(Peer, "tcp") as (peer, sock):
        await send_and_see(peer, sock, 5)
        closed_s = loop.time()
        peer.transport.close()
        assert await loop.sock_recv(sock, 1) == b""
        return loop.time() - closed_s


# ------------------------------------------------------------------------------------ for how long


class Soak:
    """Servers, and connections to them that last; `round` does a little of everything."""

    def __init__(self, seed: int) -> None:
        self.loop: Any = asyncio.get_running_loop()
        self.source = random.Random(seed)
        self.data = payload(100 * KIB, seed)
        self.lasting: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.ends_seen_s = collections.deque[float](maxlen=1000)
        self.rounds = 0

    async def open(self, stack: contextlib.AsyncExitStack, folder: Path) -> None:
        server_side, client_side = make_certificate(folder)
        servers = [
            await self.loop.create_server(Echo, "127.0.0.1", 0),
            await self.loop.create_server(BufferedEcho, "127.0.0.1", 0),
            await asyncio.start_server(echo_streams, "127.0.0.1", 0),
            await asyncio.start_server(echo_streams, "127.0.0.1", 0, ssl=server_side),
        ]
        for server in servers:
            stack.callback(server.close)
        *self.addresses, secret = [server.sockets[0].getsockname() for server in servers]
        self.asker = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        self.asker.setblocking(False)
        for size_bytes in (KIB, 10 * KIB, 100 * KIB):
            data = self.data[:size_bytes]
            for address in self.addresses:
                sock = stack.enter_context(socket.create_connection(address))
                sock.setblocking(False)
                self.lasting.append(functools.partial(echoed, sock, data))
                await self.open_streams(stack, data, *address)
            await self.open_streams(stack, data, "localhost", secret[1], ssl=client_side)

    async def open_streams(
        self, stack: contextlib.AsyncExitStack, data: bytes, *address: Any, **kwargs: Any
    ) -> None:
        ends = await asyncio.open_connection(*address, **kwargs)
        stack.callback(ends[1].close)
        self.lasting.append(functools.partial(echoed_by_streams, ends, data))

    async def round(self) -> None:
        await asyncio.gather(
            *(talk() for talk in self.lasting),
            *(talk_once(address, self.data) for address in self.addresses),
            *(one(kind, self.addresses[0]) for kind in [Brief, BufferedBrief] * 5),
            ask_by_datagrams(self.asker, self.data),
            cancel_often(self.source),
            accept_and_reset(),
        )
        self.ends_seen_s.append(await end_seen_after_s())
        check_kernel()
        assert self.loop.statistics().overflows == 0
        self.rounds += 1

    async def until(self, end_s: float) -> None:
        """Rounds, with rests in proportion to what they take of the processor."""
        while time.monotonic() < end_s:
            started_s = time.process_time()
            await self.round()
            await asyncio.sleep((time.process_time() - started_s) * (1 / SHARE_OF_A_CORE - 1))

    async def facts(self) -> Facts:
        """What is held when only the lasting connections are left; how soon ends were seen."""
        before, now = 0, len(self.loop._transports)
        while before != now:
            await asyncio.sleep(0.1)
            before, now = now, len(self.loop._transports)
        end_seen_s = statistics.median(self.ends_seen_s)
        return {"rounds": self.rounds, "end_seen_s": end_seen_s, **measure()}


def soak(monitor: str, seconds: float, folder: str) -> list[Facts]:
    """Mixed traffic for so long; what is held after each half."""

    async def main() -> list[Facts]:
        work = Soak(seed=1)
        Brief.endings = itertools.cycle(ENDINGS)
        facts = []
        async with contextlib.AsyncExitStack() as stack:
            await work.open(stack, Path(folder))
            await work.round()
            measure()  # what it needs itself is made the first time
            started_s = time.monotonic()
            for half in (1, 2):
                await work.until(started_s + half * seconds / 2)
                facts.append(await work.facts())
        while work.loop._transports:
            await asyncio.sleep(0.01)
        return facts

    return uringloop.run(main(), monitor=monitor)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("monitor", ["io_uring", "io_uring sends", "epoll"], indirect=True)
def test_mixed_traffic_leaves_nothing_behind_and_slows_nothing_down(
    monitor: str, tmp_path: Path
) -> None:
    before, after = run_child(soak, monitor, SOAK_S, str(tmp_path), limit=2 * SOAK_S + 60).value
    judge(before, after, f"{after['rounds']} rounds of mixed traffic")
    assert max(before["end_seen_s"], after["end_seen_s"]) < END_SEEN_MAX_S
