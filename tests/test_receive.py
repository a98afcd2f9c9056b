"""What is received by the ring: the same bytes, to the same protocol, in the same callbacks.

The promise: on io_uring the monitor may receive for a transport, and an application cannot tell but
by the clock. Each test runs on asyncio's own loop, which shows that it is right, on epoll, and on
io_uring in each of the modes of URINGLOOP_RECEIVE, after messages that are small enough for "auto"
to change over.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import random
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import uringloop
from tests.conftest import MONITORS, loop_named, refusal
from tests.connections import (
    BufferedPeer,
    Peer,
    digest,
    make_certificate,
    number_given_to,
    payload,
    read,
    read_to_end,
    reset,
    send_and_see,
    turns,
    wired,
)
from tests.support import IO_URING, become_nobody, in_thread, run, run_child
from tests.test_denial import all_went_well, install_a_filter_later

AnyLoop = asyncio.AbstractEventLoop
Then = Callable[["Diary"], object]

MODES = ("readiness", "auto", "ring")
RECEIVING = ("stock", "epoll", *(f"io_uring {mode}" for mode in MODES), "stepwise ring")
KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])

OURS = pytest.mark.parametrize("any_loop", RECEIVING[1:], indirect=True)

#: One of the monitor's buffers.
BUFFER = 2048

#: A user of whose locked memory no other test takes a part.
SOMEBODY = 65533

#: Later than this was not what the test waited for. Wide, for busy machines.
SOON_S = 5.0


@pytest.fixture(params=RECEIVING)
def any_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyLoop]:
    """asyncio's own loop, and ours in every way to receive, once under asyncio's own turn."""
    yield from loop_named(request.param, monkeypatch)


class Diary(Peer):
    """Writes down what comes, and "later" for the callback that each of them queues."""

    def __init__(self, then: Then | None = None, keep_open: bool | None = None) -> None:
        super().__init__(keep_open)
        self.then = then
        self.entries: list[bytes | str] = []

    def enter(self, entry: bytes | str) -> None:
        self.entries.append(entry)
        asyncio.get_running_loop().call_soon(self.entries.append, "later")

    def data_received(self, data: bytes) -> None:
        self.enter(bytes(data))
        super().data_received(data)
        if self.then is not None:
            self.then(self)

    def eof_received(self) -> bool | None:
        self.enter("eof")
        return super().eof_received()

    @property
    def pieces(self) -> list[bytes]:
        return [entry for entry in self.entries if isinstance(entry, bytes)]

    def check_passes(self) -> None:
        """One callback a pass: what it has queued runs before the next one."""
        assert self.entries[1::2] == ["later"] * (len(self.entries) // 2), self.entries
        assert "later" not in self.entries[::2], self.entries


class BufferedDiary(Diary, BufferedPeer):
    """The same with a buffer of its own, by default a small one."""

    def __init__(self, size_bytes: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.buffer = bytearray(size_bytes)


@contextlib.asynccontextmanager
async def warm(
    make: Callable[[], Diary] = Diary, kind: str = "unix"
) -> AsyncIterator[tuple[Diary, socket.socket]]:
    """A connection that has had small messages enough; its diary is empty again."""
    async with wired(make, kind) as (diary, sock):
        then, diary.then = diary.then, None
        await send_and_see(diary, sock, 5)
        await turns()
        diary.check_passes()
        diary.then = then
        diary.data.clear()
        diary.entries.clear()
        yield diary, sock


# --------------------------------------------------------------------------------- pause and resume


@KINDS
def test_what_came_before_a_pause_waits_for_the_resumption(any_loop: AnyLoop, kind: str) -> None:
    async def main() -> None:
        async with warm(kind=kind) as (diary, sock):
            for number in range(10):
                sock.send(b"before %d " % number)
                await turns(number % 2)
                diary.transport.pause_reading()
                await turns(number)
                sock.send(b"after %d " % number)
                assert not diary.entries
                diary.transport.resume_reading()
                expected = b"before %d after %d " % (number, number)
                await diary.received(len(expected))
                assert diary.data == expected
                await turns()
                diary.check_passes()
                diary.data.clear()
                diary.entries.clear()

    run(any_loop, main())


@pytest.mark.parametrize("keep_open", [True, False])
@KINDS
def test_an_end_that_came_before_a_pause_is_told_once_after_it(
    any_loop: AnyLoop, kind: str, keep_open: bool
) -> None:
    def pause_for_the_first(diary: Diary) -> None:
        if len(diary.pieces) == 1:
            diary.transport.pause_reading()

    async def main() -> None:
        async with warm(lambda: Diary(pause_for_the_first, keep_open), kind) as (diary, sock):
            sock.send(b"last words")
            sock.shutdown(socket.SHUT_WR)
            await diary.received(10)
            await turns(10)
            assert diary.entries == [b"last words", "later"]
            diary.transport.resume_reading()
            await diary.has("eof")
            await turns(10)
            assert diary.entries == [b"last words", "later", "eof", "later"]
            diary.transport.write(b"answer")
            diary.transport.close()
            assert await read_to_end(sock) == (b"answer" if keep_open else b"")

    run(any_loop, main())


# ------------------------------------------------------------------------------ one callback a pass


def test_large_and_small_messages_in_turn_come_one_a_pass(any_loop: AnyLoop) -> None:
    """So that "auto" changes over and back again, with more in the socket each time."""
    source = random.Random(1)
    data = payload(600_000)

    async def main() -> None:
        async with warm() as (diary, sock):
            sent = 0
            while sent < len(data):
                size = source.choice([1, 100, BUFFER - 1, BUFFER, 3 * BUFFER, 30_000])
                for _ in range(source.randrange(1, 8)):
                    with contextlib.suppress(BlockingIOError):
                        sent += sock.send(data[sent : sent + size])
                    await turns(source.randrange(4))
            await diary.received(len(data))
            await turns()
            assert digest(diary.data) == digest(data)
            diary.check_passes()

    run(any_loop, main())


@pytest.mark.parametrize("size_bytes", [1, 100, 5000])
@pytest.mark.parametrize("where", ["inside", "outside", "beside a pause"])
@pytest.mark.parametrize("make", [Diary, BufferedDiary])
def test_a_new_protocol_gets_what_was_received_before_it_one_callback_a_pass(
    any_loop: AnyLoop, make: type[Diary], where: str, size_bytes: int
) -> None:
    """More than its buffer holds, and more in the socket behind it. The pause of another transport
    may make the monitor look after all of them.
    """
    expected = payload(3 * size_bytes)
    messages = [
        expected[start : start + size_bytes] for start in range(0, 3 * size_bytes, size_bytes)
    ]

    def change(diary: Diary) -> None:
        diary.transport.set_protocol(new)

    new = make()

    async def main() -> None:
        async with (
            warm() as (other, _),
            warm(lambda: Diary(change if where == "inside" else None)) as (old, sock),
        ):
            sock.send(messages[0])
            if where == "beside a pause":
                other.transport.pause_reading()
            if where != "inside":
                change(old)
            sock.send(messages[1])
            if where == "inside":
                await old.received(1)
            sock.send(messages[2])
            await new.until(lambda: len(old.data) + len(new.data) == len(expected))
            await turns()
            assert old.data + new.data == expected
            assert len(old.pieces) == (where == "inside")
            old.check_passes()
            new.check_passes()
            old.transport.abort()
            await new.lost()

    run(any_loop, main())


class Raising(Diary):
    """Raises once: in data_received(), behind its entry, or in get_buffer()."""

    def __init__(self, exit_: type[BaseException]) -> None:
        super().__init__(then=self.leave)
        self.exits = [exit_]

    def leave(self, _: object = None) -> None:
        if self.exits:
            raise self.exits.pop()


class BufferedRaising(Raising, BufferedDiary):
    """It has taken nothing yet when it raises."""

    def get_buffer(self, sizehint: int) -> Any:
        self.leave()
        return super().get_buffer(sizehint)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("make", [Raising, BufferedRaising])
def test_an_exit_in_a_read_callback_loses_nothing_that_is_there(
    any_loop: AnyLoop, make: type[Raising], error: type[BaseException]
) -> None:
    data = payload(50_000)
    near, far = socket.socketpair()
    far.setblocking(False)
    made = []

    async def begin() -> None:
        _, old = await any_loop.create_connection(Diary, sock=near)
        await send_and_see(old, far, 5)
        await turns()
        far.send(data[:-10])
        await turns(1)
        old.transport.pause_reading()
        protocol = make(error)
        protocol.transport = old.transport
        made.append(protocol)
        old.transport.set_protocol(protocol)

    async def go_on() -> None:
        far.send(data[-10:])
        await made[0].received(len(data))
        assert digest(made[0].data) == digest(data)
        made[0].transport.abort()
        await made[0].lost()

    with far:
        any_loop.run_until_complete(begin())
        any_loop.call_soon(made[0].transport.resume_reading)
        timer = any_loop.call_later(SOON_S, any_loop.stop)
        with pytest.raises(error):
            any_loop.run_forever()
        timer.cancel()
        run(any_loop, go_on())


@KINDS
def test_no_piece_is_larger_than_one_read_may_be(any_loop: AnyLoop, kind: str) -> None:
    """`max_size`, which libraries set to bound what they are given at once."""
    data = payload(50_000)

    async def main() -> None:
        async with warm(kind=kind) as (diary, sock):
            for limit in (1, 1000, BUFFER, 5000):
                cast("Any", diary.transport).max_size = limit
                part = data[: 20 * limit]
                assert sock.send(part) == len(part)
                await diary.received(len(part))
                await turns()
                assert diary.data == part
                assert max(map(len, diary.pieces)) <= limit
                diary.check_passes()
                diary.data.clear()
                diary.entries.clear()

    run(any_loop, main())


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("ending", ["close", "shutdown", "reset"])
@pytest.mark.parametrize("size_bytes", [1, 60_000, 70_000, 100_000])
@KINDS
def test_an_end_behind_much_that_waited_is_told(
    any_loop: AnyLoop, kind: str, size_bytes: int, ending: str
) -> None:
    """A multishot receive that finds more than 32 buffers at its start may overlook the end."""
    data = payload(size_bytes)

    async def main() -> list[str]:
        async with warm(kind=kind) as (diary, sock):
            diary.transport.pause_reading()
            await turns()
            assert sock.send(data) == size_bytes
            if ending == "reset":
                reset(sock)
            elif ending == "close":
                sock.close()
            else:
                sock.shutdown(socket.SHUT_WR)
            await turns()
            diary.transport.resume_reading()
            await diary.lost()
            assert digest(diary.data) == digest(data)
            diary.check_passes()
            return diary.events

    is_reset = ending == "reset" and kind == "tcp"
    ended = ["lost ConnectionResetError"] if is_reset else ["eof", "lost"]
    assert run(any_loop, main(), limit=SOON_S) == ["made", *ended]


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("where", ["inside", "outside"])
@KINDS
def test_nothing_comes_after_the_end_and_the_peer_sees_it_soon(
    any_loop: AnyLoop, kind: str, where: str, how: str
) -> None:
    def leave(diary: Diary) -> None:
        getattr(diary.transport, how)()

    async def main() -> None:
        async with warm(lambda: Diary(leave if where == "inside" else None), kind) as (diary, sock):
            sending = asyncio.ensure_future(any_loop.sock_sendall(sock, payload(150_000)))
            if where == "inside":
                await diary.lost()
            else:
                await turns(1)
                leave(diary)
            with contextlib.suppress(ConnectionError):
                await sending
            async with asyncio.timeout(SOON_S):
                with contextlib.suppress(ConnectionError):
                    assert await read_to_end(sock) == b""
            await diary.lost()
            await turns(10)
            assert len(diary.pieces) <= 1
            assert diary.events == ["made", "lost"]

    run(any_loop, main())


def test_a_loop_that_is_closed_lets_go_of_what_it_was_receiving(any_loop: AnyLoop) -> None:
    """Ten connections with receives in flight, data among it; their peers see the end."""

    async def begin() -> list[tuple[Diary, socket.socket]]:
        ends = []
        for number in range(10):
            near, far = socket.socketpair()
            far.settimeout(SOON_S)
            _, diary = await any_loop.create_connection(Diary, sock=near)
            await send_and_see(diary, far, 5)
            if number % 2:
                far.send(b"never read")
            ends.append((diary, far))
        return ends

    ends = any_loop.run_until_complete(begin())
    any_loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for diary, _ in ends:
            del diary.transport
        gc.collect()
    for _, far in ends:
        with contextlib.suppress(ConnectionResetError):
            assert far.recv(1) == b""
        far.close()


def virtual_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif("URINGLOOP_TEST_SANITIZED" in os.environ, reason="the heap is the sanitizer's")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_loops_that_are_closed_while_they_receive_leave_no_memory(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Each that receives by the ring has had buffers of 2 MiB."""
    if reason := refusal("io_uring"):
        pytest.skip(reason)
    monkeypatch.setenv("URINGLOOP_RECEIVE", mode)

    async def receive() -> None:
        near, far = socket.socketpair()
        with far:
            _, diary = await asyncio.get_running_loop().create_connection(Diary, sock=near)
            await send_and_see(diary, far, 5)

    def life() -> None:
        with contextlib.closing(uringloop.new_event_loop(monitor="io_uring")) as loop:
            loop.run_until_complete(receive())

    life()
    before = virtual_bytes()
    for _ in range(50):
        life()
    assert virtual_bytes() - before < 20 << 20


# ---------------------------------------------------------------------------------------- strangers


@OURS
def test_no_byte_of_an_old_connection_reaches_a_new_one_with_its_number(any_loop: AnyLoop) -> None:
    made: list[Diary] = []

    def factory() -> Diary:
        made.append(Diary())
        return made[-1]

    async def main() -> None:
        server = await any_loop.create_server(factory, "127.0.0.1", 0)
        near, far = socket.socketpair()
        client = socket.socket()
        with far, client:
            _, old = await any_loop.create_connection(Diary, sock=near)
            await send_and_see(old, far, 5)
            far.send(b"for the old one")
            number = near.fileno()
            near.close()  # the next one that is accepted gets its number
            client.connect(server.sockets[0].getsockname())
            for _ in range(5):
                with contextlib.suppress(BrokenPipeError):
                    far.send(b"for the old one")
                await turns(1)
            async with asyncio.timeout(SOON_S):
                while not made:
                    await asyncio.sleep(0)
            (new,) = made
            assert new.transport.get_extra_info("socket").fileno() == number
            with contextlib.suppress(BrokenPipeError):
                far.send(b"for the old one")
            await send_and_see(new, client, 5)
            old.transport.abort()
            await turns()
            await send_and_see(new, client, 5)
            assert new.data == b"x" * 10
            server.close()
            new.transport.abort()
            await new.lost()
            assert not await read_to_end(client)

    run(any_loop, main())


@OURS
@pytest.mark.parametrize("asks", ["resume_reading", "set_protocol", "count"])
def test_no_byte_is_taken_from_a_stranger_who_has_the_number_now(
    any_loop: AnyLoop, asks: str
) -> None:
    """Whatever makes the transport read on after its socket was closed behind its back."""

    async def main() -> None:
        near, far = socket.socketpair()
        stranger, friend = socket.socketpair()
        stranger.setblocking(False)
        with far, stranger, friend:
            _, old = await any_loop.create_connection(Diary, sock=near)
            await send_and_see(old, far, 2 if asks == "count" else 5)
            if asks == "count":  # with this one "auto" would change over
                far.send(b"y")
                await turns(1)
            else:
                old.transport.pause_reading()
            with number_given_to(stranger, near):
                if asks == "resume_reading":
                    old.transport.resume_reading()
                elif asks == "set_protocol":
                    old.transport.set_protocol(BufferedDiary())
                    old.transport.set_protocol(old)
                    old.transport.resume_reading()
                friend.send(b"for the stranger")
                await turns(10)
                assert stranger.recv(100) == b"for the stranger"
                assert b"stranger" not in old.data
                old.transport.abort()
                await turns()

    run(any_loop, main())


# ------------------------------------------------------------------------------------------ traffic


class Echo(Peer):
    """Sends back what it gets, rests now and then, and ends when its peer does."""

    def __init__(self, source: random.Random | None = None) -> None:
        super().__init__(keep_open=True)
        self.source = source

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)
        if self.source is not None and self.source.random() < 0.1:
            self.transport.pause_reading()
            for _ in range(self.source.randrange(3)):
                self.transport.set_protocol(self)
            delay_s = self.source.choice([0, 0.001])
            asyncio.get_running_loop().call_later(delay_s, self.transport.resume_reading)

    def eof_received(self) -> bool | None:
        super().eof_received()
        self.transport.write_eof()
        return True


async def converse(
    sock: socket.socket, source: random.Random, messages: int, largest: int = 10_000
) -> bool:
    """Send messages in phases of small and of large ones, some in lock-step, and then the end.

    True when every byte came back, once and in order.
    """
    loop = asyncio.get_running_loop()
    sent, received = bytearray(), bytearray()

    async def take(until: int) -> None:
        while len(received) < until and (piece := await loop.sock_recv(sock, 1 << 16)):
            received.extend(piece)

    limit = 100
    for number in range(messages):
        if number % 10 == 0:
            limit = source.choice([100, BUFFER, largest])
        data = source.randbytes(source.randint(1, limit))
        sent += data
        await asyncio.gather(
            loop.sock_sendall(sock, data), take(len(sent) if source.random() < 0.5 else 0)
        )
    sock.shutdown(socket.SHUT_WR)
    await take(len(sent) + 1)
    return digest(sent) == digest(received)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_messages_of_every_size_between_pauses_come_back_exactly(
    any_loop: AnyLoop, seed: int
) -> None:
    async def one(number: int) -> None:
        source = random.Random(f"{seed} {number}")
        async with wired(lambda: Echo(source), source.choice(["unix", "tcp"])) as (echo, sock):
            assert await converse(sock, source, 60), f"seed {seed}, connection {number}"
            assert echo.events == ["made", "eof"]

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(20)))

    run(any_loop, main(), limit=30)


def test_the_same_in_debug_mode(any_loop: AnyLoop) -> None:
    any_loop.set_debug(True)
    any_loop.slow_callback_duration = 10
    test_messages_of_every_size_between_pauses_come_back_exactly(any_loop, 4)


def test_1000_connections_that_send_at_once_overrun_the_buffers_and_lose_nothing(
    any_loop: AnyLoop, many_files: None
) -> None:
    """Several buffers each, of which there are a thousand at most; nobody's bytes are another's."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(wired(Diary)) for _ in range(1000)]
            for round_number in range(4):  # "auto" changes over with the last one
                size = [5, 5, 5, 3 * BUFFER][round_number]
                for number, (_, sock) in enumerate(ends):
                    for part in range(3):
                        sock.send(payload(size, 10 * number + part))
                for number, (diary, _) in enumerate(ends):
                    await diary.received(3 * size)
                    parts = [payload(size, 10 * number + part) for part in range(3)]
                    assert diary.data == b"".join(parts)
                    diary.data.clear()
            await turns()
            for diary, _ in ends:
                diary.check_passes()

    run(any_loop, main(), limit=30)


def test_1000_connections_resumed_in_one_callback_receive_each_their_own_bytes(
    any_loop: AnyLoop, many_files: None
) -> None:
    """Several requests each: more than the ring's queue has places. Which of them comes first is
    not promised; where there are fewer buffers than messages the rest is received later.
    """

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(warm()) for _ in range(1000)]
            for number, (diary, sock) in enumerate(ends):
                diary.transport.pause_reading()
                sock.send(b"%d" % number)
            await turns()
            for diary, _ in ends:
                diary.transport.resume_reading()
            for number, (diary, _) in enumerate(ends):
                await diary.received(len(b"%d" % number))
            await turns()
            assert [diary.data for diary, _ in ends] == [b"%d" % number for number in range(1000)]

    run(any_loop, main(), limit=30)


# ------------------------------------------------------------ other threads, processes and monitors


@OURS
def test_a_loop_that_moves_to_another_thread_in_mid_traffic_loses_nothing(
    any_loop: AnyLoop,
) -> None:
    """Bytes come while it runs, while it moves, and while it rests."""
    loop = any_loop
    pairs = [socket.socketpair() for _ in range(20)]
    peers: list[Peer] = []
    sent = [bytearray() for _ in pairs]
    source = random.Random(20)

    def send() -> None:
        for (_, far), record in zip(pairs, sent, strict=True):
            data = source.randbytes(source.choice([1, 100, BUFFER, 5000]))
            record.extend(data)
            far.send(data)

    async def begin() -> None:
        for near, _ in pairs:
            peers.append((await loop.create_connection(Diary, sock=near))[1])

    async def some_turns() -> None:
        for _ in range(5):
            send()
            await turns(source.randrange(3))

    async def finish() -> None:
        for peer, record in zip(peers, sent, strict=True):
            await peer.received(len(record))
            assert digest(peer.data) == digest(record)
            peer.transport.abort()
            await peer.lost()

    with contextlib.ExitStack() as stack:
        for _, far in pairs:
            stack.enter_context(far)
        loop.run_until_complete(begin())
        for _ in range(4):
            in_thread(lambda: loop.run_until_complete(some_turns()))
            send()
            loop.run_until_complete(some_turns())
            send()
        run(loop, finish())


class Company:
    """Transports that echo, and their peers, before and after a fork."""

    def __init__(self, mode: str) -> None:
        os.environ["URINGLOOP_RECEIVE"] = mode
        warnings.simplefilter(
            "ignore", ResourceWarning
        )  # one of two processes leaves them unclosed
        self.loop = uringloop.new_event_loop(monitor="io_uring")
        self.pairs = [socket.socketpair() for _ in range(20)]
        self.echoes: list[Echo] = []
        run(self.loop, self.begin())

    async def begin(self) -> None:
        for near, far in self.pairs:
            far.setblocking(False)
            self.echoes.append((await self.loop.create_connection(Echo, sock=near))[1])
        await self.talk("before", 5)
        for _, far in self.pairs:
            far.send(b"received ")
        await turns(1)
        for echo, (_, far) in zip(self.echoes, self.pairs, strict=True):
            echo.transport.pause_reading()
            far.send(b"and not")

    async def talk(self, name: str, rounds: int) -> None:
        for number in range(rounds):
            text = f"{name} {number}".encode().ljust(500)
            for _, far in self.pairs:
                far.send(text)
            for _, far in self.pairs:
                assert await read(far, 500) == text

    async def go_on(self, name: str) -> None:
        """With more messages than the monitor has buffers."""
        for echo, (_, far) in zip(self.echoes, self.pairs, strict=True):
            echo.transport.resume_reading()
            assert await read(far, 16) == b"received and not"
        await self.talk(name, 30)
        for echo, (_, far) in zip(self.echoes, self.pairs, strict=True):
            echo.transport.abort()
            async with asyncio.timeout(SOON_S):
                assert await read_to_end(far) == b""


def fork_in_mid_traffic(mode: str, child_does: str) -> int:
    """The exit code of the child; what is wrong in the parent is raised there."""
    company = Company(mode)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if child_does == "goes on with the inherited loop":
                os.read(ours, 1)
                run(company.loop, company.go_on("child"), limit=20)
            if child_does == "lives without descriptors":
                os.closerange(3, ours)
                os.closerange(theirs, 1000)
                os.read(ours, 1)
            else:
                company.loop.close()
            code = 0
        finally:
            os._exit(code)
    if child_does == "goes on with the inherited loop":
        for near, _ in company.pairs:
            near.close()
    else:
        run(company.loop, company.go_on("parent"), limit=20)
    os.write(theirs, b"!")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    company.loop.close()
    return code


@pytest.mark.parametrize("mode", ["auto", "ring"])
@pytest.mark.parametrize(
    "child_does",
    ["closes the loop", "goes on with the inherited loop", "lives without descriptors"],
)
def test_a_fork_in_mid_traffic_loses_and_doubles_nothing(mode: str, child_does: str) -> None:
    if reason := refusal("io_uring"):
        pytest.skip(reason)
    assert run_child(fork_in_mid_traffic, mode, child_does).value == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calls", [IO_URING, (*IO_URING, "epoll_create1")], ids=["epoll", "poll"])
def test_a_downgrade_in_mid_traffic_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, mode: str, calls: tuple[str, ...]
) -> None:
    if reason := refusal("io_uring"):
        pytest.skip(reason)
    monkeypatch.setenv("URINGLOOP_RECEIVE", mode)
    found = run_child(install_a_filter_later, "io_uring", errno.EPERM, *calls).value
    after = "poll" if "epoll_create1" in calls else "epoll"
    all_went_well(found, "io_uring", after, "io_uring_")  # a pause or a turn finds out


def overflow(mode: str) -> list[Any]:
    """As a user whose locked memory is enough for a small ring only."""
    os.environ["URINGLOOP_RECEIVE"] = mode
    become_nobody(64 * 1024, user=SOMEBODY)
    loop = uringloop.new_event_loop(monitor="io_uring")

    async def main() -> bool:
        async with contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(wired(Diary)) for _ in range(50)]
            for number in range(10):
                data = payload(60_000, number)
                for _, sock in ends:
                    assert sock.send(data) == len(data)
                for diary, _ in ends:
                    await diary.received(len(data))
                    assert diary.data == data
                    diary.data.clear()
        return True

    exact = run(loop, main(), limit=20)
    overflows = loop.statistics().overflows
    loop.close()
    return [exact, overflows > 0, loop.statistics().downgrades]


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_more_completions_than_the_queue_takes_lose_nothing() -> None:
    if reason := refusal("io_uring"):
        pytest.skip(reason)
    assert run_child(overflow, "ring").value == [True, True, 0]


# -------------------------------------------------------------------------------------- other turns


def test_a_turn_within_a_read_callback_hands_over_what_comes_to_others(any_loop: AnyLoop) -> None:
    """As nest_asyncio does."""
    loop: Any = any_loop

    async def main() -> None:
        async with warm() as (other, other_sock):

            def turn_within(_: Diary) -> None:
                other_sock.send(b"first ")
                for text in (b"second ", b"third "):
                    count = len(other.pieces)
                    while len(other.pieces) == count:
                        loop._run_once()
                    other_sock.send(text)

            async with warm(lambda: Diary(turn_within)) as (diary, sock):
                sock.send(b"question")
                await other.received(19)
                assert other.pieces == [b"first ", b"second ", b"third "]
                diary.then = None
                await send_and_see(diary, sock, 3)
                assert diary.data == b"questionxxx"

    run(any_loop, main())


# --------------------------------------------------------------------------------------- new owners


def test_sendfile_between_messages_leaves_them_their_order(
    any_loop: AnyLoop, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content := payload(1_000_000))

    async def main() -> None:
        async with warm() as (diary, sock):
            with path.open("rb") as file:
                sock.send(b"before ")
                sending = asyncio.create_task(any_loop.sendfile(diary.transport, file))
                await turns(2)
                sock.send(b"meanwhile ")
                assert digest(await read(sock, len(content))) == digest(content)
                assert await sending == len(content)
            sock.send(b"afterwards")
            await diary.received(27)
            assert diary.data == b"before meanwhile afterwards"
            diary.check_passes()

    run(any_loop, main())


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's side of TLS for localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("size_bytes", [10, BUFFER, 1 << 20], ids=["in pieces", "some", "whole"])
@pytest.mark.parametrize("waits_turns", [0, 1, 2])
def test_start_tls_gives_tls_a_hello_that_was_in_flight(
    any_loop: AnyLoop,
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    waits_turns: int,
    size_bytes: int,
) -> None:
    """In the socket, received and not handed over, or kept while reading was paused."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = tls[1].wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()

    async def main() -> None:
        async with warm() as (plain, sock):
            sock.send(b"STARTTLS\n")
            await plain.received(9)
            for start in range(0, len(hello), size_bytes):
                sock.send(hello[start : start + size_bytes])
            await turns(min(waits_turns, 1))
            plain.transport.pause_reading()
            await turns(waits_turns - 1)
            upgrading = asyncio.create_task(
                any_loop.start_tls(plain.transport, Peer(), tls[0], server_side=True)
            )
            while not outgoing.pending:  # the client's side: until it has its say
                incoming.write(await any_loop.sock_recv(sock, 1 << 16))
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
            await any_loop.sock_sendall(sock, outgoing.read())
            transport: Any = await upgrading
            assert plain.data == b"STARTTLS\n"
            transport.abort()

    run(any_loop, main())


# --------------------------------------------------------------------------------------- the switch


@pytest.mark.parametrize("monitor", MONITORS)
def test_an_unknown_way_to_receive_is_refused_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, monitor: str
) -> None:
    monkeypatch.setenv("URINGLOOP_RECEIVE", "carrier pigeon")
    choices = "URINGLOOP_RECEIVE must be one of readiness, auto, ring, not 'carrier pigeon'"
    with pytest.raises(ValueError, match=choices):
        uringloop.new_event_loop(monitor=monitor)


@pytest.mark.parametrize("mode", ["", *MODES])
@pytest.mark.parametrize("monitor", ["epoll", "poll"])
def test_the_way_to_receive_does_not_matter_to_other_monitors(
    monkeypatch: pytest.MonkeyPatch, monitor: str, mode: str
) -> None:
    monkeypatch.setenv("URINGLOOP_RECEIVE", mode)
    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        assert loop.monitor == monitor
        test_large_and_small_messages_in_turn_come_one_a_pass(loop)
        assert loop.statistics().enters == 0
