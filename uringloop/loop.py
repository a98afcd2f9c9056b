"""EventLoop: asyncio's own Unix event loop on our selector.

Why it exists: to be asyncio on io_uring, with the whole of asyncio's API. Promise: it is a
subclass, not a rewrite; whatever is not here is asyncio's own code.

The private hooks of asyncio that we use, all of them (each is guarded by
test_every_private_hook_is_where_we_expect_it):

- `BaseSelectorEventLoop._make_socket_transport`, `._make_datagram_transport`,
  `._make_ssl_transport`, `_UnixSelectorEventLoop._make_read_pipe_transport`: where transports are
  made.
- `max_size` of the first two and of the pipe transport, and of the `_ssl_protocol` of the third:
  how much is read at once.
- `BaseEventLoop._closed`: what its finalizer asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

from uringloop.selector import Selector

if TYPE_CHECKING:
    from uringloop.fdmon import Statistics

# Stock asyncio allocates 256 KiB for every read and gives most of it back. malloc serves what is
# above 128 KiB with fresh pages, mapped and unmapped each time: 20 us for a message of 1 KiB. So a
# read of a stream stays below that, and above 100 KiB so that a message of that size needs one.
# Receiving into one hot buffer and copying was measured and is slower (docs/decisions.md).
_STREAM_READ_MAX_BYTES = 120 * 1024

# One read of a pipe, of TLS plaintext, or one datagram: their natural limits are 64 KiB, 16 KiB and
# 64 KiB.
_READ_MAX_BYTES = 64 * 1024

# Ready descriptors per turn. asyncio collects everything first and runs it afterwards: a thousand
# messages of 100 KiB have left every cache before the first is answered. Thirty-two have not.
_EVENTS_PER_TURN = 32


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
        selector = Selector(monitor, events_max=_EVENTS_PER_TURN)
        try:
            super().__init__(selector)
        except BaseException:
            selector.close()
            self._closed = True
            raise
        self._uring_selector = selector

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

    def _make_socket_transport(self, sock: Any, *args: Any, **kwargs: Any) -> Any:
        _set_nodelay(sock)
        transport = super()._make_socket_transport(sock, *args, **kwargs)  # type: ignore[misc]
        transport.max_size = _STREAM_READ_MAX_BYTES
        return transport

    def _make_datagram_transport(self, sock: Any, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_datagram_transport(sock, *args, **kwargs)  # type: ignore[misc]
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            transport.max_size = _READ_MAX_BYTES
        return transport

    def _make_read_pipe_transport(self, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_read_pipe_transport(*args, **kwargs)  # type: ignore[misc]
        transport.max_size = _READ_MAX_BYTES
        return transport

    def _make_ssl_transport(self, rawsock: Any, *args: Any, **kwargs: Any) -> Any:
        _set_nodelay(rawsock)
        transport = super()._make_ssl_transport(rawsock, *args, **kwargs)  # type: ignore[misc]
        transport._ssl_protocol.max_size = _READ_MAX_BYTES
        return transport

    async def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        """As asyncio's; only how much is read at once differs."""
        transport: Any = await super().start_tls(*args, **kwargs)
        if transport is not None:  # the connection was lost meanwhile
            transport._ssl_protocol.max_size = _READ_MAX_BYTES
        return transport


def _set_nodelay(sock: Any) -> None:
    """Turns Nagle's algorithm off where asyncio does not.

    asyncio looks for IPPROTO_TCP, but a socket made by `socket.socket()`, and whatever it accepts,
    has protocol 0 (or 262, Multipath TCP). uvicorn listens so: 44 ms per response behind a delayed
    ACK. Test:
    test_nagle_is_off_on_a_listener_made_without_a_protocol.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.proto != socket.IPPROTO_TCP:
        with contextlib.suppress(OSError):  # the peer may be gone already; or it is not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
