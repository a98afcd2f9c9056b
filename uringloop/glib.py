"""asyncio inside GLib: GTK and other GLib programs carry an event loop in their own main loop.

Why it exists: a GTK program sleeps in GLib's poll, and asyncio's callbacks have to run there.
Promise: while GLib runs, everything of the loop works (coroutines, streams, subprocesses,
executors, call_soon_threadsafe), no exception of a callback takes it out of GLib, and an idle loop
wakes nobody.

    with uringloop.glib.attach(loop):       # into a main loop that you run
        application.run()

    uringloop.glib.run(main())              # instead of asyncio.run(): GLib's callbacks run too

Wants PyGObject: `pip install uringloop[glib]`.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from uringloop import _core
from uringloop.fdmon import logger
from uringloop.hosted import Hosted
from uringloop.loop import EventLoop

try:
    from gi.repository import GLib
except ImportError as exc:
    raise ImportError(
        f"uringloop.glib needs PyGObject ({exc}); install it with: pip install uringloop[glib]"
        " (on Debian 12 it is built: apt install libgirepository1.0-dev libcairo2-dev gcc, and"
        " PyGObject<3.51)",
        name="gi",
    ) from exc

_T = TypeVar("_T")


def attach(
    loop: EventLoop,
    context: GLib.MainContext | None = None,
    priority: int = GLib.PRIORITY_DEFAULT,
    *,
    on_stop: Callable[[], object] | None = None,
) -> Attachment:
    """Has the GLib main loop that iterates `context` in this thread carry `loop`.

    `context`: None is the thread's default one. `priority`: that of the GLib source; what has a
    higher number waits while callbacks of the loop are due, so that a busy loop belongs below
    GTK's redrawing (GLib.PRIORITY_DEFAULT_IDLE). `on_stop` is called after `loop.stop()`, or after
    KeyboardInterrupt or SystemExit of a callback, have ended it: the place to quit the main loop.

        loop = uringloop.new_event_loop()
        with uringloop.glib.attach(loop, on_stop=application.quit):
            serving = loop.create_task(serve())
            application.run()

    Errors and thread rules: as `uringloop.hosted.Hosted`.
    """
    return Attachment(loop, context, priority, on_stop)


class Attachment:
    """A loop inside GLib, as `attach()` makes it. As a context manager it detaches at the end, and
    raises what has ended the loop meanwhile.
    """

    def __init__(
        self,
        loop: EventLoop,
        context: GLib.MainContext | None,
        priority: int,
        on_stop: Callable[[], object] | None,
    ) -> None:
        self.loop = loop
        self.exception: BaseException | None = None
        """The KeyboardInterrupt or SystemExit that has ended the loop, if one has."""
        self._on_stop = on_stop
        self._thread_id = threading.get_ident()
        self._source = _Source(self)
        self._source.set_priority(priority)
        self._tags: dict[tuple[int, int], Any] = {}
        self._hosted = Hosted(loop, on_fds_changed=self._watch, on_stop=self._stopped)
        try:
            self._watch()
            self._source.attach(
                GLib.MainContext.ref_thread_default() if context is None else context
            )
        except BaseException:
            self.detach()
            raise
        _attachments.add(self)

    @property
    def attached(self) -> bool:
        """Whether GLib still carries the loop."""
        return not self._hosted.closed and not self._source.is_destroyed()

    def detach(self) -> None:
        """Takes the loop out of GLib; it stays open. Harmless when repeated."""
        self._hosted.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()
        if self.exception is None or self.exception is exc:
            return
        if exc is None:
            raise self.exception
        exc.add_note(f"The event loop had ended with {self.exception!r} before.")

    # -- what the source calls, and the hosted loop --

    def before_sleep(self) -> None:
        """GLib is about to sleep, perhaps in a main loop that a callback of the loop has opened.
        PyGObject's main loops take the wake-up descriptor, which add_signal_handler() needs.
        """
        if self.loop._signal_handlers:  # type: ignore[attr-defined]
            self.loop._wake_on_signals()
        self.loop._send_what_waits()

    def dispatch(self) -> None:
        """One of the descriptors is ready."""
        self._hosted.dispatch()

    def end(self, exc: BaseException) -> None:
        """What would have ended `run_forever()` ends this."""
        self.exception = exc
        if threading.get_ident() != self._thread_id:
            logger.error("another thread iterates the GLib context that carries a loop")
            self._source.destroy()
        elif self.attached:
            self.detach()
            self._stopped()

    def _stopped(self) -> None:
        if self._on_stop is not None:
            try:
                self._on_stop()
            except Exception as exc:  # noqa: BLE001
                self.loop.call_exception_handler(
                    {"message": f"Exception in on_stop {self._on_stop!r}", "exception": exc}
                )

    def _watch(self) -> None:
        """Has GLib poll what the loop wants polled now. IOCondition's bits are poll(2)'s."""
        wanted = set(self._hosted.host_fds())
        for polled in self._tags.keys() - wanted:
            self._source.remove_unix_fd(self._tags.pop(polled))
        for polled in wanted - self._tags.keys():
            fd, events = polled
            self._tags[polled] = self._source.add_unix_fd(fd, GLib.IOCondition(events))
        if self._hosted.closed:
            self._source.destroy()


class _Source(GLib.Source):  # type: ignore[misc]
    """The GLib source. GLib itself dispatches it when one of its descriptors is ready.

    Its functions are native: `_core/guard.pxi` says why. It may recurse, as far as GLib knows: to
    block a source while it is dispatched, GLib takes its descriptors out of its set and wakes
    itself up, twice an iteration, a tenth of a round trip. `Hosted` sees to it that nothing of
    asyncio runs within itself.
    """

    check = bool  # False: GLib looks at the descriptors

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.prepare = functools.partial(_core.prepare_source, attachment)
        self.dispatch = functools.partial(_core.dispatch_source, attachment)
        self.set_name("uringloop")
        self.set_can_recurse(True)


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


@atexit.register
def _destroy_sources() -> None:
    """Else GLib calls into an interpreter that is gone."""
    for attachment in list(_attachments):
        attachment._source.destroy()


class GLibEventLoop(EventLoop):
    """An event loop that waits in GLib: while it runs, so do the sources of `context`. None is the
    thread's default one; a thread other than the main one that has none gets one, as two threads
    cannot iterate the same. For asyncio.Runner, pytest-asyncio and the like:

        asyncio.Runner(loop_factory=uringloop.glib.GLibEventLoop)

    Other keywords and errors: as `uringloop.EventLoop`. It raises RuntimeError when another thread
    iterates the context.
    """

    def __init__(self, *, context: GLib.MainContext | None = None, **loop_kwargs: Any) -> None:
        super().__init__(**loop_kwargs)
        self._glib_context = context  # PyGObject takes a loop with `_context` for one of its own

    def run_forever(self) -> None:
        """As asyncio's, iterating GLib's context until `stop()`."""
        context = self._glib_context or GLib.MainContext.get_thread_default()
        if context is None and threading.current_thread() is threading.main_thread():
            context = GLib.MainContext.default()
        elif context is None:
            context = self._glib_context = GLib.MainContext.new()
        if not context.acquire():
            raise RuntimeError("another thread iterates this GLib context; give the loop its own")
        context.push_thread_default()
        try:
            with attach(self, context) as attachment:
                while attachment.attached:
                    context.iteration(True)
        finally:
            context.pop_thread_default()
            context.release()


def run(
    main: Coroutine[Any, Any, _T],
    *,
    context: GLib.MainContext | None = None,
    debug: bool | None = None,
    **loop_kwargs: Any,
) -> _T:
    """`asyncio.run(main)` while GLib runs: the same rules, signals and clean-up. Other keywords go
    to `uringloop.EventLoop`. In a thread without a context of its own it makes one.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("uringloop.glib.run() cannot be called from a running event loop")
    factory = functools.partial(GLibEventLoop, context=context, **loop_kwargs)
    with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
        return runner.run(main)
