"""Hazards of a native loop: what reviews found in it, once each, so that it stays found.

The promise: no byte is lost, doubled or sent to a stranger, nothing waits for ever, and no Python
program crashes the interpreter, whatever a callback, a finalizer or a fork does in between. What
could take the test process along runs in a child.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import select
import selectors
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import uringloop
from tests.conftest import MONITORS
from tests.connections import (
    MIB,
    BufferedPeer,
    Peer,
    end,
    number_given_to,
    read,
    read_to_end,
    served,
    turns,
    wired,
)
from tests.support import Stepwise, in_thread, run, run_child, unexpected
from uringloop._core import DatagramTransport, StreamTransport

pytestmark = pytest.mark.parametrize(
    "monitor", [*MONITORS, "io_uring ring", "io_uring sends"], indirect=True
)

#: Later than this was not what the test waited for. Wide, for busy machines.
SOON_S = 5.0

#: What no socket takes at once.
MUCH = b"x" * (4 * MIB)


@pytest.fixture
def stepwise(monitor: str) -> Iterator[Any]:
    loop = Stepwise(monitor=monitor)
    yield loop
    loop.close()


def is_readable(sock: Any, limit_s: float = 0) -> bool:
    return bool(select.select([sock], [], [], limit_s)[0])


async def watched(fd: int) -> None:
    """Wait until somebody has called add_reader() or add_writer() for a descriptor."""
    loop: Any = asyncio.get_running_loop()
    while fd not in loop._selector.get_map():
        await asyncio.sleep(0)


# ---------------------------------------------------------------------- bytes


class Failing(Peer):
    """Answers, and fails in the same callback."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"answer to " + data)
        raise ValueError("after the answer")


def test_what_a_protocol_wrote_before_it_failed_arrives(loop: uringloop.EventLoop) -> None:
    reports: list[str] = []
    loop.set_exception_handler(lambda _, context: reports.append(str(context["exception"])))

    async def main() -> bytes:
        async with wired(Failing) as (_, far):
            far.send(b"question")
            return await read_to_end(far)

    assert run(loop, main()) == b"answer to question"
    assert reports == ["after the answer"]


def test_what_was_written_before_a_connection_is_forced_to_close_arrives(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> bytes:
        async with wired(Peer) as (peer, far):
            peer.transport.write(b"goodbye")
            cast("Any", peer.transport)._force_close(None)
            return await read_to_end(far)

    assert run(loop, main()) == b"goodbye"


def fork_after_a_write(monitor: str, send: str) -> str:
    os.environ["URINGLOOP_SEND"] = send
    loop = uringloop.new_event_loop(monitor=monitor)
    near, far = socket.socketpair()
    transport, _ = loop.run_until_complete(loop.create_connection(Peer, sock=near))

    def write_and_fork() -> None:
        transport.write(b"hello")
        child = os.fork()
        if child == 0:
            loop.call_soon(int)  # so that the pass does not wait
            cast("Any", loop)._run_once()
            sys.exit(0)  # unwinds through the loop, as a child that does not exec may
        os.waitpid(child, 0)
        loop.stop()

    loop.call_soon(write_and_fork)
    try:
        loop.run_forever()
    except SystemExit:
        os._exit(0)
    transport.close()
    loop.run_until_complete(turns())
    loop.close()
    with far:
        received = b""
        while piece := far.recv(100):
            received += piece
    return received.decode()


@pytest.mark.parametrize("send", ["callback", "turn", "ring"])
def test_a_fork_after_a_write_does_not_send_it_twice(monitor: str, send: str) -> None:
    assert run_child(fork_after_a_write, monitor, send).value == "hello"


def test_a_socket_closed_behind_its_transport_sends_nothing_to_who_has_its_number_now(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        stranger, friend = socket.socketpair()
        with far, stranger, friend:
            friend.setblocking(False)
            _, peer = await loop.create_connection(Peer, sock=near)
            await peer.has("made")
            await turns()
            with number_given_to(stranger, near) as number:
                peer.transport.write(b"secret of the first connection")
                await peer.lost()
                with pytest.raises(BlockingIOError):
                    friend.recv(100)
                os.fstat(number)
            assert peer.events == ["made", "lost OSError"]

    run(loop, main())


def test_a_socket_closed_behind_its_transport_takes_no_byte_from_who_has_its_number_now(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        stranger, friend = socket.socketpair()
        with far, stranger, friend:
            transport, peer = await loop.create_connection(Peer, sock=near)
            await turns()
            with number_given_to(stranger, near):
                friend.send(b"for the stranger")
                cast("Any", transport)._read_ready()  # a readiness that was on its way
                await peer.lost()
                assert stranger.recv(100) == b"for the stranger"
                assert not peer.data

    run(loop, main())


def test_sendfile_goes_on_when_reading_is_paused_and_resumed_meanwhile(
    loop: uringloop.EventLoop, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(MUCH)

    async def main() -> None:
        async with wired(Peer) as (peer, far):
            with path.open("rb") as file:
                sending = asyncio.create_task(loop.sendfile(peer.transport, file))
                await watched(peer.transport.get_extra_info("socket").fileno())
                peer.transport.pause_reading()
                peer.transport.resume_reading()  # as a StreamReader does
                received = await read(far, len(MUCH))
                assert await sending == len(MUCH)
            assert received == MUCH
            far.send(b"and reading goes on")
            await peer.received(19)

    run(loop, main())


def test_a_closing_transport_sends_the_rest_beside_a_reader_of_its_descriptor(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> None:
        async with wired(Peer) as (peer, far):
            fd = peer.transport.get_extra_info("socket").fileno()
            peer.transport.write(MUCH)
            peer.transport.close()
            loop.add_reader(fd, int)
            try:
                assert await read(far, len(MUCH) - 1) == MUCH[1:]
            finally:
                loop.remove_reader(fd)
            assert await read_to_end(far) == b"x"
            await peer.lost()

    run(loop, main())


# ---------------------------------------------------------------------- waiting


def test_drain_returns_when_the_limit_was_lowered_after_the_write(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> bytes:
        near, far = socket.socketpair()
        with far:
            far.setblocking(False)
            _, writer = await asyncio.open_connection(sock=near)
            writer.write(b"hello")
            writer.transport.set_write_buffer_limits(high=0)
            async with asyncio.timeout(SOON_S):
                await writer.drain()
            writer.close()
            await writer.wait_closed()
            return await read_to_end(far)

    assert run(loop, main()) == b"hello"


def test_a_host_that_waits_on_the_loops_descriptor_is_woken_every_time(
    loop: Any, monitor: str
) -> None:
    # poll has no descriptor of its own: there the host waits for the wake-up byte itself.
    waits_on = loop._ssock if monitor == "poll" else loop._selector
    ran: list[int] = []

    def pump() -> None:
        loop.call_soon(loop.stop)
        loop.run_forever()

    pump()
    pump()
    for number in range(3):
        in_thread(functools.partial(loop.call_soon_threadsafe, ran.append, number))
        assert is_readable(waits_on, SOON_S), f"call {number} woke nobody"
        pump()
        pump()
    assert ran == [0, 1, 2]


def test_a_wake_up_that_failed_is_tried_again_by_the_next_call(loop: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    loop._write_to_self = interrupted
    with pytest.raises(KeyboardInterrupt):
        loop.call_soon_threadsafe(int)
    del loop._write_to_self
    loop.call_soon_threadsafe(int)
    assert is_readable(loop._ssock, SOON_S)
    loop.run_until_complete(turns())


def test_a_select_of_somebody_elses_is_woken_every_time(loop: Any) -> None:
    """One that never calls the selector's own: the loop cannot know when it waits."""
    ran: list[int] = []
    woken: list[bool] = []

    def select_by_hand(timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0 and len(ran) < 3:  # a thread calls in the middle of the wait
            in_thread(lambda: loop.call_soon_threadsafe(ran.append, len(ran)))
        elif timeout != 0:
            loop.stop()
        woken.append(is_readable(loop._ssock, 0 if timeout == 0 or len(ran) == 3 else SOON_S))
        key = loop._selector.get_key(loop._ssock)
        return [(key, selectors.EVENT_READ)] if woken[-1] else []

    loop._selector.select = select_by_hand
    loop.call_later(1000, unexpected)
    loop.run_forever()
    assert ran == [0, 1, 2]
    assert woken.count(True) >= 3


class Interrupting(logging.Handler):
    """Stands for Ctrl-C at the moment when a lost connection is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        if "Fatal write error" in record.getMessage():
            raise SystemExit("interrupted")


@contextlib.contextmanager
def interrupted_at_the_end_of_a_turn(loop: Any) -> Iterator[socket.socket]:
    """A loop that an exception left while it sent what two transports had written.

    The first one's peer is gone. Gives the peer of the second.
    """
    handler, logger = Interrupting(), logging.getLogger("asyncio")
    level = logger.level
    (first_near, first_far), (near, far) = socket.socketpair(), socket.socketpair()
    with first_far, far:
        far.setblocking(False)
        first, _ = loop.run_until_complete(loop.create_connection(Peer, sock=first_near))
        second, _ = loop.run_until_complete(loop.create_connection(Peer, sock=near))
        first.pause_reading()

        def write() -> None:
            first_far.close()
            first.write(b"to nobody")
            second.write(b"hello")

        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        loop.set_debug(True)
        loop.call_soon(write)
        try:
            with pytest.raises(SystemExit, match="interrupted"):
                loop.run_forever()
        finally:
            loop.set_debug(False)
            logger.removeHandler(handler)
            logger.setLevel(level)
        try:
            yield far
        finally:
            for transport in (first, second):
                loop.run_until_complete(end(transport))


def test_what_was_written_leaves_first_in_the_run_after_an_interrupted_turn(loop: Any) -> None:
    with interrupted_at_the_end_of_a_turn(loop) as far:
        ended_by: list[str] = []

        def stop(name: str) -> None:
            ended_by.append(name)
            loop.stop()

        loop.add_reader(far, stop, "data")
        timer = loop.call_later(SOON_S, stop, "timer")
        loop.run_forever()
        timer.cancel()
        loop.remove_reader(far)
        assert ended_by == ["data"]
        assert far.recv(100) == b"hello"


def test_a_thread_wakes_a_loop_that_was_interrupted_at_the_end_of_a_turn(loop: Any) -> None:
    with interrupted_at_the_end_of_a_turn(loop):
        in_thread(lambda: loop.call_soon_threadsafe(int))
        assert is_readable(loop._ssock, SOON_S)


def test_a_turn_within_a_callback_sends_first_what_the_callback_wrote(loop: Any) -> None:
    async def main() -> None:
        async with wired(Peer) as (peer, far):
            seen: list[str] = []
            done = loop.create_future()  # nothing else is ready: the turn within waits

            def callback() -> None:
                peer.transport.write(b"hello")
                loop.add_reader(far, seen.append, "data")
                timer = loop.call_later(SOON_S, seen.append, "timer")
                while not seen:
                    loop._run_once()
                timer.cancel()
                loop.remove_reader(far)
                done.set_result(None)

            loop.call_soon(callback)
            await done
            assert seen[0] == "data"

    run(loop, main())


def test_a_timer_that_is_not_a_number_blocks_no_other(loop: uringloop.EventLoop) -> None:
    ran: list[str] = []
    loop.call_at(float("nan"), ran.append, "not a number")
    loop.call_at(loop.time() - 1, ran.append, "due")
    loop.run_until_complete(turns())
    assert sorted(ran) == ["due", "not a number"]


# ---------------------------------------------------------------------- debug mode


def test_debug_mode_reports_the_error_of_a_protocol_and_not_one_of_its_own(
    loop: uringloop.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.set_exception_handler(lambda loop, context: loop.default_exception_handler(context))
    loop.set_debug(True)

    async def main() -> None:
        async with wired(Failing, first=b"question") as (peer, _):
            await peer.lost()

    run(loop, main())
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info[0] for record in errors if record.exc_info] == [ValueError]
    assert "protocol.data_received() call failed" in errors[0].getMessage()


def test_debug_mode_says_which_read_was_slow_under_asyncios_turn_too(
    stepwise: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stepwise.set_debug(True)
    stepwise.slow_callback_duration = 0  # everything is slow

    async def main() -> None:
        async with wired(Peer, first=b"question") as (peer, _):
            await peer.received(8)

    run(stepwise, main())
    slow = [record.getMessage() for record in caplog.records if "Executing" in record.getMessage()]
    assert any("_SelectorSocketTransport" in line for line in slow)


def test_an_accepted_socket_does_not_block_and_debug_mode_lets_it_send_files(
    loop: uringloop.EventLoop, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content" * 100)
    loop.set_debug(True)

    async def main() -> bytes:
        async with served(Peer) as (peer, sock):
            assert peer.transport.get_extra_info("socket").gettimeout() == 0
            with path.open("rb") as file:
                assert await loop.sendfile(peer.transport, file) == 700
            return await read(sock, 700)

    assert run(loop, main()) == b"content" * 100


@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])
def test_debug_mode_refuses_none_as_a_callback(loop: uringloop.EventLoop, name: str) -> None:
    loop.set_debug(True)
    arguments = (0, None) if name in ("call_later", "call_at") else (None,)
    with pytest.raises(TypeError, match="a callable object was expected"):
        getattr(loop, name)(*arguments)


def test_debug_mode_takes_calls_from_a_thread_without_a_python_frame(
    loop: uringloop.EventLoop,
) -> None:
    loop.set_debug(True)

    async def main() -> None:
        called = asyncio.Event()
        _thread.start_new_thread(loop.call_soon_threadsafe, (called.set,))
        async with asyncio.timeout(SOON_S):
            await called.wait()

    run(loop, main())


# ---------------------------------------------------------------------- finalizers


def test_a_finalizer_may_queue_a_callback_while_the_ready_queue_grows(loop: Any) -> None:
    ran: list[object] = []

    class Garbage:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            loop.call_soon(ran.append, "finalizer")

    def fill_and_grow() -> None:
        handle = asyncio.Handle(ran.append, ("last",), loop)
        while len(loop._ready) < size:
            loop.call_soon(ran.append, "filler")
        push = loop._ready.append
        Garbage()
        gc.enable()
        gc.set_threshold(1)  # up to 3.11 the next allocation collects, which is within the queue
        push(handle)
        gc.set_threshold(*threshold)
        gc.disable()
        gc.collect()

    threshold = gc.get_threshold()
    gc.collect()
    gc.disable()
    try:
        for size in (64, 128, 256, 512, 1024):
            fill_and_grow()
            loop.run_until_complete(turns())
            counts = (ran.count("filler"), ran.count("last"), ran.count("finalizer"))
            assert counts == (size, 1, 1)
            ran.clear()
    finally:
        gc.set_threshold(*threshold)
        gc.enable()


class Dropped(asyncio.Protocol):
    """Stops reading and keeps nothing: its transport is unclosed garbage from then on."""

    numbers: list[int] = []  # noqa: RUF012

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.numbers.append(transport.get_extra_info("socket").fileno())
        cast("asyncio.Transport", transport).pause_reading()


def drop_an_accepted_transport(monitor: str) -> list[Any]:
    """Under -W error, where the finalizer's warning is an exception."""
    warnings.simplefilter("error")
    sys.unraisablehook = lambda _: None
    loop: Any = uringloop.new_event_loop(monitor=monitor)

    async def main() -> list[Any]:
        server = await loop.create_server(Dropped, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as sock:
            sock.settimeout(SOON_S)
            while not Dropped.numbers:
                await asyncio.sleep(0)
            await turns()
            gc.collect()
            fresh = [StreamTransport.__new__(StreamTransport) for _ in range(8)]
            found = [loop._transports.get(number) is not None for number in Dropped.numbers]
            try:
                ended = sock.recv(1) == b""
            except TimeoutError:
                ended = False
            server.close()
            await asyncio.wait_for(server.wait_closed(), SOON_S)
            return [found, ended, len(fresh)]

    value: list[Any] = loop.run_until_complete(main())
    loop.close()
    return value


def test_a_dropped_transport_closes_where_warnings_are_errors(monitor: str) -> None:
    # Not quiet: a finalizer that raises may be reported on the way.
    child = run_child(drop_an_accepted_transport, monitor, quiet=False)
    assert (child.code, child.value) == (0, [[False], True, 8])


def collect_a_selector_before_its_loop(monitor: str) -> list[str]:
    warnings.simplefilter("ignore")
    unraisable: list[str] = []
    sys.unraisablehook = lambda args: unraisable.append(repr(args.exc_value))

    def make_and_drop() -> None:
        loop: Any = uringloop.new_event_loop(monitor=monitor)
        kept = [loop._selector]  # over one collection, which makes the selector the younger one
        del loop
        gc.collect()
        kept.clear()

    before = len(os.listdir("/proc/self/fd"))
    make_and_drop()
    gc.collect()
    rings = monitor == "io_uring"  # the thread keeps one spare
    left = len(os.listdir("/proc/self/fd")) - before
    return [*unraisable, *(["descriptors left"] if left > rings else [])]


def test_a_loop_that_is_collected_after_its_selector_ends_quietly(monitor: str) -> None:
    assert run_child(collect_a_selector_before_its_loop, monitor).value == []


class WithFinalizer(Dropped):
    """Dropped together with something whose finalizer uses the transport, as StreamWriter's."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.user = User(transport)


class User:
    used: list[str] = []  # noqa: RUF012

    def __init__(self, transport: Any) -> None:
        self.transport = transport

    def __del__(self) -> None:
        use_the_end(self.transport)
        self.used.append(repr(self.transport))


def use_the_end(transport: Any) -> None:
    transport.write(b"too late")
    transport.write_eof()
    transport.resume_reading()
    transport.pause_reading()
    transport.set_write_buffer_limits(high=0)
    transport._read_ready()
    transport._write_ready()
    transport.close()
    transport.abort()
    assert transport.is_closing()
    assert not transport.is_reading()
    assert transport.get_write_buffer_size() == 0


def use_transports_that_were_finalized(monitor: str, by: str) -> int:
    loop = uringloop.new_event_loop(monitor=monitor)
    near, far = socket.socketpair()
    with far, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protocol = WithFinalizer if by == "finalizer" else Dropped
        loop.run_until_complete(loop.create_connection(protocol, sock=near))
        del near
        loop.run_until_complete(turns())
        gc.collect()
        kept = [w.source for w in caught if isinstance(w.source, StreamTransport)]
        if by == "warning":  # which keeps the transport that it is about
            for transport in kept:
                use_the_end(transport)
        loop.run_until_complete(turns())
    loop.close()
    return len(kept) if by == "warning" else len(User.used)


@pytest.mark.parametrize("by", ["warning", "finalizer"])
def test_a_transport_that_was_finalized_can_still_be_called(monitor: str, by: str) -> None:
    assert run_child(use_transports_that_were_finalized, monitor, by).value == 1


# ---------------------------------------------------------------------- no crash


def use_the_end_of_datagrams(transport: Any) -> None:
    with contextlib.suppress(AttributeError):  # as in asyncio
        transport.sendto(b"too late", ("127.0.0.1", 9))
    transport._sendto_ready()
    transport.pause_reading()
    transport.resume_reading()
    transport.set_write_buffer_limits(high=0)
    transport._read_ready()
    transport.close()
    transport.abort()
    assert transport.is_closing()
    assert transport.get_write_buffer_size() == 0


def use_what_was_never_made(monitor: str) -> list[str]:
    use_the_end(StreamTransport.__new__(StreamTransport))
    use_the_end_of_datagrams(DatagramTransport.__new__(DatagramTransport))
    outcomes = []
    try:
        cast("Any", uringloop.EventLoop.__new__(uringloop.EventLoop))._run_once()
    except RuntimeError as exc:
        outcomes.append(str(exc))
    loop: Any = uringloop.new_event_loop(monitor=monitor)

    async def main() -> None:
        async with wired(Peer) as (peer, _):
            peer.transport.abort()
            await peer.lost()
            await turns()
            use_the_end(peer.transport)
        sock = socket.socket(type=socket.SOCK_DGRAM)
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, sock=sock)
        transport.abort()
        await turns()
        use_the_end_of_datagrams(transport)

    loop.run_until_complete(main())
    loop.close()
    try:
        loop._run_once()
    except (RuntimeError, ValueError) as exc:
        outcomes.append(str(exc))
    return outcomes


def test_what_was_never_initialised_or_has_ended_refuses_and_does_not_crash(monitor: str) -> None:
    outcomes = run_child(use_what_was_never_made, monitor).value
    assert outcomes == ["this loop was never initialised", "I/O operation on closed selector"]


def make_transports_of_closed_sockets(monitor: str) -> list[int | None]:
    loop: Any = uringloop.new_event_loop(monitor=monitor)
    refused = []
    for make, protocol in (
        (StreamTransport, asyncio.Protocol()),
        (DatagramTransport, asyncio.DatagramProtocol()),
    ):
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.close()
        try:
            make(loop, sock, protocol)
        except OSError as exc:
            refused.append(exc.errno)
    loop.close()
    return refused


def test_a_transport_is_not_made_of_a_closed_socket(monitor: str) -> None:
    assert run_child(make_transports_of_closed_sockets, monitor).value == [errno.EBADF] * 2


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_of_reads_below_one_is_refused(loop: uringloop.EventLoop, size: int) -> None:
    async def main() -> bytearray:
        async with wired(Peer) as (peer, far):
            with pytest.raises(ValueError, match="max_size must be positive"):
                cast("Any", peer.transport).max_size = size
            far.send(b"still read")
            await peer.received(10)
            return peer.data

    assert run(loop, main()) == b"still read"


def test_a_factory_that_closes_its_server_ends_the_connection_quietly(
    loop: uringloop.EventLoop,
) -> None:
    """As in asyncio, where a closed server takes no transport."""

    async def main() -> None:
        made: list[Peer] = []

        def factory() -> Peer:
            server.close()
            made.append(Peer())
            return made[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as sock:
            sock.setblocking(False)
            assert await read_to_end(sock) == b""
        assert [peer.events for peer in made] == [[]]

    run(loop, main())  # fails when anything reached the handler of exceptions


class Clobbering(bytearray):
    """A buffer whose release runs Python code that fails a system call, which sets errno."""

    def __release_buffer__(self, view: memoryview) -> None:
        with contextlib.suppress(OSError):
            os.stat("/nowhere")
        super().__release_buffer__(view)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="buffers run Python code since 3.12")
def test_releasing_a_buffer_does_not_change_what_a_read_said(loop: uringloop.EventLoop) -> None:
    async def main() -> None:
        async with wired(lambda: BufferedPeer(Clobbering(100))) as (peer, far):
            await turns()
            cast("Any", peer.transport)._read_ready()  # there is nothing to read
            far.send(b"hello")
            await peer.received(5)
            assert peer.events == ["made"]

    run(loop, main())
