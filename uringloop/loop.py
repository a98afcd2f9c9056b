"""EventLoop: asyncio's own Unix event loop with a native turn and native transports.

Why it exists: to be asyncio on io_uring, with the whole of asyncio's API. Promise: it is a
subclass, not a rewrite; whatever is neither here nor in `_core` is asyncio's own code.

The private hooks of asyncio that we use, all of them (each is guarded by
test_every_private_hook_is_where_we_expect_it):

- `BaseSelectorEventLoop._make_socket_transport`, `._make_datagram_transport`,
  `._make_ssl_transport`, `_UnixSelectorEventLoop._make_read_pipe_transport`: where transports are
  made. `._accept_connection`, `._start_serving`: where connections are accepted.
  `._ensure_fd_no_transport` and `._transports`: which descriptors belong to a transport.
  `base_events._check_ssl_socket`: what sock_recv() and its kin refuse.
- `BaseEventLoop._run_once`, `._add_callback`, `_add_reader`, `_remove_reader`, `_add_writer`,
  `_remove_writer`, `_timer_handle_cancelled`: the turn, which `_core.LoopCore` replaces.
- `BaseEventLoop._ready`, `._scheduled`, `._timer_cancelled_count`, `._stopping`, `._debug`,
  `._thread_id`, `._closed`, `._current_handle`, `._clock_resolution`, `._task_factory`: what
  asyncio's half reads and writes; `LoopCore` holds them. `._check_thread`, `._check_callback`,
  `._write_to_self`: called by it.
- `._check_closed`, `._check_running`, `._set_coroutine_origin_tracking`,
  `._asyncgen_firstiter_hook`, `._asyncgen_finalizer_hook`, `._signal_handlers`, `._csock`,
  `asyncio._set_running_loop`: for a host, what run_forever() does.
- `max_size` of the pipe transport, and of `sslproto.SSLProtocol`: how much is read at once.
- `Handle` and `TimerHandle` with `_repr_info`, `_run`, `_cancelled`, `_scheduled`;
  `_SelectorSocketTransport`, `_SelectorDatagramTransport`: what our handles and transports say they
  are.
- `_ssl_protocol`, `_app_transport`, `_selector`, `_process_events`, `asyncio._get_running_loop`:
  met on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import weakref
from asyncio import sslproto
from collections.abc import Callable, Iterator, MutableMapping
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import TYPE_CHECKING, Any, Final

from uringloop import _core
from uringloop.selector import Selector

if TYPE_CHECKING:
    from uringloop.fdmon import Statistics

# How much one read of a stream takes, and where it lies: docs/decisions.md 8.
_STREAM_READ_MAX_BYTES = 120 * 1024

# One read of a pipe, and of TLS plaintext: what a pipe holds, and what a TLS record does.
_PIPE_READ_MAX_BYTES = 64 * 1024
_TLS_READ_MAX_BYTES = 16 * 1024

_DATAGRAM_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)

#: When what was written leaves: in write(), when the callback that wrote returns, at the end of the
#: turn together with all others, or on io_uring with the next enter. docs/decisions.md 16
_SEND_POLICIES: Final = ("now", "callback", "turn", "ring")

#: Who receives on io_uring: a transport when its socket is readable, the monitor while messages are
#: small, or the monitor always. docs/decisions.md 22
_RECEIVE_MODES: Final = ("readiness", "auto", "ring")

#: The default, the least and the most of URINGLOOP_RECV_BYTES.
_RECV_BYTES: Final = (_STREAM_READ_MAX_BYTES, 4096, 16 * 1024 * 1024)

_POLL_MAX: Final = 2**62  # as for timeouts


class EventLoop(_core.LoopCore, asyncio.SelectorEventLoop):
    """An asyncio event loop that waits through io_uring, or through epoll or poll where io_uring is
    denied.

    `monitor` is None (URINGLOOP_MONITOR, else "auto"), "auto", "io_uring", "epoll" or "poll". Made
    in any thread, it may run in any other, one at a time; methods other than `call_soon_threadsafe`
    and `statistics` belong to the thread that runs it.

    Raises UringUnavailable when a forced monitor is refused, and ValueError for an unknown name.

    For measuring: URINGLOOP_SEND ("now", "callback", "turn" or "ring": when a write leaves),
    URINGLOOP_RECEIVE ("readiness", "auto" or "ring": who receives on io_uring) and
    URINGLOOP_RECV_BYTES (4096 to 16777216: how much one read takes), read when a loop is made.

    Adaptive polling, as QEMU's AioContext has it, trades CPU time for latency: before it sleeps, a
    wait looks for events for a while. That grows while it would have spared the sleep, up to
    `poll_max_ns`, and shrinks when nothing comes for longer. Off by default. On io_uring looking
    reads the ring's memory, on epoll and poll it repeats the system call. Other threads have the
    interpreter meanwhile. docs/polling.md has the figures.

        loop.poll_max_ns = 50_000  # or the environment variable URINGLOOP_POLL_MAX_NS
    """

    def __init__(self, *, monitor: str | None = None) -> None:
        send_policy = _chosen("URINGLOOP_SEND", _SEND_POLICIES, "turn")
        receive_mode = _chosen("URINGLOOP_RECEIVE", _RECEIVE_MODES, "auto")
        recv_bytes = _number("URINGLOOP_RECV_BYTES", *_RECV_BYTES)
        poll_max_ns = _number("URINGLOOP_POLL_MAX_NS", 0, 0, _POLL_MAX)
        selector = _LoopSelector(monitor)
        try:
            self._open(selector, send_policy, receive_mode, recv_bytes)
            selector.loop = self
            super().__init__(selector)
        except BaseException:
            selector.close()
            self._closed = True
            raise
        self._transports = _Transports(self)
        self._uring_selector = selector
        self._fdmon = selector._fdmon
        self._was_hosted = False
        self._polling = {"poll_max_ns": 0, "poll_grow": 0, "poll_shrink": 0}
        if poll_max_ns:
            self.poll_max_ns = poll_max_ns

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

    @property
    def poll_max_ns(self) -> int:
        """The longest that a wait looks before it sleeps, in nanoseconds; 0, the default, is not at
        all. Setting any of the three starts anew, from not looking.

        Worth it where the next message comes within some tens of microseconds: 50_000, say. Raises
        TypeError for what is no int, ValueError for a negative one.
        """
        return self._polling["poll_max_ns"]

    @poll_max_ns.setter
    def poll_max_ns(self, value: int) -> None:
        self._set_polling("poll_max_ns", value)

    @property
    def poll_grow(self) -> int:
        """What the time to look is multiplied by when it was too short; 0, the default, means 2. It
        begins at 4 us. Errors as for `poll_max_ns`; `loop.poll_grow = 4` is more eager.
        """
        return self._polling["poll_grow"]

    @poll_grow.setter
    def poll_grow(self, value: int) -> None:
        self._set_polling("poll_grow", value)

    @property
    def poll_shrink(self) -> int:
        """What the time to look is divided by when nothing came within `poll_max_ns`; 0, the
        default, ends it at once. Errors as for `poll_max_ns`; `loop.poll_shrink = 2` is more
        patient.
        """
        return self._polling["poll_shrink"]

    @poll_shrink.setter
    def poll_shrink(self, value: int) -> None:
        self._set_polling("poll_shrink", value)

    def _set_polling(self, name: str, value: int) -> None:
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        if not 0 <= value <= _POLL_MAX:
            raise ValueError(f"{name} must be from 0 to {_POLL_MAX}, not {value}")
        self._check_closed()  # type: ignore[attr-defined]
        self._polling[name] = value
        self._fdmon.set_polling(**self._polling)

    # Signatures are asyncio's, which differ between Pythons (3.15 passes context=): everything is
    # handed on.

    def _make_socket_transport(
        self, sock: Any, protocol: Any, waiter: Any = None, **kwargs: Any
    ) -> Any:
        if not isinstance(sock, socket.socket):  # only its methods can be used
            return super()._make_socket_transport(sock, protocol, waiter, **kwargs)  # type: ignore[misc]
        self._ensure_fd_no_transport(sock)  # type: ignore[attr-defined]
        _set_nodelay(sock)
        return _core.StreamTransport(self, sock, protocol, waiter, **kwargs)

    def _make_ssl_transport(
        self,
        rawsock: Any,
        protocol: Any,
        sslcontext: Any,
        waiter: Any = None,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: Any = None,
        ssl_shutdown_timeout: Any = None,
        **kwargs: Any,
    ) -> Any:
        ssl_protocol: Any = sslproto.SSLProtocol(
            self,
            protocol,
            sslcontext,
            waiter,
            server_side,
            server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
        ssl_protocol.max_size = _TLS_READ_MAX_BYTES
        self._make_socket_transport(rawsock, ssl_protocol, **kwargs)
        return ssl_protocol._app_transport

    def _make_datagram_transport(self, sock: Any, *args: Any, **kwargs: Any) -> Any:
        if type(sock) is not socket.socket or sock.family not in _DATAGRAM_FAMILIES:
            # Only its methods can be used, or its addresses are strange to us.
            return super()._make_datagram_transport(sock, *args, **kwargs)  # type: ignore[misc]
        self._ensure_fd_no_transport(sock)  # type: ignore[attr-defined]
        return _core.DatagramTransport(self, sock, *args, **kwargs)

    def _make_read_pipe_transport(self, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_read_pipe_transport(*args, **kwargs)  # type: ignore[misc]
        transport.max_size = _PIPE_READ_MAX_BYTES
        return transport

    async def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        """As asyncio's; only how much is read at once differs."""
        transport: Any = await super().start_tls(*args, **kwargs)
        if transport is not None:  # the connection was lost meanwhile
            transport._ssl_protocol.max_size = _TLS_READ_MAX_BYTES
        return transport

    def run_forever(self) -> None:
        """As asyncio's. That of CPython 3.13 takes down the state of a loop that runs already, and
        then refuses to run it.
        """
        self._check_closed()  # type: ignore[attr-defined]
        self._check_running()  # type: ignore[attr-defined]
        super().run_forever()

    # What run_forever() does before its first pass and after its last one; hosted.py

    def _begin_hosting(self) -> None:
        self._check_closed()  # type: ignore[attr-defined]
        self._check_running()  # type: ignore[attr-defined]
        self._set_coroutine_origin_tracking(self.get_debug())  # type: ignore[attr-defined]
        self._asyncgen_hooks = sys.get_asyncgen_hooks()
        self._thread_id = threading.get_ident()
        sys.set_asyncgen_hooks(
            firstiter=self._asyncgen_firstiter_hook,  # type: ignore[attr-defined]
            finalizer=self._asyncgen_finalizer_hook,  # type: ignore[attr-defined]
        )
        asyncio._set_running_loop(self)
        self._host(True)
        self._was_hosted = True

    def _end_hosting(self) -> None:
        if not self._signal_handlers:  # type: ignore[attr-defined]
            self._wake_no_more_on_signals()
        self._host(False)
        self._stopping = False
        self._thread_id = None
        asyncio._set_running_loop(None)
        self._set_coroutine_origin_tracking(False)  # type: ignore[attr-defined]
        sys.set_asyncgen_hooks(*self._asyncgen_hooks)

    def _wake_on_signals(self) -> None:
        """A signal whose handler is Python code runs when Python code does: a host that sleeps in C
        would let Ctrl-C wait. A descriptor of the host's stays; add_signal_handler() needs ours.
        """
        if threading.current_thread() is threading.main_thread():
            number = self._csock.fileno()  # type: ignore[attr-defined]
            other = signal.set_wakeup_fd(number, warn_on_full_buffer=False)
            if other not in (-1, number) and not self._signal_handlers:  # type: ignore[attr-defined]
                with contextlib.suppress(OSError):  # its owner has closed it
                    signal.set_wakeup_fd(other)

    def _wake_no_more_on_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            current = signal.set_wakeup_fd(-1)
            if current != self._csock.fileno():  # type: ignore[attr-defined]
                signal.set_wakeup_fd(current)

    def remove_signal_handler(self, sig: int) -> bool:
        """As asyncio's; signals go on waking a host."""
        removed: bool = super().remove_signal_handler(sig)
        if self._hosted:
            self._wake_on_signals()
        return removed

    def close(self) -> None:
        """As asyncio's. PyGObject's main loops remember the wake-up descriptor that they found, and
        bring it back when they end, after the loop did.
        """
        if self._was_hosted and not self.is_closed() and not self.is_running():
            self._wake_no_more_on_signals()
        super().close()

    # sock_recv() and its kin try, wait for one report of readiness, and try again: what was
    # cancelled while it waited has taken nothing. docs/decisions.md 20

    async def sock_recv(self, sock: Any, n: int) -> bytes:
        """As asyncio's. A call that is cancelled has consumed no byte."""
        data = self._recv_now(sock, n)
        if data is None:
            data = await self._sock_retry(sock, EVENT_READ, self._recv_now, sock, n)
        return data

    async def sock_recv_into(self, sock: Any, buf: Any) -> int:
        """As asyncio's. A call that is cancelled has consumed no byte."""
        size = self._recv_into_now(sock, buf)
        if size is None:
            size = await self._sock_retry(sock, EVENT_READ, self._recv_into_now, sock, buf)
        return size

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        """As asyncio's. How much a cancelled call has sent is not known, as there."""
        sent = self._send_now(sock, data, 0) or 0
        if type(data) is bytes and sent == len(data):
            return
        with memoryview(data) as view:
            while sent < view.nbytes:
                sent += await self._sock_retry(sock, EVENT_WRITE, self._send_now, sock, view, sent)

    async def sock_recvfrom(self, sock: Any, bufsize: int) -> tuple[bytes, Any]:
        """As asyncio's. A call that is cancelled has consumed no datagram."""
        received: tuple[bytes, Any] = await self._sock_call(sock, EVENT_READ, "recvfrom", bufsize)
        return received

    async def sock_recvfrom_into(self, sock: Any, buf: Any, nbytes: int = 0) -> tuple[int, Any]:
        """As asyncio's. A call that is cancelled has consumed no datagram."""
        received: tuple[int, Any] = await self._sock_call(
            sock, EVENT_READ, "recvfrom_into", buf, nbytes
        )
        return received

    async def sock_sendto(self, sock: Any, data: Any, address: Any) -> int:
        """As asyncio's."""
        sent: int = await self._sock_call(sock, EVENT_WRITE, "sendto", data, address)
        return sent

    async def sock_accept(self, sock: Any) -> tuple[socket.socket, Any]:
        """As asyncio's. A call that is cancelled has accepted nothing."""
        connection, address = await self._sock_call(sock, EVENT_READ, "accept")
        connection.setblocking(False)
        return connection, address

    async def _sock_call(self, sock: Any, event: int, method: str, *args: Any) -> Any:
        result = self._call_now(sock, method, *args)
        if result is None:
            result = await self._sock_retry(sock, event, self._call_now, sock, method, *args)
        return result

    async def _sock_retry(
        self, sock: Any, event: int, attempt: Callable[..., Any], *args: Any
    ) -> Any:
        """Waits, tries, waits again, until the attempt brings something."""
        result = None
        while result is None:
            fd = sock.fileno()
            waiter = self._wait_once(fd, event)
            try:
                await waiter
            except BaseException:
                self._wait_no_more(fd, event, waiter)
                raise
            result = attempt(*args)
        return result

    def _accept_connection(
        self,
        protocol_factory: Any,
        sock: Any,
        sslcontext: Any = None,
        server: Any = None,
        backlog: int = 100,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        serving = (protocol_factory, sock, sslcontext, server, backlog, *args)
        if kwargs or sslcontext or sock.family not in (socket.AF_INET, socket.AF_INET6):
            super()._accept_connection(*serving, **kwargs)  # type: ignore[misc]
            return
        context = args[2] if len(args) > 2 else None  # 3.15
        _core.accept_all(self, serving, context)


class _LoopSelector(Selector):
    """The selector of a loop.

    The native turn does not use its `select()`. Whoever does (asyncio's turn under a subclass that
    replaced parts of it, nest_asyncio, looptime) gets the events of native transports delivered on
    the way.
    """

    loop: Any = None

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        self.loop._before_select()
        return super().select(0 if self.loop._hosted else timeout)

    def _turn(self, timeout_ns: int) -> list[tuple[int, int]]:
        ready: list[tuple[int, int]] = self.loop._turn(timeout_ns)
        return ready

    def _ready_keys(self, ready: list[tuple[int, int]]) -> list[tuple[SelectorKey, int]]:
        return [(key, events) for key, events in super()._ready_keys(ready) if events]


class _Transports(MutableMapping[int, Any]):
    """`loop._transports`, which asyncio reads: native transports stand in the core's table, others
    here.
    """

    def __init__(self, core: _core.LoopCore) -> None:
        self._core = core
        self._others: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __getitem__(self, fd: int) -> Any:
        transport = self._core._transport_at(fd)
        return self._others[fd] if transport is None else transport

    def __setitem__(self, fd: int, transport: Any) -> None:
        if isinstance(transport, _core.Transport):
            self._core._hide_transport(transport, False)
        else:
            self._others[fd] = transport
            self._core._has_foreign_transports = True

    def __delitem__(self, fd: int) -> None:
        transport = self._core._transport_at(fd)
        if transport is None:
            del self._others[fd]
        else:
            self._core._hide_transport(transport, True)

    def __iter__(self) -> Iterator[int]:
        yield from self._core._transport_fds()
        yield from self._others

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _chosen(variable: str, choices: tuple[str, ...], default: str) -> str:
    choice = os.environ.get(variable) or default
    if choice not in choices:
        raise ValueError(f"{variable} must be one of {', '.join(choices)}, not {choice!r}")
    return choice


def _number(variable: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(variable) or str(default)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        raise ValueError(f"{variable} must be a whole number from {least} to {most}, not {text!r}")
    return number


def _set_nodelay(sock: Any) -> None:
    """Turns Nagle's algorithm off.

    asyncio looks for IPPROTO_TCP, but a socket made by `socket.socket()`, and whatever it accepts,
    has protocol 0 (or 262, Multipath TCP). uvicorn listens so: 44 ms per response behind a delayed
    ACK. Test: test_nagle_is_off_on_a_listener_made_without_a_protocol.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # the peer may be gone already; or it is not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _before_fork() -> None:
    """What write() took leaves before the process doubles, and not twice."""
    loop = asyncio._get_running_loop()
    if isinstance(loop, EventLoop):
        loop._before_fork()


os.register_at_fork(before=_before_fork)
