"""What is sent by the ring: the same bytes, once, in order, and the same callbacks.

The promise: an application cannot tell but by the clock whether a write leaves with a call or as a
request of the ring, not even while that request waits for room. Each test runs on asyncio's own
loop, which shows that it is right, on epoll, and on io_uring with URINGLOOP_SEND=turn and ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import weakref
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from tests.conftest import loop_named
from tests.connections import Peer, read, read_now, read_to_end, reset, send_and_see, turns, wired
from tests.support import in_thread, run

AnyLoop = asyncio.AbstractEventLoop

SENDING = ("stock", "epoll", "io_uring turn", "io_uring sends", "stepwise sends")
OURS = pytest.mark.parametrize("any_loop", SENDING[1:], indirect=True)

#: Later than this was not what the test waited for. Wide, for busy machines.
SOON_S = 5.0


@pytest.fixture(params=SENDING)
def any_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyLoop]:
    """asyncio's own loop, and ours with both ways to send, once under asyncio's own turn."""
    yield from loop_named(request.param, monkeypatch)


def number_of(transport: asyncio.BaseTransport) -> int:
    number: int = transport.get_extra_info("socket").fileno()
    return number


def fill(fd: int) -> None:
    """Leaves no room in a socket for another byte."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"-")


def write(transport: asyncio.Transport, data: bytes) -> None:
    """By the ring where that sends: under asyncio's own turn only writelines() leaves it a choice.
    asyncio's own writelines() pauses nobody since 3.12.
    """
    if sends_by_ring():
        transport.writelines([data])
    else:
        transport.write(data)


def sends_by_ring() -> bool:
    return os.environ.get("URINGLOOP_SEND") == "ring"


async def write_in_vain(transport: asyncio.Transport, data: bytes) -> None:
    """A write that finds no room; where the ring sends, its request waits in the kernel."""
    fill(number_of(transport))
    write(transport, data)
    await turns(2)
    check_that_it_waits(transport, len(data))


def check_that_it_waits(transport: asyncio.Transport, size_bytes: int) -> None:
    """Where the ring sends, room is not waited for besides: both would send the same bytes."""
    state = "idle" if sends_by_ring() else "polling"
    assert f"write=<{state}, bufsize={size_bytes}>" in repr(transport)


def without_filling(data: bytes) -> bytes:
    return data.replace(b"-", b"")


class Pausing(Peer):
    """Is paused by every byte that waits."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(0)


class Twice(Pausing):
    """Writes again when it is resumed, to a socket that is full again."""

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.events.count("resume") == 1:
            fill(number_of(self.transport))
            write(self.transport, b"second")


def test_what_is_written_in_resume_writing_leaves_once(any_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Twice) as (protocol, sock):
            await write_in_vain(protocol.transport, b"first ")
            received = read_now(sock)
            await protocol.has("resume")
            check_that_it_waits(protocol.transport, len(b"second"))
            received += read_now(sock)
            await protocol.until(lambda: protocol.events.count("resume") == 2)
            await turns()
            assert without_filling(received + read_now(sock)) == b"first second"

    run(any_loop, main())


@OURS
def test_a_send_that_waits_ends_nothing_of_who_has_its_number_now(any_loop: AnyLoop) -> None:
    made: asyncio.Queue[Peer] = asyncio.Queue()

    def factory() -> Peer:
        made.put_nowait(peer := Peer())
        return peer

    async def main() -> None:
        server = await any_loop.create_server(factory, "127.0.0.1", 0)
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        near, far = socket.socketpair()
        client = socket.socket()
        with far, client:
            far.setblocking(False)
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            transport, old = await any_loop.create_connection(Peer, sock=near)
            await write_in_vain(transport, b"of the old one")
            number = near.fileno()
            near.close()  # the next one that is accepted gets its number
            await any_loop.sock_connect(client, server.sockets[0].getsockname())
            new = await made.get()
            await new.has("made")
            assert number_of(new.transport) == number
            await write_in_vain(new.transport, b"of the new one")
            transport.abort()
            await old.lost()
            new.transport.close()
            assert without_filling(await read_to_end(client)) == b"of the new one"
            await new.lost()
            assert without_filling(await read_to_end(far)) == b""
            server.close()

    run(any_loop, main())


# ------------------------------------------------------------------------------------------- exits


class Full(Pausing):
    """Has received small messages, and has written what waits; may leave the loop once."""

    leaves_in = ""

    async def make(self) -> None:
        near, self.far = socket.socketpair()
        self.far.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=near)
        await send_and_see(self, self.far, 5)
        await write_in_vain(self.transport, b"written")

    def stir(self) -> None:
        """Data and room, both before the next turn."""
        self.far.send(b"hello")
        self.read = read_now(self.far)

    def leave(self, where: str) -> None:
        if where == self.leaves_in:
            self.leaves_in = ""
            raise KeyboardInterrupt

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.leave("data_received")

    def resume_writing(self) -> None:
        super().resume_writing()
        self.leave("resume_writing")

    async def check(self) -> None:
        """Data and the end of the send arrive, and it goes on."""
        await self.received(10)
        await self.has("resume")
        assert self.data == b"xxxxxhello"
        self.transport.write(b" and again")
        self.transport.close()
        await self.lost()
        with self.far:
            assert without_filling(self.read + read_now(self.far)) == b"written and again"


def run_into_interrupt(loop: AnyLoop, prepare: Coroutine[Any, Any, None]) -> None:
    """Prepare, and go on until KeyboardInterrupt leaves the loop."""
    task = loop.create_task(prepare)
    timer = loop.call_later(SOON_S, loop.stop)
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    timer.cancel()
    task.result()


@OURS
@pytest.mark.parametrize("where", ["data_received", "resume_writing"])
def test_an_interrupt_loses_no_data_and_no_end_of_a_send(any_loop: AnyLoop, where: str) -> None:
    """Neither its own connection's nor another's that had both in the same turn. asyncio fails an
    assertion of its own after one in resume_writing().
    """
    ends = [Full(), Full(), Full()]

    async def prepare() -> None:
        for end in ends:
            await end.make()
        ends[1].leaves_in = where
        for end in ends:
            end.stir()

    async def go_on() -> None:
        for end in ends:
            await end.check()

    run_into_interrupt(any_loop, prepare())
    run(any_loop, go_on())


@OURS
def test_an_interrupt_in_resume_writing_leaves_a_closing_connection_its_end(
    any_loop: AnyLoop,
) -> None:
    end = Full()

    async def prepare() -> None:
        await end.make()
        end.transport.close()
        end.leaves_in = "resume_writing"
        end.read = read_now(end.far)

    async def go_on() -> None:
        with end.far:
            assert without_filling(end.read + await read_to_end(end.far)) == b"written"
        await end.lost()

    run_into_interrupt(any_loop, prepare())
    run(any_loop, go_on())


class Unpleasant:
    """A file that interrupts whoever asks for its number, once."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.armed = False

    def fileno(self) -> int:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return self.sock.fileno()


def test_an_interrupt_while_readiness_is_delivered_loses_nothing_of_that_turn(
    any_loop: AnyLoop,
) -> None:
    """A loop asks for the number of a file whose reader was cancelled behind its back."""
    loop: Any = any_loop
    near, far = socket.socketpair()
    file, end = Unpleasant(near), Full()

    async def prepare() -> None:
        await end.make()
        loop._add_reader(file, print).cancel()
        await turns()
        far.send(b"x")
        end.stir()
        file.armed = True

    with near, far:
        run_into_interrupt(loop, prepare())
        run(loop, end.check())
        loop._remove_reader(near)


@pytest.mark.parametrize("ends_by", [KeyboardInterrupt, SystemExit])
def test_what_was_written_has_left_when_an_exit_ends_the_run(
    any_loop: AnyLoop, ends_by: type[BaseException]
) -> None:
    near, far = socket.socketpair()
    far.setblocking(False)
    transport, _ = any_loop.run_until_complete(any_loop.create_connection(Peer, sock=near))

    def write_and_leave() -> None:
        transport.writelines([b"last ", b"words"])
        raise ends_by

    with far:
        any_loop.call_soon(write_and_leave)
        with pytest.raises(ends_by):
            any_loop.run_forever()
        assert read_now(far) == b"last words"
        transport.abort()
        any_loop.run_until_complete(turns())


def test_a_send_that_waits_goes_with_its_loop_to_another_thread(any_loop: AnyLoop) -> None:
    end = Full()
    in_thread(lambda: any_loop.run_until_complete(end.make()))
    end.stir()
    run(any_loop, end.check())


# ------------------------------------------------------------------------------------------- ends


@OURS
@pytest.mark.parametrize("how", ["close", "abort", "close, abort", "reset"])
def test_a_transport_that_ends_while_its_send_waits_is_freed_and_its_peer_sees_the_end(
    any_loop: AnyLoop, how: str
) -> None:
    """Reference counting alone frees it."""

    async def main() -> object:
        near, far = socket.socketpair()
        with far:
            far.setblocking(False)
            transport, protocol = await any_loop.create_connection(Peer, sock=near)
            await write_in_vain(transport, b"waits")
            ref = weakref.ref(transport)
            if how == "reset":
                far.close()
            else:
                for name in how.split(", "):
                    getattr(transport, name)()
                expected = b"waits" if how == "close" else b""
                async with asyncio.timeout(SOON_S):
                    assert without_filling(await read_to_end(far)) == expected
            await protocol.lost()
            del transport, near, protocol.transport, protocol
            await turns()
            return ref()

    gc.collect()
    gc.disable()
    try:
        assert run(any_loop, main()) is None
    finally:
        gc.enable()


def test_a_peer_that_is_gone_when_writing_ends_is_noticed_by_the_next_read(
    any_loop: AnyLoop,
) -> None:
    """It goes between the send and the shutdown() that asyncio would have called before."""

    async def main() -> list[str]:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.writelines([b"last words"])
            protocol.transport.write_eof()
            any_loop.call_soon(reset, sock)
            await protocol.lost()
            return protocol.events

    assert run(any_loop, main()) == ["made", "lost ConnectionResetError"]


# --------------------------------------------------------------------------------------- very many


def test_1000_connections_written_to_in_one_callback_get_each_their_own_bytes(
    any_loop: AnyLoop, many_files: None
) -> None:
    """More requests than the ring's queue has places."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(wired(Peer)) for _ in range(1000)]
            for round_number in range(3):
                for number, (protocol, _) in enumerate(ends):
                    protocol.transport.writelines([b"%d," % number, b"%d;" % round_number])
                for number, (_, sock) in enumerate(ends):
                    expected = b"%d,%d;" % (number, round_number)
                    assert await read(sock, len(expected)) == expected

    run(any_loop, main(), limit=30)
