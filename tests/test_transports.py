"""Stream transports, line by line of what asyncio's own transports promise.

The promise: a test that takes `contract_loop` also runs on asyncio's SelectorEventLoop, so it
states what asyncio does and not what we remember of it. A test that takes `loop` asks for more than
every asyncio gives, and says what.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import contextvars
import errno
import fcntl
import gc
import io
import itertools
import logging
import os
import re
import resource
import socket
import ssl
import struct
import sys
import termios
import time
import warnings
import weakref
from asyncio import constants, transports, trsock
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import uringloop
from tests.conftest import MONITORS, loop_named, refusal
from tests.connections import (
    MIB,
    TOO_MUCH,
    BufferedPeer,
    Peer,
    digest,
    make_certificate,
    payload,
    read,
    read_now,
    read_to_end,
    reset,
    send_and_see,
    served,
    tcp_pair,
    turns,
    wired,
)
from tests.support import make_loop_named, run, run_child

AnyLoop = asyncio.AbstractEventLoop
Loop = uringloop.EventLoop
Report = dict[str, Any]

BOTH = pytest.mark.parametrize("make", [Peer, BufferedPeer], ids=["Protocol", "BufferedProtocol"])
KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])

SINCE_3_12 = sys.version_info >= (3, 12)
SINCE_3_14 = sys.version_info >= (3, 14)
SINCE_3_15 = sys.version_info >= (3, 15)


@pytest.fixture(params=["stock", *MONITORS, "io_uring ring", "io_uring sends"])
def contract_loop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AnyLoop]:
    """asyncio's own loop, which shows that the test is right, and ours on each monitor, on io_uring
    also with all that is received, or sent, by the ring.
    """
    yield from loop_named(request.param, monkeypatch)


def is_stock(loop: AnyLoop) -> bool:
    """Whether it is asyncio's own."""
    return type(loop) is asyncio.SelectorEventLoop


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's side of TLS for localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def reports_of(loop: AnyLoop) -> list[Report]:
    """From now on, what the loop tells its exception handler."""
    reports: list[Report] = []
    loop.set_exception_handler(lambda _, report: reports.append(report))
    return reports


def test_tasks_are_made_with_the_options_that_asyncio_takes(contract_loop: AnyLoop) -> None:
    place = contextvars.ContextVar("place", default="outside")

    async def where() -> str:
        return place.get()

    async def main() -> None:
        create_task: Any = contract_loop.create_task
        context = contextvars.copy_context()
        context.run(place.set, "inside")
        task = create_task(where(), name="named", context=context)
        assert (task.get_name(), await task) == ("named", "inside")
        if sys.version_info >= (3, 14):
            task = create_task(where(), eager_start=True, name="eager", context=context)
            assert (task.done(), task.get_name(), await task) == (True, "eager", "inside")
            assert not create_task(where(), eager_start=False).done()
        for wrong in ({"unknown": 1}, {"loop": contract_loop}):
            coroutine = where()
            with pytest.raises(TypeError):
                create_task(coroutine, **wrong)
            coroutine.close()

    run(contract_loop, main())


def test_a_transport_takes_attributes_of_its_user(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            transport: Any = protocol.transport
            transport.remark = "kept"
            assert (transport.remark, vars(transport)["remark"]) == ("kept", "kept")
            del transport.remark
            assert not hasattr(transport, "remark")
            assert "remark" not in vars(transport)

    run(contract_loop, main())


def test_what_only_looks_like_a_socket_is_used_by_its_methods(contract_loop: AnyLoop) -> None:
    """A wrapper counts, records or encrypts: going to its descriptor would pass it by."""

    class Wrapper:
        def __init__(self, sock: socket.socket) -> None:
            self.sock, self.sent = sock, bytearray()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def send(self, data: Any) -> int:
            self.sent += bytes(data)
            return self.sock.send(data)

    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        wrapper = Wrapper(ours)
        transport, peer = await contract_loop.create_connection(Peer, sock=cast("Any", wrapper))
        transport.write(b"counted")
        assert theirs.recv(100) == wrapper.sent == b"counted"
        transport.close()
        await peer.until(lambda: peer.is_lost)
        theirs.close()

    run(contract_loop, main())


# ---------------------------------------------------------------------------------------- contexts

VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="nothing")


class InContext(Peer):
    """Writes down what each callback finds in VAR, and leaves its own name there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.count = itertools.count(1)

    def look(self, name: str) -> None:
        self.found.append((name, VAR.get()))
        VAR.set(name)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.look("made")
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.look(f"data {next(self.count)}")
        super().data_received(data)

    def eof_received(self) -> bool | None:
        self.look("eof")
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.look("lost")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self.look("pause")
        super().pause_writing()

    def resume_writing(self) -> None:
        self.look("resume")
        super().resume_writing()


class BufferedInContext(InContext, BufferedPeer):
    """The same with a buffer."""

    def get_buffer(self, sizehint: int) -> Any:
        self.asked = VAR.get()
        return super().get_buffer(sizehint)


@KINDS
@pytest.mark.parametrize("make", [InContext, BufferedInContext])
def test_reads_share_one_context_until_reading_is_resumed_from_another(
    contract_loop: AnyLoop, make: type[InContext], kind: str
) -> None:
    async def main() -> InContext:
        VAR.set("creator")
        async with wired(make, kind) as (protocol, sock):
            VAR.set("later")
            await send_and_see(protocol, sock, 2)
            protocol.transport.pause_reading()
            VAR.set("resumer")
            protocol.transport.resume_reading()
            VAR.set("after resuming")
            await send_and_see(protocol, sock, 2)
            sock.close()
            await protocol.lost()
            assert VAR.get() == "after resuming"
            return protocol

    found = run(contract_loop, main()).found
    assert found == [
        ("made", "creator"),
        ("data 1", "made" if SINCE_3_15 else "creator"),
        ("data 2", "data 1"),
        ("data 3", "data 2" if SINCE_3_15 else "resumer"),
        ("data 4", "data 3"),
        ("eof", "data 4"),
        ("lost", "eof"),
    ]


def test_a_buffer_is_asked_for_in_the_context_of_the_reads(contract_loop: AnyLoop) -> None:
    async def main() -> str:
        async with wired(BufferedInContext) as (protocol, sock):
            await send_and_see(protocol, sock, 2)
            return protocol.asked

    assert run(contract_loop, main()) == "data 1"


@pytest.mark.parametrize("how", ["close", "abort"])
def test_connection_lost_sees_the_context_that_ended_the_connection(
    contract_loop: AnyLoop, how: str
) -> None:
    async def main() -> InContext:
        async with wired(InContext) as (protocol, sock):
            await send_and_see(protocol, sock, 1)
            VAR.set("closer")
            getattr(protocol.transport, how)()
            VAR.set("too late")
            await protocol.lost()
            return protocol

    assert run(contract_loop, main()).found[-1] == ("lost", "data 1" if SINCE_3_15 else "closer")


def test_a_reset_is_reported_in_the_context_of_the_reads(contract_loop: AnyLoop) -> None:
    async def main() -> InContext:
        async with wired(InContext, "tcp") as (protocol, sock):
            await send_and_see(protocol, sock, 1)
            reset(sock)
            await protocol.lost()
            return protocol

    assert run(contract_loop, main()).found[-1] == ("lost", "data 1")


def test_resume_writing_runs_in_the_context_of_the_write_that_had_to_wait(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> InContext:
        VAR.set("creator")
        async with wired(InContext) as (protocol, sock):
            VAR.set("writer")
            protocol.transport.write(bytes(MIB))
            assert VAR.get() == "pause", "pause_writing runs in the context of write()"
            VAR.set("later writer")
            protocol.transport.write(b"more")
            VAR.set("closer")
            protocol.transport.close()
            await read_to_end(sock)
            await protocol.lost()
            return protocol

    assert run(contract_loop, main()).found == [
        ("made", "creator"),
        ("pause", "writer"),
        ("resume", "made" if SINCE_3_15 else "writer"),
        ("lost", "resume"),
    ]


def test_a_client_factory_runs_in_the_context_of_its_caller(contract_loop: AnyLoop) -> None:
    def factory() -> InContext:
        VAR.set("factory")
        return InContext()

    async def main() -> list[tuple[str, str]]:
        async with wired(factory) as (protocol, sock):
            assert VAR.get() == "factory"
            await send_and_see(protocol, sock, 1)
            return list(protocol.found)

    if not SINCE_3_15:
        assert run(contract_loop, main()) == [("made", "factory"), ("data 1", "factory")]
    else:  # the connection's context is a copy made before
        assert run(contract_loop, main()) == [("made", "nothing"), ("data 1", "made")]


def test_every_accepted_connection_has_a_context_of_its_own(contract_loop: AnyLoop) -> None:
    numbers = itertools.count(1)
    seen = []

    class Accepted(InContext):
        def __init__(self) -> None:
            super().__init__()
            seen.append(VAR.get())
            VAR.set(f"factory {next(numbers)}")
            accepted.append(self)

    accepted: list[Accepted] = []

    async def main() -> list[list[tuple[str, str]]]:
        VAR.set("starter")
        server = await asyncio.get_running_loop().create_server(Accepted, "127.0.0.1", 0)
        VAR.set("later")
        with contextlib.ExitStack() as stack:
            socks = [
                stack.enter_context(socket.create_connection(server.sockets[0].getsockname()))
                for _ in range(3)
            ]
            for sock in socks:
                sock.send(b"x")
            while len(accepted) < 3 or not all(protocol.data for protocol in accepted):
                await asyncio.sleep(0.001)
        for protocol in accepted:
            await protocol.lost()
        server.close()
        return [protocol.found for protocol in accepted]

    for number, found in enumerate(run(contract_loop, main()), start=1):
        factory = f"factory {number}"
        data = ("data 1", "made" if SINCE_3_15 else factory)
        assert found == [("made", factory), data, ("eof", "data 1"), ("lost", "eof")]
    assert seen == ["starter"] * 3


def test_a_server_serves_in_the_context_that_started_it(contract_loop: AnyLoop) -> None:
    async def main() -> list[tuple[str, str]]:
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[InContext] = asyncio.Queue()

        def factory() -> InContext:
            made.put_nowait(protocol := InContext())
            return protocol

        VAR.set("maker")
        server = await loop.create_server(factory, "127.0.0.1", 0, start_serving=False)
        VAR.set("starter")
        await server.start_serving()
        VAR.set("later")
        with socket.create_connection(server.sockets[0].getsockname()):
            protocol = await made.get()
        await protocol.lost()
        server.close()
        return protocol.found

    context = "maker" if SINCE_3_15 else "starter"
    assert run(contract_loop, main())[0] == ("made", context)


def test_a_connection_made_by_hand_starts_from_its_maker_s_context(contract_loop: AnyLoop) -> None:
    async def main() -> list[tuple[str, str]]:
        near, far = socket.socketpair()
        with far:
            VAR.set("maker")
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(InContext, near)
            VAR.set("later")
            await send_and_see(protocol, far, 1)
            far.close()
            await protocol.lost()
        return protocol.found

    found = run(contract_loop, main())
    data = ("data 1", "made" if SINCE_3_15 else "maker")
    assert found == [("made", "maker"), data, ("eof", "data 1"), ("lost", "eof")]


# -------------------------------------------------------------- what libraries reach for, and facts


def test_a_transport_is_what_asyncio_and_libraries_take_it_for(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            transport: Any = protocol.transport
            bases: list[Any] = [asyncio.Transport, transports._FlowControlMixin]
            assert all(isinstance(transport, base) for base in bases)
            assert transport._sendfile_compatible is constants._SendfileMode.TRY_NATIVE
            assert transport._start_tls_compatible is True
            assert transport._loop is contract_loop
            assert isinstance(transport._sock, socket.socket)
            assert transport._sock_fd == transport._sock.fileno() > 0
            assert transport._protocol_paused is False
            assert transport.get_protocol() is protocol
            assert transport in {transport}
            assert transport.can_write_eof() is True
            assert weakref.ref(transport)() is transport

    run(contract_loop, main())


def test_after_the_loss_a_transport_lets_go_of_everything(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            transport: Any = protocol.transport
            fd = transport._sock_fd
            transport.close()
            await protocol.lost()
            await turns()
            assert (transport._sock, transport._loop, transport.get_protocol()) == (None,) * 3
            assert transport._sock_fd == fd
            assert transport.is_closing()
            assert not transport.is_reading()
            assert transport.get_write_buffer_size() == 0
            assert transport.get_extra_info("socket").fileno() == -1

    run(contract_loop, main())


def test_nothing_done_to_a_lost_transport_raises(contract_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, _):
            transport = protocol.transport
            transport.abort()
            await protocol.lost()
            await turns()
            for method in (
                transport.close,
                transport.abort,
                transport.pause_reading,
                transport.resume_reading,
                transport.write_eof,
                transport.set_write_buffer_limits,
            ):
                assert method() is None
            transport.write(b"nobody")
            transport.set_protocol(Peer())
            await turns()
            return protocol.events

    assert run(contract_loop, main()) == ["made", "lost"]


def test_a_transport_is_found_by_its_descriptor(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        loop: Any = contract_loop
        async with wired(Peer) as (protocol, _):
            transport: Any = protocol.transport
            assert loop._transports[transport._sock_fd] is transport
            transport.pause_reading()
            assert loop._transports[transport._sock_fd] is transport

    run(contract_loop, main())


def test_a_transport_s_descriptor_is_not_for_readers_and_writers(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        loop = contract_loop
        async with wired(Peer) as (protocol, _):
            fd = protocol.transport.get_extra_info("socket").fileno()
            text = rf"^File descriptor {fd} is used by transport <.* fd={fd} read=polling"
            for refused in (
                lambda: loop.add_reader(fd, int),
                lambda: loop.remove_reader(fd),
                lambda: loop.add_writer(fd, int),
                lambda: loop.remove_writer(fd),
            ):
                with pytest.raises(RuntimeError, match=text):
                    refused()
            protocol.transport.close()
            loop.add_reader(fd, int)
            assert loop.remove_reader(fd) is True

    run(contract_loop, main())


def test_a_transport_s_socket_is_not_for_sock_recv(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            sock = cast(Any, protocol.transport)._sock
            with pytest.raises(RuntimeError, match="is used by transport"):
                await contract_loop.sock_recv(sock, 1)

    run(contract_loop, main())


def test_the_text_of_a_transport_says_how_it_is(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            transport = protocol.transport
            fd = transport.get_extra_info("socket").fileno()

            def says(text: str) -> bool:
                return re.fullmatch(rf"<\w+ {text}>", repr(transport)) is not None

            assert says(rf"fd={fd} read=polling write=<idle, bufsize=0>")
            transport.pause_reading()
            assert says(rf"fd={fd} read=idle write=<idle, bufsize=0>")
            transport.write(bytes(MIB))
            size = transport.get_write_buffer_size()
            assert size > 0
            assert says(rf"fd={fd} read=idle write=<polling, bufsize={size}>")
            transport.close()
            assert says(rf"closing fd={fd} read=idle write=<polling, bufsize={size}>")
            await read(sock, MIB)
            await protocol.lost()
            await turns()
            assert says(rf"closed fd={fd}")

    run(contract_loop, main())


def test_a_paused_transport_that_nobody_holds_is_collected_with_a_warning(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> list[str]:
        near, far = socket.socketpair()
        with far:
            far.setblocking(False)
            transport, _ = await contract_loop.create_connection(asyncio.Protocol, sock=near)
            fd = near.fileno()
            transport.pause_reading()
            await turns()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                del transport, _, near
                gc.collect()
                assert await contract_loop.sock_recv(far, 1) == b"", "its socket is closed"
                texts = [str(warning.message) for warning in warned]
                del warned
            gc.collect()
            assert fd not in cast(Any, contract_loop)._transports
            return texts

    texts = run(contract_loop, main())
    assert [text for text in texts if re.match(r"unclosed transport <\w+ fd=\d+ read=idle", text)]


def test_a_reading_transport_that_nobody_holds_goes_on(contract_loop: AnyLoop) -> None:
    received: list[bytes] = []
    ended = asyncio.Event()

    class Lonely(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            received.append(data)

        def connection_lost(self, exc: Exception | None) -> None:
            ended.set()

    async def main() -> None:
        near, far = socket.socketpair()
        with far:
            await contract_loop.create_connection(Lonely, sock=near)
            del near
            gc.collect()
            far.send(b"still there?")
        await ended.wait()

    run(contract_loop, main())
    assert received == [b"still there?"]


def test_a_writing_transport_that_nobody_holds_sends_to_the_end(contract_loop: AnyLoop) -> None:
    data = payload(MIB)

    async def main() -> bytes:
        near, far = socket.socketpair()
        with far:
            far.setblocking(False)
            transport, _ = await contract_loop.create_connection(asyncio.Protocol, sock=near)
            transport.write(data)
            transport.close()
            del transport, _, near
            gc.collect()
            return await read_to_end(far)

    assert run(contract_loop, main()) == data


@pytest.mark.parametrize("how", ["close", "abort", "eof", "flush"])
def test_a_lost_connection_leaves_no_cycle_behind(loop: Loop, how: str) -> None:
    """Reference counting alone frees transport and protocol; asyncio promises it since 3.14."""

    class Plain(asyncio.Protocol):
        pass

    async def main() -> list[Any]:
        near, far = socket.socketpair()
        with far:
            far.setblocking(False)
            transport, protocol = await loop.create_connection(Plain, sock=near)
            far.send(b"data")
            await turns()
            transport.write(bytes(MIB if how == "flush" else 1))
            if how == "eof":
                far.close()
            else:
                getattr(transport, "abort" if how == "abort" else "close")()
            if how == "flush":
                await read_to_end(far)
            while transport.get_protocol() is not None:
                await asyncio.sleep(0)
            refs: list[Any] = [weakref.ref(transport), weakref.ref(protocol)]
            del transport, protocol, near
            await turns()
            return [ref() for ref in refs]

    gc.collect()
    gc.disable()
    try:
        assert run(loop, main()) == [None, None]
    finally:
        gc.enable()


def test_force_close_hands_its_reason_to_the_protocol(contract_loop: AnyLoop) -> None:
    reason = ConnectionError("because")

    async def main() -> Peer:
        async with wired(Peer) as (protocol, _):
            protocol.transport.write(bytes(MIB))
            cast(Any, protocol.transport)._force_close(reason)
            assert protocol.transport.is_closing()
            assert protocol.transport.get_write_buffer_size() == 0
            assert not protocol.is_lost, "not before the next turn"
            await protocol.lost()
            return protocol

    protocol = run(contract_loop, main())
    assert protocol.error is reason
    assert protocol.events == ["made", "pause", "lost ConnectionError"]


def test_an_empty_waiter_waits_for_the_last_byte_and_keeps_writers_out(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            transport: Any = protocol.transport
            assert transport._make_empty_waiter().done()
            with pytest.raises(RuntimeError, match=r"^Empty waiter is already set$"):
                transport._make_empty_waiter()
            for empty in (b"", b"data"):
                with pytest.raises(
                    RuntimeError, match=r"^unable to write; sendfile is in progress"
                ):
                    transport.write(empty)
            with pytest.raises(
                RuntimeError, match=r"^unable to write(lines)?; sendfile is in prog"
            ):
                transport.writelines([b"data"])
            transport._reset_empty_waiter()
            transport.write(bytes(MIB))
            waiter = transport._make_empty_waiter()
            await turns()
            assert not waiter.done()
            await read(sock, MIB)
            assert await waiter is None
            assert transport.get_write_buffer_size() == 0
            transport._reset_empty_waiter()
            transport.write(b"again")
            assert await read(sock, 5) == b"again"

    run(contract_loop, main())


def test_an_empty_waiter_hears_that_the_connection_is_lost(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            transport: Any = protocol.transport
            transport.write(bytes(MIB))
            waiter = transport._make_empty_waiter()
            transport.abort()
            with pytest.raises(ConnectionError, match=r"^Connection is closed by peer$"):
                await waiter

    run(contract_loop, main())


def test_extra_info_names_the_socket_and_both_addresses(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer, "tcp") as (protocol, sock):
            info = protocol.transport.get_extra_info
            assert type(info("socket")) is trsock.TransportSocket
            assert info("socket") is info("socket")
            assert info("socket").fileno() == cast(Any, protocol.transport)._sock_fd
            assert info("sockname") == sock.getpeername()
            assert info("peername") == sock.getsockname()
            assert info("nothing") is None
            assert info("nothing", "default") == "default"
            assert info("sslcontext") is None
        async with served(Peer) as (protocol, sock):
            info = protocol.transport.get_extra_info
            assert info("sockname") == sock.getpeername()
            assert info("peername") == sock.getsockname()
        async with wired(Peer, "unix") as (protocol, _):
            info = protocol.transport.get_extra_info
            assert (info("sockname"), info("peername")) == ("", "")

    run(contract_loop, main())


@pytest.mark.parametrize("how", ["close", "abort", "eof", "reset"])
def test_extra_info_stays_through_connection_lost_and_after(
    contract_loop: AnyLoop, how: str
) -> None:
    facts = []

    class Asking(Peer):
        def facts(self) -> list[object]:
            return [self.transport.get_extra_info(name) for name in ("peername", "sockname")]

        def connection_lost(self, exc: Exception | None) -> None:
            facts.append(self.facts())
            assert self.transport.get_extra_info("socket").fileno() > 0, "it is still open"
            super().connection_lost(exc)

    async def main() -> None:
        async with wired(Asking, "tcp") as (protocol, sock):
            facts.append([sock.getsockname(), sock.getpeername()])
            if how in ("close", "abort"):
                getattr(protocol.transport, how)()
            else:
                (reset if how == "reset" else socket.socket.close)(sock)
            await protocol.lost()
            await turns()
            facts.append(protocol.facts())
            assert protocol.transport.get_extra_info("socket").fileno() == -1

    run(contract_loop, main())
    assert facts[1:] == facts[:1] * 2


def test_a_peer_that_is_gone_has_no_name(contract_loop: AnyLoop) -> None:
    async def main() -> object:
        near, far = tcp_pair()
        reset(far)
        transport, protocol = await contract_loop.connect_accepted_socket(Peer, near)
        await protocol.lost()
        assert protocol.events == ["made", "lost ConnectionResetError"]
        return transport.get_extra_info("peername", "default")

    assert run(contract_loop, main()) is None


# ----------------------------------------------------------------------------------------- reading


@BOTH
@KINDS
def test_nothing_is_read_before_create_connection_has_returned(
    contract_loop: AnyLoop, make: type[Peer], kind: str
) -> None:
    """So a protocol set at once gets every byte, though some were there before."""

    async def main() -> None:
        async with wired(make, kind, first=b"early") as (first, sock):
            assert (first.events, bytes(first.data)) == (["made"], b"")
            assert first.transport.is_reading()
            first.transport.set_protocol(second := make())
            await second.received(5)
            sock.send(b" and late")
            await second.received(14)
            assert (bytes(first.data), bytes(second.data)) == (b"", b"early and late")

    run(contract_loop, main())


def test_pausing_and_resuming_are_idempotent_and_is_reading_tells(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            transport = protocol.transport
            assert transport.is_reading()
            assert transport.resume_reading() is None  # type: ignore[func-returns-value]
            for _ in range(2):
                assert transport.pause_reading() is None  # type: ignore[func-returns-value]
                assert not transport.is_reading()
            sock.send(b"early")
            await turns(20)
            assert not protocol.data
            for _ in range(2):
                transport.resume_reading()
                assert transport.is_reading()
            await protocol.received(5)
            transport.pause_reading()
            transport.resume_reading()
            sock.send(b" late")
            await protocol.received(10)
            assert protocol.data == b"early late"

    run(contract_loop, main())


@pytest.mark.parametrize("resumes_at_once", [False, True])
@KINDS
def test_reading_may_be_paused_in_connection_made(
    contract_loop: AnyLoop, kind: str, resumes_at_once: bool
) -> None:
    class PausedFromTheStart(Peer):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()
            if resumes_at_once:
                self.transport.resume_reading()

    async def main() -> None:
        async with wired(PausedFromTheStart, kind, first=b"early") as (protocol, _):
            assert protocol.transport.is_reading() is resumes_at_once
            if not resumes_at_once:
                await turns(20)
                assert not protocol.data
                protocol.transport.resume_reading()
            await protocol.received(5)
            assert protocol.data == b"early"

    run(contract_loop, main())


@BOTH
@KINDS
def test_pausing_in_data_received_holds_back_what_is_pending(
    contract_loop: AnyLoop, make: type[Peer], kind: str
) -> None:
    data = payload(3 * MIB)

    class OneAtATime(make):  # type: ignore[valid-type, misc]
        pieces = 0

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.pieces += 1
            self.transport.pause_reading()

    async def main() -> None:
        async with wired(OneAtATime, kind) as (protocol, sock):
            sending = asyncio.ensure_future(contract_loop.sock_sendall(sock, data))
            pieces = 0
            while len(protocol.data) < len(data):
                await protocol.until(lambda: protocol.pieces > pieces)  # noqa: B023
                await turns(4)
                pieces += 1
                assert protocol.pieces == pieces, "it read while it was paused"
                protocol.transport.resume_reading()
            await sending
            assert digest(protocol.data) == digest(data)
            assert pieces > 2

    run(contract_loop, main())


def test_resuming_inside_data_received_neither_loses_nor_repeats(contract_loop: AnyLoop) -> None:
    data = payload(2 * MIB)

    class Restless(Peer):
        def data_received(self, data: bytes) -> None:
            self.transport.pause_reading()
            super().data_received(data)
            self.transport.resume_reading()

    async def main() -> None:
        async with wired(Restless) as (protocol, sock):
            await contract_loop.sock_sendall(sock, data)
            await protocol.received(len(data))
            assert digest(protocol.data) == digest(data)

    run(contract_loop, main())


@KINDS
def test_a_paused_transport_learns_of_the_end_when_it_resumes(
    contract_loop: AnyLoop, kind: str
) -> None:
    async def main() -> list[str]:
        async with wired(Peer, kind) as (protocol, sock):
            protocol.transport.pause_reading()
            sock.send(b"last words")
            sock.close()
            await turns(20)
            assert (protocol.events, bytes(protocol.data)) == (["made"], b"")
            protocol.transport.resume_reading()
            await protocol.lost()
            assert protocol.data == b"last words"
            return protocol.events

    assert run(contract_loop, main()) == ["made", "eof", "lost"]


@pytest.mark.parametrize("how", ["close", "abort"])
@BOTH
def test_nothing_is_received_after_ending_it_inside_data_received(
    contract_loop: AnyLoop, make: type[Peer], how: str
) -> None:
    class EnoughAtOnce(make):  # type: ignore[valid-type, misc]
        pieces = 0

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.pieces += 1
            getattr(self.transport, how)()
            assert not self.transport.is_reading()

    async def main() -> None:
        async with wired(EnoughAtOnce) as (protocol, sock):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await contract_loop.sock_sendall(sock, payload(MIB))
            await protocol.lost()
            await turns()
            assert protocol.pieces == 1
            assert protocol.events == ["made", "lost"]

    run(contract_loop, main())


@pytest.mark.parametrize("how", ["close", "abort"])
@KINDS
def test_a_connection_may_be_ended_in_connection_made(
    contract_loop: AnyLoop, how: str, kind: str
) -> None:
    class NotInterested(Peer):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            getattr(transport, how)()

    async def main() -> list[str]:
        async with wired(NotInterested, kind, first=b"unread") as (protocol, _):
            await protocol.lost()
            await turns()
            assert not protocol.data
            return protocol.events

    assert run(contract_loop, main()) == ["made", "lost"]


def test_pausing_and_resuming_a_closing_transport_does_nothing(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            transport = protocol.transport
            transport.write(bytes(MIB))
            transport.close()
            sock.send(b"unheard")
            for method in (transport.pause_reading, transport.resume_reading):
                method()
                assert not transport.is_reading()
            assert len(await read(sock, MIB)) == MIB
            await protocol.lost()
            assert not protocol.data

    run(contract_loop, main())


def test_each_connection_gets_one_read_a_turn(contract_loop: AnyLoop) -> None:
    """A flood on one connection does not keep the others waiting."""
    order: list[str] = []

    class Named(Peer):
        name = ""

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            order.append(self.name)

    async def main() -> None:
        async with wired(Named) as (flood, flooding), wired(Named) as (other, quiet):
            flood.name, other.name = "flood", "other"
            for protocol in (flood, other):
                protocol.transport.pause_reading()
            sending = asyncio.ensure_future(contract_loop.sock_sendall(flooding, payload(8 * MIB)))
            quiet.send(b"x")
            await turns()
            for protocol in (flood, other):
                protocol.transport.resume_reading()
            await other.received(1)
            await flood.received(8 * MIB)
            await sending

    run(contract_loop, main())
    assert order.index("other") <= 2


def test_what_is_received_is_bytes_of_the_right_size_and_later_reads_leave_it_alone(
    contract_loop: AnyLoop,
) -> None:
    kept: list[bytes] = []

    class Keeper(Peer):
        def data_received(self, data: bytes) -> None:
            kept.append(data)
            super().data_received(data)

    pieces = [payload(size) for size in (1, 1000, 70_000, 3, 100_000, 16_384)]

    async def main() -> None:
        async with wired(Keeper, "tcp") as (protocol, sock):
            for piece in pieces:
                size = len(protocol.data) + len(piece)
                await contract_loop.sock_sendall(sock, piece)
                await protocol.received(size)

    run(contract_loop, main())
    assert {type(data) for data in kept} == {bytes}
    assert b"".join(kept) == b"".join(pieces)
    assert all(sys.getsizeof(data) == sys.getsizeof(b"") + len(data) for data in kept)


# ------------------------------------------------------------------------------- BufferedProtocol


@pytest.mark.parametrize("size_kib", [1, 4, 16, 64, 128, 256])
@KINDS
def test_a_buffered_protocol_gets_every_byte_whatever_its_buffer(
    contract_loop: AnyLoop, kind: str, size_kib: int
) -> None:
    data = payload(MIB + 12_345)

    async def main() -> None:
        async with wired(lambda: BufferedPeer(bytearray(size_kib * 1024)), kind) as (
            protocol,
            sock,
        ):
            await contract_loop.sock_sendall(sock, data)
            await protocol.received(len(data))
            assert digest(protocol.data) == digest(data)

    run(contract_loop, main())


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(1),
        bytearray(3),
        memoryview(bytearray(7)),
        memoryview(bytearray(100))[10:13],
        array.array("i", [0] * 3),
        memoryview(array.array("i", [0] * 3)),
    ],
    ids=["1 byte", "3 bytes", "view", "view of a part", "array", "view of an array"],
)
def test_a_buffer_may_be_any_writable_memory(contract_loop: AnyLoop, buffer: Any) -> None:
    sizes = []
    size_bytes = memoryview(buffer).nbytes

    class Counting(BufferedPeer):
        def get_buffer(self, sizehint: int) -> Any:
            assert sizehint == -1, "asyncio gives no hint"
            return super().get_buffer(sizehint)

        def buffer_updated(self, nbytes: int) -> None:
            sizes.append(nbytes)
            super().buffer_updated(nbytes)

    async def main() -> bytes:
        async with wired(lambda: Counting(buffer)) as (protocol, sock):
            sock.send(b"0123456789" * 4)
            await protocol.received(40)
            return bytes(protocol.data)

    assert run(contract_loop, main()) == b"0123456789" * 4
    whole, rest = divmod(40, size_bytes)
    assert sizes == [size_bytes] * whole + [rest] * bool(rest)


def test_a_buffer_may_be_another_one_each_time(contract_loop: AnyLoop) -> None:
    data = payload(MIB)
    sizes = itertools.cycle([1, 4096, 3, 256 * 1024, 70_000])

    class Changing(BufferedPeer):
        def get_buffer(self, sizehint: int) -> Any:
            self.buffer = bytearray(next(sizes))
            return self.buffer

    async def main() -> None:
        async with wired(Changing) as (protocol, sock):
            await contract_loop.sock_sendall(sock, data)
            await protocol.received(len(data))
            assert digest(protocol.data) == digest(data)

    run(contract_loop, main())


def test_a_buffer_is_free_again_after_its_read(contract_loop: AnyLoop) -> None:
    """No export of it is kept: a bytearray may change its size in buffer_updated."""

    class Growing(BufferedPeer):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            self.buffer += bytes(100)

    async def main() -> int:
        async with wired(lambda: Growing(bytearray(100))) as (protocol, sock):
            sock.send(bytes(1000))
            await protocol.received(1000)
            return len(protocol.buffer)

    assert run(contract_loop, main()) > 200


@pytest.mark.parametrize(
    ("buffer", "message", "error"),
    [
        (bytearray(), "get_buffer", r"RuntimeError: get_buffer\(\) returned an empty buffer"),
        (memoryview(b""), "get_buffer", r"RuntimeError: get_buffer\(\) returned an empty buffer"),
        (5, "get_buffer", r"TypeError: object of type 'int' has no len\(\)"),
        (b"read-only", "read", "TypeError: .*read-write bytes-like object, not bytes"),
        (memoryview(b"read-only"), "read", "TypeError: .*read-write bytes-like object, not memory"),
        (memoryview(bytearray(9))[::2], "read", "TypeError: .*read-write bytes-like object, not m"),
        ([0, 0], "read", "TypeError: .*read-write bytes-like object, not list"),
    ],
    ids=["empty", "empty view", "int", "bytes", "read-only view", "view with gaps", "list"],
)
def test_a_useless_buffer_ends_the_connection_with_a_report(
    contract_loop: AnyLoop, buffer: Any, message: str, error: str
) -> None:
    reports = reports_of(contract_loop)

    async def main() -> Peer:
        async with wired(lambda: BufferedPeer(buffer)) as (protocol, sock):
            sock.send(b"data")
            await protocol.lost()
            return protocol

    protocol = run(contract_loop, main())
    (report,) = reports
    assert re.fullmatch(
        error + ".*", f"{type(report['exception']).__name__}: {report['exception']}"
    )
    assert (
        report["message"]
        == {
            "get_buffer": "Fatal error: protocol.get_buffer() call failed.",
            "read": "Fatal read error on socket transport",
        }[message]
    )
    assert protocol.error is report["exception"]


def test_a_buffer_is_asked_for_before_the_end_is_seen(contract_loop: AnyLoop) -> None:
    class Asked(BufferedPeer):
        def get_buffer(self, sizehint: int) -> Any:
            self.note("asked")
            return super().get_buffer(sizehint)

    async def main() -> list[str]:
        async with wired(Asked) as (protocol, sock):
            sock.close()
            await protocol.lost()
            return protocol.events

    assert run(contract_loop, main()) == ["made", "asked", "eof", "lost"]


@KINDS
def test_the_protocol_may_change_its_kind_in_mid_stream(contract_loop: AnyLoop, kind: str) -> None:
    """Protocol and BufferedProtocol take turns, each handing over inside its own callback."""
    expected = payload(2 * MIB)
    whole = bytearray()
    ways = []

    def hand_over(transport: asyncio.Transport, data: bytes, way: str) -> None:
        whole.extend(data)
        ways.append(way)
        successor = BufferedRelay(transport) if way == "data" else Relay()
        if isinstance(successor, Relay):
            successor.transport = transport
        transport.set_protocol(successor)
        assert transport.get_protocol() is successor
        if len(whole) == len(expected):
            done.set()

    class Relay(Peer):
        def data_received(self, data: bytes) -> None:
            hand_over(self.transport, data, "data")

    class BufferedRelay(asyncio.BufferedProtocol):
        def __init__(self, transport: asyncio.Transport) -> None:
            self.transport, self.buffer = transport, bytearray(1000)

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            hand_over(self.transport, bytes(self.buffer[:nbytes]), "buffer")

    done = asyncio.Event()

    async def main() -> None:
        async with wired(Relay, kind) as (_, sock):
            await contract_loop.sock_sendall(sock, expected)
            await done.wait()

    run(contract_loop, main())
    assert digest(whole) == digest(expected)
    assert ways == (["data", "buffer"] * len(ways))[: len(ways)]
    assert len(ways) > 4


def test_a_new_protocol_gets_what_is_pending_and_the_end(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(BufferedPeer) as (old, sock):
            old.transport.pause_reading()
            sock.send(b"pending")
            old.transport.set_protocol(new := Peer())
            old.transport.resume_reading()
            await new.received(7)
            sock.close()
            await new.lost()
            assert new.events == ["eof", "lost"]
            assert (old.events, bytes(old.data)) == (["made"], b"")

    run(contract_loop, main())


def test_what_only_looks_like_a_buffered_protocol_gets_data(contract_loop: AnyLoop) -> None:
    """asyncio asks for the class and not for the methods."""

    class Misleading(Peer):
        def get_buffer(self, sizehint: int) -> bytearray:
            raise AssertionError

        def buffer_updated(self, nbytes: int) -> None:
            raise AssertionError

    async def main() -> bytes:
        async with wired(Misleading) as (protocol, sock):
            sock.send(b"data")
            await protocol.received(4)
            return bytes(protocol.data)

    assert run(contract_loop, main()) == b"data"


# ----------------------------------------------------------------------------------------- writing


class Subclass(bytes):
    """Bytes by another name."""


@pytest.mark.parametrize(
    "data",
    [
        b"written",
        Subclass(b"written"),
        bytearray(b"written"),
        memoryview(b"written"),
        memoryview(bytearray(b"un-written"))[3:],
        memoryview(array.array("I", struct.pack("7s9x", b"written"))),
    ],
    ids=lambda data: type(data).__name__,
)
@pytest.mark.parametrize("is_queued", [False, True], ids=["sent", "queued"])
def test_every_kind_of_bytes_is_written_exactly(
    contract_loop: AnyLoop, data: Any, is_queued: bool
) -> None:
    if is_queued and memoryview(data).itemsize > 1 and is_stock(contract_loop):
        pytest.skip("asyncio cuts such a view by its elements")
    first = bytes(MIB if is_queued else 1)

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            assert protocol.transport.write(first) is None  # type: ignore[func-returns-value]
            assert protocol.transport.write(data) is None  # type: ignore[func-returns-value]
            protocol.transport.write(b"")
            protocol.transport.write(b" to the end")
            protocol.transport.close()
            return await read_to_end(sock)

    received = run(contract_loop, main())
    assert received[len(first) :].replace(b"\0", b"") == b"written to the end"
    assert len(received) == len(first) + memoryview(data).nbytes + 11


@pytest.mark.parametrize("bad", ["text", None, 5, [b"list"], array.array("b", b"1")], ids=repr)
def test_what_is_not_bytes_is_refused(contract_loop: AnyLoop, bad: Any) -> None:
    wanted = "bytes, bytearray, or memoryview" if SINCE_3_14 else "bytes-like"
    text = f"^data argument must be a {wanted} object, not '{type(bad).__name__}'$"

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            with pytest.raises(TypeError, match=text):
                protocol.transport.write(bad)
            protocol.transport.write(b"good")
            protocol.transport.write_eof()
            with pytest.raises(TypeError, match=text):
                protocol.transport.write(bad)
            return await read(sock, 5)

    assert run(contract_loop, main()) == b"good"


@pytest.mark.parametrize("is_queued", [False, True], ids=["sent", "queued"])
def test_a_view_with_gaps_is_a_fatal_write_error(contract_loop: AnyLoop, is_queued: bool) -> None:
    """asyncio's way: write() itself does not raise, the connection ends."""
    if is_queued and is_stock(contract_loop) and not SINCE_3_12:
        pytest.skip("asyncio 3.11 lets a TypeError out of write()")
    reports = reports_of(contract_loop)

    async def main() -> Peer:
        async with wired(Peer) as (protocol, sock):
            if is_queued:
                protocol.transport.write(bytes(MIB))
            protocol.transport.write(memoryview(b"with gaps")[::2])
            if is_queued:
                await read(sock, MIB)
            await protocol.lost()
            return protocol

    protocol = run(contract_loop, main())
    (report,) = reports
    assert report["message"] == "Fatal write error on socket transport"
    assert isinstance(report["exception"], BufferError)
    assert protocol.error is report["exception"]


@KINDS
def test_a_buffer_may_change_once_it_was_sent(contract_loop: AnyLoop, kind: str) -> None:
    async def main() -> bytes:
        async with wired(Peer, kind) as (protocol, sock):
            buffer = bytearray(b"old content")
            protocol.transport.write(buffer)
            buffer[:] = b"new content"
            buffer += b" and more"
            view = memoryview(buffer)
            protocol.transport.write(view)
            view[:3] = b"any"
            protocol.transport.writelines([buffer, view])
            view[:3] = b"bad"
            protocol.transport.close()
            return await read_to_end(sock)

    more = b" content and more"
    expected = b"old content" + b"new" + more + (b"any" + more) * 2
    assert run(contract_loop, main()) == expected


@pytest.mark.parametrize("how", ["write", "writelines"])
@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_a_buffer_that_had_to_wait_may_change_too(
    loop: Loop, how: str, kind: type[bytearray | memoryview]
) -> None:
    """More than asyncio promises: since 3.12 it queues the caller's own memory."""

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            for first in (0, 1):
                buffer = bytearray(payload(MIB, first))
                data = kind(buffer)
                if how == "write":
                    protocol.transport.write(data)
                else:
                    protocol.transport.writelines([data[:10], data[10:]])
                assert protocol.transport.get_write_buffer_size() > 0
                buffer[:] = bytes(MIB)
                del data
                buffer += b"it may be resized"
            protocol.transport.close()
            return await read_to_end(sock)

    assert digest(run(loop, main())) == digest(payload(MIB) + payload(MIB, 1))


def test_a_wide_view_that_had_to_wait_is_counted_in_bytes(loop: Loop) -> None:
    """More than asyncio promises: since 3.12 it counts and cuts a view by its elements."""
    data = payload(4 * MIB)

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(memoryview(array.array("Q", data)))
            received = read_now(sock)
            left = len(data) - len(received)
            assert protocol.transport.get_write_buffer_size() == left > 0
            protocol.transport.write(memoryview(data).cast("B", (1024, 4096)))
            assert protocol.transport.get_write_buffer_size() == left + len(data)
            protocol.transport.close()
            return received + await read_to_end(sock)

    assert digest(run(loop, main())) == digest(data + data)


@pytest.mark.parametrize("is_queued", [False, True], ids=["sent", "queued"])
@pytest.mark.parametrize(
    "lines",
    [
        [b"one", b"two", b"three"],
        (b"one", bytearray(b"two"), memoryview(b"three")),
        [array.array("b", b"one"), b"two", b"three"],
        [b"onetwothree"],
    ],
    ids=["list", "mixed tuple", "with an array", "one"],
)
def test_writelines_writes_them_in_order(
    contract_loop: AnyLoop, lines: Any, is_queued: bool
) -> None:
    first = bytes(MIB if is_queued else 1)

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(first)
            protocol.transport.writelines(lines)
            protocol.transport.writelines(line for line in lines)
            protocol.transport.write(b" and on")
            protocol.transport.writelines([])
            protocol.transport.close()
            return await read_to_end(sock)

    assert run(contract_loop, main())[len(first) :] == b"onetwothree" * 2 + b" and on"


@KINDS
def test_writelines_takes_more_pieces_than_one_system_call(
    contract_loop: AnyLoop, kind: str
) -> None:
    data = payload(1_500_000)
    pieces = [data[start : start + 500] for start in range(0, len(data), 500)]
    assert len(pieces) > 2 * 1024, "IOV_MAX is 1024"

    async def main() -> bytes:
        async with wired(Peer, kind) as (protocol, sock):
            protocol.transport.writelines(pieces)
            for piece in pieces:
                protocol.transport.write(piece)
            protocol.transport.close()
            return await read_to_end(sock)

    assert digest(run(contract_loop, main())) == digest(data + data)


@pytest.mark.parametrize("bad", ["text", 5, [b"list"]], ids=repr)
def test_writelines_with_something_else_than_bytes_writes_none_of_them(
    contract_loop: AnyLoop, bad: Any
) -> None:
    if SINCE_3_15 and is_stock(contract_loop):
        pytest.skip("asyncio 3.15 keeps what came before and forgets to send it")

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            with pytest.raises(TypeError, match="a bytes-like object"):
                protocol.transport.writelines([b"before", bad, b"after"])
            assert protocol.transport.get_write_buffer_size() == 0
            protocol.transport.write(b"good")
            return await read(sock, 4)

    assert run(contract_loop, main()) == b"good"


@pytest.mark.parametrize(
    "lines", [[b""], iter(()), [b"", bytearray(), memoryview(b"")]], ids=["one", "none", "three"]
)
def test_empty_lines_leave_nothing_to_write(loop: Loop, lines: Any) -> None:
    """More than asyncio promises: 3.12 and 3.13 span on such a line, or raised AssertionError."""

    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.writelines(lines)
            assert "write=<idle, bufsize=0>" in repr(protocol.transport)
            protocol.transport.writelines([b"a", b"", b"b"])
            assert await read(sock, 2) == b"ab"
            assert "write=<idle, bufsize=0>" in repr(protocol.transport)

    run(loop, main())


def test_writelines_pauses_the_protocol_like_write(loop: Loop) -> None:
    """More than asyncio promises: in 3.12 and early 3.13 only write() did."""

    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.writelines([bytes(MIB)] * 3)
            assert protocol.events[1:] == ["pause"]
            await read(sock, 3 * MIB)
            await protocol.has("resume")
            return list(protocol.events)

    assert run(loop, main()) == ["made", "pause", "resume"]


def test_write_and_writelines_keep_their_order_while_the_buffer_fills(
    contract_loop: AnyLoop,
) -> None:
    data = payload(3 * MIB)
    cuts = [0, 1, 1000, 200_000, 200_001, 900_000, 2_000_000, 2_500_000, 3 * MIB]
    pieces = [data[start:end] for start, end in itertools.pairwise(cuts)]

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            for number, piece in enumerate(pieces):
                if number % 2:
                    protocol.transport.write(piece)
                else:
                    protocol.transport.writelines([piece[:10], piece[10:]])
            protocol.transport.close()
            return await read_to_end(sock)

    assert digest(run(contract_loop, main())) == digest(data)


def test_a_write_of_70_kb_leaves_at_once(contract_loop: AnyLoop) -> None:
    """Users measure how far behind a peer is by what is left after write()."""

    async def main() -> None:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.write(bytes(70_000))
            assert protocol.transport.get_write_buffer_size() == 0
            assert protocol.events == ["made"]
            assert len(await read(sock, 70_000)) == 70_000

    run(contract_loop, main())


def test_a_write_has_left_when_the_turn_ends(contract_loop: AnyLoop) -> None:
    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(b"one ")
            protocol.transport.write(b"two")
            await turns(2)
            return read_now(sock)

    assert run(contract_loop, main()) == b"one two"


def test_the_write_buffer_s_size_is_what_the_kernel_has_not_taken(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            transport = protocol.transport
            transport.write(bytes(MIB))
            queued = transport.get_write_buffer_size()
            assert 0 < queued < MIB
            transport.write(bytes(1000))
            assert transport.get_write_buffer_size() == queued + 1000
            transport.writelines([bytes(10)] * 3)
            assert transport.get_write_buffer_size() <= queued + 1030
            taken = read_now(sock)
            assert len(taken) + transport.get_write_buffer_size() == MIB + 1030
            assert len(await read(sock, MIB + 1030 - len(taken))) + len(taken) == MIB + 1030
            await turns()
            assert transport.get_write_buffer_size() == 0

    run(contract_loop, main())


@pytest.mark.parametrize("method", ["write", "writelines"])
def test_writing_after_the_loss_is_quiet_four_times_and_then_warns(
    contract_loop: AnyLoop, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    if method == "writelines" and SINCE_3_12 and not SINCE_3_14:
        pytest.skip("asyncio 3.12 and 3.13 have a TypeError of their own making here")

    async def main() -> list[int]:
        warned = []
        async with wired(Peer) as (protocol, _):
            protocol.transport.close()
            protocol.transport.write(b"")
            for number in range(7):
                if number == 2:
                    await protocol.lost()
                getattr(protocol.transport, method)(b"x" if method == "write" else [b"x"])
                warned.append(len(caplog.records))
            assert protocol.transport.get_write_buffer_size() == 0
        return warned

    with caplog.at_level(logging.WARNING, "asyncio"):
        assert run(contract_loop, main()) == [0, 0, 0, 0, 1, 2, 3]
    assert {record.getMessage() for record in caplog.records} == {"socket.send() raised exception."}


def test_writelines_after_the_loss_is_as_quiet_as_write(loop: Loop) -> None:
    """More than asyncio 3.12 and 3.13 promise."""

    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            protocol.transport.abort()
            protocol.transport.writelines([b"too", b"late"])
            await protocol.lost()
            protocol.transport.writelines([b"too", b"late"])
            assert protocol.transport.get_write_buffer_size() == 0

    run(loop, main())


def test_what_is_written_while_close_flushes_is_sent_too(contract_loop: AnyLoop) -> None:
    data = payload(MIB)

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(data)
            protocol.transport.close()
            assert protocol.transport.is_closing()
            protocol.transport.write(b"more")
            protocol.transport.write_eof()
            protocol.transport.write(b" and more")
            received = await read_to_end(sock)
            await protocol.lost()
            return received

    assert run(contract_loop, main()) == data + b"more and more"


# --------------------------------------------------------------------------------- ends and losses


@KINDS
@pytest.mark.parametrize("size_bytes", [0, 10, 3 * MIB], ids=["nothing", "little", "much"])
def test_close_sends_what_was_written(contract_loop: AnyLoop, size_bytes: int, kind: str) -> None:
    data = payload(size_bytes)

    async def main() -> Peer:
        async with wired(Peer, kind) as (protocol, sock):
            protocol.transport.write(data)
            protocol.transport.close()
            protocol.transport.close()
            assert not protocol.is_lost, "never inside close()"
            assert digest(await read_to_end(sock)) == digest(data)
            await protocol.lost()
            await turns()
            protocol.transport.close()
            return protocol

    protocol = run(contract_loop, main())
    assert [event for event in protocol.events if event not in ("pause", "resume")] == [
        "made",
        "lost",
    ]
    assert protocol.error is None


def test_close_lets_the_flush_resume_writing_before_the_loss(contract_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(bytes(MIB))
            protocol.transport.close()
            await read_to_end(sock)
            await protocol.lost()
            return protocol.events

    assert run(contract_loop, main()) == ["made", "pause", "resume", "lost"]


@pytest.mark.parametrize("first", [None, "close"])
def test_abort_throws_away_what_was_not_sent(contract_loop: AnyLoop, first: str | None) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            transport = protocol.transport
            transport.write(payload(MIB))
            taken = MIB - transport.get_write_buffer_size()
            if first:
                transport.close()
            for _ in range(2):
                transport.abort()
                assert transport.get_write_buffer_size() == 0
                assert transport.is_closing()
            transport.close()
            assert not protocol.is_lost, "never inside abort()"
            assert await read_to_end(sock) == payload(MIB)[:taken]
            await protocol.lost()
            assert protocol.error is None
            return protocol.events

    assert run(contract_loop, main()) == ["made", "pause", "lost"]


def test_the_peer_sees_the_end_after_connection_lost(contract_loop: AnyLoop) -> None:
    class Looking(Peer):
        def connection_lost(self, exc: Exception | None) -> None:
            with pytest.raises(BlockingIOError):
                self.far.recv(1)
            super().connection_lost(exc)

        far: socket.socket

    async def main() -> list[str]:
        async with wired(Looking) as (protocol, sock):
            protocol.far = sock
            protocol.transport.close()
            assert await read_to_end(sock) == b""
            return protocol.events

    assert run(contract_loop, main()) == ["made", "lost"]


@BOTH
@KINDS
@pytest.mark.parametrize("answer", [True, False, None])
def test_eof_received_decides_whether_the_connection_stays(
    contract_loop: AnyLoop, make: Callable[..., Peer], kind: str, answer: bool | None
) -> None:
    async def main() -> None:
        async with wired(lambda: make(keep_open=answer), kind) as (protocol, sock):
            sock.send(b"question")
            sock.shutdown(socket.SHUT_WR)
            await protocol.has("eof")
            await turns()
            assert protocol.data == b"question"
            assert protocol.is_lost is not answer or not protocol.is_lost
            assert protocol.transport.is_closing() is not bool(answer)
            if answer:
                assert protocol.transport.is_reading(), "says asyncio"
                data = payload(2 * MIB)
                protocol.transport.write(data)
                assert digest(await read(sock, len(data))) == digest(data)
                protocol.transport.close()
            assert await read_to_end(sock) == b""
            await protocol.lost()
            assert protocol.error is None
            assert [event for event in protocol.events if event[0] in "el"] == ["eof", "lost"]

    run(contract_loop, main())


def test_the_answer_to_a_half_closed_connection_is_flushed(contract_loop: AnyLoop) -> None:
    """eof_received that returns None closes, and close() sends what was written."""
    data = payload(2 * MIB)

    class Answering(Peer):
        def eof_received(self) -> bool | None:
            self.transport.write(data)
            return super().eof_received()

    async def main() -> None:
        async with wired(Answering, "tcp") as (protocol, sock):
            sock.shutdown(socket.SHUT_WR)
            assert digest(await read_to_end(sock)) == digest(data)
            await protocol.lost()
            assert protocol.error is None

    run(contract_loop, main())


def test_an_end_that_was_kept_open_is_told_again_after_resuming(contract_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(lambda: Peer(keep_open=True)) as (protocol, sock):
            sock.shutdown(socket.SHUT_WR)
            await protocol.has("eof")
            await turns(20)
            assert protocol.events == ["made", "eof"]
            protocol.transport.resume_reading()
            await turns(20)
            assert protocol.events == ["made", "eof"], "it was not paused"
            protocol.transport.pause_reading()
            protocol.transport.resume_reading()
            await protocol.until(lambda: protocol.events.count("eof") == 2)
            return list(protocol.events[:3])

    assert run(contract_loop, main()) == ["made", "eof", "eof"]


@KINDS
@pytest.mark.parametrize("size_bytes", [0, 10, 3 * MIB], ids=["nothing", "little", "much"])
def test_write_eof_ends_one_direction_only(
    contract_loop: AnyLoop, kind: str, size_bytes: int
) -> None:
    data = payload(size_bytes)

    async def main() -> None:
        async with wired(Peer, kind) as (protocol, sock):
            transport = protocol.transport
            transport.write(data)
            for _ in range(2):
                assert transport.write_eof() is None  # type: ignore[func-returns-value]
            for refused in (b"x", b""):
                with pytest.raises(
                    RuntimeError, match=r"^Cannot call write\(\) after write_eof\(\)$"
                ):
                    transport.write(refused)
            text = r"^Cannot call write(lines)?\(\) after write_eof\(\)$"
            with pytest.raises(RuntimeError, match=text):
                transport.writelines([b"x"])
            assert not transport.is_closing()
            assert digest(await read_to_end(sock)) == digest(data)
            await contract_loop.sock_sendall(sock, b"still heard")
            await protocol.received(11)
            sock.close()
            await protocol.lost()
            assert protocol.error is None

    run(contract_loop, main())


def test_both_directions_may_end_one_after_the_other(contract_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(lambda: Peer(keep_open=True), "tcp") as (protocol, sock):
            protocol.transport.write_eof()
            assert await read_to_end(sock) == b""
            sock.shutdown(socket.SHUT_WR)
            await protocol.has("eof")
            await turns(20)
            assert not protocol.is_lost, "it is the protocol's to close"
            protocol.transport.close()
            await protocol.lost()
            return protocol.events

    assert run(contract_loop, main()) == ["made", "eof", "lost"]


def test_write_eof_of_a_reset_connection_raises_what_the_kernel_says(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> None:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.pause_reading()
            reset(sock)
            with pytest.raises(OSError, match="not connected") as raised:
                protocol.transport.write_eof()
            assert raised.value.errno == errno.ENOTCONN
            assert not protocol.transport.is_closing()

    run(contract_loop, main())


@BOTH
def test_a_reset_while_reading_is_the_reason_of_the_loss(
    contract_loop: AnyLoop, make: type[Peer]
) -> None:
    reports = reports_of(contract_loop)

    async def main() -> Peer:
        async with wired(make, "tcp") as (protocol, sock):
            reset(sock)
            await protocol.lost()
            await turns()
            return protocol

    protocol = run(contract_loop, main())
    assert protocol.events == ["made", "lost ConnectionResetError"]
    assert protocol.error is not None
    assert protocol.error.errno == errno.ECONNRESET  # type: ignore[attr-defined]
    assert not reports


def test_a_reset_while_writing_is_the_reason_of_the_loss(contract_loop: AnyLoop) -> None:
    reports = reports_of(contract_loop)

    async def main() -> Peer:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.pause_reading()
            reset(sock)
            protocol.transport.write(b"anybody?")
            assert not protocol.is_lost, "never inside write()"
            protocol.transport.write(b"nobody")
            await turns(2)
            assert protocol.transport.is_closing(), "it was tried in this turn"
            await protocol.lost()
            await turns()
            return protocol

    assert run(contract_loop, main()).events == ["made", "lost ConnectionResetError"]
    assert not reports


def test_a_broken_pipe_is_the_reason_of_the_loss(contract_loop: AnyLoop) -> None:
    async def main() -> list[str]:
        async with wired(Peer, "unix") as (protocol, sock):
            protocol.transport.pause_reading()
            sock.close()
            protocol.transport.write(b"anybody?")
            await protocol.lost()
            await turns()
            return protocol.events

    assert run(contract_loop, main()) == ["made", "lost BrokenPipeError"]


@pytest.mark.parametrize("closes_first", [False, True])
def test_a_reset_during_the_flush_is_the_reason_of_the_loss(
    contract_loop: AnyLoop, closes_first: bool
) -> None:
    async def main() -> list[str]:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.pause_reading()
            protocol.transport.write(bytes(TOO_MUCH))
            if closes_first:
                protocol.transport.close()
            await turns()
            reset(sock)
            await protocol.lost()
            await turns()
            assert protocol.transport.get_write_buffer_size() == 0
            return protocol.events

    assert run(contract_loop, main()) == ["made", "pause", "lost ConnectionResetError"]


@BOTH
def test_what_came_before_a_reset_is_received_before_it(
    contract_loop: AnyLoop, make: type[Peer]
) -> None:
    """The kernel keeps it, and tells of the reset when it is read."""

    async def main() -> Peer:
        async with wired(make, "tcp") as (protocol, sock):
            protocol.transport.pause_reading()
            sock.send(b"last words")
            reset(sock)
            await turns(20)
            assert protocol.events == ["made"], "a paused transport does not ask"
            protocol.transport.resume_reading()
            await protocol.lost()
            return protocol

    protocol = run(contract_loop, main())
    assert protocol.events == ["made", "lost ConnectionResetError"]
    assert protocol.data == b"last words"


# ------------------------------------------------------------------------------------- flow control


LIMITS = [
    ({}, (16_384, 65_536)),
    ({"high": 10}, (2, 10)),
    ({"low": 10}, (10, 40)),
    ({"high": 0}, (0, 0)),
    ({"high": 5, "low": 5}, (5, 5)),
    ({"high": 100, "low": 0}, (0, 100)),
]


@pytest.mark.parametrize(("limits", "expected"), LIMITS, ids=str)
def test_limits_complete_each_other(
    contract_loop: AnyLoop, limits: dict[str, int], expected: tuple[int, int]
) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            transport = protocol.transport
            assert transport.get_write_buffer_limits() == (16_384, 65_536)
            transport.set_write_buffer_limits(**limits)
            assert transport.get_write_buffer_limits() == expected
            assert protocol.events == ["made"]

    run(contract_loop, main())


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"high": 1, "low": 2}, r"high \(1\) must be >= low \(2\) must be >= 0"),
        ({"high": -1}, r"high \(-1\) must be >= low \(-1\) must be >= 0"),
        ({"low": -1}, r"high \(-4\) must be >= low \(-1\) must be >= 0"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(
    contract_loop: AnyLoop, limits: dict[str, int], text: str
) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            with pytest.raises(ValueError, match=f"^{text}$"):
                protocol.transport.set_write_buffer_limits(**limits)
            assert protocol.transport.get_write_buffer_limits() == (16_384, 65_536)

    run(contract_loop, main())


@pytest.mark.parametrize("high", [0, 1000, 65_536, 500_000])
@KINDS
def test_a_protocol_is_paused_above_the_high_mark_and_resumed_at_the_low_one(
    contract_loop: AnyLoop, high: int, kind: str
) -> None:
    class Watching(Peer):
        def pause_writing(self) -> None:
            assert cast(Any, self.transport)._protocol_paused is True
            sizes.append(self.transport.get_write_buffer_size())
            super().pause_writing()

        def resume_writing(self) -> None:
            assert cast(Any, self.transport)._protocol_paused is False
            sizes.append(self.transport.get_write_buffer_size())
            super().resume_writing()

    sizes: list[int] = []

    async def main() -> list[str]:
        async with wired(Watching, kind) as (protocol, sock):
            transport = protocol.transport
            transport.set_write_buffer_limits(high)
            total = 0
            while protocol.events[-1] != "pause":
                assert transport.get_write_buffer_size() <= high
                transport.write(bytes(50_000))
                total += 50_000
            assert transport.get_write_buffer_size() > high
            transport.write(bytes(50_000))
            assert protocol.events == ["made", "pause"], "once is enough"
            assert len(await read(sock, total + 50_000)) == total + 50_000
            await protocol.has("resume")
            return list(protocol.events)

    assert run(contract_loop, main()) == ["made", "pause", "resume"]
    assert high < sizes[0] <= high + 50_000
    assert sizes[1] <= high // 4


def test_a_lower_limit_pauses_at_once_and_a_higher_one_does_not_resume(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            transport = protocol.transport
            transport.set_write_buffer_limits(2 * MIB)
            transport.write(bytes(MIB))
            assert protocol.events == ["made"]
            transport.set_write_buffer_limits(1000)
            assert protocol.events == ["made", "pause"]
            transport.set_write_buffer_limits(4 * MIB)
            await turns(20)
            assert protocol.events == ["made", "pause"]
            await read(sock, MIB)
            await protocol.has("resume")
            return list(protocol.events)

    assert run(contract_loop, main()) == ["made", "pause", "resume"]


@KINDS
def test_a_protocol_that_writes_when_it_is_resumed_loses_nothing(
    contract_loop: AnyLoop, kind: str
) -> None:
    pieces = [payload(300_000, number) for number in range(20)]
    left = list(pieces)

    class Pump(Peer):
        def resume_writing(self) -> None:
            super().resume_writing()
            self.pump()

        def pump(self) -> None:
            while left and not cast(Any, self.transport)._protocol_paused:
                self.transport.write(left.pop(0))
            if not left:  # not here: asyncio before 3.14 loses it twice then
                asyncio.get_running_loop().call_soon(self.transport.close)

    async def main() -> Pump:
        async with wired(Pump, kind) as (protocol, sock):
            protocol.pump()
            assert digest(await read_to_end(sock)) == digest(b"".join(pieces))
            await protocol.lost()
            return protocol

    events = run(contract_loop, main()).events
    turning = [event for event in events if event in ("pause", "resume")]
    assert turning == (["pause", "resume"] * len(turning))[: len(turning)]
    assert (events[0], events[-1]) == ("made", "lost")


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("closes_first", [False, True])
def test_a_connection_may_be_ended_in_resume_writing(
    loop: Loop, how: str, closes_first: bool
) -> None:
    """More than asyncio promises before 3.14: one connection_lost, and nothing else."""

    class Ending(Peer):
        def resume_writing(self) -> None:
            super().resume_writing()
            getattr(self.transport, how)()

    async def main() -> list[str]:
        async with wired(Ending) as (protocol, sock):
            protocol.transport.write(bytes(MIB))
            if closes_first:
                protocol.transport.close()
            await read_to_end(sock)
            await protocol.lost()
            await turns()
            return protocol.events

    assert run(loop, main()) == ["made", "pause", "resume", "lost"]


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_connection_may_be_ended_in_pause_writing(contract_loop: AnyLoop, how: str) -> None:
    class Ending(Peer):
        def pause_writing(self) -> None:
            super().pause_writing()
            getattr(self.transport, how)()

    async def main() -> tuple[list[str], int]:
        async with wired(Ending) as (protocol, sock):
            protocol.transport.write(bytes(MIB))
            size = len(await read_to_end(sock))
            await protocol.lost()
            return protocol.events, size

    events, size = run(contract_loop, main())
    if how == "close":
        assert (events, size) == (["made", "pause", "resume", "lost"], MIB)
    else:
        assert events == ["made", "pause", "lost"]
        assert size < MIB


@pytest.mark.parametrize("method", ["write", "abort"])
def test_nothing_done_after_a_flushed_close_raises(loop: Loop, method: str) -> None:
    """More than asyncio promises before 3.14, where it was an AttributeError."""

    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.write(bytes(MIB))
            protocol.transport.close()
            await read_to_end(sock)
            await protocol.lost()
            await turns()
            if method == "write":
                protocol.transport.write(b"too late")
            else:
                protocol.transport.abort()
            await turns()
            assert protocol.events == ["made", "pause", "resume", "lost"]

    run(loop, main())


def test_streams_wait_for_a_slow_reader(contract_loop: AnyLoop) -> None:
    data = payload(8 * MIB)

    async def main() -> int:
        near, far = tcp_pair()
        far.setblocking(False)
        with far:
            _, writer = await asyncio.open_connection(sock=near)
            writer.write(data[: 4 * MIB])
            writer.write(data[4 * MIB :])
            draining = asyncio.ensure_future(writer.drain())
            await turns(20)
            assert not draining.done()
            received = await read(far, len(data) - 20_000)
            await draining
            writer.close()
            received += await read_to_end(far)
            await writer.wait_closed()
            assert digest(received) == digest(data)
            return len(received)

    assert run(contract_loop, main()) == len(data)


# ------------------------------------------------------------------------- protocols that raise


class Faulty(BufferedPeer):
    """Raises one error in one callback, once, after it has done its duty there."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.failure = where, error

    def fail(self, where: str) -> None:
        if where == self.where:
            self.where = ""
            raise self.failure

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.fail("connection_made")

    def get_buffer(self, sizehint: int) -> Any:
        self.fail("get_buffer")
        return super().get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        self.fail("buffer_updated")

    def eof_received(self) -> bool | None:
        super().eof_received()
        self.fail("eof_received")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.fail("connection_lost")

    def pause_writing(self) -> None:
        super().pause_writing()
        self.fail("pause_writing")

    def resume_writing(self) -> None:
        super().resume_writing()
        self.fail("resume_writing")


class FaultyWithData(Peer):
    """The same for data_received, which a BufferedProtocol does not have."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.failure = error

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        raise self.failure


def faulty(where: str, error: BaseException) -> Callable[[], Peer]:
    kind = FaultyWithData if where == "data_received" else Faulty
    return lambda: kind(where, error)


READ_CALLBACKS = ["data_received", "get_buffer", "buffer_updated", "eof_received"]
FLOW_CALLBACKS = ["pause_writing", "resume_writing"]


async def provoke(protocol: Peer, sock: socket.socket, where: str) -> None:
    """Do what makes the callback run."""
    if where in FLOW_CALLBACKS:
        protocol.transport.write(bytes(MIB))
        await read(sock, MIB)
    elif where == "eof_received":
        sock.shutdown(socket.SHUT_WR)
    elif where == "connection_lost":
        protocol.transport.abort()
    else:
        sock.send(b"data")
    await turns(20)


@pytest.mark.parametrize("error", [ValueError("mine"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("where", READ_CALLBACKS)
def test_a_read_callback_that_raises_ends_the_connection_with_a_report(
    contract_loop: AnyLoop, where: str, error: BaseException
) -> None:
    reports = reports_of(contract_loop)

    async def main() -> Peer:
        async with wired(faulty(where, error)) as (protocol, sock):
            await provoke(protocol, sock, where)
            assert protocol.transport.get_extra_info("socket").fileno() == -1
            (report,) = reports
            assert report == {
                "message": f"Fatal error: protocol.{where}() call failed.",
                "exception": error,
                "transport": protocol.transport,
                "protocol": protocol,
            }
            return protocol

    protocol = run(contract_loop, main())
    assert protocol.events[-1] == f"lost {type(error).__name__}"
    assert protocol.error is error
    reports.clear()


@pytest.mark.parametrize("where", READ_CALLBACKS)
def test_an_oserror_of_a_read_callback_is_a_loss_without_a_report(
    contract_loop: AnyLoop, where: str
) -> None:
    error = OSError("mine")
    reports = reports_of(contract_loop)

    async def main() -> Peer:
        async with wired(faulty(where, error)) as (protocol, sock):
            await provoke(protocol, sock, where)
            await protocol.lost()
            return protocol

    assert run(contract_loop, main()).error is error
    assert not reports


@pytest.mark.parametrize("where", FLOW_CALLBACKS)
def test_a_flow_callback_that_raises_is_reported_and_the_connection_goes_on(
    contract_loop: AnyLoop, where: str
) -> None:
    error = ValueError("mine")
    reports = reports_of(contract_loop)

    async def main() -> None:
        async with wired(faulty(where, error)) as (protocol, sock):
            await provoke(protocol, sock, where)
            assert reports == [
                {
                    "message": f"protocol.{where}() failed",
                    "exception": error,
                    "transport": protocol.transport,
                    "protocol": protocol,
                }
            ]
            protocol.transport.write(b"still here")
            assert await read(sock, 10) == b"still here"
            assert protocol.events == ["made", "pause", "resume"]

    run(contract_loop, main())


def test_connection_made_that_raises_is_reported_and_the_connection_goes_on(
    contract_loop: AnyLoop,
) -> None:
    error = ValueError("mine")
    reports = reports_of(contract_loop)

    async def main() -> None:
        async with wired(faulty("connection_made", error)) as (protocol, sock):
            sock.send(b"data")
            await protocol.received(4)
            (report,) = reports
            assert report["exception"] is error
            assert report["message"].startswith("Exception in callback ")
            assert "connection_made" in report["message"]
            assert isinstance(report["handle"], asyncio.Handle)
            assert set(report) == {"message", "exception", "handle"}

    run(contract_loop, main())


@pytest.mark.parametrize("how", ["abort", "close", "flush", "eof", "reset"])
def test_connection_lost_that_raises_is_reported_and_the_socket_is_closed(
    contract_loop: AnyLoop, how: str
) -> None:
    error = ValueError("mine")
    reports = reports_of(contract_loop)

    async def main() -> None:
        make = faulty("connection_lost", error)
        async with wired(make, "tcp") as (protocol, sock):
            transport: Any = protocol.transport
            if how == "flush":
                transport.write(bytes(TOO_MUCH))
                transport.close()
                await read_to_end(sock)
            elif how == "reset":
                reset(sock)
            elif how == "eof":
                protocol.eof_received = lambda: None  # type: ignore[method-assign]
                sock.close()
            else:
                getattr(transport, how)()
            await protocol.lost()
            await turns()
            assert (transport._sock, transport.get_protocol()) == (None, None)
            assert transport.get_extra_info("socket").fileno() == -1
            (report,) = reports
            assert report["exception"] is error
            assert report["message"].startswith("Exception in callback ")
            assert set(report) == {"message", "exception", "handle"}

    run(contract_loop, main())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "where", ["connection_made", *READ_CALLBACKS, *FLOW_CALLBACKS, "connection_lost"]
)
def test_an_exit_leaves_the_loop_and_not_the_connection(
    contract_loop: AnyLoop, where: str, error: type[BaseException]
) -> None:
    reports = reports_of(contract_loop)
    near, far = socket.socketpair()
    far.setblocking(False)
    protocol = faulty(where, error())()

    async def begin() -> None:
        await contract_loop.create_connection(lambda: protocol, sock=near)
        await provoke(protocol, far, where)

    async def go_on() -> None:
        await asyncio.wait([task])
        transport: Any = protocol.transport
        if where == "connection_lost":
            assert transport._sock is None
        else:
            assert not transport.is_closing()
            transport.set_protocol(successor := Peer())
            while transport._protocol_paused:
                read_now(far)
                await asyncio.sleep(0)
            read_now(far)
            transport.write(b"still here")
            assert await read(far, 10) == b"still here"
            if where != "eof_received":
                far.send(b"and listening")
                await successor.received(13)
            transport.abort()
            await successor.lost()
        await turns()

    with far:
        task = contract_loop.create_task(begin())
        with pytest.raises(error):
            contract_loop.run_until_complete(task)
        run(contract_loop, go_on())
    with contextlib.suppress(error):
        task.result()
    if not (is_stock(contract_loop) and where == "resume_writing"):
        assert not reports  # asyncio complains there of an empty buffer


# ---------------------------------------------------------------------------------------- sendfile


class Unread(io.BytesIO):
    """A file without a descriptor: sendfile() must read and write it."""


@pytest.fixture
def file_data() -> bytes:
    """What the files of these tests hold."""
    return payload(3 * MIB + 17)


@pytest.fixture
def disk_file(tmp_path: Path, file_data: bytes) -> Iterator[Any]:
    """A file on a disk."""
    path = tmp_path / "file"
    path.write_bytes(file_data)
    with path.open("rb") as file:
        yield file


@KINDS
@pytest.mark.parametrize(("offset", "count"), [(0, None), (1000, None), (5, 100), (7, 2 * MIB)])
def test_sendfile_sends_what_it_is_told_and_leaves_the_file_behind_it(
    contract_loop: AnyLoop,
    disk_file: Any,
    file_data: bytes,
    kind: str,
    offset: int,
    count: int | None,
) -> None:
    expected = file_data[offset:][:count]

    async def main() -> None:
        async with wired(Peer, kind) as (protocol, sock):
            reading = asyncio.ensure_future(read(sock, len(expected)))
            sent = await contract_loop.sendfile(
                protocol.transport, disk_file, offset, count, fallback=False
            )
            assert sent == len(expected)
            assert disk_file.tell() == offset + sent
            assert digest(await reading) == digest(expected)
            protocol.transport.write(b"and on")
            assert await read(sock, 6) == b"and on"
            sock.send(b"heard")
            await protocol.received(5)

    run(contract_loop, main())


def test_sendfile_comes_after_what_was_written_and_before_what_follows(
    contract_loop: AnyLoop, disk_file: Any, file_data: bytes
) -> None:
    first, last = payload(MIB, 1), payload(MIB, 2)

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            reading = asyncio.ensure_future(read_to_end(sock))
            protocol.transport.write(first)
            await contract_loop.sendfile(protocol.transport, disk_file)
            protocol.transport.write(last)
            protocol.transport.close()
            return await reading

    assert digest(run(contract_loop, main())) == digest(first + file_data + last)


def test_while_sendfile_sends_nobody_writes_and_nothing_is_read(
    contract_loop: AnyLoop, disk_file: Any
) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            transport: Any = protocol.transport
            sending = asyncio.ensure_future(contract_loop.sendfile(transport, disk_file))
            await turns()
            with pytest.raises(RuntimeError, match=r"^unable to write; sendfile is in progress$"):
                transport.write(b"in between")
            assert not transport.is_reading()
            sock.send(b"for later")
            await turns()
            assert not protocol.data
            await read(sock, 3 * MIB + 17)
            await sending
            assert transport.is_reading()
            await protocol.received(9)
            fd = transport._sock_fd
            assert cast(Any, contract_loop)._transports[fd] is transport

    run(contract_loop, main())


def test_sendfile_leaves_a_paused_transport_paused(contract_loop: AnyLoop, disk_file: Any) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, sock):
            protocol.transport.pause_reading()
            await contract_loop.sendfile(protocol.transport, disk_file, 0, 1000)
            assert not protocol.transport.is_reading()
            assert len(await read(sock, 1000)) == 1000

    run(contract_loop, main())


def test_sendfile_to_a_peer_that_goes_away_raises(contract_loop: AnyLoop, disk_file: Any) -> None:
    async def main() -> list[str]:
        async with wired(Peer) as (protocol, sock):
            sending = asyncio.ensure_future(
                contract_loop.sendfile(protocol.transport, disk_file, fallback=False)
            )
            await turns()
            sock.close()
            with pytest.raises(BrokenPipeError):
                await sending
            await protocol.lost()
            await turns()
            return protocol.events

    assert run(contract_loop, main()) == ["made", "lost ConnectionResetError"]


@pytest.mark.parametrize("how", ["reset", "abort"])
def test_sendfile_that_waits_for_earlier_bytes_hears_that_the_connection_is_lost(
    loop: Loop, disk_file: Any, how: str
) -> None:
    """More than asyncio promises: it sets the waiter's error twice, which it then reports."""

    async def main() -> None:
        async with wired(Peer, "tcp") as (protocol, sock):
            protocol.transport.write(bytes(TOO_MUCH))
            sending = asyncio.ensure_future(loop.sendfile(protocol.transport, disk_file))
            await turns()
            if how == "reset":
                reset(sock)
            else:
                protocol.transport.abort()
            with pytest.raises(ConnectionError):
                await sending
            await protocol.lost()
            await turns()

    run(loop, main())


def test_sendfile_on_a_closing_transport_is_refused(contract_loop: AnyLoop, disk_file: Any) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            protocol.transport.close()
            with pytest.raises(RuntimeError, match=r"^Transport is closing$"):
                await contract_loop.sendfile(protocol.transport, disk_file)

    run(contract_loop, main())


def test_sendfile_reads_and_writes_what_has_no_descriptor(
    contract_loop: AnyLoop, file_data: bytes
) -> None:
    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await contract_loop.sendfile(protocol.transport, Unread(file_data), fallback=False)
            reading = asyncio.ensure_future(read_to_end(sock))
            size = 100_000
            assert (
                await contract_loop.sendfile(protocol.transport, Unread(file_data), 9, size) == size
            )
            assert protocol.transport.get_protocol() is protocol
            assert protocol.transport.is_reading()
            protocol.transport.write(b"and on")
            protocol.transport.close()
            return await reading

    assert digest(run(contract_loop, main())) == digest(file_data[9:100_009] + b"and on")


def test_a_file_without_descriptor_reaches_a_slow_reader_unharmed(
    loop: Loop, file_data: bytes
) -> None:
    """More than asyncio promises: since 3.12 the buffer that is read into may still be queued."""

    async def main() -> bytes:
        async with wired(Peer) as (protocol, sock):
            sending = asyncio.ensure_future(loop.sendfile(protocol.transport, Unread(file_data)))
            received = bytearray()
            while len(received) < len(file_data):
                while not (cast(Any, protocol.transport)._protocol_paused or sending.done()):
                    await asyncio.sleep(0)
                received += await loop.sock_recv(sock, 50_000)
            assert await sending == len(file_data)
            return bytes(received)

    assert digest(run(loop, main(), limit=30)) == digest(file_data)


# --------------------------------------------------------------------------------------------- TLS

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


class Echo(Peer):
    """Sends back what it gets."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


@contextlib.asynccontextmanager
async def tls_pair(
    tls: Contexts, make_client: Callable[[], Peer], make_server: Callable[[], Peer]
) -> AsyncIterator[tuple[Peer, Peer]]:
    """A client and a server of TLS over TCP."""
    loop = asyncio.get_running_loop()
    made: asyncio.Queue[Peer] = asyncio.Queue()

    def factory() -> Peer:
        made.put_nowait(protocol := make_server())
        return protocol

    server_side, client_side = tls
    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=server_side)
    _, near = await loop.create_connection(
        make_client,
        *server.sockets[0].getsockname(),
        ssl=client_side,
        server_hostname="localhost",
    )
    far = await made.get()
    await far.has("made")
    try:
        yield near, far
    finally:
        server.close()
        for protocol in (near, far):
            protocol.transport.abort()
        await near.lost()
        await far.lost()
        await turns()


@pytest.mark.parametrize("size_bytes", [1, 16_384, MIB])
def test_tls_echoes_every_byte_and_ends_on_both_sides(
    contract_loop: AnyLoop, tls: Contexts, size_bytes: int
) -> None:
    data = payload(size_bytes)

    async def main() -> None:
        async with tls_pair(tls, Peer, Echo) as (near, far):
            info = near.transport.get_extra_info
            assert info("ssl_object").version().startswith("TLS")
            assert info("peercert")["subject"]
            assert info("peername") == far.transport.get_extra_info("sockname")
            assert info("socket").fileno() > 0
            near.transport.write(data)
            await near.received(size_bytes)
            assert digest(near.data) == digest(far.data) == digest(data)
            near.transport.close()
            await near.lost()
            await far.lost()
            assert (near.error, far.error) == (None, None)

    run(contract_loop, main())


def test_tls_respects_a_slow_reader(contract_loop: AnyLoop, tls: Contexts) -> None:
    data = payload(8 * MIB)

    async def main() -> None:
        async with tls_pair(tls, Peer, Peer) as (near, far):
            far.transport.pause_reading()
            for start in range(0, len(data), 100_000):
                near.transport.write(data[start : start + 100_000])
            await near.has("pause")
            far.transport.resume_reading()
            await far.received(len(data))
            await near.has("resume")
            assert digest(far.data) == digest(data)

    run(contract_loop, main())


def test_tls_that_fails_leaves_the_server_serving(contract_loop: AnyLoop, tls: Contexts) -> None:
    async def main() -> None:
        loop = contract_loop
        made: list[Peer] = []

        def factory() -> Peer:
            made.append(Echo())
            return made[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0, ssl=tls[0])
        address = server.sockets[0].getsockname()
        with socket.create_connection(address) as sock:
            sock.setblocking(False)
            sock.send(b"this is no TLS\r\n" * 20)
            with contextlib.suppress(ConnectionResetError):
                await read_to_end(sock)
        transport, near = await loop.create_connection(
            Peer, *address, ssl=tls[1], server_hostname="localhost"
        )
        transport.write(b"served")
        await near.received(6)
        transport.close()
        await near.lost()
        server.close()
        await made[-1].lost()
        assert [protocol.events for protocol in made[:-1]] in ([[]], [["made"]], [])

    run(contract_loop, main())


class Upgrading(Peer):
    """A server that takes one line in plain text and then wants TLS."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.pause_reading()
        self.transport.write(b"go on\n")


async def bytes_wait(sock: Any) -> None:
    """Until the kernel holds unread bytes of a socket."""
    count = bytearray(4)
    while not int.from_bytes(count, sys.byteorder):
        await asyncio.sleep(0.001)
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, count)


def test_start_tls_gives_what_was_received_before_to_the_new_protocol(
    contract_loop: AnyLoop, tls: Contexts
) -> None:
    """Both sides; the client's hello waits in the kernel before the server starts TLS."""

    async def main() -> None:
        loop = contract_loop
        data = payload(300_000)
        async with served(Upgrading) as (plain, sock):
            transport, client = await loop.create_connection(Peer, sock=sock.dup())
            transport.write(b"STARTTLS\n")
            await client.received(6)
            upgrading = asyncio.ensure_future(
                loop.start_tls(transport, near := Peer(), tls[1], server_hostname="localhost")
            )
            await bytes_wait(plain.transport.get_extra_info("socket"))
            far = Echo()
            server_side = await loop.start_tls(plain.transport, far, tls[0], server_side=True)
            client_side = await upgrading
            assert server_side is not None
            assert client_side is not None
            far.transport = server_side
            near.transport = client_side
            near.transport.write(data)
            await near.received(len(data))
            assert digest(near.data) == digest(far.data) == digest(data)
            assert (bytes(plain.data), bytes(client.data)) == (b"STARTTLS\n", b"go on\n")
            assert plain.events == client.events == ["made"]
            near.transport.close()
            await near.lost()
            await far.lost()
            await turns()

    run(contract_loop, main())


def test_a_stream_writer_may_start_tls(contract_loop: AnyLoop, tls: Contexts) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go on\n")
        await writer.start_tls(tls[0])
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        done.set()

    done = asyncio.Event()

    async def main() -> bytes:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"go on\n"
        await writer.start_tls(tls[1], server_hostname="localhost")
        writer.write(b"secret\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        await done.wait()
        server.close()
        return answer

    assert run(contract_loop, main()) == b"SECRET\n"


def test_start_tls_on_what_cannot_is_refused(contract_loop: AnyLoop, tls: Contexts) -> None:
    async def main() -> None:
        async with wired(Peer) as (protocol, _):
            with pytest.raises(TypeError, match="sslcontext is expected to be an instance"):
                await contract_loop.start_tls(protocol.transport, protocol, cast(Any, None))
            cast(Any, protocol.transport)._start_tls_compatible = False
            with pytest.raises(TypeError, match=r"is not supported by start_tls\(\)"):
                await contract_loop.start_tls(protocol.transport, protocol, tls[1])

    run(contract_loop, main())


# ------------------------------------------------------------------------------------------ servers


def test_a_server_says_what_it_is_and_closes(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        loop = contract_loop
        server = await loop.create_server(Peer, "127.0.0.1", 0, start_serving=False)
        assert not server.is_serving()
        assert server.get_loop() is loop
        await server.start_serving()
        await server.start_serving()
        assert server.is_serving()
        (sock,) = server.sockets
        assert type(sock).__name__ == "TransportSocket"
        address = sock.getsockname()
        server.close()
        server.close()
        assert not server.is_serving()
        assert server.sockets == ()
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(Peer, *address)

    run(contract_loop, main())


async def serve_three(loop: AnyLoop) -> tuple[Any, list[Peer], list[socket.socket]]:
    """A server, the protocols of its three connections, and their clients."""
    made: list[Peer] = []

    def factory() -> Peer:
        made.append(Peer())
        return made[-1]

    server = await loop.create_server(factory, "127.0.0.1", 0)
    socks = [socket.create_connection(server.sockets[0].getsockname()) for _ in range(3)]
    for sock in socks:
        sock.setblocking(False)
    while len(made) < 3 or not all(protocol.events for protocol in made):
        await asyncio.sleep(0.001)
    return server, made, socks


def test_a_closed_server_keeps_its_connections(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        server, made, socks = await serve_three(contract_loop)
        server.close()
        waiting = asyncio.ensure_future(server.wait_closed())
        await turns()
        assert waiting.done() is not SINCE_3_12, "since 3.12 it waits for the connections"
        for protocol, sock in zip(made, socks, strict=True):
            with sock:
                protocol.transport.write(b"still here")
                assert await read(sock, 10) == b"still here"
                assert waiting.done() is not SINCE_3_12
            await protocol.lost()
        await waiting

    run(contract_loop, main())


@pytest.mark.skipif(sys.version_info < (3, 13), reason="asyncio has these since Python 3.13")
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
def test_a_server_may_end_its_connections(contract_loop: AnyLoop, how: str) -> None:
    async def main() -> None:
        server, made, socks = await serve_three(contract_loop)
        made[0].transport.write(data := payload(TOO_MUCH))
        server.close()
        getattr(server, how)()
        received = await read_to_end(socks[0])
        assert (digest(received) == digest(data)) is (how == "close_clients")
        for protocol, sock in zip(made, socks, strict=True):
            assert await read_to_end(sock) == b""
            await protocol.lost()
            sock.close()
        await server.wait_closed()
        assert {protocol.error for protocol in made} == {None}

    run(contract_loop, main())


def test_a_connection_that_was_dropped_unclosed_does_not_hold_its_server(
    contract_loop: AnyLoop,
) -> None:
    if is_stock(contract_loop) and sys.version_info < (3, 13):
        pytest.skip("asyncio counts it among the living, before 3.13")

    async def main() -> None:
        made: asyncio.Queue[asyncio.Transport] = asyncio.Queue()

        class Dropped(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                held = cast("asyncio.Transport", transport)
                held.pause_reading()
                made.put_nowait(held)

        server = await contract_loop.create_server(Dropped, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as sock:
            sock.setblocking(False)
            transport = await made.get()
            server.close()
            closing = asyncio.ensure_future(server.wait_closed())
            await turns()
            assert closing.done() is not SINCE_3_12
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del transport
                gc.collect()
                assert await read_to_end(sock) == b""
            await closing

    run(contract_loop, main())


def test_200_clients_that_come_in_one_turn_are_all_served(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        loop = contract_loop
        made: list[Echo] = []

        def factory() -> Echo:
            made.append(Echo())
            return made[-1]

        server = await loop.create_server(factory, "127.0.0.1", 0, backlog=200)
        address = server.sockets[0].getsockname()
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.create_connection(address)) for _ in range(200)]
            for number, sock in enumerate(socks):
                sock.setblocking(False)
                sock.send(b"%3d" % number)
            for number, sock in enumerate(socks):
                assert await read(sock, 3) == b"%3d" % number
        for protocol in made:
            await protocol.lost()
        assert len(made) == 200
        server.close()
        await server.wait_closed()

    run(contract_loop, main())


@pytest.mark.parametrize("debug", [False, True])
def test_a_factory_that_raises_costs_one_connection_and_the_server_goes_on(
    contract_loop: AnyLoop, debug: bool
) -> None:
    contract_loop.set_debug(debug)
    reports = reports_of(contract_loop)
    error = ValueError("mine")
    made: list[Peer] = []

    def factory() -> Peer:
        made.append(Peer())
        if len(made) == 1:
            raise error
        return made[-1]

    async def main() -> None:
        server = await contract_loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        with socket.create_connection(address) as refused:
            refused.setblocking(False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                while not made:
                    await asyncio.sleep(0.001)
                await turns()
                message = "Error on transport creation for incoming connection"
                assert reports == [{"message": message, "exception": error}] * debug
                reports.clear()
                error.__traceback__ = None
                gc.collect()
                assert await read_to_end(refused) == b""
        with socket.create_connection(address) as served:
            served.send(b"next")
            while len(made) < 2:
                await asyncio.sleep(0.001)
            await made[1].received(4)
        await made[1].lost()
        server.close()
        await server.wait_closed()

    run(contract_loop, main())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exit_of_a_factory_leaves_the_loop_and_not_the_server(
    contract_loop: AnyLoop, error: type[BaseException]
) -> None:
    made: list[Peer] = []

    def factory() -> Peer:
        made.append(Peer())
        if len(made) == 1:
            raise error
        return made[-1]

    async def serve() -> Any:
        return await contract_loop.create_server(factory, "127.0.0.1", 0)

    async def go_on() -> None:
        with socket.create_connection(server.sockets[0].getsockname()):
            while len(made) < 2:
                await asyncio.sleep(0.001)
            await made[1].has("made")
        await made[1].lost()
        server.close()

    server = contract_loop.run_until_complete(serve())
    reports = reports_of(contract_loop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with socket.create_connection(server.sockets[0].getsockname()), pytest.raises(error):
            contract_loop.run_until_complete(asyncio.sleep(10))
        run(contract_loop, go_on())
        gc.collect()
    assert not [report for report in reports if "Task" not in report["message"]]


def test_a_client_factory_that_raises_gives_its_error_to_the_caller(contract_loop: AnyLoop) -> None:
    def factory() -> Peer:
        raise ValueError("mine")

    async def main() -> None:
        near, far = socket.socketpair()
        with near, far, pytest.raises(ValueError, match=r"^mine$"):
            await contract_loop.create_connection(factory, sock=near)

    run(contract_loop, main())


def test_connections_that_ended_before_they_were_accepted_do_no_harm(
    contract_loop: AnyLoop,
) -> None:
    made: list[Peer] = []

    def factory() -> Peer:
        made.append(Peer())
        return made[-1]

    async def main() -> None:
        server = await contract_loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        for number in range(3):
            sock = socket.create_connection(address)
            if number == 0:
                reset(sock)
                continue
            sock.send(b"bye")
            if number == 1:
                reset(sock)
            else:
                sock.close()
        while len(made) < 3:
            await asyncio.sleep(0.001)
        for protocol in made:
            await protocol.lost()
        server.close()

    run(contract_loop, main())
    names = [protocol.transport.get_extra_info("peername") for protocol in made]
    assert [host for host, _ in names] == ["127.0.0.1"] * 3, "accept() had told who they were"
    assert [(protocol.events, bytes(protocol.data)) for protocol in made] == [
        (["made", "lost ConnectionResetError"], b""),
        (["made", "lost ConnectionResetError"], b"bye"),
        (["made", "eof", "lost"], b"bye"),
    ]


def test_a_server_that_closes_beside_an_accept_lets_go_of_it(loop: Loop) -> None:
    """asyncio drops such a connection with a warning or two; ours may serve it, or drop it."""
    reports = reports_of(loop)

    async def main() -> None:
        for delay in range(4):
            server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
            with socket.create_connection(server.sockets[0].getsockname()):
                await turns(delay)
                server.close()
                await turns(4)
            await turns(10)
            gc.collect()
            await server.wait_closed()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(loop, main())
    assert not reports


def starve(name: str) -> list[Any]:
    """Serve with two descriptors too few for five; what was reported, and how long it took."""
    loop = make_loop_named(name)
    reports = reports_of(loop)
    made: list[Peer] = []

    def factory() -> Peer:
        made.append(Peer())
        return made[-1]

    async def main() -> list[Any]:
        server = await loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        socks = [socket.create_connection(address) for _ in range(5)]
        free = [fcntl.fcntl(0, fcntl.F_DUPFD, 0) for _ in range(3)]
        for fd in free:
            os.close(fd)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1] + 1, hard))
        start, cpu_start = time.monotonic(), time.process_time()
        while not reports:
            await asyncio.sleep(0.001)
        accepted = len(made)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        while len(made) < len(socks):
            await asyncio.sleep(0.001)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
        for sock in socks:
            sock.close()
        for protocol in made:
            await protocol.lost()
        server.close()
        report = reports[0]
        return [
            {report["message"] for report in reports} == {report["message"]} and report["message"],
            sorted(report),
            report["exception"].errno,
            type(report["socket"]).__name__,
            accepted,
            seconds,
            cpu_seconds,
        ]

    try:
        return loop.run_until_complete(asyncio.wait_for(main(), 20))
    finally:
        loop.close()


@pytest.mark.parametrize("name", ["stock", *MONITORS])
def test_a_server_without_descriptors_reports_it_rests_a_second_and_serves_on(name: str) -> None:
    if name != "stock" and (reason := refusal(name)):
        pytest.skip(reason)
    *facts, seconds, cpu_seconds = run_child(starve, name).value
    keys = ["exception", "message", "socket"]
    message = "socket.accept() out of system resource"
    assert facts == [message, keys, errno.EMFILE, "TransportSocket", 3]
    assert 0.95 < seconds < 10
    assert cpu_seconds < 0.7, "it span while it had no descriptors"


# ---------------------------------------------------------------------------------- ways to connect


def test_a_refused_connection_says_whom_it_called(contract_loop: AnyLoop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

    async def main() -> None:
        with pytest.raises(ConnectionRefusedError) as raised:
            await contract_loop.create_connection(Peer, *address)
        assert raised.value.errno == errno.ECONNREFUSED
        assert str(raised.value) == f"[Errno 111] Connect call failed {address}"

    run(contract_loop, main())


def test_a_datagram_socket_is_no_stream(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        text = r"^A Stream Socket was expected, got <socket"
        with (
            socket.socket(type=socket.SOCK_DGRAM) as sock,
            pytest.raises(ValueError, match=text),
        ):
            await contract_loop.create_connection(Peer, sock=sock)

    run(contract_loop, main())


def test_a_connection_cancelled_before_it_is_made_closes_its_socket(
    contract_loop: AnyLoop,
) -> None:
    async def main() -> list[str]:
        near, far = socket.socketpair()
        protocol = Peer()
        with far:
            far.setblocking(False)
            connecting = asyncio.ensure_future(
                contract_loop.create_connection(lambda: protocol, sock=near)
            )
            await asyncio.sleep(0)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            assert await read_to_end(far) == b""
            await turns()
            assert near.fileno() == -1
            return protocol.events

    assert run(contract_loop, main()) == ["made", "lost"]


def test_unix_servers_and_clients_find_each_other_by_path(
    contract_loop: AnyLoop, tmp_path: Path
) -> None:
    data, path = payload(MIB), str(tmp_path / "socket")

    async def main() -> None:
        made: asyncio.Queue[Echo] = asyncio.Queue()

        def factory() -> Echo:
            made.put_nowait(protocol := Echo())
            return protocol

        server = await contract_loop.create_unix_server(factory, path)
        transport, near = await contract_loop.create_unix_connection(Peer, path)
        far = await made.get()
        await far.has("made")
        assert transport.get_extra_info("peername") == path
        assert far.transport.get_extra_info("sockname") == path
        assert far.transport.get_extra_info("peername") == ""
        transport.write(data)
        transport.write_eof()
        await near.lost()
        await far.lost()
        assert digest(near.data) == digest(far.data) == digest(data)
        server.close()
        await server.wait_closed()

    run(contract_loop, main())


def test_an_accepted_socket_may_be_handed_over_with_bytes_waiting(contract_loop: AnyLoop) -> None:
    async def main() -> None:
        near, far = tcp_pair()
        with far:
            far.setblocking(False)
            far.send(b"waiting")
            transport, protocol = await contract_loop.connect_accepted_socket(Echo, near)
            assert await read(far, 7) == b"waiting"
            assert transport.get_extra_info("peername") == far.getsockname()
        await protocol.lost()

    run(contract_loop, main())


def test_a_socket_made_blocking_is_made_non_blocking(contract_loop: AnyLoop) -> None:
    async def main() -> bool:
        async with wired(Peer) as (protocol, _):
            return bool(cast(Any, protocol.transport)._sock.getblocking())

    assert run(contract_loop, main()) is False


# --------------------------------------------------------------------------------------- debug mode


async def a_whole_life(kind: str) -> Peer:
    """One connection that does nearly everything."""
    loop = asyncio.get_running_loop()
    data = payload(2 * MIB)
    async with wired(lambda: Peer(keep_open=True), kind) as (protocol, sock):
        transport = protocol.transport
        sock.send(b"a")
        await protocol.received(1)
        transport.pause_reading()
        sock.send(b"b")
        transport.resume_reading()
        await protocol.received(2)
        transport.write(data)
        transport.writelines([b"c", bytearray(b"d")])
        assert digest(await read(sock, len(data) + 2)) == digest(data + b"cd")
        await loop.sock_sendall(sock, data)
        await protocol.received(2 + len(data))
        sock.shutdown(socket.SHUT_WR)
        await protocol.has("eof")
        transport.write_eof()
        assert await read_to_end(sock) == b""
        transport.close()
        await protocol.lost()
    assert digest(protocol.data) == digest(b"ab" + data)
    return protocol


@KINDS
def test_debug_mode_changes_nothing_but_what_is_logged(
    contract_loop: AnyLoop, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    contract_loop.set_debug(True)
    contract_loop.slow_callback_duration = 10
    with caplog.at_level(logging.DEBUG, "asyncio"):
        protocol = run(contract_loop, a_whole_life(kind))
    flow = ["pause", "resume"] if "pause" in protocol.events else []
    assert protocol.events == ["made", *flow, "eof", "lost"]
    log = "\n".join(record.getMessage() for record in caplog.records)
    for text in ("pauses reading", "resumes reading", "received EOF"):
        assert re.search(rf"^<\w+ .*fd=\d+.*> {text}$", log, re.M)


@pytest.mark.parametrize("way", ["read", "write"])
def test_debug_mode_logs_the_error_that_ended_a_connection(
    contract_loop: AnyLoop, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    contract_loop.set_debug(True)

    async def main() -> None:
        async with wired(Peer, "tcp") as (protocol, sock):
            if way == "write":
                protocol.transport.pause_reading()
            reset(sock)
            if way == "write":
                protocol.transport.write(b"x")
            await protocol.lost()

    with caplog.at_level(logging.DEBUG, "asyncio"):
        run(contract_loop, main())
    (record,) = [record for record in caplog.records if "Fatal" in record.getMessage()]
    assert record.getMessage().endswith(f": Fatal {way} error on socket transport")
    assert record.levelno == logging.DEBUG
    assert record.exc_info
    assert isinstance(record.exc_info[1], ConnectionResetError)


def test_debug_mode_says_where_a_failing_callback_was_scheduled(contract_loop: AnyLoop) -> None:
    contract_loop.set_debug(True)
    reports = reports_of(contract_loop)

    async def main() -> None:
        async with wired(faulty("connection_lost", ValueError("mine"))) as (protocol, _):
            protocol.transport.abort()
            await protocol.lost()
            await turns()

    run(contract_loop, main())
    (report,) = reports
    names = [frame.name for frame in report["source_traceback"]]
    assert "main" in names
