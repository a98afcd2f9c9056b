"""Denial: io_uring (and epoll) refused at the start, and taken away while the loop runs.

The promise: whatever the kernel answers, the same application runs on the next monitor, loses and
doubles no byte, and says why. Refusals are real: seccomp filters, limits, a sysctl, in children.

A filter whose action is to kill (SIGSYS) ends the process before anybody could fall back; that is
documented, and URINGLOOP_MONITOR=epoll avoids the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import io
import logging
import os
import re
import resource
import selectors
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import uringloop
from tests.support import (
    IO_URING,
    ROOT,
    become_nobody,
    child_environment,
    deny,
    echo_traffic,
    files_that_are,
    in_thread,
    ring_files,
    ring_mappings,
    run_child,
    unexpected,
)
from uringloop import doctor

SYSCTL = Path("/proc/sys/kernel/io_uring_disabled")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
on_io_uring = pytest.mark.parametrize("monitor", ["io_uring"], indirect=True)


class Lines(logging.Handler):
    """Keeps what the package logs, instead of printing it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("uringloop").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


# ---------------------------------------------------------------------- refused at the start


def start_where_denied(number: int, *calls: str) -> dict[str, Any]:
    deny(number, *calls)
    loop = uringloop.new_event_loop(monitor="auto")
    with contextlib.closing(loop):
        exact = loop.run_until_complete(echo_traffic(5, 20_000))
        found = {
            "monitor": loop.monitor,
            "reason": loop.fallback_reason,
            "exact": exact,
            "downgrades": loop.statistics().downgrades,
        }
    try:
        uringloop.new_event_loop(monitor="io_uring").close()
    except uringloop.UringUnavailable as exc:
        return {**found, "forced": [exc.errno, str(exc)], "rings": ring_mappings()}
    return found


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.EPERM, "kernel.io_uring_disabled or a seccomp profile"),
        (errno.ENOSYS, "without io_uring"),
        (errno.EACCES, "SELinux"),
        (errno.ENOMEM, "RLIMIT_MEMLOCK"),
        (errno.EINVAL, "older than 6.1"),
        (errno.EXDEV, ""),  # an errno that nobody has foreseen
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_a_refused_set_up_means_epoll_and_a_reason_and_an_error_where_io_uring_was_forced(
    number: int, cause: str
) -> None:
    found = run_child(start_where_denied, number, "io_uring_setup").value
    name = errno.errorcode[number]
    assert found["monitor"] == "epoll"
    assert found["exact"]
    assert found["reason"].startswith(f"io_uring_setup: {name}")
    assert cause in found["reason"]
    assert found["downgrades"] == 0
    forced_errno, forced_text = found["forced"]
    assert forced_errno == number
    assert name in forced_text
    assert cause in forced_text
    assert found["rings"] == 0


@on_io_uring
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_ring_that_can_be_made_and_not_entered_fails_its_self_test(
    monitor: str, number: int
) -> None:
    found = run_child(start_where_denied, number, "io_uring_enter").value
    assert found["monitor"] == "epoll"
    assert found["exact"]
    assert found["reason"].startswith(f"io_uring self-test: {errno.errorcode[number]}")
    assert found["forced"][0] == number
    assert found["rings"] == 0


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_where_epoll_is_refused_too_the_loop_runs_on_poll(number: int) -> None:
    found = run_child(start_where_denied, number, *IO_URING, "epoll_create1").value
    assert found["monitor"] == "poll"
    assert found["exact"]
    assert found["reason"].startswith(f"io_uring_setup: {errno.errorcode[number]}")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_epoll_without_nanoseconds_still_works(number: int) -> None:
    found = run_child(start_where_denied, number, *IO_URING, "epoll_pwait2").value
    assert found["monitor"] == "epoll"
    assert found["exact"]
    assert found["downgrades"] == 0


def force_epoll_where_denied() -> list[Any]:
    deny(errno.EPERM, "epoll_create1")
    try:
        uringloop.new_event_loop(monitor="epoll").close()
    except uringloop.UringUnavailable as exc:
        return [exc.errno, str(exc)]
    return []


def test_a_forced_epoll_that_is_refused_says_so() -> None:
    number, text = run_child(force_epoll_where_denied).value
    assert number == errno.EPERM
    assert "epoll_create1: EPERM" in text


def files_watched_without_epoll(monitor: str) -> list[str]:
    """What register() answers for things that epoll would refuse, where epoll cannot be asked."""
    deny(errno.EPERM, "epoll_create1")
    answers = []
    with uringloop.Selector(monitor) as selector:
        for path in ("/etc/passwd", "/etc"):
            fd = os.open(path, os.O_RDONLY)
            try:
                selector.register(fd, selectors.EVENT_READ)
                answers.append("watched")
            except OSError as exc:
                answers.append(type(exc).__name__)
            os.close(fd)
    return answers


def test_a_regular_file_is_refused_even_where_epoll_cannot_be_asked() -> None:
    assert run_child(files_watched_without_epoll, "poll").value == ["PermissionError"] * 2


# ---------------------------------------------------------------------- taken away in mid traffic


def lose_it_in_mid_traffic(
    monitor: str, take_away: Callable[[], object], connections: int = 100, size_bytes: int = 40_000
) -> dict[str, Any]:
    log = Lines()
    received, taken_away_at = 0, 0

    def progress(count: int) -> None:
        nonlocal received, taken_away_at
        received += count
        if not taken_away_at and received > connections * size_bytes // 3:
            taken_away_at = received
            take_away()

    loop = uringloop.new_event_loop(monitor=monitor)
    with contextlib.closing(loop):
        monitor_before = loop.monitor
        exact = loop.run_until_complete(echo_traffic(connections, size_bytes, progress))
        exact_again = loop.run_until_complete(echo_traffic(5, 5000))
        return {
            "before": monitor_before,
            "exact": exact and exact_again,
            "received": received == connections * size_bytes,
            "in mid traffic": 0 < taken_away_at < received,
            "after": loop.monitor,
            "reason": loop.fallback_reason,
            "downgrades": loop.statistics().downgrades,
            "log": log.lines,
            "rings": ring_mappings(),
        }


def install_a_filter_later(monitor: str, number: int, *calls: str) -> dict[str, Any]:
    return lose_it_in_mid_traffic(monitor, lambda: deny(number, *calls))


def all_went_well(found: dict[str, Any], before: str, after: str, reason: str) -> None:
    assert found["before"] == before
    assert found["in mid traffic"]
    assert found["exact"]
    assert found["received"]
    assert found["after"] == after
    assert found["downgrades"] == 1
    assert found["reason"].startswith(reason)
    assert found["log"] == [f"WARNING: {found['reason']}; the loop goes on with {after}"]
    assert found["rings"] == 0


@on_io_uring
@pytest.mark.parametrize("requested", ["auto", "io_uring"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_traffic_survives_a_seccomp_filter_installed_later(
    monitor: str, number: int, requested: str
) -> None:
    found = run_child(install_a_filter_later, requested, number, *IO_URING).value
    all_went_well(found, "io_uring", "epoll", f"io_uring_enter: {errno.errorcode[number]}")


@on_io_uring
def test_traffic_survives_a_filter_on_enter_alone(monitor: str) -> None:
    found = run_child(install_a_filter_later, "auto", errno.EACCES, "io_uring_enter").value
    all_went_well(found, "io_uring", "epoll", "io_uring_enter: EACCES")


@on_io_uring
def test_traffic_goes_on_with_poll_when_epoll_is_denied_as_well(monitor: str) -> None:
    calls = (*IO_URING, "epoll_create1")
    found = run_child(install_a_filter_later, "auto", errno.EPERM, *calls).value
    all_went_well(found, "io_uring", "poll", "io_uring_enter: EPERM")


@on_io_uring
def test_a_filter_on_set_up_alone_does_not_disturb_the_ring_that_is_there(monitor: str) -> None:
    found = run_child(install_a_filter_later, "auto", errno.EPERM, "io_uring_setup").value
    assert found["in mid traffic"]
    assert found["exact"]
    assert (found["after"], found["downgrades"], found["log"]) == ("io_uring", 0, [])


def close_its_descriptor(monitor: str, stranger: str) -> list[Any]:
    """Close the ring (or epoll) behind the loop's back; perhaps its number becomes another file."""
    target = {"io_uring": "anon_inode:[io_uring]", "epoll": "anon_inode:[eventpoll]"}[monitor]
    kept: list[int] = []

    def take_away() -> None:
        (taken,) = files_that_are(target)
        os.close(taken)
        if stranger == "a socket":
            kept.extend(end.detach() for end in socket.socketpair())
        elif stranger == "a pipe":
            kept.extend(os.pipe())
        elif stranger == "a file":
            kept.append(os.open("/etc/passwd", os.O_RDONLY))
        assert not kept or taken in kept

    found = lose_it_in_mid_traffic(monitor, take_away, 20)
    intact = all(os.fstat(fd) for fd in kept)
    for fd in kept:
        os.close(fd)
    return [found, intact]


STRANGERS = ["nothing", "a socket", "a pipe", "a file"]


@on_io_uring
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_ring_that_was_closed_behind_our_back_is_replaced_and_its_number_left_alone(
    monitor: str, stranger: str
) -> None:
    found, intact = run_child(close_its_descriptor, monitor, stranger).value
    assert intact
    assert found["exact"]
    assert found["received"]
    assert found["in mid traffic"]
    # A removal may meet the loss first: then the next turn makes a new ring, and nothing is lost.
    if found["after"] == "epoll":
        all_went_well(found, "io_uring", "epoll", "io_uring_enter: E")
    else:
        assert (found["after"], found["downgrades"]) == ("io_uring", 0)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_an_epoll_that_was_closed_behind_our_back_means_poll_and_its_number_left_alone(
    stranger: str,
) -> None:
    found, intact = run_child(close_its_descriptor, "epoll", stranger).value
    assert intact
    all_went_well(found, "epoll", "poll", "epoll_wait: E")


# ---------------------------------------------------------------------- changes under way


class Watched:
    """A socket on a selector, and its peer."""

    def __init__(self, selector: uringloop.Selector, events: int = 0) -> None:
        self.selector = selector
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        if events:
            self.watch(events)

    def watch(self, events: int) -> None:
        self.selector.register(self.ours, events, self)

    def ready(self) -> int:
        """What the selector reports of it, in three turns."""
        found = 0
        for _ in range(3):
            for key, events in self.selector.select(0.02):
                if key.data is self:
                    found |= events
        return found


def lose_it_with_changes_pending(monitor: str, when: str, also_epoll: bool) -> dict[str, Any]:
    log = Lines()
    read, write = selectors.EVENT_READ, selectors.EVENT_WRITE
    calls = (*IO_URING, "epoll_create1") if also_epoll else IO_URING
    with uringloop.Selector(monitor) as selector:
        kept, modified, removed = (Watched(selector, read) for _ in range(3))
        fired = Watched(selector, read)
        fired.peer.send(b"!")
        armed = fired.ready()  # three turns: all four are armed in the kernel
        if when == "before the changes":
            deny(errno.EPERM, *calls)
        selector.unregister(removed.ours)
        selector.modify(modified.ours, write, modified)
        added = Watched(selector, read)
        gone = Watched(selector, read)
        selector.unregister(gone.ours)  # never reached the kernel
        fired.ours.recv(1)
        if when == "after the changes":
            deny(errno.EPERM, *calls)
        for watched in (kept, modified, removed, added, gone):
            watched.peer.send(b"!")
        found = {
            "armed": armed,
            "fired": fired.ready(),
            "kept": kept.ready(),
            "modified": modified.ready(),
            "removed": removed.ready(),
            "added": added.ready(),
            "gone": gone.ready(),
            "monitor": selector.monitor,
            "watches": selector.statistics().watches,
            "downgrades": selector.statistics().downgrades,
            "log": len(log.lines),
        }
        removed.ours.recv(1)  # a close with unread data would be a reset
        removed.ours.close()
        removed.peer.settimeout(1)
        found["the removed one's peer sees the end"] = removed.peer.recv(1) == b""
    return found


@on_io_uring
@pytest.mark.parametrize("also_epoll", [False, True], ids=["to epoll", "to poll"])
@pytest.mark.parametrize("when", ["before the changes", "after the changes"])
def test_changes_that_are_pending_survive_the_loss_of_the_ring(
    monitor: str, when: str, also_epoll: bool
) -> None:
    read, write = selectors.EVENT_READ, selectors.EVENT_WRITE
    assert run_child(lose_it_with_changes_pending, monitor, when, also_epoll).value == {
        "armed": read,
        "fired": 0,
        "kept": read,
        "modified": write,
        "removed": 0,
        "added": read,
        "gone": 0,
        "monitor": "poll" if also_epoll else "epoll",
        "watches": 4,
        "downgrades": 1,
        "log": 1,
        "the removed one's peer sees the end": True,
    }


def close_where_denied(monitor: str) -> list[Any]:
    """Close the loop at once after the filter: its own cancellations are refused."""
    loop = uringloop.new_event_loop(monitor=monitor)
    ours, peer = socket.socketpair()
    peer.settimeout(1)
    loop.add_reader(ours, unexpected)
    loop.run_until_complete(asyncio.sleep(0.01))
    deny(errno.EPERM, *IO_URING)
    loop.close()
    ours.close()
    return [peer.recv(1).decode(), len(ring_files()), ring_mappings()]


@on_io_uring
def test_a_loop_that_is_closed_where_io_uring_is_denied_lets_everything_go(monitor: str) -> None:
    assert run_child(close_where_denied, monitor).value == ["", 0, 0]


def reuse_a_ring_where_denied(monitor: str) -> list[Any]:
    """The second loop of a thread takes over the first one's ring, which then cannot be entered."""
    log = Lines()
    uringloop.new_event_loop(monitor=monitor).close()
    deny(errno.EPERM, *IO_URING)
    with contextlib.closing(uringloop.new_event_loop(monitor="auto")) as loop:
        exact = loop.run_until_complete(echo_traffic(5, 5000))
        return [exact, loop.monitor, len(log.lines), len(ring_files()), ring_mappings()]


@on_io_uring
def test_a_ring_that_is_used_again_and_was_denied_meanwhile_is_given_up(monitor: str) -> None:
    found = run_child(reuse_a_ring_where_denied, monitor).value
    exact, monitor_got, lines, *left = found
    assert exact
    assert monitor_got == "epoll"
    assert lines <= 1  # none where the new loop noticed before it took the ring
    assert left == [0, 0]


def fork_where_denied(monitor: str) -> list[Any]:
    """A child's filter does not touch its parent; the inherited loop falls back in the child."""
    log = Lines()
    loop = uringloop.new_event_loop(monitor=monitor)
    loop.run_until_complete(echo_traffic(2, 2000))
    pid = os.fork()
    if pid == 0:
        deny(errno.EPERM, *IO_URING)
        exact = loop.run_until_complete(echo_traffic(2, 2000))
        os._exit(0 if exact and loop.monitor == "epoll" and len(log.lines) == 1 else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    exact = loop.run_until_complete(echo_traffic(2, 2000))
    loop.close()
    return [code, exact, loop.monitor, log.lines]


@on_io_uring
def test_an_inherited_loop_falls_back_in_a_child_that_is_denied_what_its_parent_has(
    monitor: str,
) -> None:
    assert run_child(fork_where_denied, monitor).value == [0, True, "io_uring", []]


# ---------------------------------------------------------------------- limits


def loops_within_memlock(limit_bytes: int, count: int) -> list[list[Any]]:
    become_nobody(limit_bytes, 8 << 20)
    loops = [uringloop.new_event_loop(monitor="auto") for _ in range(count)]
    found = []
    for loop in loops:
        exact = loop.run_until_complete(echo_traffic(2, 2000))
        found.append([loop.monitor, loop.fallback_reason, exact])
    for loop in loops:
        loop.close()
    del loop, loops
    # That memory was short once is not remembered: with a limit that suffices io_uring is back.
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
    with contextlib.closing(uringloop.new_event_loop(monitor="auto")) as late:
        found.append([late.monitor, late.fallback_reason, True])
    return found


def memlock_is_charged() -> bool:
    become_nobody(0)
    try:
        uringloop.Selector("io_uring").close()
    except uringloop.UringUnavailable as exc:
        return exc.errno == errno.ENOMEM
    return False


@pytest.mark.root
@as_root
@on_io_uring
@pytest.mark.parametrize(("limit_kib", "count"), [(0, 1), (256, 12)])
def test_where_locked_memory_is_used_up_loops_run_on_epoll_until_there_is_more(
    monitor: str, limit_kib: int, count: int
) -> None:
    if not run_child(memlock_is_charged).value:
        pytest.skip("this kernel does not charge rings to RLIMIT_MEMLOCK (before 6.14)")
    with sysctl_lock(fcntl.LOCK_SH):
        *found, late = run_child(loops_within_memlock, limit_kib * 1024, count).value
    short = ["epoll", "io_uring_setup: ENOMEM (RLIMIT_MEMLOCK or memory is used up)", True]
    assert found[-1] == short
    assert all(loop in (["io_uring", None, True], short) for loop in found)
    if limit_kib:
        assert found[0] == ["io_uring", None, True]
    assert late == ["io_uring", None, True]


def selectors_without_descriptors(left: int) -> list[Any]:
    """What a selector becomes when so many descriptors are left, and whether it works."""
    uringloop.Selector("poll").close()
    ours, peer = socket.socketpair()
    peer.send(b"!")
    filler = [os.dup(2) for _ in range(40)]
    for fd in filler[:left]:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(filler) + 1, hard))
    try:
        with uringloop.Selector("auto") as selector:
            selector.register(ours, selectors.EVENT_READ)
            found = [selector.monitor, selector.fallback_reason, len(selector.select(1))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with uringloop.Selector("auto") as selector:
        return [*found, selector.monitor]


@on_io_uring
@pytest.mark.parametrize(
    ("left", "monitor_got", "step"),
    [
        (0, "poll", "io_uring_setup: EMFILE (RLIMIT_NOFILE is used up)"),
        (1, "epoll", "io_uring self-test: EMFILE (RLIMIT_NOFILE is used up)"),
        (2, "io_uring", None),
    ],
    ids=["none left", "one left", "two left"],
)
def test_where_no_descriptor_is_left_the_monitor_is_the_one_that_needs_none(
    monitor: str, left: int, monitor_got: str, step: str | None
) -> None:
    found = run_child(selectors_without_descriptors, left).value
    assert found == [monitor_got, step, 1, "io_uring"]


def loop_without_descriptors() -> list[Any]:
    uringloop.new_event_loop(monitor="auto").close()
    files = len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        uringloop.new_event_loop(monitor="auto").close()
        number = 0
    except OSError as exc:
        number = exc.errno or 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    return [number, len(os.listdir("/proc/self/fd")) - files]


def test_a_loop_that_cannot_be_made_for_want_of_descriptors_leaves_none_behind() -> None:
    number, more = run_child(loop_without_descriptors).value
    assert number == errno.EMFILE
    assert more <= 0


# ---------------------------------------------------------------------- the sysctl


@contextlib.contextmanager
def sysctl_lock(how: int) -> Iterator[None]:
    """Keeps apart, across test processes, what changes the sysctl and what must not notice."""
    with open(__file__, "rb") as file:
        fcntl.flock(file, how)
        yield


def io_uring_switched_off(value: int) -> dict[str, Any]:
    """The sysctl is the whole machine's: it is set for the blink between import and answer."""
    # What is imported late must be imported before the user changes; in a thread, whose spare ring
    # ends with it.
    in_thread(lambda: uringloop.run(echo_traffic(1, 1)))
    with contextlib.redirect_stdout(io.StringIO()):
        in_thread(lambda: doctor.main([]))
    if value == 1:
        become_nobody(8 << 20)
    else:
        SYSCTL.write_text("2")
    try:
        loop = uringloop.new_event_loop(monitor="auto")
        try:
            uringloop.new_event_loop(monitor="io_uring").close()
            forced = ""
        except uringloop.UringUnavailable as exc:
            forced = str(exc)
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            code = doctor.main([])
    finally:
        if value == 2:
            SYSCTL.write_text("0")
    exact = loop.run_until_complete(echo_traffic(2, 2000))
    loop.close()
    return {
        "monitor": loop.monitor,
        "reason": loop.fallback_reason,
        "exact": exact,
        "forced": forced,
        "doctor": text.getvalue(),
        "doctor's code": code,
    }


@contextlib.contextmanager
def sysctl_set_to(value: int) -> Iterator[None]:
    if not os.access(SYSCTL, os.W_OK):
        pytest.skip("the sysctl kernel.io_uring_disabled is not there or may not be set")
    if SYSCTL.read_text().strip() != "0":
        pytest.skip("the sysctl kernel.io_uring_disabled is set already")
    with sysctl_lock(fcntl.LOCK_EX):
        try:
            SYSCTL.write_text(str(value))
            yield
        finally:
            SYSCTL.write_text("0")


@pytest.mark.root
@as_root
@pytest.mark.parametrize("value", [1, 2])
def test_doctor_and_fallback_reason_name_the_sysctl_that_switches_io_uring_off(value: int) -> None:
    if value == 2 and not os.environ.get("URINGLOOP_TEST_SYSCTL"):
        pytest.skip("2 takes io_uring from the whole machine: set URINGLOOP_TEST_SYSCTL=1 to try")
    with sysctl_set_to(1 if value == 1 else 0):
        found = run_child(io_uring_switched_off, value).value
    assert found["monitor"] == "epoll"
    assert found["reason"].startswith("io_uring_setup: EPERM (kernel.io_uring_disabled")
    assert found["exact"]
    assert "EPERM" in found["forced"]
    assert found["doctor's code"] == 0
    assert f"kernel.io_uring_disabled is {value}" in found["doctor"]


# ---------------------------------------------------------------------- the same tests, denied


def python_where_denied(
    number: int, *arguments: str, limit: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python, as a user does, under a filter that denies io_uring."""
    code = (
        "import os, sys; from tests.support import IO_URING, deny;"
        "deny(int(sys.argv[1]), *IO_URING);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(number), *arguments],
        env=child_environment(**environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
    )


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_doctor_explains_in_words_why_a_filter_means_epoll(number: int) -> None:
    ran = python_where_denied(number, "-m", "uringloop", "doctor")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    assert "epoll" in ran.stdout
    assert errno.errorcode[number] in ran.stdout
    assert "seccomp" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_loop.py", "test_selector.py"])
def test_the_same_tests_pass_on_epoll_and_poll_where_io_uring_is_denied(
    name: str, tmp_path: Path
) -> None:
    file, report = ROOT / "tests" / name, tmp_path / "report.xml"
    assert file.exists()
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}")
    started = time.monotonic()
    ran = python_where_denied(
        errno.EPERM, "-m", "pytest", *options, str(file), limit=500, URINGLOOP_TEST_DENIED="1"
    )
    assert ran.returncode == 0, f"{time.monotonic() - started:.0f} s: {ran.stdout[-5000:]}"
    skipped = {
        case.attrib["name"]: case.find("skipped") for case in ET.parse(report).iter("testcase")
    }

    def on(monitor: str) -> list[str]:
        return [name for name in skipped if monitor in re.split(r"[][-]", name)]

    for monitor in ("epoll", "poll"):
        assert sum(skipped[name] is None for name in on(monitor)) > 20
    reasons = {name: skipped[name] for name in on("io_uring")}
    assert [name for name, reason in reasons.items() if reason is None] == []
    texts = [reason.attrib["message"] for reason in reasons.values() if reason is not None]
    assert sum("io_uring_setup: EPERM" in text for text in texts) > 20
