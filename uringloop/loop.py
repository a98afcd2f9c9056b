"""EventLoop: asyncio's own Unix event loop on our selector.

Why it exists: to be asyncio on io_uring, with the whole of asyncio's API. Promise: it is a
subclass, not a rewrite; whatever is not here is asyncio's own code.

The private hooks of asyncio that we use, all of them (each is guarded by
test_every_private_hook_is_where_we_expect_it):

- `BaseSelectorEventLoop._make_socket_transport`, `._make_datagram_transport`,
  `._ensure_fd_no_transport`: which transport classes are made, one per socket.
- `_UnixSelectorEventLoop._make_read_pipe_transport`: the same for pipes.
- `BaseSelectorEventLoop._make_ssl_transport` and the `_ssl_protocol` of what it returns: the size
  of a TLS read.
- `_SelectorSocketTransport.set_protocol`, `._read_ready__data_received`, and in it `_loop`,
  `_sock`, `_conn_lost`, `_protocol`, `_fatal_error`, `_read_ready__on_eof`: how bytes are received.
- `BaseEventLoop._closed`: what its finalizer asks.
- `max_size` of `_SelectorDatagramTransport`, `_UnixReadPipeTransport` and `SSLProtocol`: how much
  is read at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import socket
from asyncio import selector_events, sslproto
from typing import TYPE_CHECKING, Any

from uringloop.selector import Selector

if TYPE_CHECKING:
    from uringloop.fdmon import Statistics

# Stock asyncio allocates 256 KiB for every read and gives most of it back: malloc maps and unmaps
# fresh pages each time, 25 us for a message of 1 KiB. We receive into one page-aligned buffer (recv
# to other addresses is up to ten times slower on some processors) and make bytes of the exact size.
# It stays below malloc's 128 KiB mmap threshold, and above 100 KiB so that a message of that size
# needs one read. Numbers: docs/decisions.md.
_RECV_BUFFER_SIZE_BYTES = 120 * 1024

# asyncio has no public name for it, and typeshed none at all.
_StockSocketTransport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]

# One read of a pipe, of TLS plaintext, or one datagram: their natural limits are 64 KiB, 16 KiB and
# 64 KiB.
_READ_SIZE_MAX_BYTES = 64 * 1024


class EventLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop that waits through io_uring, or through epoll or poll where io_uring is
    denied.

    `monitor` is None (URINGLOOP_MONITOR, else "auto"), "auto", "io_uring", "epoll" or "poll". Made
    in any thread, it may run in any other, one at a time; methods other than `call_soon_threadsafe`
    and `statistics` belong to the thread that runs it.

    Raises UringUnavailable when a forced monitor is refused, and ValueError for an unknown name.
    """

    # A loop that could not be made has nothing to close; asyncio's __init__ says False.
    _closed = True

    def __init__(self, *, monitor: str | None = None) -> None:
        selector = Selector(monitor)
        try:
            super().__init__(selector)
        except BaseException:
            selector.close()
            self._closed = True
            raise
        self._uring_selector = selector
        self._recv_buffer = memoryview(mmap.mmap(-1, _RECV_BUFFER_SIZE_BYTES))

    @property
    def monitor(self) -> str:
        """How the loop waits now: "io_uring", "epoll" or "poll"."""
        return self._uring_selector.monitor

    @property
    def fallback_reason(self) -> str | None:
        """Why it does not wait through io_uring although that was tried, in one line; else None."""
        return self._uring_selector.fallback_reason

    def statistics(self) -> Statistics:
        """Counters since the loop was made: turns, enters, SQEs, CQEs, overflows, downgrades, live
        watches.

        Safe from any thread; after `close()` the last values.
        """
        return self._uring_selector.statistics()

    # Signatures are asyncio's, which differ between Pythons (3.15 passes context=): everything is
    # handed on.

    def _make_socket_transport(self, sock: Any, protocol: Any, *args: Any, **kwargs: Any) -> Any:
        self._ensure_fd_no_transport(sock)  # type: ignore[attr-defined]
        _set_nodelay(sock)
        return _SocketTransport(self, sock, protocol, *args, **kwargs)

    def _make_datagram_transport(self, sock: Any, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_datagram_transport(sock, *args, **kwargs)  # type: ignore[misc]
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            transport.max_size = _READ_SIZE_MAX_BYTES
        return transport

    def _make_read_pipe_transport(self, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_read_pipe_transport(*args, **kwargs)  # type: ignore[misc]
        transport.max_size = _READ_SIZE_MAX_BYTES
        return transport

    def _make_ssl_transport(self, rawsock: Any, *args: Any, **kwargs: Any) -> Any:
        _set_nodelay(rawsock)
        transport = super()._make_ssl_transport(rawsock, *args, **kwargs)  # type: ignore[misc]
        transport._ssl_protocol.max_size = _READ_SIZE_MAX_BYTES
        return transport


def _set_nodelay(sock: Any) -> None:
    """Turns Nagle's algorithm off where asyncio does not.

    asyncio looks for IPPROTO_TCP, but a socket made by `socket.socket()`, and whatever it accepts,
    has protocol 0. That is how uvicorn listens: 44 ms per response behind a delayed ACK. Test:
    test_nagle_is_off_on_a_listener_made_without_a_protocol.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.proto == 0:
        with contextlib.suppress(OSError):  # the peer may be gone already; or it is not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _SocketTransport(_StockSocketTransport):  # type: ignore[misc]
    """asyncio's stream transport, receiving into the loop's one buffer.

    As in asyncio, any exception but the two that end a program ends the connection.
    """

    _loop: EventLoop

    def set_protocol(self, protocol: Any) -> None:
        if isinstance(protocol, sslproto.SSLProtocol):  # start_tls makes it without asking the loop
            protocol.max_size = _READ_SIZE_MAX_BYTES  # type: ignore[misc]
        super().set_protocol(protocol)

    def _read_ready__data_received(self) -> None:
        if self._conn_lost:
            return
        buffer = self._loop._recv_buffer
        try:
            size_bytes = self._sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001
            self._fatal_error(exc, "Fatal read error on socket transport")
            return
        if not size_bytes:
            self._read_ready__on_eof()
            return
        try:
            self._protocol.data_received(bytes(buffer[:size_bytes]))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001
            self._fatal_error(exc, "Fatal error: protocol.data_received() call failed.")
