"""Datagram transports, line by line of what asyncio's own promise.

The promise: as in test_transports.py, a test that takes `contract_loop` also runs on asyncio's
SelectorEventLoop, and says what asyncio does. A test that takes `loop` asks for more, and says
what.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import gc
import itertools
import logging
import os
import re
import socket
import sys
import time
import warnings
import weakref
import zlib
from asyncio import selector_events, trsock
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

import uringloop
from tests.conftest import MONITORS, refusal
from tests.connections import digest, payload, turns
from tests.support import run

AnyLoop = asyncio.AbstractEventLoop
Loop = uringloop.EventLoop
Report = dict[str, Any]

SINCE_3_12 = sys.version_info >= (3, 12)
SINCE_3_13 = sys.version_info >= (3, 13)
SINCE_3_14 = sys.version_info >= (3, 14)

#: What a waiting datagram counts for besides its bytes.
HEADER = 8 if SINCE_3_13 else 0

KINDS = pytest.mark.parametrize("kind", ["ipv4", "ipv6", "unix"])
FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6, "unix": socket.AF_UNIX}


@pytest.fixture(params=["stock", *MONITORS])
def contract_loop(request: pytest.FixtureRequest) -> Iterator[AnyLoop]:
    """asyncio's own loop, which shows that the test is right, and ours on each monitor."""
    if request.param == "stock":
        loop: AnyLoop = asyncio.SelectorEventLoop()
    elif reason := refusal(request.param):
        pytest.skip(reason)
    else:
        loop = uringloop.new_event_loop(monitor=request.param)
    yield loop
    loop.close()


class Endpoint(asyncio.DatagramProtocol):
    """A protocol that writes down what happens to it."""

    transport: asyncio.DatagramTransport

    def __init__(self) -> None:
        self.events: list[str] = []
        self.got: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.lost_with: Exception | None = None
        self._changed = asyncio.Event()

    def note(self, event: str) -> None:
        self.events.append(event)
        self._changed.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)
        self.note("made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.append((data, addr))
        self.note("datagram")

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)
        self.note(f"error {type(exc).__name__}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_with = exc
        self.note("lost")

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def received(self, count: int) -> list[tuple[bytes, Any]]:
        await self.until(lambda: len(self.got) >= count)
        return self.got

    async def has(self, event: str) -> None:
        await self.until(lambda: event in self.events)

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.got]

    @property
    def address(self) -> Any:
        return self.transport.get_extra_info("sockname")


AnyEndpoint = TypeVar("AnyEndpoint", bound=Endpoint)


@contextlib.asynccontextmanager
async def endpoint(
    make_protocol: Callable[[], AnyEndpoint], sock: socket.socket | None = None, **kwargs: Any
) -> AsyncIterator[AnyEndpoint]:
    """A datagram endpoint on 127.0.0.1 unless told otherwise; aborted in the end."""
    if sock is not None:
        kwargs["sock"] = sock
    elif not kwargs:
        kwargs["local_addr"] = ("127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(make_protocol, **kwargs)
    try:
        yield protocol
    finally:
        if "lost" not in protocol.events:
            transport.abort()
            await protocol.has("lost")


@contextlib.contextmanager
def bound(kind: str, folder: Path, name: str = "peer") -> Iterator[socket.socket]:
    """A socket with an address of its own, for the other end."""
    places: dict[str, Any] = {
        "ipv4": ("127.0.0.1", 0),
        "ipv6": ("::1", 0),
        "unix": str(folder / name),
    }
    with socket.socket(FAMILIES[kind], socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(places[kind])
        except OSError as exc:
            pytest.skip(f"no {kind} here: {exc}")
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        yield sock


def here(kind: str, folder: Path) -> dict[str, Any]:
    """Where an endpoint of this kind is to be."""
    if kind == "unix":
        return {"local_addr": str(folder / "endpoint"), "family": socket.AF_UNIX}
    return {"local_addr": ("127.0.0.1" if kind == "ipv4" else "::1", 0)}


def unix_pair(folder: Path) -> tuple[socket.socket, socket.socket]:
    """A connected socket, and the one that it is connected to, whose queue is short."""
    near, far = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    near.bind(str(folder / "near"))
    far.bind(str(folder / "far"))
    near.connect(str(folder / "far"))
    far.setblocking(False)
    return near, far


@contextlib.asynccontextmanager
async def to_short_queue(
    make_protocol: Callable[[], AnyEndpoint], folder: Path
) -> AsyncIterator[tuple[AnyEndpoint, socket.socket]]:
    """An endpoint that is connected to a socket whose queue is short, and that socket."""
    near, far = unix_pair(folder)
    with far:
        async with endpoint(make_protocol, near) as protocol:
            yield protocol, far


def reports_of(loop: AnyLoop) -> list[Report]:
    """From now on, what the loop tells its exception handler."""
    reports: list[Report] = []
    loop.set_exception_handler(lambda _, report: reports.append(report))
    return reports


def read_all(sock: socket.socket) -> list[bytes]:
    """The datagrams that a non-blocking socket has at this moment."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(1 << 18))
    return found


# --------------------------------------------------------------------------------------- receiving


@pytest.mark.parametrize("size_bytes", [0, 1, 479, 480, 4096, 4097, 65_000])
@KINDS
def test_a_datagram_arrives_whole_with_the_address_of_its_sender(
    contract_loop: AnyLoop, tmp_path: Path, kind: str, size_bytes: int
) -> None:
    data = payload(size_bytes)

    async def main() -> None:
        with bound(kind, tmp_path) as sock:
            async with endpoint(Endpoint, **here(kind, tmp_path)) as protocol:
                sock.sendto(data, protocol.address)
                sock.sendto(b"next", protocol.address)
                address = sock.getsockname()
                assert await protocol.received(2) == [(data, address), (b"next", address)]
                assert type(protocol.got[0][0]) is bytes
                assert type(protocol.got[0][1]) is type(address)

    run(contract_loop, main())


def test_datagrams_that_are_kept_do_not_change_when_others_come(contract_loop: AnyLoop) -> None:
    sizes = [480 + number % 5 for number in range(300)]

    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                for number, size in enumerate(sizes):
                    sock.sendto(payload(size, number), protocol.address)
                    await protocol.received(number + 1)
            assert protocol.data == [payload(size, number) for number, size in enumerate(sizes)]

    run(contract_loop, main())


@pytest.mark.parametrize("size_bytes", [100 * 1024, 122_880, 122_881, 200 * 1024, 256 * 1024])
def test_a_unix_datagram_is_as_long_as_256_kib(
    contract_loop: AnyLoop, tmp_path: Path, size_bytes: int
) -> None:
    data = payload(size_bytes)

    async def main() -> None:
        with bound("unix", tmp_path) as sock:
            async with endpoint(Endpoint, **here("unix", tmp_path)) as protocol:
                try:
                    sock.sendto(data, protocol.address)
                except OSError as exc:
                    pytest.skip(f"this kernel sends no such datagram: {exc}")
                sock.sendto(b"next", protocol.address)
                await protocol.received(2)
                assert digest(protocol.data[0]) == digest(data)
                assert protocol.data[1] == b"next"

    run(contract_loop, main())


def test_max_size_cuts_what_is_longer(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            cast("Any", protocol.transport).max_size = 5
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.sendto(b"long enough", protocol.address)
                sock.sendto(b"four", protocol.address)
            await protocol.received(2)
            assert protocol.data == [b"long ", b"four"]

    run(contract_loop, main())


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("a path", "a path"),
        (b"\xff\xfe", "\udcff\udcfe"),
        (b"\0abstract\0name", b"\0abstract\0name"),
        (b"\0" + b"n" * 107, b"\0" + b"n" * 107),
        (None, None),
    ],
    ids=["text", "no text", "abstract", "longest", "unbound"],
)
def test_a_unix_senders_address_is_a_path_abstract_bytes_or_nothing(
    contract_loop: AnyLoop, tmp_path: Path, address: Any, shown: Any
) -> None:
    async def main() -> None:
        async with endpoint(Endpoint, **here("unix", tmp_path)) as protocol:
            with (
                contextlib.chdir(tmp_path),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
            ):
                if address is not None:
                    sock.bind(address)
                sock.sendto(b"data", protocol.address)
                assert await protocol.received(1) == [(b"data", shown)]
                if address is not None:
                    protocol.transport.sendto(b"answer", protocol.got[0][1])
                    sock.settimeout(5)
                    assert sock.recv(100) == b"answer"

    run(contract_loop, main())


def test_each_of_many_senders_is_told_from_the_others(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            senders = []
            for number in range(3000):
                with socket.socket(type=socket.SOCK_DGRAM) as sock:
                    sock.bind((f"127.0.0.{1 + number % 250}", 0))
                    senders.append((b"%d" % number, sock.getsockname()))
                    sock.sendto(senders[-1][0], protocol.address)
                await protocol.received(number + 1)
            assert protocol.got == senders

    run(contract_loop, main(), limit=30)


@pytest.mark.parametrize("kind", ["ipv4", "unix"])
def test_ten_thousand_datagrams_come_back_whole_and_in_order(
    contract_loop: AnyLoop, tmp_path: Path, kind: str
) -> None:
    """Each carries its number and its checksum; at most 50 are under way."""
    count, window = 10_000, 50

    class Echo(Endpoint):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data, addr)

    def made(number: int) -> bytes:
        body = b"%08d" % number * (1 + number % 200)
        return zlib.crc32(body).to_bytes(4, "big") + body

    async def main() -> None:
        with bound(kind, tmp_path) as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            async with endpoint(Echo, **here(kind, tmp_path)) as protocol:
                sock.connect(protocol.address)
                sent = 0
                for number in range(count):
                    while sent < min(count, number + window):
                        await loop.sock_sendall(sock, made(sent))
                        sent += 1
                    data = await loop.sock_recv(sock, 1 << 16)
                    assert zlib.crc32(data[4:]).to_bytes(4, "big") == data[:4]
                    assert int(data[4:12]) == number

    run(contract_loop, main(), limit=60)


# --------------------------------------------------------- between one datagram and the next


class Flooded(Endpoint):
    """Finds so many datagrams waiting when it is made, and does something with each."""

    def __init__(self, act: Callable[[Flooded], object]) -> None:
        super().__init__()
        self.act = act

    def datagram_received(self, data: bytes, addr: Any) -> None:
        super().datagram_received(data, addr)
        self.act(self)


@contextlib.asynccontextmanager
async def flooded(act: Callable[[Flooded], object], count: int) -> AsyncIterator[Flooded]:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        ours = socket.socket(type=socket.SOCK_DGRAM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        ours.bind(("127.0.0.1", 0))
        for number in range(count):
            sock.sendto(b"%d" % number, ours.getsockname())
        async with endpoint(lambda: Flooded(act), ours) as protocol:
            yield protocol


def numbers(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, count)]


def test_connection_made_comes_before_what_was_waiting(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with flooded(lambda _: None, 10) as protocol:
            await protocol.received(10)
            assert protocol.events == ["made"] + ["datagram"] * 10
            assert protocol.data == numbers(10)

    run(contract_loop, main())


def test_a_flood_leaves_the_others_their_turns(contract_loop: AnyLoop) -> None:
    """Between two runs of a callback that always comes back, at most 64 datagrams are read."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen = [0]

        def tick() -> None:
            seen.append(len(protocol.got))
            if seen[-1] < 300:
                loop.call_soon(tick)

        async with flooded(lambda _: None, 300) as protocol:
            tick()
            await protocol.received(300)
            await turns()
            assert max(after - before for before, after in itertools.pairwise(seen)) <= 64
            assert protocol.data == numbers(300)

    run(contract_loop, main())


def test_a_burst_is_read_in_one_turn(loop: Loop) -> None:
    async def main() -> None:
        async with flooded(lambda _: None, 60) as protocol:
            seen = [0]
            while seen[-1] < 60:
                await asyncio.sleep(0)
                seen.append(len(protocol.got))
            assert max(after - before for before, after in itertools.pairwise(seen)) >= 16
            assert protocol.data == numbers(60)

    run(loop, main())


def test_datagrams_that_take_long_do_not_keep_a_timer_waiting(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with flooded(lambda _: time.sleep(0.003), 60) as protocol:
            due: asyncio.Future[None] = loop.create_future()
            loop.call_later(0.001, due.set_result, None)
            await due
            assert len(protocol.got) <= 10
            await protocol.received(60)

    run(contract_loop, main())


def test_what_a_datagram_has_queued_runs_before_the_next_is_read(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        def act(protocol: Flooded) -> None:
            asyncio.get_running_loop().call_soon(protocol.note, "queued")

        async with flooded(act, 20) as protocol:
            await protocol.until(lambda: protocol.events.count("queued") == 20)
            assert protocol.events == ["made"] + ["datagram", "queued"] * 20

    run(contract_loop, main())


def test_a_task_that_waits_for_each_datagram_misses_none(contract_loop: AnyLoop) -> None:
    """The protocol sets the result of a future, of which the task makes a new one."""

    async def main() -> list[bytes]:
        loop = asyncio.get_running_loop()
        following: asyncio.Future[bytes] = loop.create_future()
        found: list[bytes] = []
        async with flooded(lambda p: following.set_result(p.got[-1][0]), 100):
            while len(found) < 100:
                found.append(await following)
                following = loop.create_future()
        return found

    assert run(contract_loop, main()) == numbers(100)


def test_reading_can_be_paused_and_resumed_after_each_datagram(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with flooded(lambda p: cast("Any", p.transport).pause_reading(), 5) as protocol:
            transport = cast("Any", protocol.transport)
            for count in range(1, 6):
                await protocol.received(count)
                await turns(10)
                assert len(protocol.got) == count
                assert not transport.is_reading()
                transport.pause_reading()
                transport.resume_reading()
                transport.resume_reading()
                assert transport.is_reading()
            assert protocol.data == numbers(5)

    run(contract_loop, main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_nothing_arrives_after_it_was_closed(contract_loop: AnyLoop, how: str) -> None:
    async def main() -> None:
        async with flooded(lambda p: getattr(p.transport, how)(), 5) as protocol:
            await protocol.has("lost")
            await turns()
            assert protocol.events == ["made", "datagram", "lost"]
            assert protocol.lost_with is None
            assert protocol.transport.is_closing()

    run(contract_loop, main())


def test_the_next_datagram_goes_to_the_protocol_that_was_set(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        second = Endpoint()
        async with flooded(lambda p: p.transport.set_protocol(second), 3) as first:
            await second.received(2)
            assert first.data == [b"0"]
            assert second.data == [b"1", b"2"]
            assert first.transport.get_protocol() is second
            first.transport.abort()
            await second.has("lost")
            first.note("lost")

    run(contract_loop, main())


def test_an_exception_in_datagram_received_is_reported_and_ends_nothing(
    contract_loop: AnyLoop,
) -> None:
    reports = reports_of(contract_loop)

    async def main() -> None:
        async with flooded(lambda p: 1 / 0, 3) as protocol:
            await protocol.received(3)
            await turns()
            assert protocol.data == numbers(3)
            assert not protocol.transport.is_closing()

    run(contract_loop, main())
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError] * 3
    assert re.match(
        r"Exception in callback _SelectorDatagramTransport._read_ready\(\)", reports[0]["message"]
    )
    assert isinstance(reports[0]["handle"], asyncio.Handle)


@contextlib.contextmanager
def flooded_later(loop: AnyLoop, act: Callable[[Flooded], object], count: int) -> Iterator[Flooded]:
    """An endpoint that will find so many datagrams when its loop runs again."""
    making = loop.create_datagram_endpoint(lambda: Flooded(act), ("127.0.0.1", 0))
    _, protocol = run(loop, making)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        for number in range(count):
            sock.sendto(b"%d" % number, protocol.address)
    yield protocol
    protocol.transport.abort()
    run(loop, protocol.has("lost"))


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_an_exit_leaves_the_loop_and_the_other_datagrams(
    contract_loop: AnyLoop, kind: type[BaseException]
) -> None:
    def leave(protocol: Flooded) -> None:
        if len(protocol.got) == 2:
            raise kind

    with flooded_later(contract_loop, leave, 4) as protocol:
        with pytest.raises(kind):
            contract_loop.run_forever()
        assert protocol.data == numbers(2)
        run(contract_loop, protocol.received(4))
        assert protocol.data == numbers(4)


def test_a_stopped_loop_reads_nothing_more(contract_loop: AnyLoop) -> None:
    with flooded_later(contract_loop, lambda _: contract_loop.stop(), 3) as protocol:
        for count in (1, 2, 3):
            contract_loop.run_forever()
            assert protocol.data == numbers(count)


# ----------------------------------------------------------------------------------------- sending


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
@KINDS
def test_every_kind_of_bytes_reaches_the_address_that_is_named(
    contract_loop: AnyLoop, tmp_path: Path, kind: str, make: Callable[[bytes], Any]
) -> None:
    async def main() -> None:
        with bound(kind, tmp_path) as sock:
            async with endpoint(Endpoint, **here(kind, tmp_path)) as protocol:
                for size in (1, 1000, 60_000):
                    protocol.transport.sendto(make(payload(size)), sock.getsockname())
                    data, address = sock.recvfrom(1 << 17)
                    assert (digest(data), address) == (digest(payload(size)), protocol.address)

    run(contract_loop, main())


@pytest.mark.parametrize("data", ["text", None, 1, [b"bytes"]])
def test_nothing_else_is_sent(contract_loop: AnyLoop, data: Any) -> None:
    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            with pytest.raises(
                TypeError, match=r"^data argument must be a bytes-like object, not '"
            ):
                protocol.transport.sendto(data, protocol.address)

    run(contract_loop, main())


def test_an_empty_datagram_is_sent_since_3_13(contract_loop: AnyLoop, tmp_path: Path) -> None:
    async def main() -> None:
        with bound("ipv4", tmp_path) as sock:
            async with endpoint(Endpoint) as protocol:
                protocol.transport.sendto(b"", sock.getsockname())
                protocol.transport.sendto(b"full", sock.getsockname())
                assert sock.recv(100) == (b"" if SINCE_3_13 else b"full")

    run(contract_loop, main())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("ipv4", lambda port: ("127.0.0.1", port)),
        ("ipv4", lambda port: ("localhost", port)),
        ("ipv4", lambda port: ("", port)),
        ("ipv6", lambda port: ("::1", port)),
        ("ipv6", lambda port: ("0:0:0:0:0:0:0:1", port, 0)),
        ("ipv6", lambda port: ("::1", port, 0, 0)),
        ("ipv6", lambda port: ("::1", port, 7, 1)),
    ],
)
def test_an_address_may_be_written_in_many_ways(
    contract_loop: AnyLoop, tmp_path: Path, kind: str, shape: Callable[[int], Any]
) -> None:
    async def main() -> None:
        with bound(kind, tmp_path) as sock:
            async with endpoint(Endpoint, **here(kind, tmp_path)) as protocol:
                protocol.transport.sendto(b"data", shape(sock.getsockname()[1]))
                assert not protocol.errors
                assert sock.recv(100) == b"data"

    run(contract_loop, main())


def test_the_senders_address_is_what_one_answers_to(contract_loop: AnyLoop, tmp_path: Path) -> None:
    """As it came, and as an equal tuple."""

    async def main() -> None:
        with bound("ipv4", tmp_path) as one, bound("ipv4", tmp_path) as two:
            async with endpoint(Endpoint) as protocol:
                for sock in (one, two):
                    sock.sendto(b"question", protocol.address)
                (_, first), (_, second) = await protocol.received(2)
                protocol.transport.sendto(b"to two", second)
                protocol.transport.sendto(b"to one", first)
                protocol.transport.sendto(b"again", (first[0], first[1]))
                assert [one.recv(100), one.recv(100), two.recv(100)] == [
                    b"to one",
                    b"again",
                    b"to two",
                ]

    run(contract_loop, main())


def test_an_ipv4_address_is_none_for_an_ipv6_socket(contract_loop: AnyLoop, tmp_path: Path) -> None:
    """Not even one that an IPv4 transport was given by the kernel."""

    async def main() -> None:
        with bound("ipv4", tmp_path) as sock:
            async with (
                endpoint(Endpoint) as ipv4,
                endpoint(Endpoint, **here("ipv6", tmp_path)) as ipv6,
            ):
                sock.sendto(b"data", ipv4.address)
                [(_, address)] = await ipv4.received(1)
                ipv6.transport.sendto(b"data", address)
                assert [type(exc) for exc in ipv6.errors] == [socket.gaierror]

    run(contract_loop, main())


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (("255.255.255.255", 9), PermissionError),
        (("127.0.0.1", 0), OSError),
        (("no.such.host.invalid", 9), socket.gaierror),
    ],
    ids=["broadcast", "port 0", "unknown host"],
)
def test_an_error_of_sending_reaches_error_received(
    contract_loop: AnyLoop, address: Any, expected: type[Exception]
) -> None:
    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            protocol.transport.sendto(b"data", address)
            assert [type(exc) for exc in protocol.errors] == [expected]
            assert not protocol.transport.is_closing()

    run(contract_loop, main())


def test_a_datagram_that_is_too_long_reaches_error_received(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            protocol.transport.sendto(bytes(70_000), protocol.address)
            assert [cast("OSError", exc).errno for exc in protocol.errors] == [errno.EMSGSIZE]
            assert str(protocol.errors[0]) == f"[Errno 90] {os.strerror(errno.EMSGSIZE)}"

    run(contract_loop, main())


def test_broadcast_is_sent_where_it_was_allowed(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with endpoint(
            Endpoint, local_addr=("127.0.0.1", 0), allow_broadcast=True
        ) as protocol:
            protocol.transport.sendto(b"data", ("127.255.255.255", protocol.address[1]))
            assert not protocol.errors

    run(contract_loop, main())


@pytest.mark.parametrize(
    ("kind", "address", "expected"),
    [
        ("ipv4", None, TypeError),
        ("ipv4", "127.0.0.1", TypeError),
        ("ipv4", ("127.0.0.1",), TypeError),
        ("ipv4", ("127.0.0.1", "9"), TypeError),
        ("ipv4", ("127.0.0.1", 9, 0), TypeError),
        ("ipv4", ["127.0.0.1", 9], TypeError),
        ("ipv4", ("127.0.0.1", 65536), OverflowError),
        ("ipv4", ("127.0.0.1", -1), OverflowError),
        ("ipv4", ("127.0.0.1", 1 << 70), OverflowError),
        ("ipv4", ("127.0.0.1\0", 9), TypeError),
        ("ipv6", ("::1", 9, 1 << 20), OverflowError),
        ("ipv6", ("::1", 9, -1), OverflowError),
        ("ipv6", ("::1", 9, "0"), TypeError),
        ("unix", None, TypeError),
        ("unix", ("127.0.0.1", 9), TypeError),
    ],
)
def test_what_is_no_address_ends_the_transport(
    contract_loop: AnyLoop, tmp_path: Path, kind: str, address: Any, expected: type[Exception]
) -> None:
    reports = reports_of(contract_loop)

    async def main() -> None:
        async with endpoint(Endpoint, **here(kind, tmp_path)) as protocol:
            protocol.transport.sendto(b"data", address)
            assert protocol.transport.is_closing()
            await protocol.has("lost")
            assert isinstance(protocol.lost_with, expected)
            assert protocol.events == ["made", "lost"]
            [report] = reports
            assert report["message"] == "Fatal write error on datagram transport"
            assert report["exception"] is protocol.lost_with
            assert report["protocol"] is protocol
            assert report["transport"] is protocol.transport

    run(contract_loop, main())


def test_a_view_with_gaps_ends_the_transport(contract_loop: AnyLoop) -> None:
    reports = reports_of(contract_loop)

    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            protocol.transport.sendto(memoryview(b"abcd")[::2], protocol.address)
            await protocol.has("lost")
            assert isinstance(protocol.lost_with, BufferError)

    run(contract_loop, main())
    assert len(reports) == 1


def test_what_error_received_raises_reaches_the_sender(contract_loop: AnyLoop) -> None:
    class Strict(Endpoint):
        def error_received(self, exc: Exception) -> None:
            raise exc

    async def main() -> None:
        async with endpoint(Strict) as protocol:
            with pytest.raises(PermissionError):
                protocol.transport.sendto(b"data", ("255.255.255.255", 9))
            assert not protocol.transport.is_closing()

    run(contract_loop, main())


# --------------------------------------------------------------------------------------- connected


@pytest.mark.parametrize("kind", ["ipv4", "ipv6"])
def test_a_connected_transport_sends_to_its_peer_alone(
    contract_loop: AnyLoop, tmp_path: Path, kind: str
) -> None:
    async def main() -> None:
        with bound(kind, tmp_path) as sock, bound(kind, tmp_path) as stranger:
            address = sock.getsockname()
            async with endpoint(Endpoint, remote_addr=address[:2]) as protocol:
                assert protocol.transport.get_extra_info("peername") == address
                protocol.transport.sendto(b"one")
                protocol.transport.sendto(b"two", address)
                with pytest.raises(ValueError, match="Invalid address: must be None or"):
                    protocol.transport.sendto(b"three", stranger.getsockname())
                assert [sock.recv(10), sock.recv(10)] == [b"one", b"two"]
                stranger.sendto(b"not me", protocol.address)
                sock.sendto(b"me", protocol.address)
                assert await protocol.received(1) == [(b"me", address)]

    run(contract_loop, main())


def test_a_socket_that_came_connected_sends_to_its_peer_whatever_is_named(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, far):
            protocol.transport.sendto(b"one")
            protocol.transport.sendto(b"two", "anywhere")
            assert read_all(far) == [b"one", b"two"]

    run(contract_loop, main())


@pytest.mark.parametrize("paused", [False, True], ids=["by reading", "by sending"])
def test_a_refused_datagram_reaches_error_received(contract_loop: AnyLoop, paused: bool) -> None:
    async def main() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            address = sock.getsockname()
        async with endpoint(Endpoint, remote_addr=address) as protocol:
            if paused:
                cast("Any", protocol.transport).pause_reading()
            protocol.transport.sendto(b"anybody?")
            if paused:
                protocol.transport.sendto(b"anybody?")
            await protocol.until(lambda: protocol.errors)
            assert [type(exc) for exc in protocol.errors] == [ConnectionRefusedError]
            assert not protocol.transport.is_closing()

    run(contract_loop, main())


def test_a_socket_that_was_closed_behind_it_is_an_error(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    """And the descriptor's next owner is not sent to."""

    async def main() -> None:
        near, far = unix_pair(tmp_path)
        with far:
            async with endpoint(Endpoint, near) as protocol:
                number = near.fileno()
                near.close()
                one, two = socket.socketpair(type=socket.SOCK_DGRAM)
                with one, two:
                    assert number in (one.fileno(), two.fileno())
                    protocol.transport.sendto(b"data")
                    assert [cast("OSError", exc).errno for exc in protocol.errors] == [errno.EBADF]
                    protocol.transport.abort()
                    await protocol.has("lost")

    run(contract_loop, main())


def test_a_socket_that_was_closed_behind_it_reads_nothing_of_the_next_owners(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    """And does not ask for ever, although a pending poll keeps the old one open."""

    async def main() -> None:
        near, far = unix_pair(tmp_path)
        with far:
            async with endpoint(Endpoint, near) as protocol:
                await turns()
                number = near.fileno()
                near.close()
                one, two = socket.socketpair(type=socket.SOCK_DGRAM)
                with one, two:
                    owner, other = (one, two) if one.fileno() == number else (two, one)
                    assert owner.fileno() == number
                    other.send(b"for the owner")
                    with contextlib.suppress(ConnectionRefusedError):
                        far.sendto(b"for the closed one", str(tmp_path / "near"))
                    await asyncio.sleep(0.1)
                    assert owner.recv(100) == b"for the owner"
                    assert not protocol.got
                    assert len(protocol.errors) <= 2
                    protocol.transport.abort()
                    await protocol.has("lost")

    run(contract_loop, main())


@pytest.mark.skipif(not SINCE_3_12, reason="buffers run Python code since 3.12")
def test_a_buffer_that_ends_the_transport_while_it_is_sent_harms_nothing(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            transport: Any = protocol.transport

            class Ending(bytearray):
                def __buffer__(self, flags: int) -> memoryview:
                    transport._call_connection_lost(None)
                    return super().__buffer__(flags)

            with pytest.raises(AttributeError):  # there is no protocol to tell any more
                transport.sendto(Ending(b"data"), protocol.address)
            assert protocol.events == ["made", "lost"]

    run(contract_loop, main())


# ------------------------------------------------------------------------------------ flow control


async def fill(protocol: Endpoint, size_bytes: int = 1000) -> int:
    """Send until the peer's queue is full and one datagram waits; how many were sent."""
    count = 0
    while not cast("Any", protocol.transport).get_write_buffer_size():
        protocol.transport.sendto(b"%d " % count + bytes(size_bytes))
        count += 1
    return count


def test_what_finds_no_room_waits_and_follows_in_order(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, far):
            count = await fill(protocol)
            changing = bytearray(b"%d " % count + bytes(1000))
            protocol.transport.sendto(changing)
            changing[:] = b"changed"
            protocol.transport.sendto(memoryview(b"%d " % (count + 1)))
            assert not [event for event in protocol.events if event != "made"]
            found: list[bytes] = []
            while len(found) < count + 2:
                found += read_all(far)
                await asyncio.sleep(0)
            assert [int(data.split(b" ")[0]) for data in found] == list(range(count + 2))
            assert protocol.events == ["made"]

    run(contract_loop, main())


def test_the_protocol_is_paused_above_high_water_and_resumed_below_low(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, far):
            transport: Any = protocol.transport
            assert transport.get_write_buffer_limits() == (16384, 65536)
            transport.set_write_buffer_limits(high=3000, low=1500)
            count = await fill(protocol)
            size = transport.get_write_buffer_size()
            assert size == len(b"%d " % (count - 1)) + 1000 + HEADER
            transport.sendto(b"%d " % count + bytes(1000))
            transport.sendto(b"%d " % (count + 1) + bytes(1000))
            assert protocol.events == ["made", "pause"]
            found: list[bytes] = []
            while "resume" not in protocol.events:
                found += read_all(far)
                await asyncio.sleep(0)
            assert protocol.events == ["made", "pause", "resume"]
            await turns()
            found += read_all(far)
            assert [int(data.split(b" ")[0]) for data in found] == list(range(count + 2))
            if SINCE_3_14 or isinstance(contract_loop, Loop):  # 3.13.0 never counts down
                assert transport.get_write_buffer_size() == 0

    run(contract_loop, main())


def test_limits_are_checked_and_may_pause_at_once(contract_loop: AnyLoop, tmp_path: Path) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, _):
            transport: Any = protocol.transport
            with pytest.raises(ValueError, match="must be >= low"):
                transport.set_write_buffer_limits(high=1, low=2)
            transport.set_write_buffer_limits(low=100)
            assert transport.get_write_buffer_limits() == (100, 400)
            transport.set_write_buffer_limits(high=4000)
            assert transport.get_write_buffer_limits() == (1000, 4000)
            await fill(protocol)
            assert "pause" not in protocol.events
            transport.set_write_buffer_limits(high=0)
            assert "pause" in protocol.events

    run(contract_loop, main())


def test_what_resume_writing_sends_comes_last(contract_loop: AnyLoop, tmp_path: Path) -> None:
    class Sender(Endpoint):
        def resume_writing(self) -> None:
            super().resume_writing()
            self.transport.sendto(b"last")

    async def main() -> None:
        async with to_short_queue(Sender, tmp_path) as (protocol, far):
            cast("Any", protocol.transport).set_write_buffer_limits(high=500)
            await fill(protocol)
            found: list[bytes] = []
            while b"last" not in found:
                found += read_all(far)
                await asyncio.sleep(0)
            assert found[-1] == b"last"

    run(contract_loop, main())


def test_a_peer_that_goes_away_is_an_error_for_each_waiting_datagram(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, far):
            await fill(protocol)
            protocol.transport.sendto(b"another")
            far.close()
            await protocol.until(lambda: len(protocol.errors) >= 2)
            await turns()
            assert all(isinstance(exc, OSError) for exc in protocol.errors)
            assert not protocol.transport.is_closing()
            assert not cast("Any", protocol.transport)._buffer

    run(contract_loop, main())


# ----------------------------------------------------------------------------------------- its end


def test_close_waits_for_what_waits(contract_loop: AnyLoop, tmp_path: Path) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, far):
            count = await fill(protocol)
            protocol.transport.close()
            assert protocol.transport.is_closing()
            protocol.transport.close()
            protocol.transport.sendto(b"%d after close()" % count)
            await turns()
            assert "lost" not in protocol.events
            found: list[bytes] = []
            while "lost" not in protocol.events:
                found += read_all(far)
                await asyncio.sleep(0)
            found += read_all(far)
            assert [int(data.split(b" ")[0]) for data in found] == list(range(count + 1))
            await turns()
            assert protocol.events == ["made", "lost"]
            assert protocol.lost_with is None

    run(contract_loop, main())


def test_abort_drops_what_waits(contract_loop: AnyLoop, tmp_path: Path) -> None:
    async def main() -> None:
        async with to_short_queue(Endpoint, tmp_path) as (protocol, far):
            count = await fill(protocol)
            protocol.transport.abort()
            protocol.transport.abort()
            protocol.transport.close()
            await protocol.has("lost")
            await turns()
            assert protocol.events == ["made", "lost"]
            assert protocol.transport.get_extra_info("socket").fileno() == -1
            assert len(read_all(far)) == count - 1

    run(contract_loop, main())


def test_after_abort_an_unconnected_transport_sends_until_it_is_lost(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        with bound("ipv4", tmp_path) as sock:
            async with endpoint(Endpoint) as protocol:
                protocol.transport.abort()
                protocol.transport.sendto(b"farewell", sock.getsockname())
                assert sock.recv(100) == b"farewell"
                await protocol.has("lost")
                await turns()
                with pytest.raises(AttributeError):
                    protocol.transport.sendto(b"too late", sock.getsockname())

    run(contract_loop, main())


def test_after_abort_a_connected_transport_sends_nothing_and_says_so_at_the_fifth_time(
    contract_loop: AnyLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with bound("ipv4", tmp_path) as sock:
            async with endpoint(Endpoint, remote_addr=sock.getsockname()) as protocol:
                protocol.transport.abort()
                for _ in range(5):
                    protocol.transport.sendto(b"data")
                    await turns()
                assert [record.getMessage() for record in caplog.records] == [
                    "socket.send() raised exception."
                ]
                sock.setblocking(False)
                assert read_all(sock) == []
                assert protocol.events == ["made", "lost"]

    with caplog.at_level(logging.WARNING, logger="asyncio"):
        run(contract_loop, main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_it_is_lost_once_when_resume_writing_ends_it(loop: Loop, tmp_path: Path, how: str) -> None:
    """asyncio calls connection_lost(), and then again with a protocol that is None."""

    class Ending(Endpoint):
        def resume_writing(self) -> None:
            super().resume_writing()
            getattr(self.transport, how)()

    async def main() -> None:
        async with to_short_queue(Ending, tmp_path) as (protocol, far):
            cast("Any", protocol.transport).set_write_buffer_limits(high=0)
            await fill(protocol)
            while "lost" not in protocol.events:
                read_all(far)
                await asyncio.sleep(0)
            await turns()
            assert protocol.events == ["made", "pause", "resume", "lost"]

    run(loop, main())


def test_an_exception_in_connection_lost_is_reported_and_the_socket_closed(
    contract_loop: AnyLoop,
) -> None:
    reports = reports_of(contract_loop)

    class Failing(Endpoint):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            raise ZeroDivisionError

    async def main() -> None:
        sock = socket.socket(type=socket.SOCK_DGRAM)
        async with endpoint(Failing, sock) as protocol:
            protocol.transport.close()
            await protocol.has("lost")
            await turns()
            assert sock.fileno() == -1

    run(contract_loop, main())
    assert [type(report["exception"]) for report in reports] == [ZeroDivisionError]


def test_an_unclosed_transport_warns_and_closes_its_socket(contract_loop: AnyLoop) -> None:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))

    async def make() -> Any:
        transport, _ = await contract_loop.create_datagram_endpoint(Endpoint, sock=sock)
        return transport

    transport = contract_loop.run_until_complete(make())
    contract_loop.close()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del transport
        gc.collect()
    assert [w.category for w in warned] == [ResourceWarning]
    assert "unclosed transport <_SelectorDatagramTransport" in str(warned[0].message)
    assert sock.fileno() == -1


def test_ten_thousand_datagrams_and_senders_leave_nothing_behind(loop: Loop) -> None:
    """More senders than addresses are remembered, answers, and errors of every kind."""

    async def one_round(protocol: Endpoint) -> int:
        for number in range(2000):
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.bind((f"127.0.{number % 250}.{1 + number % 7}", 0))
                sock.sendto(bytes(number % 700), protocol.address)
            await protocol.received(1)
            protocol.transport.sendto(protocol.got[0][0], protocol.got[0][1])
            protocol.transport.sendto(b"data", ("127.0.0.1", number))
            protocol.transport.sendto(b"data", ("255.255.255.255", 9))
            protocol.got.clear()
            protocol.events.clear()
            protocol.errors.clear()
        gc.collect()
        return sys.getallocatedblocks()

    async def main() -> None:
        async with endpoint(Endpoint) as protocol:
            blocks = [await one_round(protocol) for _ in range(5)]
            assert blocks[-1] - blocks[2] < 200, blocks

    run(loop, main(), limit=30)


@pytest.mark.parametrize("by", ["close", "abort"])
def test_a_transport_and_its_protocol_are_freed_without_the_collector(
    contract_loop: AnyLoop, by: str
) -> None:
    async def main() -> None:
        protocol = Endpoint()
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: protocol, sock=sock)
        protocol.transport.sendto(b"data", protocol.address)
        await protocol.received(1)
        getattr(protocol.transport, by)()
        await protocol.has("lost")
        await turns()
        seen = weakref.ref(protocol.transport)
        del protocol.transport
        assert seen() is None

    run(contract_loop, main())


# ---------------------------------------------------------------------------------------- contexts

VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="nothing")


class InContext(Endpoint):
    """Writes down what each callback finds in VAR, and leaves its own name there."""

    def note(self, event: str) -> None:
        super().note(f"{event} in {VAR.get()}")
        VAR.set(event)


def test_callbacks_run_in_the_contexts_that_asyncio_uses(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        VAR.set("creator")
        transport, protocol = await loop.create_datagram_endpoint(
            InContext, local_addr=("127.0.0.1", 0)
        )
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            for number in range(2):
                sock.sendto(b"data", protocol.address)
                await protocol.received(number + 1)
            VAR.set("resumer")
            cast("Any", transport).pause_reading()
            cast("Any", transport).resume_reading()
            for number in range(2, 4):
                sock.sendto(b"data", protocol.address)
                await protocol.received(number + 1)
        VAR.set("sender")
        transport.sendto(b"data", ("255.255.255.255", 9))
        assert VAR.get() == "error PermissionError"
        VAR.set("closer")
        transport.close()
        await turns()
        assert protocol.events == [
            "made in creator",
            "datagram in creator",
            "datagram in datagram",
            "datagram in resumer",
            "datagram in datagram",
            "error PermissionError in sender",
            "lost in closer",
        ]

    run(contract_loop, main())


def test_waiting_datagrams_are_sent_in_the_context_of_the_first(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        near, far = unix_pair(tmp_path)
        with far:
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.create_datagram_endpoint(InContext, sock=near)
            cast("Any", transport).set_write_buffer_limits(high=1500, low=100)
            VAR.set("first")
            await fill(protocol)
            VAR.set("second")
            transport.sendto(bytes(1000))
            VAR.set("third")
            while len(protocol.events) < 3:
                read_all(far)
                await asyncio.sleep(0)
            transport.abort()
            await turns()
            assert protocol.events == [
                "made in nothing",
                "pause in second",
                "resume in first",
                "lost in third",
            ]

    run(contract_loop, main())


def test_a_resume_within_a_datagram_changes_the_context_of_the_next(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        found: list[str] = []

        def act(protocol: Flooded) -> None:
            found.append(VAR.get())
            VAR.set(f"set by {len(found)}")
            if len(found) == 2:
                cast("Any", protocol.transport).pause_reading()
                cast("Any", protocol.transport).resume_reading()
                VAR.set("left behind")

        async with flooded(act, 4) as protocol:
            await protocol.received(4)
        assert found == ["nothing", "set by 1", "set by 2", "set by 3"]

    run(contract_loop, main())


# -------------------------------------------------------------------------------------- what it is


def test_it_says_what_it_is(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        number = sock.fileno()
        async with endpoint(Endpoint, sock) as protocol:
            transport: Any = protocol.transport
            for cls, expected in {
                cast("Any", selector_events)._SelectorDatagramTransport: True,
                asyncio.BaseTransport: True,
                asyncio.DatagramTransport: SINCE_3_12,
            }.items():
                assert isinstance(transport, cls) == expected
            await turns()
            shown = f"fd={number} read=polling write=<idle, bufsize=0>"
            assert repr(transport) == f"<_SelectorDatagramTransport {shown}>"
            assert transport.get_extra_info("sockname") == sock.getsockname()
            assert transport.get_extra_info("peername") is None
            assert transport.get_extra_info("peername", 1) is None
            assert transport.get_extra_info("unknown", 1) == 1
            shown_socket = transport.get_extra_info("socket")
            assert isinstance(shown_socket, trsock.TransportSocket)
            assert shown_socket.fileno() == number
            assert transport._sock is sock
            assert transport._sock_fd == number
            assert transport._loop is contract_loop
            assert transport._protocol is protocol
            assert transport._address is None
            assert cast("Any", contract_loop)._transports[number] is transport
            assert weakref.ref(transport)() == transport
            with pytest.raises(RuntimeError, match="is used by transport"):
                contract_loop.add_reader(number, print)
            transport.close()
            assert repr(transport).startswith(f"<_SelectorDatagramTransport closing fd={number} ")
            await protocol.has("lost")
            assert repr(transport) == f"<_SelectorDatagramTransport closed fd={number}>"

    run(contract_loop, main())


def test_debug_mode_says_which_datagram_took_long(
    contract_loop: AnyLoop, caplog: pytest.LogCaptureFixture
) -> None:
    contract_loop.set_debug(True)
    contract_loop.slow_callback_duration = 0.05

    async def main() -> None:
        async with flooded(lambda p: time.sleep(0.06 if len(p.got) == 2 else 0), 3) as protocol:
            await protocol.received(3)
            transport = cast("Any", protocol.transport)
            transport.pause_reading()
            transport.resume_reading()
            protocol.transport.sendto(b"3", protocol.address)
            await protocol.received(4)
            assert protocol.data == numbers(4)

    with caplog.at_level(logging.DEBUG, logger="asyncio"):
        run(contract_loop, main())
    messages = [record.getMessage() for record in caplog.records]
    assert any(re.match(r"Executing .* took 0.0\d\d seconds", text) for text in messages)
    assert any(text.endswith("pauses reading") for text in messages)
    assert any(text.endswith("resumes reading") for text in messages)


def test_a_kind_of_socket_with_methods_of_its_own_is_used_by_them(contract_loop: AnyLoop) -> None:
    class Counting(socket.socket):
        def __init__(self) -> None:
            super().__init__(type=socket.SOCK_DGRAM)
            self.calls: list[str] = []

        def recvfrom(self, *args: Any) -> Any:
            self.calls.append("recvfrom")
            return super().recvfrom(*args)

        def sendto(self, *args: Any) -> Any:
            self.calls.append("sendto")
            return super().sendto(*args)

    async def main() -> None:
        sock = Counting()
        sock.bind(("127.0.0.1", 0))
        async with endpoint(Endpoint, sock) as protocol:
            protocol.transport.sendto(b"data", protocol.address)
            assert await protocol.received(1) == [(b"data", protocol.address)]
            assert sock.calls[:2] == ["sendto", "recvfrom"]

    run(contract_loop, main())


def test_a_loop_that_replaced_a_building_block_reads_datagrams_too(
    monitor: str, tmp_path: Path
) -> None:
    class Counting(Loop):
        calls = 0

        def call_soon(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            self.calls += 1
            return super().call_soon(*args, **kwargs)

    loop = Counting(monitor=monitor)

    async def main() -> None:
        async with flooded(lambda p: p.transport.sendto(p.got[-1][0], p.got[-1][1]), 5) as protocol:
            await protocol.received(5)
            assert protocol.data == numbers(5)

    run(loop, main())
    assert loop.calls
    loop.close()
