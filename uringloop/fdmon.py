"""FDMon: the Python face of the C fd monitor.

Why it exists: one place that knows the cffi module, chooses a monitor, names the causes of refusals
and looks after rings across `fork()`. Promise: a call into C is made at most once per operation and
once per turn; what comes back are plain tuples.

Words: a watch is a registered interest in a descriptor; a turn is one wait with everything that
changed before it; enter is the `io_uring_enter` system call; the monitor is "io_uring", "epoll" or
"poll".
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import weakref
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, TypeAlias

if sys.platform != "linux":
    raise ImportError(
        "uringloop works on Linux only: it waits through io_uring, epoll or poll", name="uringloop"
    )

try:
    from uringloop._fdmon import ffi, lib
except ImportError as exc:
    raise ImportError(
        f"uringloop's C extension is missing or was built for another Python ({exc});"
        " install uringloop with pip, which builds it (gcc and the Python headers are needed)",
        name="uringloop",
    ) from exc

CData: TypeAlias = Any  # what cffi hands out: pointers and structures of C

logger = logging.getLogger("uringloop")

#: The values that `monitor=` and the environment variable URINGLOOP_MONITOR may have.
MONITORS: Final = ("auto", "io_uring", "epoll", "poll")

_KINDS: Final = {
    "auto": lib.UL_AUTO,
    "io_uring": lib.UL_IO_URING,
    "epoll": lib.UL_EPOLL,
    "poll": lib.UL_POLL,
}

#: What an errno means for any step,
_CAUSES: Final = {
    errno.ENOMEM: "RLIMIT_MEMLOCK or memory is used up",
    errno.EMFILE: "RLIMIT_NOFILE is used up",
    errno.ENFILE: "the system's table of open files is full",
    errno.EBADF: "its descriptor was closed by the application",
}
#: and for a step of io_uring.
_IO_URING_CAUSES: Final = {
    errno.EPERM: "kernel.io_uring_disabled or a seccomp profile",
    errno.EACCES: "a security module such as SELinux",
    errno.ENOSYS: "a kernel or a sandbox without io_uring",
    errno.EINVAL: "a kernel older than 6.1",
    errno.EOPNOTSUPP: "a kernel or an emulator that does not carry it out",
}
#: Another file has the number by now.
_LOST_NUMBER: Final = {("io_uring_enter", errno.EOPNOTSUPP), ("epoll_wait", errno.EINVAL)}

_SETUP_FLAGS: Final = {
    1 << 12: "SINGLE_ISSUER",
    1 << 13: "DEFER_TASKRUN",
    1 << 9: "TASKRUN_FLAG",
    1 << 7: "SUBMIT_ALL",
    1 << 4: "CLAMP",
    1 << 3: "CQSIZE",
    1 << 16: "NO_SQARRAY",
}

#: fd and events of an `ul_event`; the rest belongs to the native transports.
_EVENT: Final = Struct(f"=iI{ffi.sizeof('ul_event') - 8}x")
#: Events that one call into C hands over; a turn that may have all of them calls again.
EVENTS_MAX: Final = 1024


class UringUnavailable(OSError):
    """The monitor that was asked for cannot be had; `errno` and the text name the refused step and
    its likely cause.

    Raised only where a monitor was forced (`monitor="io_uring"`, URINGLOOP_MONITOR=io_uring);
    "auto" falls back instead.
    """


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters of one monitor since it was made. On epoll and poll the four of io_uring stay as
    they are.
    """

    turns: int
    """Waits asked for: passes of the loop."""
    enters: int
    """`io_uring_enter` system calls."""
    sqes: int
    """Submission queue entries that the kernel took."""
    cqes: int
    """Completion queue entries that were read."""
    overflows: int
    """Times the kernel's completion queue had run over (nothing is lost by that)."""
    downgrades: int
    """Times that the monitor was lost at run time and the next one took over."""
    watches: int
    """Watches registered now."""
    poll_ns: int
    """How long the next wait spins before it blocks, in nanoseconds."""
    polled: int
    """Waits whose spinning found what they waited for, so that they did not block."""


def resolve_monitor(monitor: str | None) -> str:
    """The monitor to make for this argument: itself, or URINGLOOP_MONITOR, or "auto".

    Raises ValueError, which lists the right values, and TypeError for what is no string.
    """
    source = "monitor"
    if monitor is None:
        source = "URINGLOOP_MONITOR"
        monitor = os.environ.get(source) or "auto"
    if not isinstance(monitor, str):
        raise TypeError(f"monitor must be a str or None, not {type(monitor).__name__}")
    if monitor not in _KINDS:
        raise ValueError(f"{source} must be one of {', '.join(MONITORS)}, not {monitor!r}")
    return monitor


def describe_refusal(step: str, err: int) -> str:
    """One line that names a refused step, its errno and the likely cause."""
    cause = _CAUSES.get(err)
    if (step, err) in _LOST_NUMBER:
        cause = _CAUSES[errno.EBADF]
    elif "io_uring" in step:
        cause = _IO_URING_CAUSES.get(err, cause)
    name = "EOPNOTSUPP" if err == errno.EOPNOTSUPP else errno.errorcode.get(err, str(err))
    return f"{step}: {name} ({cause})" if cause else f"{step}: {name}"


class _SpareRing(threading.local):
    """The quiet ring of this thread's last closed loop, for its next one.

    A closed ring's share of RLIMIT_MEMLOCK comes back late: a loop per test would run an ordinary
    user out of it within about a hundred loops. Test:
    test_ten_thousand_loops_as_an_ordinary_user_all_get_io_uring.
    """

    def __init__(self) -> None:
        self._ring = _RingHandle(ffi.NULL)

    def take(self) -> CData:
        ring, self._ring.ring = self._ring.ring, ffi.NULL
        return ring

    def keep(self, ring: CData) -> None:
        older, self._ring.ring = self._ring.ring, ring
        lib.ul_ring_free(older)


class _RingHandle:
    """Frees its ring when the thread ends, and lets go of it in a forked child."""

    __slots__ = ("__weakref__", "ring")

    def __init__(self, ring: CData) -> None:
        self.ring = ring
        _held.add(self)

    def __del__(self, free: object = lib.ul_ring_free) -> None:
        free(self.ring)  # type: ignore[operator]

    def after_fork_in_child(self) -> None:
        ring, self.ring = self.ring, ffi.NULL
        lib.ul_ring_free(ring)  # which knows that its memory stayed with the parent


def _free(mon: CData, free: object = lib.ul_fdmon_free, sys: Any = sys) -> None:
    if not sys.is_finalizing():  # a daemon thread may still wait on it
        free(mon)  # type: ignore[operator]


class FDMon:
    """One fd monitor.

    `turn()` belongs to the thread that runs the loop; the other methods may be called from any
    thread. Descriptors are plain numbers here; `Selector` adds file objects and keys.
    """

    __slots__ = (
        "__weakref__",
        "_host_version",
        "_mon",
        "_out",
        "_out_bytes",
        "closed",
    )

    def __init__(self, requested: str) -> None:
        self.closed = True
        """Whether `close()` was called."""
        mon, info = ffi.new("ul_fdmon **"), ffi.new("ul_setup_info *")
        spare = _spare.take() if requested in ("auto", "io_uring") else ffi.NULL
        ret = lib.ul_fdmon_new(_KINDS[requested], spare, mon, info)
        if ret < 0:
            step = ffi.string(info.refused_step).decode() if info.refused_step else requested
            raise UringUnavailable(-ret, f"{describe_refusal(step, -ret)}: {os.strerror(-ret)}")
        # Freed with the last reference: the native loop has one too, and may outlive __del__.
        self._mon = ffi.gc(mon[0], _free)
        self.closed = False
        self._host_version = ffi.new("uint64_t *")
        self._out = ffi.new("ul_event[]", EVENTS_MAX)
        self._out_bytes = memoryview(ffi.buffer(self._out)).toreadonly()
        _held.add(self)

    @classmethod
    def create(cls, monitor: str | None = None) -> FDMon:
        """Makes the monitor asked for; "auto" takes the first that works of io_uring, epoll, poll.

        Raises UringUnavailable when a forced monitor is refused, ValueError for an unknown name.
        """
        return cls(resolve_monitor(monitor))

    # -- watches and turns --

    def update(self, fd: int, events: int) -> None:
        """Watches `fd` for `events` (1 read, 2 write) instead of what was watched before; 0 removes
        the watch.

        Raises the OSError that epoll would for a descriptor that is closed or cannot be polled;
        then nothing has changed.
        """
        ret = lib.ul_fdmon_update(self._mon, fd, events)
        if ret < 0:
            raise self.error(ret)

    def turn(self, timeout_ns: int, events_max: int = EVENTS_MAX) -> list[tuple[int, int]]:
        """Waits at most `timeout_ns` (negative: without limit) and returns (fd, events) of what is
        ready: all of it, or at most `events_max`, and the rest in the next turns.

        An empty list before time is up means "interrupted": the caller returns to Python, so that
        signal handlers run, looks at the clock and asks again.
        """
        n = lib.ul_fdmon_turn(self._mon, timeout_ns, self._out, events_max)
        if n == 0:
            return []
        if n < 0 or n >= EVENTS_MAX:
            return self._unusual_turn(n)
        return list(_EVENT.iter_unpack(self._out_bytes[: n * _EVENT.size]))

    def _unusual_turn(self, n: int) -> list[tuple[int, int]]:
        if n < 0:
            raise self.error(n)
        downgraded = n & lib.UL_DOWNGRADED
        n &= ~lib.UL_DOWNGRADED
        events = list(_EVENT.iter_unpack(self._out_bytes[: n * _EVENT.size]))
        while n == EVENTS_MAX:
            n = lib.ul_fdmon_dispatch(self._mon, self._out, EVENTS_MAX)
            events += _EVENT.iter_unpack(self._out_bytes[: n * _EVENT.size])
        if downgraded:
            self.log_downgrade()
        return events

    def log_downgrade(self) -> None:
        """Says that this monitor was lost at run time and which one has taken over."""
        logger.warning("%s; the loop goes on with %s", self.fallback_reason, self.name)

    def need_wait(self) -> bool:
        """Whether a turn with timeout 0 has anything to do. No system call."""
        return bool(lib.ul_fdmon_need_wait(self._mon))

    def fileno(self) -> int:
        """A descriptor that is readable whenever a turn is due; raises OSError(EOPNOTSUPP) on poll,
        which has none.
        """
        fd = lib.ul_fdmon_fileno(self._mon)
        if fd == -errno.EOPNOTSUPP:
            raise OSError(errno.EOPNOTSUPP, "the poll monitor has no descriptor of its own")
        if fd < 0:
            raise self.error(fd)
        return int(fd)

    def set_polling(self, poll_max_ns: int, poll_grow: int, poll_shrink: int) -> None:
        """How long a wait may spin before it blocks, and how that adapts: see `EventLoop`."""
        lib.ul_fdmon_set_polling(self._mon, poll_max_ns, poll_grow, poll_shrink)

    def host_version(self) -> int:
        """Another number whenever `host_fds()` has changed."""
        lib.ul_fdmon_host_fds(self._mon, ffi.NULL, 0, self._host_version)
        return int(self._host_version[0])

    def host_fds(self) -> list[tuple[int, int]]:
        """What an outer loop has to poll: (fd, poll(2) bits)."""
        room = 1
        while True:
            out = ffi.new("ul_host_fd[]", room)
            count = lib.ul_fdmon_host_fds(self._mon, out, room, self._host_version)
            if count < 0:
                raise self.error(count)
            if count <= room:
                return [(out[i].fd, out[i].poll_events) for i in range(count)]
            room = count

    def pointer(self) -> tuple[int, CData]:
        """The address of the C monitor, for the native loop, and what keeps it valid."""
        return int(ffi.cast("uintptr_t", self._mon)), self._mon

    def error(self, ret: int) -> Exception:
        """The exception for a negative result of a call into C."""
        if self.closed:
            return ValueError("I/O operation on closed selector")
        if ret == -errno.EBUSY:
            return RuntimeError("another thread is already waiting on this selector")
        return OSError(-ret, os.strerror(-ret))

    # -- what it is --

    def _info(self) -> CData:
        info = ffi.new("ul_setup_info *")
        lib.ul_fdmon_setup_info(self._mon, info)
        return info

    @property
    def name(self) -> str:
        """The active monitor: "io_uring", "epoll" or "poll"."""
        return str(ffi.string(self._info().name).decode())

    @property
    def refused_step(self) -> str | None:
        """The step that was refused when a better monitor was tried or lost, such as
        "io_uring_setup".
        """
        step = self._info().refused_step
        return str(ffi.string(step).decode()) if step else None

    @property
    def fallback_errno(self) -> int | None:
        """The errno of that refusal."""
        return int(self._info().refused_errno) or None

    @property
    def fallback_reason(self) -> str | None:
        """Why this is not io_uring although it was wished for, in one line; None when there is
        nothing to explain.
        """
        step, err = self.refused_step, self.fallback_errno
        return describe_refusal(step, err) if step and err else None

    @property
    def features(self) -> int:
        """The kernel's io_uring feature bits; 0 without a ring."""
        return int(self._info().ring_features)

    @property
    def setup_step(self) -> str | None:
        """The step of the set-up ladder that worked: flags and queue sizes of the ring; None
        without a ring.
        """
        info = self._info()
        if not info.sq_entries:
            return None
        flags = [name for bit, name in _SETUP_FLAGS.items() if info.ring_setup_flags & bit]
        return f"{'|'.join(flags)}, sq {info.sq_entries}, cq {info.cq_entries}"

    def statistics(self) -> Statistics:
        """The counters, of this moment or of the moment it was closed. Safe from any thread."""
        raw = ffi.new("ul_statistics *")
        lib.ul_fdmon_statistics(self._mon, raw)
        return Statistics(
            turns=raw.turns,
            enters=raw.enters,
            sqes=raw.sqes,
            cqes=raw.cqes,
            overflows=raw.overflows,
            downgrades=raw.downgrades,
            watches=raw.watches,
            poll_ns=raw.poll_ns,
            polled=raw.polled,
        )

    # -- its end --

    def close(self) -> None:
        """Ends it. Every file that a watch held is let go. Harmless when repeated; not while
        another thread waits on it.
        """
        spare = ffi.new("ul_ring **")
        if lib.ul_fdmon_close(self._mon, spare) == -errno.EBUSY:
            raise RuntimeError("another thread is waiting on this selector; stop that loop first")
        self.closed = True
        if spare[0]:
            _spare.keep(spare[0])

    def __del__(self) -> None:
        if hasattr(self, "_mon") and not sys.is_finalizing():
            self.close()

    def after_fork_in_child(self) -> None:
        """Lets go of the parent's kernel objects; the next use makes new ones. Called by
        `os.fork()` through Python.
        """
        lib.ul_fdmon_after_fork_in_child(self._mon)


_held: weakref.WeakSet[FDMon | _RingHandle] = weakref.WeakSet()
_spare = _SpareRing()


def _after_fork_in_child() -> None:
    for holder in list(_held):
        holder.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
