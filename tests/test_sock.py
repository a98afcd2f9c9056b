"""sock_*: asyncio's low-level socket calls, line by line of what they promise.

The promise: a test that takes `contract_loop` also runs on asyncio's SelectorEventLoop, so it
states what asyncio does and not what we remember of it. A test that takes `loop` asks for more than
asyncio gives, and says what: above all that a cancelled call has consumed no byte.
"""

from __future__ import annotations

import array
import asyncio
import collections.abc
import contextlib
import contextvars
import ctypes
import errno
import fcntl
import gc
import hashlib
import inspect
import io
import itertools
import mmap
import os
import random
import resource
import select
import signal
import socket
import ssl
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

import uringloop
from tests.conftest import MONITORS, refusal
from tests.connections import (
    MIB,
    PAIRS,
    TOO_MUCH,
    Peer,
    digest,
    end,
    payload,
    read,
    read_now,
    read_to_end,
    reset,
    turns,
    wired,
)
from tests.support import (
    IO_URING,
    Stepwise,
    deny,
    in_thread,
    make_loop_named,
    ring_files,
    run,
    run_child,
    unexpected,
)

T = TypeVar("T")

#: Any: the tests look at what only asyncio's own loops have, `_selector` for example.
AnyLoop = Any
Loop = uringloop.EventLoop
Call = Callable[[AnyLoop, Any], Coroutine[Any, Any, Any]]
Receive = Callable[[AnyLoop, Any, int], Coroutine[Any, Any, bytes]]

KIB = 1024

KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])
on_io_uring = pytest.mark.parametrize("monitor", ["io_uring"], indirect=True)


@pytest.fixture(params=["stock", *MONITORS])
def name(request: pytest.FixtureRequest) -> str:
    """asyncio's own loop, then ours on each monitor that this machine allows."""
    if request.param != "stock" and (reason := refusal(request.param)):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def contract_loop(name: str) -> Iterator[AnyLoop]:
    """asyncio's own loop, which shows that the test is right, and ours on each monitor."""
    with contextlib.closing(make_loop_named(name)) as loop:
        yield loop


def watched(loop: AnyLoop) -> tuple[list[int], int]:
    """The descriptors that a loop watches, and how many its monitor does."""
    fds = sorted(loop._selector.get_map())
    is_stock = type(loop) is asyncio.SelectorEventLoop
    return fds, len(fds) if is_stock else loop.statistics().watches


def go(loop: AnyLoop, main: Coroutine[Any, Any, T], limit: float = 10) -> T:
    """Run a coroutine to its end; fail when it leaves a watch or a task."""
    before = watched(loop)
    result = run(loop, main, limit)
    assert watched(loop) == before, "a watch is left"
    assert not asyncio.all_tasks(loop)
    return result


@contextlib.contextmanager
def pair(kind: str = "unix") -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that do not block."""
    near, far = PAIRS[kind]()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


@contextlib.contextmanager
def listening(backlog: int = 100, **kwargs: Any) -> Iterator[socket.socket]:
    """A TCP socket that listens and does not block."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog, **kwargs) as listener:
        listener.setblocking(False)
        yield listener


async def by_recv(loop: AnyLoop, sock: Any, size: int) -> bytes:
    data: bytes = await loop.sock_recv(sock, size)
    return data


async def by_recv_into(loop: AnyLoop, sock: Any, size: int) -> bytes:
    buffer = bytearray(size)
    count: int = await loop.sock_recv_into(sock, buffer)
    return bytes(buffer[:count])


async def by_recvfrom(loop: AnyLoop, sock: Any, size: int) -> bytes:
    data: bytes = (await loop.sock_recvfrom(sock, size))[0]
    return data


async def by_recvfrom_into(loop: AnyLoop, sock: Any, size: int) -> bytes:
    buffer = bytearray(size)
    count: int = (await loop.sock_recvfrom_into(sock, buffer))[0]
    return bytes(buffer[:count])


READS: dict[str, Receive] = {
    "recv": by_recv,
    "recv_into": by_recv_into,
    "recvfrom": by_recvfrom,
    "recvfrom_into": by_recvfrom_into,
}
ALL_READS = pytest.mark.parametrize("receive", READS.values(), ids=list(READS))
STREAM_READS = pytest.mark.parametrize(
    "receive", [by_recv, by_recv_into], ids=["recv", "recv_into"]
)

#: Every call, on a socket of any state.
CALLS: dict[str, Call] = {
    "recv": lambda loop, sock: loop.sock_recv(sock, 100),
    "recv_into": lambda loop, sock: loop.sock_recv_into(sock, bytearray(100)),
    "recvfrom": lambda loop, sock: loop.sock_recvfrom(sock, 100),
    "recvfrom_into": lambda loop, sock: loop.sock_recvfrom_into(sock, bytearray(100)),
    "sendall": lambda loop, sock: loop.sock_sendall(sock, b"x"),
    "sendto": lambda loop, sock: loop.sock_sendto(sock, b"x", ("127.0.0.1", 9)),
    "connect": lambda loop, sock: loop.sock_connect(sock, ("127.0.0.1", 9)),
    "accept": lambda loop, sock: loop.sock_accept(sock),
    "sendfile": lambda loop, sock: loop.sock_sendfile(sock, io.BytesIO(b"x")),
}

#: Calls that wait on a connected socket whose peer does nothing.
WAITING: dict[str, Call] = {
    **{how: call for how, call in CALLS.items() if "recv" in how},
    "sendall": lambda loop, sock: loop.sock_sendall(sock, bytes(TOO_MUCH)),
}


async def waiting(call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that makes this call, which waits by now: the kernel has its watch."""
    task = asyncio.create_task(call)
    await asyncio.sleep(0.005)
    assert not task.done()
    return task


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a call that waits; it ends so."""
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def end_of(task: asyncio.Task[T], nothing: T) -> T:
    """Cancel a call; what it gave if that was too late, else nothing."""
    task.cancel()
    await asyncio.wait([task])
    return nothing if task.cancelled() else task.result()


def at_number(sock: socket.socket, number: int) -> socket.socket:
    """The same connection under this number, which is free."""
    assert fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, number) == number
    sock.close()
    moved = socket.socket(fileno=number)
    moved.setblocking(False)
    return moved


async def sees_end(sock: socket.socket) -> bool:
    """Whether the peer of a closed socket hears of it."""
    async with asyncio.timeout(2):
        return await asyncio.get_running_loop().sock_recv(sock, 1) == b""


# ------------------------------------------------------------------------------------------- bytes


async def echo(loop: AnyLoop, sock: socket.socket, receive: Receive) -> None:
    """Send back what comes, until the peer ends."""
    while piece := await receive(loop, sock, 64 * KIB):
        await loop.sock_sendall(sock, piece)
    sock.shutdown(socket.SHUT_WR)


@KINDS
@STREAM_READS
@pytest.mark.parametrize(
    "size_bytes",
    [1, KIB, 10 * KIB, 100 * KIB, 120 * KIB - 1, 120 * KIB, 120 * KIB + 1, MIB],
)
def test_an_echo_gives_every_byte_back_once_and_in_order(
    contract_loop: AnyLoop, size_bytes: int, receive: Receive, kind: str
) -> None:
    async def main() -> None:
        data = payload(size_bytes)
        with pair(kind) as (near, far):
            echoing = asyncio.create_task(echo(contract_loop, far, receive))
            sending = asyncio.create_task(contract_loop.sock_sendall(near, data))
            got = bytearray()
            while len(got) < size_bytes:
                got += await receive(contract_loop, near, 64 * KIB)
            assert await sending is None
            near.shutdown(socket.SHUT_WR)
            assert await receive(contract_loop, near, 1) == b""
            await echoing
            assert digest(got) == digest(data)

    go(contract_loop, main())


@KINDS
def test_both_directions_of_both_ends_are_used_at_once(contract_loop: AnyLoop, kind: str) -> None:
    async def main() -> None:
        there, back = payload(4 * MIB, 1), payload(4 * MIB, 2)
        with pair(kind) as (near, far):
            _, _, at_far, at_near = await asyncio.gather(
                contract_loop.sock_sendall(near, there),
                contract_loop.sock_sendall(far, back),
                read(far, len(there)),
                read(near, len(back)),
            )
            assert (digest(at_far), digest(at_near)) == (digest(there), digest(back))

    go(contract_loop, main(), limit=30)


def memory_bytes(line: str) -> int:
    """A line of /proc/self/status: VmRSS, or VmHWM, its peak."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line + ":"):
            return int(text.split()[1]) * KIB
    raise AssertionError(line)


def send_to_a_slow_reader(name: str, size_bytes: int) -> list[Any]:
    """How many bytes arrived, whether they are right, and how much memory sending them took."""
    loop = make_loop_named(name)
    data = payload(size_bytes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here

    async def main() -> list[Any]:
        hashed, count = hashlib.sha256(), 0
        with pair("tcp") as (near, far):
            before = memory_bytes("VmRSS")
            sending = asyncio.create_task(loop.sock_sendall(near, data))
            for number in itertools.count():
                piece = await loop.sock_recv(far, 100 * KIB)
                hashed.update(piece)
                count += len(piece)
                if not piece or count >= size_bytes:
                    break
                if number % 10 == 0:
                    await asyncio.sleep(0.001)
            await sending
            extra = read_now(far)
            peak = memory_bytes("VmHWM") - before
        return [count + len(extra), hashed.hexdigest() == digest(data), peak]

    with contextlib.closing(loop):
        return go(loop, main(), limit=60)


@pytest.mark.slow
def test_100_mib_reach_a_slow_reader_whole_and_are_not_copied_first(name: str) -> None:
    size_bytes = 100 * MIB
    arrived, is_right, peak_bytes = run_child(
        send_to_a_slow_reader, name, size_bytes, limit=90
    ).value
    assert (arrived, is_right) == (size_bytes, True)
    assert peak_bytes < 16 * MIB


# -------------------------------------------------------------------------------------------- recv


@ALL_READS
@KINDS
def test_a_read_takes_at_most_what_was_asked_for(
    contract_loop: AnyLoop, receive: Receive, kind: str
) -> None:
    async def main() -> None:
        with pair(kind) as (near, far):
            far.send(b"abcdef")
            assert await receive(contract_loop, near, 1) == b"a"
            assert await receive(contract_loop, near, 2) == b"bc"
            assert await receive(contract_loop, near, 10 * MIB) == b"def"
            task = await waiting(receive(contract_loop, near, 2))
            far.send(b"ghij")
            assert await task == b"gh"
            assert near.recv(10) == b"ij"

    go(contract_loop, main())


@pytest.mark.parametrize("late", [False, True], ids=["there at once", "waited for"])
def test_recv_gives_bytes_of_the_size_that_came(contract_loop: AnyLoop, late: bool) -> None:
    async def main() -> None:
        with pair() as (near, far):
            contract_loop.call_later(0.01 if late else 0, far.send, payload(100 * KIB))
            await asyncio.sleep(0 if late else 0.01)
            data = await contract_loop.sock_recv(near, 256 * MIB)
            assert type(data) is bytes
            assert data == payload(100 * KIB)[: len(data)] != b""

    go(contract_loop, main())


@KINDS
def test_what_was_received_stays_as_it_was(contract_loop: AnyLoop, kind: str) -> None:
    async def main() -> None:
        data, pieces = payload(8 * MIB), []
        source = random.Random(8)
        with pair(kind) as (near, far):
            sending = asyncio.create_task(contract_loop.sock_sendall(far, data))
            left = len(data)
            while left:
                size = source.choice([1, 100, 4096, 65_535, 65_536, 65_537, MIB])
                pieces.append(await contract_loop.sock_recv(near, size))
                left -= len(pieces[-1])
                assert len(pieces[-1]) <= size
            await sending
        assert digest(b"".join(pieces)) == digest(data)
        for piece in pieces:  # C code relies on the zero behind the last byte
            end = id(piece) + bytes.__basicsize__ - 1 + len(piece)
            assert ctypes.string_at(end, 1) == b"\0"

    go(contract_loop, main())


def keep_what_comes(name: str, size_bytes: int, count: int) -> int:
    """How much memory so many results take."""
    loop = make_loop_named(name)

    async def main() -> int:
        kept = []
        with pair() as (near, far):
            before = 0
            for number in range(100 + count):
                far.send(bytes(size_bytes))
                kept.append(await loop.sock_recv(near, 1_000_000))
                assert len(kept[-1]) == size_bytes
                if number == 100:
                    before = memory_bytes("VmRSS")
            return memory_bytes("VmRSS") - before

    with contextlib.closing(loop):
        return go(loop, main(), limit=30)


@pytest.mark.skipif("URINGLOOP_TEST_SANITIZED" in os.environ, reason="the heap is the sanitizer's")
@pytest.mark.parametrize(("size_bytes", "count"), [(100, 5000), (5000, 4000), (70_000, 400)])
def test_a_result_that_is_kept_takes_the_memory_of_its_size(
    monitor: str, size_bytes: int, count: int
) -> None:
    """asyncio reads into a new object of the size asked for and cuts it, which leaves gaps."""
    taken_bytes = run_child(keep_what_comes, monitor, size_bytes, count).value
    assert taken_bytes < 2 * size_bytes * count + 4 * MIB


def test_a_read_of_no_bytes_waits_for_nothing(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            assert await contract_loop.sock_recv(near, 0) == b""
            assert await contract_loop.sock_recv_into(near, bytearray()) == 0
            far.send(b"x")
            assert await contract_loop.sock_recv(near, 0) == b""
            assert await contract_loop.sock_recv_into(near, bytearray()) == 0
            assert near.recv(10) == b"x"

    go(contract_loop, main())


def test_a_size_may_be_whatever_is_an_index(contract_loop: AnyLoop) -> None:
    class Index:
        def __index__(self) -> int:
            return 2

    async def main() -> None:
        with pair() as (near, far):
            far.send(b"abc")
            assert await contract_loop.sock_recv(near, Index()) == b"ab"
            assert await contract_loop.sock_recv(near, True) == b"c"
            task = await waiting(contract_loop.sock_recv(near, Index()))
            far.send(b"de")
            assert await task == b"de"

    go(contract_loop, main())


Refusal = tuple[type[Exception], int | None]


def refusal_of(call: Callable[[], Any]) -> Refusal:
    """How a method of a socket refuses."""
    try:
        call()
    except (OSError, TypeError, ValueError, BufferError, OverflowError, AttributeError) as exc:
        return type(exc), getattr(exc, "errno", None)
    raise AssertionError("it was not refused")


async def refuses_alike(call: Coroutine[Any, Any, Any], expected: Refusal) -> None:
    """Await a call that is refused, at once, as the socket's own method was."""
    with pytest.raises(expected[0]) as raised:
        await call
    assert type(raised.value) is expected[0]
    assert getattr(raised.value, "errno", None) == expected[1]


@pytest.mark.parametrize("size", [-1, 1.5, "1", None, b"1", 1 << 63, -(1 << 70)], ids=repr)
def test_what_is_no_size_is_refused_as_recv_refuses_it(contract_loop: AnyLoop, size: Any) -> None:
    async def main() -> None:
        with pair() as (near, far):
            expected = refusal_of(lambda: near.recv(size))
            await refuses_alike(contract_loop.sock_recv(near, size), expected)
            far.send(b"x")
            await refuses_alike(contract_loop.sock_recv(near, size), expected)
            assert near.recv(10) == b"x"

    go(contract_loop, main())


# --------------------------------------------------------------------------------------- recv_into


BUFFERS: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(6),
    "memoryview": lambda: memoryview(bytearray(6)),
    "slice of a memoryview": lambda: memoryview(bytearray(10))[2:8],
    "array": lambda: array.array("H", [0] * 3),
    "two dimensions": lambda: memoryview(bytearray(6)).cast("B", (2, 3)),
    "ctypes": ctypes.c_char * 6,
    "mmap": lambda: mmap.mmap(-1, 6),
}


@pytest.mark.parametrize("late", [False, True], ids=["there at once", "waited for"])
@pytest.mark.parametrize("make", BUFFERS.values(), ids=list(BUFFERS))
def test_recv_into_fills_any_buffer_that_can_be_written(
    contract_loop: AnyLoop, make: Callable[[], Any], late: bool
) -> None:
    async def main() -> None:
        buffer = make()
        with pair() as (near, far):
            task = asyncio.create_task(contract_loop.sock_recv_into(near, buffer))
            if late:
                await asyncio.sleep(0.005)
            far.send(b"abcdefgh")
            assert await task == 6
            assert memoryview(buffer).tobytes() == b"abcdef"
            assert near.recv(10) == b"gh"

    go(contract_loop, main())


@pytest.mark.parametrize("late", [False, True], ids=["there at once", "waited for"])
def test_recv_into_touches_nothing_but_what_it_received(contract_loop: AnyLoop, late: bool) -> None:
    async def main() -> None:
        whole = bytearray(b"." * 10)
        with pair() as (near, far):
            buffer = memoryview(whole)[3:8]
            task = asyncio.create_task(contract_loop.sock_recv_into(near, buffer))
            if late:
                await asyncio.sleep(0.005)
            far.send(b"abc")
            assert await task == 3
            assert whole == b"...abc...."

    go(contract_loop, main())


@pytest.mark.parametrize(
    "buffer",
    [b"const", memoryview(b"const"), memoryview(bytearray(6))[::2], "text", None, 5],
    ids=["bytes", "read-only view", "view with gaps", "str", "None", "int"],
)
def test_what_is_no_buffer_is_refused_as_recv_into_refuses_it(
    contract_loop: AnyLoop, buffer: Any
) -> None:
    async def main() -> None:
        with pair() as (near, far):
            expected = refusal_of(lambda: near.recv_into(buffer))
            await refuses_alike(contract_loop.sock_recv_into(near, buffer), expected)
            far.send(b"x")
            await refuses_alike(contract_loop.sock_recv_into(near, buffer), expected)
            assert near.recv(10) == b"x"

    go(contract_loop, main())


def test_a_buffer_may_grow_while_recv_into_waits(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        buffer = bytearray(2)
        with pair() as (near, far):
            task = await waiting(contract_loop.sock_recv_into(near, buffer))
            buffer.extend(bytes(4))
            far.send(b"abcdef")
            assert await task == 6
            assert buffer == b"abcdef"

    go(contract_loop, main())


def test_recvfrom_into_takes_no_more_than_it_is_told(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        buffer = bytearray(b"." * 10)
        with pair() as (near, far):
            far.send(b"abcdef")
            assert (await contract_loop.sock_recvfrom_into(near, buffer, 3))[0] == 3
            assert buffer == b"abc......."
            assert near.recv(10) == b"def"

    go(contract_loop, main())


# ----------------------------------------------------------------------------------------- sendall

#: Ways to say the same two million bytes.
DATA: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "slice of a memoryview": lambda data: memoryview(b"head" + data + b"tail")[4:-4],
    "view of a bytearray": lambda data: memoryview(bytearray(data)),
    "array": lambda data: array.array("B", data),
    "ctypes": lambda data: (ctypes.c_char * len(data)).from_buffer_copy(data),
}


class Derived(socket.socket):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("size_bytes", [1, 5000, 2_000_000])
@pytest.mark.parametrize("kind", [socket.socket, Derived])
@pytest.mark.parametrize("make", DATA.values(), ids=list(DATA))
def test_sendall_sends_any_bytes_like_object(
    contract_loop: AnyLoop,
    make: Callable[[bytes], Any],
    kind: type[socket.socket],
    size_bytes: int,
) -> None:
    async def main() -> None:
        data = payload(size_bytes)
        with pair() as (plain, far), kind(fileno=plain.detach()) as near:
            near.setblocking(False)
            sending = asyncio.create_task(contract_loop.sock_sendall(near, make(data)))
            assert digest(await read(far, size_bytes)) == digest(data)
            assert await sending is None
            assert read_now(far) == b""

    go(contract_loop, main())


@pytest.mark.parametrize("size_bytes", [12, 2_000_004])
@pytest.mark.parametrize(
    "make",
    [
        lambda data: array.array("I", data),
        lambda data: memoryview(data).cast("I"),
        lambda data: memoryview(data).cast("B", (2, len(data) // 2)),
    ],
    ids=["array of integers", "view of integers", "two dimensions"],
)
def test_sendall_counts_in_bytes_whatever_the_items_are(
    loop: Loop, make: Callable[[bytes], Any], size_bytes: int
) -> None:
    """asyncio compares what was sent with len(), which counts items, and never returns."""

    async def main() -> None:
        data = payload(size_bytes)
        with pair() as (near, far):
            sending = asyncio.create_task(loop.sock_sendall(near, make(data)))
            assert digest(await read(far, size_bytes)) == digest(data)
            await sending
            assert read_now(far) == b""

    go(loop, main(), limit=3)


@pytest.mark.parametrize(
    "data",
    ["text", None, 5, ["x"], memoryview(b"abcdef")[::2]],
    ids=lambda data: type(data).__name__,
)
def test_what_is_not_bytes_is_refused_as_send_refuses_it(contract_loop: AnyLoop, data: Any) -> None:
    async def main() -> None:
        with pair() as (near, far):
            expected = refusal_of(lambda: near.send(data))
            await refuses_alike(contract_loop.sock_sendall(near, data), expected)
            assert read_now(far) == b""

    go(contract_loop, main())


def test_sending_nothing_to_a_stream_is_nothing(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            for nothing in (b"", bytearray(), memoryview(b"")):
                assert await contract_loop.sock_sendall(near, nothing) is None
            assert read_now(far) == b""

    go(contract_loop, main())


def test_what_is_being_sent_cannot_be_resized_before_it_is_sent(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        data = bytearray(payload(2 * MIB))
        with pair() as (near, far):
            sending = await waiting(contract_loop.sock_sendall(near, data))
            with pytest.raises(BufferError):
                data.clear()
            assert digest(await read(far, 2 * MIB)) == digest(payload(2 * MIB))
            await sending
            data.clear()

    go(contract_loop, main())


def test_a_view_may_be_released_while_it_is_being_sent(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        data = payload(2 * MIB)
        with pair() as (near, far):
            with memoryview(data) as view:
                sending = await waiting(contract_loop.sock_sendall(near, view))
            got, _ = await asyncio.gather(read(far, 2 * MIB), sending)
            assert digest(got) == digest(data)

    go(contract_loop, main())


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_sendall_that_does_not_end_well_lets_go_of_its_data(
    contract_loop: AnyLoop, how: str
) -> None:
    async def main() -> None:
        data = bytearray(TOO_MUCH)
        with pair() as (near, far):
            sending = await waiting(contract_loop.sock_sendall(near, data))
            if how == "cancelled":
                sending.cancel()
            else:
                far.close()
            await asyncio.wait([sending])
            assert sending.cancelled() or isinstance(sending.exception(), ConnectionError)
            del sending
            gc.collect()
            data.clear()

    go(contract_loop, main())


@KINDS
def test_a_cancelled_sendall_has_sent_a_beginning_and_sends_no_more(
    contract_loop: AnyLoop, kind: str
) -> None:
    async def main() -> None:
        data = payload(TOO_MUCH)
        with pair(kind) as (near, far):
            sending = await waiting(contract_loop.sock_sendall(near, data))
            got = bytearray(await read(far, 2 * MIB))  # it has gone on since
            assert not sending.done()
            await cancel(sending)
            near.shutdown(socket.SHUT_WR)  # whoever sends from now on fails
            got += await read_to_end(far)
            assert 2 * MIB <= len(got) < len(data)
            assert digest(got) == digest(memoryview(data)[: len(got)])

    go(contract_loop, main())


def test_after_a_cancelled_sendall_the_next_one_sends(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            await cancel(await waiting(contract_loop.sock_sendall(near, bytes(TOO_MUCH))))
            while read_now(far):
                pass
            sending = asyncio.create_task(contract_loop.sock_sendall(near, payload(MIB)))
            assert digest(await read(far, MIB)) == digest(payload(MIB))
            await sending

    go(contract_loop, main())


def test_sends_of_one_task_keep_their_order(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        source = random.Random(4)
        data = payload(3 * MIB)
        with pair() as (near, far):
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)

            async def send() -> None:
                start = 0
                while start < len(data):
                    end = start + source.choice([1, 100, 5000, 200_000])
                    await contract_loop.sock_sendall(near, data[start:end])
                    start = end

            sending = asyncio.create_task(send())
            assert digest(await read(far, len(data))) == digest(data)
            await sending

    go(contract_loop, main())


# --------------------------------------------------------------------------------- at once, or late


@pytest.mark.parametrize("how", ["recv", "recv_into", "sendall", "accept"])
def test_what_can_be_done_at_once_takes_no_turn_of_the_loop(
    contract_loop: AnyLoop, how: str
) -> None:
    with pair() as (near, far), listening() as listener:
        far.send(b"x")
        with socket.create_connection(listener.getsockname()):
            coroutine = CALLS[how](contract_loop, listener if how == "accept" else near)
            with pytest.raises(StopIteration) as ended:
                coroutine.send(None)
    value = ended.value.value
    if how == "accept":
        value[0].close()
    else:
        assert value == {"recv": b"x", "recv_into": 1, "sendall": None}[how]


@pytest.mark.parametrize("how", ["recv", "recv_into", "sendall", "accept"])
def test_nothing_is_done_and_nothing_raised_before_the_call_is_awaited(
    contract_loop: AnyLoop, how: str
) -> None:
    with pair() as (near, far), listening() as listener:
        far.send(b"x")
        with socket.create_connection(listener.getsockname()):
            CALLS[how](contract_loop, listener if how == "accept" else near).close()
            listener.accept()[0].close()
        CALLS[how](contract_loop, "nonsense").close()
        assert near.recv(10) == b"x"
        assert read_now(far) == b""
    contract_loop.call_soon(contract_loop.stop)
    contract_loop.run_forever()


@pytest.mark.parametrize("how", ["recv", "recv_into", "sendall", "accept"])
def test_a_call_that_is_never_awaited_says_so(contract_loop: AnyLoop, how: str) -> None:
    call: Any = CALLS[how]
    with pair() as (near, far):
        far.send(b"x")
        with pytest.warns(RuntimeWarning, match=rf"coroutine '.*sock_{how}' was never awaited"):
            call(contract_loop, near)
        assert near.recv(10) == b"x"


@pytest.mark.parametrize("how", list(CALLS))
def test_a_call_gives_a_coroutine(contract_loop: AnyLoop, how: str) -> None:
    with pair() as (near, _):
        coroutine = CALLS[how](contract_loop, near)
        try:
            assert asyncio.iscoroutine(coroutine)
            assert inspect.isawaitable(coroutine)
            assert isinstance(coroutine, collections.abc.Coroutine)
            assert cast(Any, coroutine).__name__ == f"sock_{how}"
        finally:
            coroutine.close()


@pytest.mark.parametrize("how", list(CALLS))
def test_a_call_says_that_it_is_a_coroutine_function(contract_loop: AnyLoop, how: str) -> None:
    assert inspect.iscoroutinefunction(getattr(contract_loop, f"sock_{how}"))


def test_a_waiting_call_yields_a_future_of_its_loop(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            coroutine = contract_loop.sock_recv(near, 100)
            future = coroutine.send(None)
            assert asyncio.isfuture(future)
            assert future.get_loop() is contract_loop
            far.send(b"x")
            while not future.done():
                await asyncio.sleep(0)
            with pytest.raises(StopIteration) as ended:
                coroutine.send(None)
            assert ended.value.value == b"x"

    go(contract_loop, main())


def test_a_waiting_call_that_is_closed_by_hand_leaves_no_watch_and_takes_nothing(
    loop: Loop,
) -> None:
    """asyncio leaves its reader, which takes what comes for nobody."""

    async def main() -> None:
        before = watched(loop)
        with pair() as (near, far):
            coroutine: Any = loop.sock_recv(near, 100)
            coroutine.send(None)
            await asyncio.sleep(0.005)
            coroutine.close()
            assert watched(loop) == before
            far.send(b"kept")
            await turns()
            assert near.recv(100) == b"kept"

    go(loop, main())


def test_every_parameter_may_be_named(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            await contract_loop.sock_sendall(sock=far, data=b"abc")
            assert await contract_loop.sock_recv(sock=near, n=1) == b"a"
            assert await contract_loop.sock_recv_into(sock=near, buf=bytearray(10)) == 2
        with listening() as listener, socket.create_connection(listener.getsockname()):
            accepted, _ = await contract_loop.sock_accept(sock=listener)
            accepted.close()

    go(contract_loop, main())


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("how", ["recv", "recv_into", "sendall"])
def test_a_wrong_number_of_arguments_is_refused_by_the_call_itself(
    contract_loop: AnyLoop, how: str, count: int
) -> None:
    with pytest.raises(TypeError):
        getattr(contract_loop, f"sock_{how}")(*range(count))


def test_a_call_runs_in_a_task_a_group_and_a_thread_that_asks_for_it(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        with pair() as (near, far):
            far.send(b"abcd")
            assert await asyncio.create_task(contract_loop.sock_recv(near, 1)) == b"a"
            async with asyncio.TaskGroup() as group:
                second = group.create_task(contract_loop.sock_recv(near, 1))
            assert second.result() == b"b"
            (third,) = await asyncio.gather(contract_loop.sock_recv(near, 1))
            assert third == b"c"

            def ask() -> Any:
                call = contract_loop.sock_recv(near, 1)
                return asyncio.run_coroutine_threadsafe(call, contract_loop).result(5)

            assert await asyncio.to_thread(ask) == b"d"

    go(contract_loop, main())


def test_a_waiting_call_keeps_the_context_of_its_task(contract_loop: AnyLoop) -> None:
    variable = contextvars.ContextVar[str]("variable")

    async def call(sock: socket.socket, value: str) -> str:
        variable.set(value)
        await contract_loop.sock_recv(sock, 1)
        return variable.get()

    async def main() -> None:
        variable.set("main")
        with pair() as (near, far), pair() as (other, other_far):
            tasks = [await waiting(call(near, "one")), await waiting(call(other, "two"))]
            far.send(b"x")
            other_far.send(b"x")
            assert await asyncio.gather(*tasks) == ["one", "two"]
            assert variable.get() == "main"

    go(contract_loop, main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_an_eager_task_ends_at_once_or_waits(contract_loop: AnyLoop) -> None:
    contract_loop.set_task_factory(vars(asyncio)["eager_task_factory"])

    async def main() -> None:
        with pair() as (near, far), listening() as listener:
            far.send(b"x")
            assert asyncio.create_task(contract_loop.sock_recv(near, 10)).result() == b"x"
            sent: asyncio.Task[None] = asyncio.create_task(contract_loop.sock_sendall(near, b"y"))
            assert sent.done()
            assert read_now(far) == b"y"
            reading = [
                asyncio.create_task(contract_loop.sock_recv(near, 10)),
                asyncio.create_task(contract_loop.sock_accept(listener)),
            ]
            await turns()
            assert not any(task.done() for task in reading)
            far.send(b"late")
            assert await reading[0] == b"late"
            with socket.create_connection(listener.getsockname()):
                (await reading[1])[0].close()
            stopped = asyncio.create_task(contract_loop.sock_recv(near, 10))
            await cancel(stopped)
            far.send(b"again")
            assert await contract_loop.sock_recv(near, 10) == b"again"

    go(contract_loop, main())


# ------------------------------------------------------------------------ what is refused, and how


@pytest.mark.parametrize("how", list(CALLS))
def test_debug_mode_refuses_a_socket_that_may_block(contract_loop: AnyLoop, how: str) -> None:
    contract_loop.set_debug(True)

    async def main() -> None:
        with pair("tcp") as (near, far):
            far.send(b"x")
            for timeout_s in (None, 1.0):
                near.settimeout(timeout_s)
                with pytest.raises(ValueError, match=r"^the socket must be non-blocking$"):
                    await CALLS[how](contract_loop, near)
            near.settimeout(0)
            assert near.recv(10) == b"x"

    go(contract_loop, main())


@pytest.mark.parametrize("timeout_s", [0, None], ids=["", "blocking"])
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("how", [how for how in CALLS if how != "sendfile"])
def test_a_tls_socket_is_refused(
    contract_loop: AnyLoop, how: str, debug: bool, timeout_s: float | None
) -> None:
    contract_loop.set_debug(debug)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False

    async def main() -> None:
        with pair() as (near, far), context.wrap_socket(near, do_handshake_on_connect=False) as tls:
            tls.settimeout(timeout_s)
            with pytest.raises(TypeError, match=r"^Socket cannot be of type SSLSocket$"):
                await CALLS[how](contract_loop, tls)
            assert read_now(far) == b""

    go(contract_loop, main())


@pytest.mark.parametrize("sock", [None, 5, "text", object()], ids=lambda sock: type(sock).__name__)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("how", list(CALLS))
def test_what_is_no_socket_has_not_its_methods(
    contract_loop: AnyLoop, how: str, debug: bool, sock: Any
) -> None:
    contract_loop.set_debug(debug)

    async def main() -> None:
        with pytest.raises(AttributeError):
            await CALLS[how](contract_loop, sock)

    go(contract_loop, main())


def test_what_a_transport_shows_of_its_socket_has_not_its_methods(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, far):
            shown = protocol.transport.get_extra_info("socket")
            for how in ("recv", "recv_into", "recvfrom", "sendall", "accept"):
                with pytest.raises(AttributeError):
                    await CALLS[how](contract_loop, shown)
            far.send(b"unharmed")
            await protocol.received(8)

    go(contract_loop, main())


@pytest.mark.parametrize("how", list(WAITING))
def test_a_call_that_would_wait_on_a_transports_socket_is_refused(
    contract_loop: AnyLoop, how: str
) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, far):
            sock = cast(Any, protocol.transport)._sock
            with pytest.raises(RuntimeError, match=r"File descriptor .* is used by transport"):
                await WAITING[how](contract_loop, sock)
            while read_now(far):
                pass
            far.send(b"to the transport")
            await protocol.received(16)
            protocol.transport.write(b"from the transport")
            assert await read(far, 18) == b"from the transport"

    go(contract_loop, main())


def test_what_waits_in_a_paused_transports_socket_is_given_at_once(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, far):
            protocol.transport.pause_reading()
            far.send(b"taken")
            sock = cast(Any, protocol.transport)._sock
            assert await contract_loop.sock_recv(sock, 100) == b"taken"
            with pytest.raises(RuntimeError, match="is used by transport"):
                await contract_loop.sock_recv(sock, 100)
            protocol.transport.resume_reading()
            far.send(b"received")
            await protocol.received(8)

    go(contract_loop, main())


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_transport_takes_the_place_of_a_waiting_read_and_gets_every_byte(
    contract_loop: AnyLoop, kind: str
) -> None:
    class Asking(Peer):
        """Each piece that it receives makes its peer send the next."""

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if len(self.data) < 10:
                far.send(b"%d" % len(self.data))

    near, far = PAIRS[kind]()

    async def main() -> None:
        with far:
            near.setblocking(False)
            far.setblocking(False)
            task = await waiting(contract_loop.sock_recv(near, 10))
            transport, protocol = await contract_loop.create_connection(Asking, sock=near)
            try:
                far.send(b"0")
                await asyncio.wait([task], timeout=0.05)
                if task.done():
                    with pytest.raises(RuntimeError, match="is used by transport"):
                        task.result()
                else:
                    await cancel(task)
                assert protocol.data == b"0123456789"
                far.send(b"after")
                await protocol.received(15)
            finally:
                await end(transport)

    go(contract_loop, main())


def test_a_read_may_wait_on_the_socket_of_a_transport_that_is_closing(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, far):
            protocol.transport.write(payload(TOO_MUCH))
            protocol.transport.close()
            sock = cast(Any, protocol.transport)._sock
            for text in (b"one", b"two"):
                task = await waiting(contract_loop.sock_recv(sock, 10))
                far.send(text)
                async with asyncio.timeout(2):
                    assert await task == text
            assert digest(await read(far, TOO_MUCH)) == digest(payload(TOO_MUCH))
            await protocol.lost()
            assert await sees_end(far)

    go(contract_loop, main())


@pytest.mark.parametrize("how", ["recv", "recv_into", "sendall", "accept"])
def test_a_closed_loop_refuses_to_wait(name: str, how: str) -> None:
    loop = make_loop_named(name)
    loop.close()
    with pair() as (near, far), listening() as listener:
        call = {**WAITING, "accept": CALLS["accept"]}[how]
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            call(loop, listener if how == "accept" else near).send(None)
        while read_now(far):
            pass
        far.send(b"x")
        with pytest.raises(StopIteration) as ended:
            loop.sock_recv(near, 10).send(None)
        assert ended.value.value == b"x"


# -------------------------------------------------------------------------------- states of sockets


def closed(stack: contextlib.ExitStack) -> socket.socket:
    near, _ = stack.enter_context(pair())
    near.close()
    return near


def unconnected(stack: contextlib.ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket())
    sock.setblocking(False)
    return sock


def listens(stack: contextlib.ExitStack) -> socket.socket:
    return stack.enter_context(listening())


def datagrams(stack: contextlib.ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    sock.setblocking(False)
    return sock


def idle(stack: contextlib.ExitStack) -> socket.socket:
    return stack.enter_context(pair())[0]


def ended(stack: contextlib.ExitStack) -> socket.socket:
    near, far = stack.enter_context(pair())
    far.send(b"last")
    far.close()
    return near


def ended_unread(stack: contextlib.ExitStack) -> socket.socket:
    near, far = stack.enter_context(pair())
    near.send(b"unread")
    far.close()
    return near


def was_reset(stack: contextlib.ExitStack) -> socket.socket:
    near, far = stack.enter_context(pair("tcp"))
    reset(far)
    return near


def reset_with_bytes_left(stack: contextlib.ExitStack) -> socket.socket:
    near, far = stack.enter_context(pair("tcp"))
    far.send(b"lost")
    reset(far)
    return near


def ended_its_side(stack: contextlib.ExitStack) -> socket.socket:
    near, far = stack.enter_context(pair("tcp"))
    far.shutdown(socket.SHUT_WR)
    return near


def shut_for_writing(stack: contextlib.ExitStack) -> socket.socket:
    near, _ = stack.enter_context(pair())
    near.shutdown(socket.SHUT_WR)
    return near


def shut_for_reading(stack: contextlib.ExitStack) -> socket.socket:
    near, _ = stack.enter_context(pair())
    near.shutdown(socket.SHUT_RD)
    return near


STATES = [
    closed,
    unconnected,
    listens,
    datagrams,
    idle,
    ended,
    ended_unread,
    was_reset,
    reset_with_bytes_left,
    ended_its_side,
    shut_for_writing,
    shut_for_reading,
]

#: A method of a socket, twice, and the calls that should do the same.
TWICE: dict[str, tuple[Callable[[Any], Any], Call]] = {
    "recv": (lambda sock: sock.recv(5), lambda loop, sock: loop.sock_recv(sock, 5)),
    "recv_into": (
        lambda sock: sock.recv_into(bytearray(5)),
        lambda loop, sock: loop.sock_recv_into(sock, bytearray(5)),
    ),
    "sendall": (lambda sock: sock.sendall(b"x"), lambda loop, sock: loop.sock_sendall(sock, b"x")),
    "send nothing": (
        lambda sock: sock.sendall(b""),
        lambda loop, sock: loop.sock_sendall(sock, b""),
    ),
    "accept": (lambda sock: sock.accept(), lambda loop, sock: loop.sock_accept(sock)),
}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("how", list(TWICE))
def test_a_call_does_what_the_sockets_own_method_does(
    contract_loop: AnyLoop, how: str, state: Callable[[contextlib.ExitStack], socket.socket]
) -> None:
    method, call = TWICE[how]

    def outcome(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except BlockingIOError:
            return "waits"
        except OSError as exc:
            return type(exc), exc.errno

    async def attempt(sock: socket.socket) -> Any:
        task = asyncio.create_task(call(contract_loop, sock))
        await asyncio.wait([task], timeout=0.01)
        if not task.done():
            await cancel(task)
            return "waits"
        return outcome(task.result)

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            model, sock = state(stack), state(stack)
            for _ in range(2):
                expected = outcome(lambda: method(model))
                assert await attempt(sock) == expected

    go(contract_loop, main())


@STREAM_READS
@KINDS
def test_a_waiting_read_sees_the_end_and_sees_it_again(
    contract_loop: AnyLoop, receive: Receive, kind: str
) -> None:
    async def main() -> None:
        with pair(kind) as (near, far):
            task = await waiting(receive(contract_loop, near, 10))
            far.shutdown(socket.SHUT_WR)
            assert await task == b""
            assert await receive(contract_loop, near, 10) == b""
            await contract_loop.sock_sendall(near, b"still sent")
            assert await contract_loop.sock_recv(far, 100) == b"still sent"

    go(contract_loop, main())


@ALL_READS
def test_a_waiting_read_hears_of_a_reset(contract_loop: AnyLoop, receive: Receive) -> None:
    async def main() -> None:
        with pair("tcp") as (near, far):
            task = await waiting(receive(contract_loop, near, 10))
            reset(far)
            with pytest.raises(ConnectionResetError) as raised:
                await task
            assert raised.value.errno == errno.ECONNRESET

    go(contract_loop, main())


@KINDS
@pytest.mark.parametrize("how", ["ends", "resets"])
def test_a_waiting_sendall_hears_that_its_peer_is_gone(
    contract_loop: AnyLoop, kind: str, how: str
) -> None:
    async def main() -> None:
        with pair(kind) as (near, far):
            task = await waiting(contract_loop.sock_sendall(near, bytes(TOO_MUCH)))
            if how == "resets" and kind == "tcp":
                reset(far)
            else:
                far.close()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                await task
            with pytest.raises(BrokenPipeError):
                await contract_loop.sock_sendall(near, b"more")

    go(contract_loop, main())


def test_a_waiting_read_hears_that_its_own_side_was_shut(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair("tcp") as (near, _):
            task = await waiting(contract_loop.sock_recv(near, 10))
            near.shutdown(socket.SHUT_RDWR)
            assert await task == b""

    go(contract_loop, main())


# -------------------------------------------------------------------------------------- cancelling


@KINDS
@pytest.mark.parametrize("how", list(WAITING))
def test_a_cancelled_call_leaves_no_watch_and_does_not_hold_its_socket(
    contract_loop: AnyLoop, how: str, kind: str
) -> None:
    async def main() -> None:
        before = watched(contract_loop)
        with pair(kind) as (near, far):
            task = await waiting(WAITING[how](contract_loop, near))
            await cancel(task)
            assert watched(contract_loop) == before
            near.close()
            await read_to_end(far)
            assert await sees_end(far)

    go(contract_loop, main())


def test_a_cancelled_accept_does_not_hold_its_socket(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        before = watched(contract_loop)
        with listening() as listener:
            address = listener.getsockname()
            await cancel(await waiting(contract_loop.sock_accept(listener)))
            assert watched(contract_loop) == before
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 1)

    go(contract_loop, main())


@contextlib.contextmanager
def unreachable() -> Iterator[Any]:
    """The address of a listener whose queue is full: who connects to it waits."""
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(listening(backlog=0)).getsockname()
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
        yield address


def test_a_cancelled_connect_leaves_no_watch_and_its_number_is_free(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        before = watched(contract_loop)
        with unreachable() as address, socket.socket() as sock, pair() as (other, far):
            sock.setblocking(False)
            number = sock.fileno()
            await cancel(await waiting(contract_loop.sock_connect(sock, address)))
            assert watched(contract_loop) == before
            sock.close()
            with at_number(other, number) as taken:
                contract_loop.call_later(0.005, far.send, b"new")
                assert await contract_loop.sock_recv(taken, 10) == b"new"

    go(contract_loop, main())


@pytest.mark.parametrize("has_descriptor", [True, False], ids=["file", "no descriptor"])
def test_a_cancelled_sendfile_leaves_no_watch(
    contract_loop: AnyLoop, tmp_path: Path, has_descriptor: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(TOO_MUCH))

    async def main() -> None:
        before = watched(contract_loop)
        with pair() as (near, far), path.open("rb") as file:
            source = file if has_descriptor else io.BytesIO(bytes(TOO_MUCH))
            task = asyncio.create_task(contract_loop.sock_sendfile(near, source))
            await asyncio.sleep(0.1)
            await cancel(task)
            assert watched(contract_loop) == before
            near.close()
            await read_to_end(far)

    go(contract_loop, main())


def test_a_file_without_descriptor_is_sent_by_sendall(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        data = payload(2 * MIB)
        with pair() as (near, far):
            sending = asyncio.create_task(contract_loop.sock_sendfile(near, io.BytesIO(data)))
            assert digest(await read(far, len(data))) == digest(data)
            assert await sending == len(data)
            part = contract_loop.sock_sendfile(near, io.BytesIO(data), 5, 100)
            assert await part == 100
            assert await read(far, 100) == data[5:105]

    go(contract_loop, main())


@ALL_READS
@pytest.mark.parametrize("how", ["timeout", "wait_for"])
def test_a_read_that_times_out_leaves_what_comes_later(
    contract_loop: AnyLoop, receive: Receive, how: str
) -> None:
    async def attempt(sock: socket.socket) -> bytes:
        if how == "wait_for":
            return await asyncio.wait_for(receive(contract_loop, sock, 10), 0.005)
        async with asyncio.timeout(0.005):
            return await receive(contract_loop, sock, 10)

    async def main() -> None:
        before = watched(contract_loop)
        with pair() as (near, far):
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await attempt(near)
                assert watched(contract_loop) == before
            far.send(b"later")
            async with asyncio.timeout(5):
                assert await receive(contract_loop, near, 10) == b"later"

    go(contract_loop, main())


@pytest.mark.parametrize("how", ["sendall", "accept", "connect"])
def test_a_call_that_times_out_leaves_no_watch(contract_loop: AnyLoop, how: str) -> None:
    async def main() -> None:
        before = watched(contract_loop)
        with (
            pair() as (near, _),
            listening() as listener,
            unreachable() as address,
            socket.socket() as sock,
        ):
            sock.setblocking(False)
            calls = {
                "sendall": lambda: contract_loop.sock_sendall(near, bytes(TOO_MUCH)),
                "accept": lambda: contract_loop.sock_accept(listener),
                "connect": lambda: contract_loop.sock_connect(sock, address),
            }
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await calls[how]()
            assert watched(contract_loop) == before

    go(contract_loop, main())


def test_a_timeout_that_has_passed_already_still_gives_what_is_there(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        with pair() as (near, far):
            far.send(b"there")
            async with asyncio.timeout(5):
                assert await contract_loop.sock_recv(near, 10) == b"there"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(-1):
                    await contract_loop.sock_recv(near, 10)
            far.send(b"kept")
            assert await contract_loop.sock_recv(near, 10) == b"kept"

    go(contract_loop, main())


@ALL_READS
@KINDS
@pytest.mark.parametrize("count", range(5))
def test_a_read_cancelled_after_the_bytes_came_has_them_or_leaves_them(
    loop: Loop, receive: Receive, kind: str, count: int
) -> None:
    """asyncio has taken them off the socket in a callback by then, and they are lost."""

    async def main() -> None:
        with pair(kind) as (near, far):
            task = await waiting(receive(loop, near, 100))
            far.send(b"kept")
            await turns(count)
            got = await end_of(task, b"")
            async with asyncio.timeout(2):
                got += await read(near, 4 - len(got))
            assert got == b"kept"

    go(loop, main())


@pytest.mark.parametrize("count", range(5))
def test_an_accept_cancelled_after_the_client_came_has_it_or_leaves_it(
    loop: Loop, count: int
) -> None:
    """asyncio has accepted it in a callback by then, and the connection is closed."""

    async def main() -> None:
        with listening() as listener:
            task = await waiting(loop.sock_accept(listener))
            with socket.create_connection(listener.getsockname()) as client:
                await turns(count)
                task.cancel()
                await asyncio.wait([task])
                async with asyncio.timeout(2):
                    accepted, _ = (
                        await loop.sock_accept(listener) if task.cancelled() else task.result()
                    )
                with accepted:
                    client.send(b"x")
                    assert await loop.sock_recv(accepted, 1) == b"x"

    go(loop, main())


class Unreliable:
    """A reader whose calls are cancelled, in every way, at times that a seed decides."""

    def __init__(self, loop: Loop, sock: socket.socket, seed: int) -> None:
        self.loop, self.sock = loop, sock
        self.source = random.Random(seed)
        self.got, self.cancels = bytearray(), 0

    async def read(self, size_bytes: int) -> None:
        """Read so many bytes."""
        ways = [self.by_cancel, self.by_timeout, self.by_wait_for, self.not_at_all]
        while len(self.got) < size_bytes:
            receive = self.source.choice([by_recv, by_recv_into])
            call = receive(self.loop, self.sock, self.source.choice([1, 100, 5000, 100_000]))
            piece = await self.source.choice(ways)(call)
            if piece is None:
                self.cancels += 1
            else:
                assert piece, "the peer has ended"
                self.got += piece

    async def by_cancel(self, call: Coroutine[Any, Any, bytes]) -> bytes | None:
        task = asyncio.create_task(call)
        await turns(self.source.randrange(5))
        task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    async def by_timeout(self, call: Coroutine[Any, Any, bytes]) -> bytes | None:
        try:
            async with asyncio.timeout(self.source.choice([0, 0.0001, 0.001])):
                return await call
        except TimeoutError:
            return None

    async def by_wait_for(self, call: Coroutine[Any, Any, bytes]) -> bytes | None:
        try:
            return await asyncio.wait_for(call, self.source.choice([0.0001, 0.001]))
        except TimeoutError:
            return None

    async def not_at_all(self, call: Coroutine[Any, Any, bytes]) -> bytes | None:
        return await call


@KINDS
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_of_a_million_bytes_none_is_lost_or_doubled_by_random_cancels(
    loop: Loop, kind: str, seed: int
) -> None:
    """asyncio loses bytes here. What is read by cancelled calls crosses what is sent meanwhile."""
    size_bytes = 1_000_000

    async def send(sock: socket.socket, data: bytes, source: random.Random) -> None:
        start = 0
        while start < len(data):
            end = start + source.choice([1, 50, 3000])
            await loop.sock_sendall(sock, data[start:end])
            await asyncio.sleep(source.choice([0, 0, 0.0002]))
            start = end

    async def main() -> None:
        source = random.Random(seed)
        there, back = payload(size_bytes, seed), payload(size_bytes, -seed)
        with pair(kind) as (near, far):
            near_reader, far_reader = Unreliable(loop, near, seed), Unreliable(loop, far, -seed)
            await asyncio.gather(
                near_reader.read(size_bytes),
                far_reader.read(size_bytes),
                send(near, there, source),
                send(far, back, source),
            )
            assert digest(near_reader.got) == digest(back)
            assert digest(far_reader.got) == digest(there)
            assert read_now(near) == read_now(far) == b""
            assert near_reader.cancels > 50
            assert far_reader.cancels > 50

    go(loop, main(), limit=60)


@pytest.mark.parametrize("seed", [1, 2])
def test_of_two_thousand_messages_none_is_lost_by_random_cancels(loop: Loop, seed: int) -> None:
    """asyncio loses messages here."""
    count = 2000

    async def main() -> int:
        source, got, cancels = random.Random(seed), bytearray(), 0
        with message_pair(socket.SOCK_DGRAM) as (near, far):

            async def send() -> None:
                for number in range(count):
                    await loop.sock_sendall(far, b"%d," % number)
                    await asyncio.sleep(0)

            sending = asyncio.create_task(send())
            expected = b"".join(b"%d," % number for number in range(count))
            while len(got) < len(expected):
                task = asyncio.create_task(source.choice(list(READS.values()))(loop, near, 100))
                await turns(source.randrange(4))
                got += await end_of(task, b"")
                cancels += task.cancelled()
            assert got == expected
            await sending
            return cancels

    assert go(loop, main(), limit=30) > 100


@pytest.mark.parametrize("seed", [1, 2])
def test_of_two_hundred_clients_none_is_lost_by_random_cancels(loop: Loop, seed: int) -> None:
    """asyncio closes the connection that a cancelled call has accepted."""
    count = 200

    async def main() -> None:
        source = random.Random(seed)
        addresses: list[Any] = []
        clients: list[Any] = []
        with listening(count) as listener, contextlib.ExitStack() as stack:

            async def connect() -> None:
                for _ in range(count):
                    client = stack.enter_context(socket.create_connection(listener.getsockname()))
                    clients.append(client.getsockname())
                    await turns(source.randrange(6))

            connecting = asyncio.create_task(connect())
            while len(addresses) < count:
                task = asyncio.create_task(loop.sock_accept(listener))
                await turns(source.randrange(5))
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    accepted, address = task.result()
                    accepted.close()
                    addresses.append(address)
            await connecting
            assert addresses == clients

    go(loop, main(), limit=30)


# -------------------------------------------------- two calls on one socket, one socket twice


@ALL_READS
@pytest.mark.parametrize("cancelled", ["before", "after"])
def test_a_second_read_takes_the_place_of_the_first(
    contract_loop: AnyLoop, receive: Receive, cancelled: str
) -> None:
    async def main() -> None:
        with pair() as (near, far):
            first = await waiting(receive(contract_loop, near, 1))
            second = await waiting(receive(contract_loop, near, 1))
            if cancelled == "before":
                await cancel(first)
            far.send(b"x")
            async with asyncio.timeout(2):
                assert await second == b"x"
            if cancelled == "after":
                await cancel(first)
            third = await waiting(receive(contract_loop, near, 1))
            far.send(b"y")
            assert await third == b"y"

    go(contract_loop, main())


def test_a_second_accept_takes_the_place_of_the_first(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with listening() as listener:
            first = await waiting(contract_loop.sock_accept(listener))
            second = await waiting(contract_loop.sock_accept(listener))
            with socket.create_connection(listener.getsockname()):
                async with asyncio.timeout(2):
                    (await second)[0].close()
            await cancel(first)

    go(contract_loop, main())


@pytest.mark.parametrize("started", ["read", "write"])
@pytest.mark.parametrize("ends", ["read", "write", "both"])
def test_one_task_reads_while_another_writes_on_the_same_socket(
    contract_loop: AnyLoop, started: str, ends: str
) -> None:
    async def main() -> None:
        data = payload(2 * MIB)
        with pair() as (near, far):
            calls = [
                lambda: contract_loop.sock_recv(near, 10),
                lambda: contract_loop.sock_sendall(near, data),
            ]
            order = [0, 1] if started == "read" else [1, 0]
            tasks = {index: await waiting(calls[index]()) for index in order}
            if ends == "read":
                far.send(b"x")
                assert await tasks[0] == b"x"
                assert not tasks[1].done()
            elif ends == "both":
                far.send(b"x")
            assert digest(await read(far, len(data))) == digest(data)
            await tasks[1]
            if ends == "write":
                await turns()
                assert not tasks[0].done()
                far.send(b"x")
            assert await tasks[0] == b"x"

    go(contract_loop, main())


@pytest.mark.parametrize("started", ["read", "write"])
@pytest.mark.parametrize("ended", ["read", "write"])
def test_cancelling_one_direction_leaves_the_other_waiting(
    contract_loop: AnyLoop, started: str, ended: str
) -> None:
    async def main() -> None:
        data = payload(2 * MIB)
        with pair() as (near, far):
            calls = {
                "read": lambda: contract_loop.sock_recv(near, 10),
                "write": lambda: contract_loop.sock_sendall(near, data),
            }
            order = ["read", "write"] if started == "read" else ["write", "read"]
            tasks = {way: await waiting(calls[way]()) for way in order}
            await cancel(tasks[ended])
            await turns()
            if ended == "write":
                far.send(b"x")
                assert await tasks["read"] == b"x"
            else:
                assert digest(await read(far, len(data))) == digest(data)
                await tasks["write"]

    go(contract_loop, main())


@ALL_READS
def test_two_descriptors_of_one_socket_share_what_comes(
    contract_loop: AnyLoop, receive: Receive
) -> None:
    async def main() -> None:
        with pair() as (near, far), near.dup() as twin:
            for _ in range(10):
                tasks = [await waiting(receive(contract_loop, sock, 1)) for sock in (near, twin)]
                far.send(b"a")
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                await turns()
                assert [task.done() for task in tasks].count(True) == 1
                far.send(b"b")
                assert sorted(await asyncio.gather(*tasks)) == [b"a", b"b"]

    go(contract_loop, main())


def test_a_closed_descriptor_leaves_its_twin_working(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far), near.dup() as twin, near.dup() as third:
            task = await waiting(contract_loop.sock_recv(near, 10))
            await cancel(await waiting(contract_loop.sock_recv(twin, 10)))
            twin.close()
            far.send(b"first")
            assert await task == b"first"
            near.close()
            contract_loop.call_later(0.005, far.send, b"second")
            assert await contract_loop.sock_recv(third, 10) == b"second"

    go(contract_loop, main())


# ------------------------------------------------------------ beside add_reader() and add_writer()


def test_a_read_takes_the_place_of_a_reader_for_good(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            contract_loop.add_reader(near, unexpected)
            await turns()
            task = await waiting(contract_loop.sock_recv(near, 10))
            far.send(b"x")
            assert await task == b"x"
            far.send(b"y")
            await turns()
            assert contract_loop.remove_reader(near) is False
            assert near.recv(10) == b"y"

    go(contract_loop, main())


def test_a_read_that_need_not_wait_leaves_a_reader_in_place(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            called = asyncio.Event()
            contract_loop.add_reader(near, called.set)
            far.send(b"x")
            assert await contract_loop.sock_recv(near, 10) == b"x"
            far.send(b"y")
            await called.wait()
            assert contract_loop.remove_reader(near) is True

    go(contract_loop, main())


def test_a_reader_takes_the_place_of_a_waiting_read(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            task = await waiting(contract_loop.sock_recv(near, 10))
            got: asyncio.Queue[bytes] = asyncio.Queue()
            contract_loop.add_reader(near, lambda: got.put_nowait(near.recv(10)))
            for text in (b"one", b"two"):
                far.send(text)
                assert await got.get() == text
            assert not task.done()
            await cancel(task)
            far.send(b"three")
            assert await got.get() == b"three"
            assert contract_loop.remove_reader(near) is True

    go(contract_loop, main())


def test_removing_a_reader_takes_the_watch_from_a_waiting_read(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            task = await waiting(contract_loop.sock_recv(near, 10))
            assert contract_loop.remove_reader(near) is True
            far.send(b"kept")
            await asyncio.sleep(0.01)
            assert not task.done()
            await cancel(task)
            assert await contract_loop.sock_recv(near, 10) == b"kept"

    go(contract_loop, main())


def test_a_writer_stays_beside_a_waiting_read(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            called = asyncio.Event()
            contract_loop.add_writer(near, called.set)
            for text in (b"one", b"two"):
                called.clear()
                task = await waiting(contract_loop.sock_recv(near, 10))
                await called.wait()
                far.send(text)
                assert await task == text
                called.clear()
                await called.wait()
            await cancel(await waiting(contract_loop.sock_recv(near, 10)))
            called.clear()
            await called.wait()
            assert contract_loop.remove_writer(near) is True

    go(contract_loop, main())


def test_a_reader_stays_beside_a_waiting_send(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            got: asyncio.Queue[bytes] = asyncio.Queue()
            contract_loop.add_reader(near, lambda: got.put_nowait(near.recv(10)))
            for end in ("sent", "cancelled"):
                sending = await waiting(contract_loop.sock_sendall(near, payload(2 * MIB)))
                far.send(b"meanwhile")
                assert await got.get() == b"meanwhile"
                if end == "sent":
                    assert digest(await read(far, 2 * MIB)) == digest(payload(2 * MIB))
                    await sending
                else:
                    await cancel(sending)
                far.send(b"after")
                assert await got.get() == b"after"
            assert contract_loop.remove_reader(near) is True

    go(contract_loop, main())


def test_a_reader_may_be_added_and_removed_while_a_send_waits(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far):
            sending = await waiting(contract_loop.sock_sendall(near, payload(2 * MIB)))
            for _ in range(3):
                contract_loop.add_reader(near, unexpected)
                await asyncio.sleep(0.002)
                assert contract_loop.remove_reader(near) is True
                await asyncio.sleep(0.002)
            assert digest(await read(far, 2 * MIB)) == digest(payload(2 * MIB))
            await sending

    go(contract_loop, main())


# ------------------------------------------------------- sockets that are closed while a call waits


async def ends_somehow(task: asyncio.Task[Any]) -> None:
    """A call whose descriptor is gone waits until it is cancelled, or fails with EBADF."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        error = task.exception()
        assert isinstance(error, OSError)
        assert error.errno == errno.EBADF


@pytest.mark.parametrize("how", list(WAITING))
@pytest.mark.parametrize("way", ["close", "behind the back"])
def test_a_call_whose_socket_is_closed_can_be_cancelled_and_leaves_nothing(
    contract_loop: AnyLoop, how: str, way: str
) -> None:
    async def main() -> None:
        with pair() as (near, far):
            task = await waiting(WAITING[how](contract_loop, near))
            if way == "close":
                near.close()
            else:
                os.close(near.fileno())
            await asyncio.sleep(0.01)
            await ends_somehow(task)
            near.detach()
            await read_to_end(far)
            assert await sees_end(far)

    go(contract_loop, main())


@pytest.mark.parametrize("has_twin", [False, True], ids=["", "its file stays open"])
@pytest.mark.parametrize("event", ["nothing", "bytes", "end"])
@pytest.mark.parametrize("first", ["read", "write"])
def test_a_socket_closed_under_a_read_and_a_write_does_no_harm(
    loop: Loop, first: str, event: str, has_twin: bool
) -> None:
    """asyncio on epoll reports a failure of its own to the exception handler, or spins."""

    async def main() -> None:
        with pair() as (near, far), contextlib.ExitStack() as stack:
            if has_twin:
                stack.enter_context(near.dup())
            tasks = [
                await waiting(loop.sock_recv(near, 100)),
                await waiting(loop.sock_sendall(near, bytes(TOO_MUCH))),
            ]
            near.close()
            if event == "bytes":
                with contextlib.suppress(BrokenPipeError):  # unless something holds the file
                    far.send(b"x")
            elif event == "end":
                far.close()
            await asyncio.sleep(0.01)
            for task in tasks if first == "read" else reversed(tasks):
                if task.done():
                    error = task.exception()
                    assert isinstance(error, OSError)
                    assert error.errno == errno.EBADF
                else:
                    await cancel(task)
        with pair() as (near, far):
            loop.call_later(0.005, far.send, b"alive")
            assert await loop.sock_recv(near, 10) == b"alive"

    go(loop, main())


def test_a_detached_socket_can_be_cancelled_and_its_descriptor_used(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        before = watched(contract_loop)
        with pair() as (near, far):
            task = await waiting(contract_loop.sock_recv(near, 10))
            number = near.detach()
            await cancel(task)
            assert watched(contract_loop) == before
            with socket.socket(fileno=number) as again:
                again.setblocking(False)
                contract_loop.call_later(0.005, far.send, b"x")
                assert await contract_loop.sock_recv(again, 10) == b"x"

    go(contract_loop, main())


@STREAM_READS
@pytest.mark.parametrize("meanwhile", ["waits", "is cancelled", "receives"])
def test_a_number_may_go_to_another_file_and_come_back(
    contract_loop: AnyLoop, receive: Receive, meanwhile: str
) -> None:
    async def main() -> None:
        with pair() as (near, far), pair() as (other, other_far), near.dup() as twin:
            number = near.fileno()
            task = await waiting(receive(contract_loop, near, 100))
            far.send(b"one")
            assert await task == b"one"
            near.close()
            with at_number(other, number) as taken:
                if meanwhile != "waits":
                    task = await waiting(receive(contract_loop, taken, 100))
                    if meanwhile == "receives":
                        other_far.send(b"two")
                        assert await task == b"two"
                    else:
                        await cancel(task)
            with at_number(twin, number) as back:
                for text in (b"three", b"four"):
                    task = await waiting(receive(contract_loop, back, 100))
                    far.send(text)
                    async with asyncio.timeout(2):
                        assert await task == text

    go(contract_loop, main())


@pytest.mark.parametrize("count", range(5))
def test_a_sendall_whose_socket_was_closed_sends_nothing_to_who_has_its_number_now(
    contract_loop: AnyLoop, count: int
) -> None:
    async def main() -> None:
        with pair() as (near, far), pair() as (other, other_far):
            number = near.fileno()
            task = await waiting(contract_loop.sock_sendall(near, bytes(TOO_MUCH)))
            read_now(far)
            await turns(count)
            near.close()
            with at_number(other, number) as taken:
                await turns()
                await contract_loop.sock_sendall(taken, b"new")
                await ends_somehow(task)
                await turns()
                assert read_now(other_far) == b"new"

    go(contract_loop, main())


@ALL_READS
@pytest.mark.parametrize("count", range(5))
def test_a_call_whose_socket_was_closed_takes_nothing_from_who_has_its_number_now(
    contract_loop: AnyLoop, receive: Receive, count: int
) -> None:
    async def main() -> None:
        with pair() as (near, far), pair() as (other, other_far):
            number = near.fileno()
            task = await waiting(receive(contract_loop, near, 100))
            far.send(b"old")
            await turns(count)
            near.close()
            with at_number(other, number) as taken:
                other_far.send(b"new")
                await turns()
                assert await receive(contract_loop, taken, 100) == b"new"
                if not task.done() or task.exception():
                    await ends_somehow(task)
                else:
                    assert task.result() == b"old"

    go(contract_loop, main())


@pytest.mark.parametrize("cancelled", ["before", "after"])
@pytest.mark.parametrize("new", ["read", "write", "both"])
@pytest.mark.parametrize("old", ["read", "write", "both"])
def test_a_number_that_is_used_again_under_a_waiting_call_serves_its_new_owner(
    loop: Loop, old: str, new: str, cancelled: str
) -> None:
    """asyncio takes the new socket for the old one, and the new call waits for ever."""
    data = payload(2 * MIB)

    async def calls(sock: socket.socket, which: str) -> dict[str, asyncio.Task[Any]]:
        tasks: dict[str, asyncio.Task[Any]] = {}
        if which != "write":
            tasks["read"] = await waiting(loop.sock_recv(sock, 100))
        if which != "read":
            tasks["write"] = await waiting(loop.sock_sendall(sock, data))
        return tasks

    async def main() -> None:
        with pair() as (near, far), pair() as (other, other_far):
            number = near.fileno()
            old_tasks = await calls(near, old)
            near.close()
            with at_number(other, number) as taken:
                new_tasks = await calls(taken, new)
                if cancelled == "before":
                    for task in old_tasks.values():
                        await ends_somehow(task)
                async with asyncio.timeout(2):
                    if "read" in new_tasks:
                        other_far.send(b"new")
                        assert await new_tasks["read"] == b"new"
                    if "write" in new_tasks:
                        assert digest(await read(other_far, 2 * MIB)) == digest(data)
                        await new_tasks["write"]
                for task in old_tasks.values():
                    await ends_somehow(task)
            await read_to_end(far)

    go(loop, main())


@ALL_READS
def test_a_number_is_free_once_a_call_was_cancelled(
    contract_loop: AnyLoop, receive: Receive
) -> None:
    async def main() -> None:
        for _ in range(10):
            with pair() as (near, far), pair() as (other, other_far):
                number = near.fileno()
                await cancel(await waiting(receive(contract_loop, near, 100)))
                far.send(b"old")
                near.close()
                with at_number(other, number) as taken:
                    contract_loop.call_later(0.002, other_far.send, b"new")
                    async with asyncio.timeout(2):
                        assert await receive(contract_loop, taken, 100) == b"new"

    go(contract_loop, main())


@STREAM_READS
def test_a_number_is_free_as_soon_as_a_call_is_being_cancelled(
    loop: Loop, receive: Receive
) -> None:
    """asyncio removes its watch a turn later, and takes the new socket for the old one."""

    async def main() -> None:
        for _ in range(10):
            with pair() as (near, far), pair() as (other, other_far):
                number = near.fileno()
                task = await waiting(receive(loop, near, 100))
                task.cancel()
                near.close()
                with at_number(other, number) as taken:
                    loop.call_later(0.002, other_far.send, b"new")
                    async with asyncio.timeout(2):
                        assert await receive(loop, taken, 100) == b"new"
                assert task.cancelled()
                assert await sees_end(far)

    go(loop, main())


# -------------------------------------------------- other sockets, and what only looks like one


class Recording(socket.socket):
    """Notes the calls of its methods, and changes what they do, so that a bypass shows."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.setblocking(False)
        self.calls: list[str] = []

    def recv(self, *args: Any) -> bytes:
        self.calls.append("recv")
        return super().recv(*args).upper()

    def recv_into(self, buffer: Any, *args: Any) -> int:
        self.calls.append("recv_into")
        count = super().recv_into(buffer, *args)
        buffer[:count] = bytes(buffer[:count]).upper()
        return count

    def send(self, data: Any, *args: Any) -> int:
        self.calls.append("send")
        return super().send(bytes(data[:3]).upper(), *args)

    def accept(self) -> tuple[Any, Any]:
        self.calls.append("accept")
        sock, address = super().accept()
        sock.send(b"hello")
        return sock, address


@STREAM_READS
def test_a_subclass_is_read_by_its_own_methods(contract_loop: AnyLoop, receive: Receive) -> None:
    async def main() -> None:
        with pair() as (near, far), Recording(near.detach()) as sock:
            far.send(b"at once")
            assert await receive(contract_loop, sock, 100) == b"AT ONCE"
            task = await waiting(receive(contract_loop, sock, 100))
            far.send(b"late")
            assert await task == b"LATE"
            assert len(sock.calls) == 3
            assert len(set(sock.calls)) == 1

    go(contract_loop, main())


def test_a_subclass_sends_by_its_own_method_and_its_count_is_believed(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        with pair() as (near, far), Recording(near.detach()) as sock:
            await contract_loop.sock_sendall(sock, b"abcdefgh")
            assert read_now(far) == b"ABCDEFGH"
            assert sock.calls == ["send"] * 3

    go(contract_loop, main())


def test_a_subclass_accepts_by_its_own_method(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with listening() as listener, Recording(listener.detach()) as sock:
            address = sock.getsockname()
            for late in (False, True):
                task = asyncio.create_task(contract_loop.sock_accept(sock))
                if late:
                    await turns()
                with socket.create_connection(address) as client:
                    accepted, _ = await task
                    with accepted:
                        assert client.recv(100) == b"hello"
                        assert accepted.gettimeout() == 0
            assert set(sock.calls) == {"accept"}

    go(contract_loop, main())


class Reluctant(Recording):
    """Says for a while that there is nothing, although there is."""

    def __init__(self, fileno: int, error: type[OSError], times: int) -> None:
        super().__init__(fileno)
        self.error, self.left = error, times

    def recv(self, *args: Any) -> bytes:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return super().recv(*args)

    def send(self, data: Any, *args: Any) -> int:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return super().send(data, *args)


@pytest.mark.parametrize("error", [BlockingIOError, InterruptedError])
def test_a_socket_that_was_called_in_vain_is_called_again(
    contract_loop: AnyLoop, error: type[OSError]
) -> None:
    async def main() -> None:
        with pair() as (near, far), Reluctant(near.detach(), error, 5) as sock:
            far.send(b"x")
            assert await contract_loop.sock_recv(sock, 10) == b"X"
            sock.left = 5
            assert await contract_loop.sock_sendall(sock, b"abcdef") is None
            assert read_now(far) == b"ABCDEF"

    go(contract_loop, main())


class Failing(socket.socket):
    """Fails in a way of its own when it is read for the second time."""

    error: BaseException | None = None

    def recv(self, *args: Any) -> bytes:
        data = super().recv(*args)
        if self.error is not None:
            raise self.error
        return data


def test_an_error_of_a_socket_s_own_reaches_the_caller(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with pair() as (near, far), Failing(fileno=near.detach()) as sock:
            sock.setblocking(False)
            sock.error = ZeroDivisionError("own")
            task = await waiting(contract_loop.sock_recv(sock, 1))
            far.send(b"ab")
            with pytest.raises(ZeroDivisionError, match="own"):
                await task
            with pytest.raises(ZeroDivisionError, match="own"):
                await contract_loop.sock_recv(sock, 1)

    go(contract_loop, main())


def test_an_exit_raised_by_a_socket_leaves_the_loop(contract_loop: AnyLoop) -> None:
    with pair() as (near, far), Failing(fileno=near.detach()) as sock:
        sock.setblocking(False)
        sock.error = SystemExit("out")
        task = contract_loop.create_task(contract_loop.sock_recv(sock, 1))
        contract_loop.call_later(0.005, far.send, b"x")
        contract_loop.call_later(5, unexpected)
        with pytest.raises(SystemExit, match="out"):
            contract_loop.run_forever()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, SystemExit):
            contract_loop.run_until_complete(task)
        contract_loop.call_soon(contract_loop.stop)
        contract_loop.run_forever()


class PipeEnd:
    """One end of a pipe, with as much of a socket as the calls need."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self.fd

    def recv(self, size: int) -> bytes:
        return os.read(self.fd, size)

    def recv_into(self, buffer: Any) -> int:
        return os.readv(self.fd, [buffer])

    def send(self, data: Any) -> int:
        return os.write(self.fd, data)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@STREAM_READS
def test_what_only_looks_like_a_socket_works_by_its_methods(
    contract_loop: AnyLoop, receive: Receive
) -> None:
    async def main() -> None:
        fds = os.pipe()
        with (
            contextlib.closing(PipeEnd(fds[0])) as reader,
            contextlib.closing(PipeEnd(fds[1])) as writer,
        ):
            data, got = payload(MIB), bytearray()
            task = await waiting(receive(contract_loop, reader, 10))
            os.write(writer.fd, b"first")
            assert await task == b"first"
            sending = await waiting(contract_loop.sock_sendall(writer, data))
            while len(got) < MIB:
                got += await receive(contract_loop, reader, 100_000)
            await sending
            assert digest(got) == digest(data)
            task = await waiting(receive(contract_loop, reader, 10))
            writer.close()
            assert await task == b""

    go(contract_loop, main())


def test_a_pipe_without_a_reader_breaks_a_waiting_sendall(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        fds = os.pipe()
        with (
            contextlib.closing(PipeEnd(fds[0])) as reader,
            contextlib.closing(PipeEnd(fds[1])) as writer,
        ):
            sending = await waiting(contract_loop.sock_sendall(writer, bytes(MIB)))
            reader.close()
            with pytest.raises(BrokenPipeError):
                await sending

    go(contract_loop, main())


def test_what_has_no_descriptor_is_refused_when_it_would_have_to_wait(
    contract_loop: AnyLoop,
) -> None:
    class Nowhere(PipeEnd):
        def recv(self, size: int) -> bytes:
            raise BlockingIOError

        def fileno(self) -> int:
            return -1

    async def main() -> None:
        nowhere = Nowhere(os.open(os.devnull, os.O_RDONLY))
        with contextlib.closing(nowhere), pytest.raises(ValueError, match="file descriptor"):
            await contract_loop.sock_recv(nowhere, 1)

    go(contract_loop, main())


def test_a_regular_file_is_refused_when_it_would_have_to_wait(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    class Empty(PipeEnd):
        def recv(self, size: int) -> bytes:
            raise BlockingIOError

    path = tmp_path / "file"
    path.write_bytes(b"x")

    async def main() -> None:
        file = Empty(os.open(path, os.O_RDONLY))
        with contextlib.closing(file), pytest.raises(PermissionError):
            await contract_loop.sock_recv(file, 1)

    go(contract_loop, main())


# --------------------------------------------------------------------------------------- datagrams


@contextlib.contextmanager
def udp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two UDP sockets, each connected to the other."""
    with (
        socket.socket(type=socket.SOCK_DGRAM) as near,
        socket.socket(type=socket.SOCK_DGRAM) as far,
    ):
        for sock in (near, far):
            sock.setblocking(False)
            sock.bind(("127.0.0.1", 0))
        near.connect(far.getsockname())
        far.connect(near.getsockname())
        yield near, far


@contextlib.contextmanager
def message_pair(kind: socket.SocketKind) -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, kind)
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


MESSAGES: dict[str, tuple[Callable[[], Any], int]] = {
    "UDP": (udp_pair, 60_000),
    "unix datagrams": (lambda: message_pair(socket.SOCK_DGRAM), 150_000),
    "unix packets": (lambda: message_pair(socket.SOCK_SEQPACKET), 150_000),
}
ALL_MESSAGES = pytest.mark.parametrize(
    ("connect", "largest"), MESSAGES.values(), ids=list(MESSAGES)
)


@ALL_MESSAGES
@ALL_READS
@pytest.mark.parametrize("late", [False, True], ids=["there at once", "waited for"])
def test_a_message_is_received_whole(
    contract_loop: AnyLoop, connect: Any, largest: int, receive: Receive, late: bool
) -> None:
    async def main() -> None:
        with connect() as (near, far):
            for size_bytes in (1, 1472, largest):
                task = asyncio.create_task(receive(contract_loop, near, MIB))
                if late:
                    await asyncio.sleep(0.002)
                await contract_loop.sock_sendall(far, payload(size_bytes))
                assert digest(await task) == digest(payload(size_bytes))

    go(contract_loop, main())


@ALL_MESSAGES
@ALL_READS
def test_a_message_is_cut_at_the_size_asked_for_and_the_next_is_untouched(
    contract_loop: AnyLoop, connect: Any, largest: int, receive: Receive
) -> None:
    async def main() -> None:
        with connect() as (near, far):
            for text in (b"abcdef", b"second"):
                far.send(text)
            assert await receive(contract_loop, near, 3) == b"abc"
            assert await receive(contract_loop, near, 100) == b"second"

    go(contract_loop, main())


def test_a_message_of_no_bytes_is_sent_and_received(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with udp_pair() as (near, far):
            for receive in READS.values():
                task = await waiting(receive(contract_loop, near, 10))
                await contract_loop.sock_sendall(far, b"")
                async with asyncio.timeout(2):
                    assert await task == b""

    go(contract_loop, main())


def test_a_message_that_is_too_long_is_refused(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with udp_pair() as (near, far):
            with pytest.raises(OSError, match="Message too long") as raised:
                await contract_loop.sock_sendall(near, bytes(70_000))
            assert raised.value.errno == errno.EMSGSIZE
            assert read_now(far) == b""

    go(contract_loop, main())


def test_a_waiting_read_of_datagrams_hears_that_its_peer_refuses(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with udp_pair() as (near, far):
            task = await waiting(contract_loop.sock_recv(near, 10))
            far.close()
            near.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                await task

    go(contract_loop, main())


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_messages_wait_for_room_and_keep_their_order(
    contract_loop: AnyLoop, kind: socket.SocketKind
) -> None:
    count = 2000

    async def main() -> None:
        with message_pair(kind) as (near, far):

            async def send() -> None:
                for number in range(count):
                    await contract_loop.sock_sendall(near, b"%d" % number)

            sending = asyncio.create_task(send())
            for number in range(count):
                assert await contract_loop.sock_recv(far, 100) == b"%d" % number
            await sending

    go(contract_loop, main())


# --------------------------------------------------------------------------- connecting, accepting


def unix_listener(folder: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "listener"))
    listener.listen()
    return listener


@pytest.mark.parametrize("late", [False, True], ids=["there at once", "waited for"])
@pytest.mark.parametrize("family", ["IPv4", "IPv6", "unix"])
def test_what_is_accepted_is_a_socket_that_does_not_block_and_its_address(
    contract_loop: AnyLoop, family: str, late: bool, tmp_path: Path
) -> None:
    before = socket.getdefaulttimeout()

    async def main() -> None:
        if family == "unix":
            listener = unix_listener(tmp_path)
        elif family == "IPv6":
            listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        else:
            listener = socket.create_server(("127.0.0.1", 0))
        with listener, socket.socket(listener.family) as client:
            listener.setblocking(False)
            task = asyncio.create_task(contract_loop.sock_accept(listener))
            if late:
                await asyncio.sleep(0.005)
            client.connect(listener.getsockname())
            socket.setdefaulttimeout(5)  # what is accepted does not care
            accepted, address = await task
            with accepted:
                assert type(accepted) is socket.socket
                assert address == client.getsockname()
                assert accepted.getpeername() == address
                assert (accepted.family, accepted.type, accepted.proto) == (
                    listener.family,
                    listener.type,
                    listener.proto,
                )
                assert accepted.gettimeout() == 0
                assert os.get_blocking(accepted.fileno()) is False
                assert accepted.get_inheritable() is False

    try:
        go(contract_loop, main())
    finally:
        socket.setdefaulttimeout(before)


def test_many_clients_are_accepted_in_their_order_each_with_its_address(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        with listening() as listener, contextlib.ExitStack() as stack:
            clients: list[socket.socket] = []

            async def connect() -> None:
                for number in range(200):
                    client = stack.enter_context(socket.socket())
                    client.setblocking(False)
                    clients.append(client)
                    await contract_loop.sock_connect(client, listener.getsockname())
                    await contract_loop.sock_sendall(client, b"%d" % number)
                    if number % 30 == 0:
                        await asyncio.sleep(0.002)

            connecting = asyncio.create_task(connect())
            for number in range(200):
                accepted, address = await contract_loop.sock_accept(listener)
                stack.enter_context(accepted)
                assert address == clients[number].getsockname()
                assert await contract_loop.sock_recv(accepted, 10) == b"%d" % number
            await connecting

    go(contract_loop, main())


def test_a_client_that_has_gone_is_accepted_all_the_same(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with listening() as listener:
            for late in (False, True):
                task = asyncio.create_task(contract_loop.sock_accept(listener))
                if late:
                    await asyncio.sleep(0.005)
                client = socket.create_connection(listener.getsockname())
                own = client.getsockname()
                reset(client)
                accepted, address = await task
                with accepted:
                    assert address == own
                    with pytest.raises(ConnectionResetError):
                        await contract_loop.sock_recv(accepted, 1)

    go(contract_loop, main())


def accept_without_descriptors(name: str, late: bool) -> list[Any]:
    """What an accept raises that finds no descriptor; whether the client is accepted afterwards."""
    loop = make_loop_named(name)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> list[Any]:
        with listening() as listener, socket.socket() as client:
            task = await waiting(loop.sock_accept(listener)) if late else None
            resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
            client.connect(listener.getsockname())
            raised = None
            try:
                async with asyncio.timeout(2):
                    await (task or loop.sock_accept(listener))
            except OSError as exc:
                raised = exc.errno
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            accepted, address = await loop.sock_accept(listener)
            accepted.close()
            return [raised, address == client.getsockname()]

    with contextlib.closing(loop):
        return go(loop, main())


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after a wait"])
def test_an_accept_without_descriptors_says_so_and_loses_no_client(name: str, late: bool) -> None:
    assert run_child(accept_without_descriptors, name, late).value == [errno.EMFILE, True]


def test_connecting_finds_a_host_by_name(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        with listening() as listener, socket.socket() as client:
            client.setblocking(False)
            address = ("localhost", listener.getsockname()[1])
            assert await contract_loop.sock_connect(client, address) is None
            accepted, _ = await contract_loop.sock_accept(listener)
            accepted.close()

    go(contract_loop, main())


def test_unix_sockets_connect_by_path_and_say_when_nobody_listens(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            with pytest.raises(FileNotFoundError):
                await contract_loop.sock_connect(client, str(tmp_path / "nobody"))
            with unix_listener(tmp_path) as listener:
                listener.setblocking(False)
                await contract_loop.sock_connect(client, listener.getsockname())
                accepted, _ = await contract_loop.sock_accept(listener)
                with accepted:
                    await contract_loop.sock_sendall(accepted, b"x")
                    assert await contract_loop.sock_recv(client, 10) == b"x"

    go(contract_loop, main())


# ------------------------------------------------------------------- the life of the loop around it


@ALL_READS
def test_a_waiting_read_goes_on_when_its_loop_was_stopped_and_runs_again(
    contract_loop: AnyLoop, receive: Receive
) -> None:
    before = watched(contract_loop)
    with pair() as (near, far):
        task = contract_loop.create_task(receive(contract_loop, near, 10))
        for _ in range(3):
            contract_loop.call_later(0.005, contract_loop.stop)
            contract_loop.run_forever()
            assert not task.done()
        far.send(b"at last")
        assert contract_loop.run_until_complete(asyncio.wait_for(task, 5)) == b"at last"
    assert watched(contract_loop) == before


def test_a_waiting_sendall_goes_on_when_its_loop_was_stopped_and_runs_again(
    contract_loop: AnyLoop,
) -> None:
    data, got = payload(4 * MIB), bytearray()
    with pair() as (near, far):
        task = contract_loop.create_task(contract_loop.sock_sendall(near, data))
        while not task.done() or len(got) < len(data):
            contract_loop.call_soon(contract_loop.stop)
            contract_loop.run_forever()
            got += read_now(far)
        assert digest(got) == digest(data)


def test_a_loop_may_be_interrupted_while_a_call_waits(contract_loop: AnyLoop) -> None:
    with pair() as (near, far):
        task = contract_loop.create_task(contract_loop.sock_recv(near, 10))
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        contract_loop.call_later(5, unexpected)
        with pytest.raises(KeyboardInterrupt):
            contract_loop.run_until_complete(task)
        timer.join()
        assert not task.done()
        far.send(b"at last")
        assert contract_loop.run_until_complete(task) == b"at last"


@ALL_READS
def test_a_waiting_read_is_finished_in_another_thread(
    contract_loop: AnyLoop, receive: Receive
) -> None:
    with pair() as (near, far), ThreadPoolExecutor(max_workers=1) as other:
        task = contract_loop.create_task(receive(contract_loop, near, 10))
        wait = contract_loop.run_until_complete
        other.submit(lambda: wait(asyncio.sleep(0.01))).result(5)
        assert not task.done()
        far.send(b"here")
        assert wait(asyncio.wait_for(task, 5)) == b"here"
        task = contract_loop.create_task(receive(contract_loop, near, 10))
        wait(asyncio.sleep(0.01))
        far.send(b"there")
        assert in_thread(lambda: wait(asyncio.wait_for(task, 5))) == b"there"


def test_a_waiting_sendall_is_finished_in_another_thread(contract_loop: AnyLoop) -> None:
    data = payload(4 * MIB)
    with pair() as (near, far):
        task = contract_loop.create_task(contract_loop.sock_sendall(near, data))
        in_thread(lambda: contract_loop.run_until_complete(asyncio.sleep(0.01)))

        async def rest() -> bytes:
            got = await read(far, len(data))
            await task
            return got

        got = contract_loop.run_until_complete(asyncio.wait_for(rest(), 10))
        assert digest(got) == digest(data)


def test_two_loops_in_two_threads_share_a_socket(name: str) -> None:
    data = payload(4 * MIB)
    with contextlib.ExitStack() as stack, pair() as (near, far):
        closing = [contextlib.closing(make_loop_named(name)) for _ in range(3)]
        loops = [stack.enter_context(loop) for loop in closing]

        async def read_all(sock: socket.socket) -> bytes:
            async with asyncio.timeout(20):
                return await read(sock, len(data))

        async def echo_all() -> None:
            async with asyncio.timeout(20):
                await echo(asyncio.get_running_loop(), far, by_recv)

        works: list[Any] = [
            loops[0].sock_sendall(near, data),
            read_all(near),
            echo_all(),
        ]
        with ThreadPoolExecutor(max_workers=3) as threads:
            running = [
                threads.submit(loop.run_until_complete, work)
                for loop, work in zip(loops, works, strict=True)
            ]
            running[0].result(20)
            assert digest(running[1].result(20)) == digest(data)
            near.shutdown(socket.SHUT_WR)
            running[2].result(20)


def test_a_loop_inside_a_callback_may_read_what_the_outer_one_waits_for(name: str) -> None:
    with (
        contextlib.closing(make_loop_named(name)) as outer,
        contextlib.closing(make_loop_named(name)) as inner,
        pair() as (near, far),
    ):
        got = []

        def nested() -> None:
            asyncio._set_running_loop(None)
            try:
                got.append(inner.run_until_complete(inner.sock_recv(near, 10)))
            finally:
                asyncio._set_running_loop(outer)
            outer.call_later(0.005, far.send, b"outer")

        task = outer.create_task(outer.sock_recv(near, 10))
        outer.run_until_complete(asyncio.sleep(0.01))
        thread = threading.Timer(0.02, far.send, (b"inner",))
        thread.start()
        outer.call_soon(nested)
        assert outer.run_until_complete(asyncio.wait_for(task, 5)) == b"outer"
        assert got == [b"inner"]
        thread.join()


def test_a_loop_that_is_closed_under_waiting_calls_lets_go_of_their_sockets(name: str) -> None:
    loop = make_loop_named(name)
    with pair() as (near, far), pair() as (full, full_far), listening() as listener:
        tasks = [
            loop.create_task(loop.sock_recv(near, 10)),
            loop.create_task(loop.sock_sendall(full, bytes(TOO_MUCH))),
            loop.create_task(loop.sock_accept(listener)),
        ]
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        address = listener.getsockname()
        for sock in (near, full, listener):
            sock.close()
        assert select.select([far], [], [], 2)[0]
        assert far.recv(1) == b""
        while read_now(full_far):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 1)
        for task in tasks:
            vars_of: Any = task
            vars_of._log_destroy_pending = False  # that is said, and is not what is asked here
        del task, vars_of, tasks
        gc.collect()


@STREAM_READS
def test_a_loop_with_asyncios_own_turn_makes_the_same_calls(monitor: str, receive: Receive) -> None:
    with contextlib.closing(Stepwise(monitor=monitor)) as loop:

        async def main() -> None:
            data = payload(2 * MIB)
            with pair() as (near, far), listening() as listener:
                task = await waiting(receive(loop, near, 10))
                far.send(b"late")
                assert await task == b"late"
                await cancel(await waiting(receive(loop, near, 10)))
                far.send(b"kept")
                assert await receive(loop, near, 10) == b"kept"
                sending = await waiting(loop.sock_sendall(near, data))
                assert digest(await read(far, len(data))) == digest(data)
                await sending
                accepting = await waiting(loop.sock_accept(listener))
                with socket.create_connection(listener.getsockname()):
                    (await accepting)[0].close()

        go(loop, main())


def test_debug_mode_changes_nothing_else(contract_loop: AnyLoop) -> None:
    contract_loop.set_debug(True)
    contract_loop.slow_callback_duration = 10

    async def main() -> None:
        data = payload(2 * MIB)
        with pair() as (near, far), listening() as listener:
            task = await waiting(contract_loop.sock_recv(near, 10))
            far.send(b"late")
            assert await task == b"late"
            await cancel(await waiting(contract_loop.sock_recv_into(near, bytearray(10))))
            sending = await waiting(contract_loop.sock_sendall(near, data))
            assert digest(await read(far, len(data))) == digest(data)
            await sending
            accepting = await waiting(contract_loop.sock_accept(listener))
            with socket.create_connection(listener.getsockname()):
                accepted, _ = await accepting
                accepted.close()

    go(contract_loop, main())


def fork_in_mid_wait(monitor: str, what: str) -> list[Any]:
    """How the child ended; what two calls gave that waited while the process was doubled."""
    loop = uringloop.new_event_loop(monitor=monitor)
    with contextlib.closing(loop), pair() as (stays, stays_far), pair() as (goes, goes_far):
        staying = loop.create_task(loop.sock_recv(stays, 100))
        going = loop.create_task(loop.sock_recv(goes, 100))
        loop.run_until_complete(asyncio.sleep(0.01))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if what == "closes the loop":
                    loop.close()
                elif what == "runs its own":
                    own = uringloop.new_event_loop(monitor=monitor)
                    goes_far.send(b"child")
                    assert own.run_until_complete(own.sock_recv(goes, 100)) == b"child"
                    own.close()
                elif what == "goes on":
                    goes_far.send(b"child")
                    assert loop.run_until_complete(asyncio.wait_for(going, 5)) == b"child"
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stays_far.send(b"parent")
        goes_far.send(b"parent too")

        async def both() -> list[str]:
            async with asyncio.timeout(5):
                return [(await task).decode() for task in (staying, going)]

        return [code, *loop.run_until_complete(both()), loop.monitor]


@pytest.mark.parametrize("what", ["ends at once", "closes the loop", "runs its own", "goes on"])
def test_calls_that_wait_are_unharmed_by_a_forked_child_that(monitor: str, what: str) -> None:
    expected = [0, "parent", "parent too", monitor]
    assert run_child(fork_in_mid_wait, monitor, what).value == expected


def lose_the_ring_in_mid_wait(calls: list[str], then: str) -> list[Any]:
    """What calls gave that waited when the ring was taken away; the monitor afterwards."""
    loop = uringloop.new_event_loop(monitor="auto")
    data = payload(2 * MIB)

    async def main() -> list[Any]:
        with contextlib.ExitStack() as stack:
            pairs = [stack.enter_context(pair()) for _ in range(50)]
            full = [stack.enter_context(pair()) for _ in range(5)]
            listener = stack.enter_context(listening())
            reading = [asyncio.create_task(loop.sock_recv(near, 100)) for near, _ in pairs]
            sending = [asyncio.create_task(loop.sock_sendall(near, data)) for near, _ in full]
            accepting = await waiting(loop.sock_accept(listener))
            if calls:
                deny(errno.EPERM, *calls)
            else:
                os.close(*ring_files())
            if then == "cancels":
                for task in reading[::2]:
                    task.cancel()
            for number, (_, far) in enumerate(pairs):
                far.send(b"%d" % number)
            got = []
            for number, task in enumerate(reading):
                await asyncio.wait([task], timeout=5)
                text = await loop.sock_recv(pairs[number][0], 9) if task.cancelled() else await task
                got.append(text == b"%d" % number)
            got += [await read(far, len(data)) == data for _, far in full]
            await asyncio.gather(*sending)
            with socket.create_connection(listener.getsockname()):
                (await accepting)[0].close()
            return [all(got), loop.monitor, loop.statistics().downgrades]

    with contextlib.closing(loop):
        return go(loop, main(), limit=20)


@on_io_uring
@pytest.mark.parametrize("then", ["waits", "cancels"])
@pytest.mark.parametrize("after", ["epoll", "poll"])
def test_calls_that_wait_when_the_ring_is_denied_go_on(monitor: str, after: str, then: str) -> None:
    calls = [*IO_URING, *(["epoll_create1"] if after == "poll" else [])]
    child = run_child(lose_the_ring_in_mid_wait, calls, then, quiet=False)
    assert child.value == [True, after, 1], child.err


@on_io_uring
def test_calls_that_wait_when_the_ring_is_closed_behind_our_back_go_on(monitor: str) -> None:
    child = run_child(lose_the_ring_in_mid_wait, [], "waits", quiet=False)
    assert (child.value or [child.err])[0] is True


# ---------------------------------------------------------------------------- nothing is left over


def futures_of(loop: AnyLoop) -> list[Any]:
    """Futures of a loop that are not done."""
    return [
        held
        for held in gc.get_objects()
        if isinstance(held, asyncio.Future) and held.get_loop() is loop and not held.done()
    ]


def echo_a_thousand(name: str) -> list[Any]:
    """Whether every connection got its bytes back, and what is left afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    loop, connections, rounds = make_loop_named(name), 1000, 3

    async def ask(address: Any, number: int) -> bool:
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            for turn in range(rounds):
                data = payload(KIB, number * rounds + turn)
                await loop.sock_sendall(sock, data)
                if await read(sock, KIB) != data:
                    return False
            return True

    async def answer(sock: socket.socket) -> None:
        with sock:
            await echo(loop, sock, by_recv)

    async def main() -> bool:
        with listening(backlog=connections) as listener:
            address = listener.getsockname()
            asking = [asyncio.create_task(ask(address, number)) for number in range(connections)]
            answering = []
            for _ in range(connections):
                accepted, _ = await loop.sock_accept(listener)
                answering.append(asyncio.create_task(answer(accepted)))
            exact = await asyncio.gather(*asking)
            await asyncio.gather(*answering)
            return all(exact)

    with contextlib.closing(loop):
        files = len(os.listdir("/proc/self/fd"))
        exact = go(loop, main(), limit=60)
        gc.collect()
        return [exact, len(os.listdir("/proc/self/fd")) - files, len(futures_of(loop))]


def test_a_thousand_connections_are_echoed_and_leave_nothing(name: str) -> None:
    assert run_child(echo_a_thousand, name, limit=90).value == [True, 0, 0]


@pytest.mark.parametrize("how", ["recv", "recv_into", "sendall"])
@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_a_call_that_has_ended_holds_neither_its_socket_nor_its_buffer(
    contract_loop: AnyLoop, how: str, end: str
) -> None:
    class Buffer(bytearray):
        """A bytearray that can be watched."""

    async def main() -> list[Any]:
        with pair("tcp") as (near, far):
            sock = socket.socket(fileno=near.detach())
            sock.setblocking(False)
            buffer = Buffer(TOO_MUCH if how == "sendall" else 10)
            calls = {
                "recv": lambda: contract_loop.sock_recv(sock, 10),
                "recv_into": lambda: contract_loop.sock_recv_into(sock, buffer),
                "sendall": lambda: contract_loop.sock_sendall(sock, buffer),
            }
            task = await waiting(calls[how]())
            if end == "cancelled":
                task.cancel()
            elif end == "failed":
                reset(far)
            elif how == "sendall":
                await read(far, TOO_MUCH)
            else:
                far.send(b"x")
            await asyncio.wait([task])
            assert task.cancelled() == (end == "cancelled")
            assert task.cancelled() or (task.exception() is None) == (end == "done")
            await turns()
            held = [weakref.ref(sock), weakref.ref(buffer)]
            sock.close()
        return held

    held = go(contract_loop, main())
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def use_much(name: str, rounds: int) -> list[int]:
    """How many blocks of memory, descriptors, watches and futures are left of so many calls."""
    loop = make_loop_named(name)

    async def main(rounds: int) -> None:
        buffer = bytearray(100)
        with pair() as (near, far), listening() as listener, pair("tcp") as (ended, ended_far):
            ended_far.close()
            address = listener.getsockname()
            for number in range(rounds):
                task = asyncio.create_task(loop.sock_recv(near, 100))
                await turns(2)
                if number % 3 == 0:
                    await cancel(task)
                    far.send(b"x")
                    assert await loop.sock_recv_into(near, buffer) == 1
                else:
                    far.send(b"x")
                    assert await task == b"x"
                await loop.sock_sendall(far, buffer)
                assert await loop.sock_recv(near, 100) == buffer
                assert await loop.sock_recv(ended, 1) == b""
                for call in (
                    loop.sock_recv(near, -1),
                    loop.sock_recv_into(near, b""),
                    loop.sock_sendall(near, "text"),  # type: ignore[arg-type]
                ):
                    with contextlib.suppress(TypeError, ValueError):
                        await call
                if number % 20 == 0:
                    accepting = asyncio.create_task(loop.sock_accept(listener))
                    await turns(2)
                    with socket.create_connection(address):
                        (await accepting)[0].close()
                    sending = asyncio.create_task(loop.sock_sendall(near, bytes(MIB)))
                    await turns(2)
                    await cancel(sending)
                    read_now(far)

    with contextlib.closing(loop):
        go(loop, main(500), limit=30)
        gc.collect()
        files, blocks = len(os.listdir("/proc/self/fd")), sys.getallocatedblocks()
        go(loop, main(rounds), limit=30)
        gc.collect()
        blocks = sys.getallocatedblocks() - blocks
        return [blocks, len(os.listdir("/proc/self/fd")) - files, len(futures_of(loop))]


def test_four_thousand_calls_of_every_kind_leave_no_memory_behind(name: str) -> None:
    blocks, files, futures = run_child(use_much, name, 4000, limit=60).value
    assert (files, futures) == (0, 0)
    assert blocks < 500, "something is left of every call"
