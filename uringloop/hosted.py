"""Hosted: an event loop inside a foreign main loop (GLib, Qt, Tk, a plain `poll()`).

Why it exists: a program has one place where it sleeps. When that is a toolkit's main loop, asyncio
must do its work from there. Promise: the descriptors that `host_fds()` names are readable whenever
the loop has something to do, be it I/O, a timer or a callback that the host's own code has queued.
So a host needs no timer, no idle callback and no hook before it sleeps.

The verbs are those of QEMU's AioContext under GLib: prepare, check, dispatch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from uringloop.loop import EventLoop

if TYPE_CHECKING:
    from uringloop.fdmon import FDMon


class Hosted:
    """`loop` is carried by a foreign main loop in this thread, until `close()` or `loop.stop()`.

    The host polls what `host_fds()` names and calls `dispatch()` when one of them is ready:

        hosted = Hosted(loop)
        while not hosted.closed:
            poller = select.poll()
            for fd, events in hosted.host_fds():
                poller.register(fd, events)
            hosted.prepare()
            poller.poll()
            hosted.dispatch()

    From here on the loop counts as running in this thread: `asyncio.get_running_loop()` and
    `asyncio.create_task()` work in callbacks of the host too, `asyncio.run()` does not. Callbacks
    of the loop run in `dispatch()` and nowhere else.

    `on_fds_changed()` is called when `host_fds()` has a new answer: on io_uring and epoll after a
    run-time downgrade and at the end, on poll whenever a watch has changed; it may not dispatch.
    `on_stop()` is called after `loop.stop()` has ended it.

    It never spins before it sleeps (`poll_max_ns`), as it never sleeps itself.

    In the main thread a signal wakes the host, so that handlers set with `signal.signal()` run at
    once, unless the host has arranged for that by `signal.set_wakeup_fd()` already.

    Raises TypeError for another kind of loop, and RuntimeError when it is closed, or this or
    another loop runs in this thread. All methods belong to this thread: RuntimeError elsewhere.
    """

    def __init__(
        self,
        loop: EventLoop,
        *,
        on_fds_changed: Callable[[], object] | None = None,
        on_stop: Callable[[], object] | None = None,
    ) -> None:
        if not isinstance(loop, EventLoop):
            raise TypeError(
                f"only an uringloop.EventLoop can be hosted, not {type(loop).__name__};"
                " make one with uringloop.new_event_loop()"
            )
        self.loop: Any = loop
        self.closed = True
        """Whether hosting has ended."""
        self._on_fds_changed = on_fds_changed
        self._on_stop = on_stop
        self._thread_id = threading.get_ident()
        self._dispatching = self._suspended = self._closing = False
        self._version = 0
        self.loop._begin_hosting()
        self.closed = False
        try:
            self.loop._wake_on_signals()
            self.host_fds()  # makes the descriptors, which prepare() has to know
            self.loop._prepare_host()
            self._version = self._fdmon.host_version()
        except BaseException:
            self._end()
            raise

    # -- what a host calls --

    def host_fds(self) -> list[tuple[int, int]]:
        """What the host has to poll: pairs of a descriptor and `select.POLLIN | select.POLLOUT`
        bits.

        On io_uring and epoll a single descriptor, for reading; on poll every watch of the loop, and
        two more. An empty list when hosting has ended, and while a host that runs nested inside one
        of the loop's callbacks must wait for that to return.
        """
        self._check_thread()
        if self.closed or self._suspended:
            return []
        return self._fdmon.host_fds()

    def prepare(self) -> bool:
        """Before the host sleeps: hands every change to the kernel and sets the timer. Whether
        `dispatch()` is due now; a descriptor is readable then, too.

        Never blocks. Optional, since `dispatch()` ends with it and what is queued later wakes the
        host; a host that calls it saves that wake-up.
        """
        self._check_thread()
        if self._dispatching:
            self.loop._send_what_waits()
        if self.closed or self._dispatching:
            return False
        due: bool = self.loop._prepare_host()
        self._look_for_changed_fds()
        return due

    def check(self, revents: int) -> bool:
        """After the host slept: whether `dispatch()` is due, given the poll(2) bits that it has
        seen on its descriptors, all in one number. No system call.
        """
        self._check_thread()
        if self.closed or self._dispatching:
            return False
        return bool(revents) or self.loop._is_due()

    def dispatch(self) -> None:
        """One pass of the loop: callbacks that are due, and what the kernel has to report. Never
        blocks, and does no harm when nothing is due.

        KeyboardInterrupt and SystemExit of a callback pass through, as they do through
        `run_forever()`; hosting goes on if the host does. Other exceptions go to the loop's
        exception handler. Inside a callback of the loop (a nested main loop) it does nothing, as
        asyncio does not nest; the host is then told to poll nothing until that callback returns.
        """
        self._check_thread()
        if self.closed:
            return
        if self._dispatching:
            self.loop._send_what_waits()
            self._suspend(True)
            return
        self._dispatching = True
        try:
            self.loop._dispatch_host()
        finally:
            self._dispatching = False
            self._after_dispatch()

    def close(self) -> None:
        """Ends hosting; the loop stays open, with all it has, and may be run or hosted again.

        Harmless when repeated. In a callback of the loop it takes effect when the pass ends.
        """
        self._check_thread()
        if self._dispatching:
            self._closing = True
        elif not self.closed:
            self._end()
            self._tell_fds_changed()

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- how it works --

    @property
    def _fdmon(self) -> FDMon:
        fdmon: FDMon = self.loop._fdmon
        return fdmon

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread_id:
            raise RuntimeError(
                "a hosted loop belongs to the thread that hosts it;"
                " use loop.call_soon_threadsafe() from another one"
            )

    def _end(self) -> None:
        self.closed, self._suspended = True, False
        self.loop._end_hosting()

    def _after_dispatch(self) -> None:
        stopped = self.loop._stopping
        if stopped or self._closing:
            self._closing = False
            self._end()
            self._tell_fds_changed()
            if stopped and self._on_stop is not None:
                self._on_stop()
            return
        self._suspend(False)
        self._look_for_changed_fds()

    def _suspend(self, suspended: bool) -> None:
        """A descriptor that stays readable while nobody may look after it would keep a nested host
        awake.
        """
        if suspended != self._suspended:
            self._suspended = suspended
            self._tell_fds_changed()

    def _look_for_changed_fds(self) -> None:
        version = self._fdmon.host_version()
        if version != self._version:
            self._version = version
            self._tell_fds_changed()

    def _tell_fds_changed(self) -> None:
        if self._on_fds_changed is not None:
            self._on_fds_changed()
