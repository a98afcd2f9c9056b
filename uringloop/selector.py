"""Selector: io_uring (or epoll, or poll) behind the interface of `selectors`.

Why it exists: asyncio and everything else that takes a `selectors.BaseSelector` can wait on a ring
without knowing it. Promise: keys, events and errors are those of `selectors.EpollSelector`; only
the system calls differ.
"""

from __future__ import annotations

import math
import selectors
import time
import warnings
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import TYPE_CHECKING, Any

from uringloop.fdmon import EVENTS_MAX, FDMon, Statistics

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_TIMEOUT_NS_MAX = 2**62  # 146 years; what is longer would not fit the kernel's arithmetic
_ALL = EVENT_READ | EVENT_WRITE


class _Keys(selectors._SelectorMapping):  # type: ignore[name-defined,misc]
    """What `get_map()` gives, with a short way for plain descriptors."""

    def get(self, fileobj: FileDescriptorLike, default: Any = None) -> Any:
        if type(fileobj) is int and fileobj >= 0:
            return self._selector._fd_to_key.get(fileobj, default)
        return super().get(fileobj, default)


class Selector(selectors._BaseSelectorImpl):
    """A complete `selectors.BaseSelector` over an fd monitor.

    Use it alone, or as `asyncio.SelectorEventLoop(uringloop.Selector())`. `monitor` is None or
    "auto" (the first that works), "io_uring", "epoll" or "poll"; see `uringloop.new_event_loop` for
    errors. Timeouts are seconds, kept to the nanosecond and rounded up. On io_uring changes
    travel to the kernel with the next `select()`. Removing a watch that is armed there enters at
    once, so that a `close()` right after it really closes.

    `events_max` limits what one `select()` returns (None: everything that is ready); the rest is
    returned by the next ones, before anything new.

    Not thread-safe, like every selector; a call from a wrong thread does no damage but does not
    wake a `select()` either.
    """

    _fd_to_key: dict[int, SelectorKey]
    _fileobj_lookup: Callable[[FileDescriptorLike], int]

    def __init__(self, monitor: str | None = None, *, events_max: int | None = None) -> None:
        super().__init__()
        if events_max is not None and not 0 < events_max < EVENTS_MAX:
            raise ValueError(f"events_max must be None or 1..{EVENTS_MAX - 1}, not {events_max!r}")
        self._events_max = events_max or EVENTS_MAX
        self._map = _Keys(self)
        self._fdmon = FDMon.create(monitor)

    @property
    def monitor(self) -> str:
        """The active monitor: "io_uring", "epoll" or "poll"."""
        return self._fdmon.name

    @property
    def fallback_reason(self) -> str | None:
        """Why io_uring is not in use although it was tried; None if it is or was not wished for."""
        return self._fdmon.fallback_reason

    def statistics(self) -> Statistics:
        """Counters since it was made. Safe from any thread."""
        return self._fdmon.statistics()

    @property
    def fileno(self) -> Callable[[], int]:
        """`fileno()` gives a descriptor for an outer loop: readable whenever `select(0)` should be
        called.

        On io_uring an eventfd, made by the first call; on epoll the epoll descriptor. On poll there
        is none, hence no such method, as `selectors.PollSelector` has none. Ask again after a
        run-time downgrade (`monitor` has changed): the old descriptor was signalled once.
        """
        if self.monitor == "poll":
            raise AttributeError("the poll monitor has no descriptor of its own, so no fileno()")
        return self._fdmon.fileno

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> SelectorKey:
        """Watches a file object or descriptor. Errors as EpollSelector: ValueError, KeyError,
        OSError (EBADF, EPERM).
        """
        fd = self._descriptor(fileobj)
        if not events or events & ~_ALL:
            raise ValueError(f"Invalid events: {events!r}")
        if fd in self._fd_to_key:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        self._fdmon.update(fd, events)
        key = self._fd_to_key[fd] = SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> SelectorKey:
        """Ends a watch: it is never reported again, and the kernel no longer holds the file.
        KeyError when there is none.
        """
        key = self._fd_to_key.pop(self._descriptor(fileobj), None)
        if key is None:
            raise KeyError(f"{fileobj!r} is not registered")
        self._fdmon.update(key.fd, 0)
        return key

    def _descriptor(self, fileobj: FileDescriptorLike) -> int:
        # asyncio passes plain numbers, twice per operation; the general look-up costs three calls.
        if type(fileobj) is int and fileobj >= 0:
            return fileobj
        return self._fileobj_lookup(fileobj)

    def modify(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> SelectorKey:
        """Changes events or data of a watch. A change of data alone costs the kernel nothing."""
        key = self._fd_to_key.get(self._descriptor(fileobj))
        if key is None:
            raise KeyError(f"{fileobj!r} is not registered")
        if events != key.events:
            if not events or events & ~_ALL:
                raise ValueError(f"Invalid events: {events!r}")
            try:
                self._fdmon.update(key.fd, events)
            except BaseException:  # as EpollSelector: a descriptor gone bad is not registered
                self.unregister(fileobj)
                raise
        elif data is key.data:
            return key
        key = key._replace(events=events, data=data)
        self._fd_to_key[key.fd] = key
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Waits for readiness: for ever (None), not at all (<= 0) or at most `timeout` seconds.

        A signal handler runs during the wait; if it does not raise, the wait goes on for the rest
        of the time (PEP 475).
        """
        if timeout is None:
            ready = self._turn(-1) or self._turn_until(None)
        elif timeout <= 0:
            ready = self._turn(0)
        else:
            timeout_ns = min(math.ceil(timeout * 1e9), _TIMEOUT_NS_MAX)
            deadline_ns = time.monotonic_ns() + timeout_ns
            ready = self._turn(timeout_ns) or self._turn_until(deadline_ns)
        return self._ready_keys(ready)

    def _turn(self, timeout_ns: int) -> list[tuple[int, int]]:
        return self._fdmon.turn(timeout_ns, self._events_max)

    def _ready_keys(self, ready: list[tuple[int, int]]) -> list[tuple[SelectorKey, int]]:
        keys = self._fd_to_key
        return [
            (key, events & key.events) for fd, events in ready if (key := keys.get(fd)) is not None
        ]

    def _turn_until(self, deadline_ns: int | None) -> list[tuple[int, int]]:
        ready: list[tuple[int, int]] = []
        while not ready:
            timeout_ns = -1
            if deadline_ns is not None:
                timeout_ns = deadline_ns - time.monotonic_ns()
                if timeout_ns <= 0:
                    break
            ready = self._turn(timeout_ns)
        return ready

    def close(self) -> None:
        """Ends all watches and frees the ring. Harmless when repeated."""
        self._fdmon.close()
        super().close()

    def __del__(self) -> None:
        fdmon = getattr(self, "_fdmon", None)
        if fdmon is not None and not fdmon.closed:
            warnings.warn(f"unclosed selector {self!r}", ResourceWarning, source=self, stacklevel=2)
            fdmon.close()
