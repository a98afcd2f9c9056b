"""The selector on its own: registration, levels, time, signals, threads, outer loops, its end.

The promise: what a user of `selectors.EpollSelector` can observe is the same on all three monitors,
and a test compares with EpollSelector itself wherever that is possible.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import random
import resource
import select
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, EpollSelector, SelectorKey
from typing import Any

import pytest

import uringloop
from tests.conftest import MONITORS, refusal
from tests.support import child_environment, in_thread, polls_in_kernel, run_child

READ, WRITE, BOTH = EVENT_READ, EVENT_WRITE, EVENT_READ | EVENT_WRITE

Ready = list[tuple[SelectorKey, int]]
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes what a test opened, at its end."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def make_pair(stack: contextlib.ExitStack) -> Callable[[], Pair]:
    """Makes pairs of connected, non-blocking sockets."""

    def make() -> Pair:
        ours, peer = socket.socketpair()
        for sock in (ours, peer):
            stack.enter_context(sock)
            sock.setblocking(False)
        return ours, peer

    return make


@pytest.fixture
def pair(make_pair: Callable[[], Pair]) -> Pair:
    """A socket to watch and its peer."""
    return make_pair()


@pytest.fixture
def ring() -> Iterator[uringloop.Selector]:
    """A selector on io_uring, for tests that count its entries."""
    if reason := refusal("io_uring"):
        pytest.skip(reason)
    with uringloop.Selector("io_uring") as selector:
        yield selector


@pytest.fixture
def selector(selector: uringloop.Selector, monitor: str) -> Iterator[uringloop.Selector]:
    """The shared fixture, which must end on its own monitor: a downgrade would hide faults."""
    yield selector
    assert (selector.monitor, selector.statistics().downgrades) == (monitor, 0)


@pytest.fixture
def outer_selector(selector: uringloop.Selector) -> uringloop.Selector:
    """A selector with a descriptor of its own, for an outer loop."""
    if selector.monitor == "poll":
        pytest.skip("the poll monitor has no descriptor of its own")
    return selector


def by_fd(ready: Ready) -> dict[int, int]:
    """What is ready, by descriptor; no descriptor twice."""
    found = {key.fd: events for key, events in ready}
    assert len(found) == len(ready), "a descriptor was reported twice in one select()"
    return found


def arm(selector: BaseSelector) -> None:
    """Let the kernel have every change; nothing is ready yet."""
    assert selector.select(0) == []


def outcome(action: Callable[[], Any]) -> tuple[Any, ...]:
    """How an action ends, in a form that can be compared."""
    try:
        return ("returns", action())
    except Exception as exc:  # noqa: BLE001 - whatever it is, the other selector must raise it too
        words = exc.args if isinstance(exc, (KeyError, ValueError)) else ()
        return ("raises", type(exc), getattr(exc, "errno", None), words)


def elapsed_s(action: Callable[[], Any]) -> float:
    """How long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def wait_until(condition: Callable[[], bool], limit_s: float = 5) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def end_of_file_seen(peer: socket.socket) -> bool:
    """Whether the other end is closed, as seen from here now."""
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False


@contextlib.contextmanager
def running(function: Callable[[], Any]) -> Iterator[threading.Thread]:
    """Run a function in a thread meanwhile; it must have ended well soon after the body."""
    problems: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as exc:  # noqa: BLE001 - raised again below, in the test's own thread
            problems.append(exc)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(10)
        alive = thread.is_alive()
    assert not alive, "the thread hangs"
    if problems:
        raise problems[0]


def sleeps_in_kernel(thread: threading.Thread) -> bool:
    """Whether a thread is blocked; only then a test may rely on its being inside select()."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


@contextlib.contextmanager
def waiting_in_thread(
    selector: uringloop.Selector, timeout: float | None = 5
) -> Iterator[list[Ready]]:
    """Have a thread wait in select(); the list holds its result after the body."""
    results: list[Ready] = []
    turns = selector.statistics().turns
    with running(lambda: results.append(selector.select(timeout))) as thread:
        assert wait_until(lambda: selector.statistics().turns > turns)
        assert wait_until(lambda: sleeps_in_kernel(thread))
        yield results


# ---------------------------------------------------------------------- keys and errors


def test_a_key_holds_what_was_registered_and_is_found_by_object_and_by_number(
    selector: uringloop.Selector, pair: Pair
) -> None:
    data = object()
    key = selector.register(pair[0], BOTH, data)
    assert key == (pair[0], pair[0].fileno(), BOTH, data)
    assert selector.get_key(pair[0]) is key
    assert selector.get_key(pair[0].fileno()) is key
    assert selector.unregister(pair[0].fileno()) is key
    assert pair[0] not in selector.get_map()


MISTAKES: dict[str, Callable[[BaseSelector, socket.socket, int], Any]] = {
    "registering twice": lambda s, sock, closed: s.register(sock, READ),
    "registering its number too": lambda s, sock, closed: s.register(sock.fileno(), READ),
    "registering for nothing": lambda s, sock, closed: s.register(0, 0),
    "registering for an unknown event": lambda s, sock, closed: s.register(0, 4),
    "registering a negative number": lambda s, sock, closed: s.register(-1, READ),
    "registering a number beyond int": lambda s, sock, closed: s.register(2**31, READ),
    "registering the largest number": lambda s, sock, closed: s.register(2**31 - 1, READ),
    "registering what is no file": lambda s, sock, closed: s.register("file", READ),  # type: ignore[arg-type]
    "registering a closed number": lambda s, sock, closed: s.register(closed, READ),
    "unregistering an unknown number": lambda s, sock, closed: s.unregister(closed),
    "unregistering what is no file": lambda s, sock, closed: s.unregister(None),  # type: ignore[arg-type]
    "modifying an unknown number": lambda s, sock, closed: s.modify(closed, READ),
    "asking for an unknown number": lambda s, sock, closed: s.get_key(closed),
    "a timeout that is no number": lambda s, sock, closed: s.select("1"),  # type: ignore[arg-type]
    "a timeout that is not a number": lambda s, sock, closed: s.select(math.nan),
    "an infinite timeout": lambda s, sock, closed: s.select(math.inf),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_what_epoll_selector_raises_and_changes_nothing(
    selector: uringloop.Selector, pair: Pair, mistake: str
) -> None:
    with EpollSelector() as model:
        closed = os.dup(0)
        os.close(closed)
        model.register(pair[0], WRITE)
        selector.register(pair[0], WRITE)
        expected = outcome(lambda: MISTAKES[mistake](model, pair[0], closed))
        assert expected[0] == "raises"
        assert outcome(lambda: MISTAKES[mistake](selector, pair[0], closed)) == expected
    assert dict(selector.get_map()) == {pair[0].fileno(): (pair[0], pair[0].fileno(), WRITE, None)}
    assert selector.statistics().watches == 1
    assert by_fd(selector.select(0)) == {pair[0].fileno(): WRITE}


@pytest.mark.parametrize("events", [0, 4, 7, -1])
def test_modify_refuses_the_events_that_register_refuses(
    selector: uringloop.Selector, pair: Pair, events: int
) -> None:
    selector.register(pair[0], WRITE)
    with pytest.raises(ValueError, match="Invalid events"):
        selector.modify(pair[0], events)
    assert by_fd(selector.select(0)) == {pair[0].fileno(): WRITE}


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/", __file__])
def test_what_epoll_cannot_poll_is_refused_with_epolls_own_exception(
    selector: uringloop.Selector, path: str
) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with EpollSelector() as model:
            expected = outcome(lambda: model.register(fd, READ))
        assert expected[:3] == ("raises", PermissionError, errno.EPERM)
        assert outcome(lambda: selector.register(fd, READ)) == expected
        assert fd not in selector.get_map()
        assert selector.select(0) == []
        assert selector.statistics().watches == 0
    finally:
        os.close(fd)


def test_a_refused_number_costs_no_memory_however_large_it_is(selector: uringloop.Selector) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before_bytes = resident_bytes()
    with pytest.raises(OSError, match="Bad file descriptor"):
        selector.register(4_000_000, READ)
    assert resident_bytes() - before_bytes < 4 << 20


def test_modify_of_a_descriptor_that_was_closed_behind_our_back_ends_as_with_epoll_selector(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    ends = []
    with EpollSelector() as model:
        for one in (model, selector):
            sock = make_pair()[0]
            one.register(sock, READ)
            fd = sock.fileno()
            sock.close()
            ends.append((outcome(lambda one=one, fd=fd: one.modify(fd, WRITE)), len(one.get_map())))  # type: ignore[misc]
            if one.get_map():
                one.unregister(fd)
    assert ends[1] == ends[0]


# ---------------------------------------------------------------------- levels


def test_a_reader_that_takes_one_byte_is_reported_for_every_byte(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    pair[1].send(bytes(100))
    for _ in range(100):
        assert by_fd(selector.select(1)) == {pair[0].fileno(): READ}
        assert pair[0].recv(1) == b"\0"
    assert selector.select(0) == []


def test_readiness_that_nobody_takes_is_reported_by_every_select(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], BOTH)
    pair[1].send(b"x")
    for timeout in (0, 1, None) * 10:
        assert by_fd(selector.select(timeout)) == {pair[0].fileno(): BOTH}


def test_data_that_comes_while_other_data_is_not_yet_read_is_reported_again(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    arm(selector)
    for _ in range(20):
        pair[1].send(b"xy")
        assert by_fd(selector.select(1)) == {pair[0].fileno(): READ}
        pair[0].recv(1)
    assert len(pair[0].recv(100)) == 20
    assert selector.select(0) == []


def test_a_thousand_registrations_and_removals_between_two_selects_leave_no_trace(
    selector: uringloop.Selector, pair: Pair
) -> None:
    pair[1].send(b"x")
    before = selector.statistics()
    for _ in range(1000):
        selector.register(pair[0], READ)
        selector.unregister(pair[0])
    assert selector.select(0) == []
    after = selector.statistics()
    assert after.sqes - before.sqes <= 2
    assert after.watches == 0


def test_a_thousand_changes_of_one_watch_are_one_request(
    ring: uringloop.Selector, pair: Pair
) -> None:
    ring.register(pair[0], READ)
    arm(ring)
    before = ring.statistics()
    for _ in range(500):
        ring.modify(pair[0], WRITE)
        ring.modify(pair[0], BOTH)
    assert by_fd(ring.select(1)) == {pair[0].fileno(): WRITE}
    assert ring.statistics().sqes - before.sqes <= 2


def test_registering_does_not_enter_the_kernel(
    ring: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(200)]
    before = ring.statistics()
    for ours, _ in pairs:
        ring.register(ours, READ)
    assert ring.statistics().enters == before.enters
    arm(ring)
    after = ring.statistics()
    assert (after.enters - before.enters, after.sqes - before.sqes) == (1, 200)


def test_a_change_of_data_alone_costs_the_kernel_nothing(
    ring: uringloop.Selector, pair: Pair
) -> None:
    ring.register(pair[0], READ, 0)
    arm(ring)
    before = ring.statistics()
    for data in range(1, 101):
        assert ring.modify(pair[0], READ, data).data == data
        arm(ring)
    after = ring.statistics()
    assert (after.sqes, after.enters) == (before.sqes, before.enters)
    pair[1].send(b"x")
    assert ring.select(1) == [((pair[0], pair[0].fileno(), READ, 100), READ)]


def test_a_modify_that_changes_nothing_returns_the_same_key(
    selector: uringloop.Selector, pair: Pair
) -> None:
    key = selector.register(pair[0], READ, "data")
    assert selector.modify(pair[0], READ, "data") is key


def test_a_watch_flipped_between_reading_and_writing_reports_only_what_it_wants_now(
    selector: uringloop.Selector, pair: Pair
) -> None:
    pair[1].send(b"x")
    selector.register(pair[0], BOTH)
    for events in (READ, WRITE, BOTH, WRITE, READ, BOTH) * 5:
        selector.modify(pair[0], events)
        for _ in range(2):
            assert by_fd(selector.select(1)) == {pair[0].fileno(): events}


def test_an_armed_watch_that_changes_its_mind_forgets_what_it_wanted(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    arm(selector)
    pair[1].send(b"x")
    selector.modify(pair[0], WRITE)
    assert by_fd(selector.select(1)) == {pair[0].fileno(): WRITE}
    selector.modify(pair[0], READ)
    assert by_fd(selector.select(1)) == {pair[0].fileno(): READ}
    pair[0].recv(1)
    assert selector.select(0) == []


# ---------------------------------------------------------------------- removal


@pytest.mark.parametrize("armed", [False, True])
def test_a_watch_removed_before_the_select_is_not_reported(
    selector: uringloop.Selector, pair: Pair, armed: bool
) -> None:
    selector.register(pair[0], READ)
    if armed:
        arm(selector)
    pair[1].send(b"x")
    selector.unregister(pair[0])
    assert selector.select(0) == []
    assert selector.select(0.01) == []
    assert selector.statistics().watches == 0


def test_an_event_collected_by_another_removal_dies_with_its_watch(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (a, _), (b, b_peer) = make_pair(), make_pair()
    selector.register(a, READ)
    selector.register(b, READ, "old")
    arm(selector)
    b_peer.send(b"x")
    selector.unregister(a)  # on io_uring this reads completions, also the one of b
    selector.unregister(b)
    assert b.recv(1) == b"x"
    selector.register(b, READ, "new")
    assert selector.select(0) == []
    b_peer.send(b"y")
    assert selector.select(1) == [((b, b.fileno(), READ, "new"), READ)]


@pytest.mark.parametrize("removal", [False, True])
def test_readiness_that_is_gone_before_the_select_is_reported_once_at_most_and_only_by_io_uring(
    selector: uringloop.Selector, make_pair: Callable[[], Pair], removal: bool
) -> None:
    """A poll remembers the mask of its wake-up and does not look again; the next turn is exact."""
    (a, _), (b, b_peer) = make_pair(), make_pair()
    selector.register(a, READ)
    selector.register(b, READ)
    arm(selector)
    for _ in range(5):
        b_peer.send(b"x")
        if removal:
            selector.unregister(a)
            selector.register(a, READ)
        assert b.recv(1) == b"x"
        if selector.monitor == "io_uring":
            assert by_fd(selector.select(0)) in ({}, {b.fileno(): READ})
        assert selector.select(0) == []
    b_peer.send(b"y")
    assert by_fd(selector.select(1)) == {b.fileno(): READ}


@pytest.mark.parametrize("how", ["removed", "changed, then removed"])
def test_a_wake_up_without_readiness_does_not_keep_a_removed_watch_in_the_kernel(
    selector: uringloop.Selector, make_pair: Callable[[], Pair], how: str
) -> None:
    """POLL_REMOVE would answer -EALREADY here and leave behind the poll, which holds the file."""
    (sock, _), (other, _) = make_pair(), make_pair()
    fill(sock)
    selector.register(sock, WRITE)
    selector.register(other, READ)
    arm(selector)
    before = selector.statistics()
    sock.shutdown(socket.SHUT_WR)  # wakes a writer who still cannot write
    if how == "changed, then removed":
        selector.modify(sock, READ)
        arm(selector)
    selector.unregister(sock)
    after = selector.statistics()
    assert after.enters - before.enters <= 4
    if selector.monitor == "io_uring":
        selector.unregister(other)
        assert polls_in_kernel() == 0


def test_waiting_to_write_to_a_peer_that_has_half_closed_costs_no_cpu(
    selector: uringloop.Selector, pair: Pair
) -> None:
    """A client may end its side and read on; io_uring adds POLLRDHUP to whatever was asked for."""
    ours, peer = pair
    selector.register(ours, WRITE)
    for half_closed in (False, True, True):
        fill(ours)
        if half_closed:
            peer.shutdown(socket.SHUT_WR)
        turns, cpu_s = selector.statistics().turns, time.process_time()
        assert selector.select(0.05) == []
        assert selector.statistics().turns - turns <= 5
        assert time.process_time() - cpu_s < 0.02
        with contextlib.suppress(BlockingIOError):
            while peer.recv(1 << 20):
                pass
        for _ in range(5):
            assert by_fd(selector.select(1)) == {ours.fileno(): WRITE}
    fill(ours)
    assert selector.select(0) == []
    selector.unregister(ours)
    if selector.monitor == "io_uring":
        assert polls_in_kernel() == 0


def test_other_watches_keep_their_readiness_through_a_removal(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(40)]
    for ours, _ in pairs:
        selector.register(ours, READ)
    arm(selector)
    for _, peer in pairs:
        peer.send(b"x")
    for ours, _ in pairs[::2]:
        selector.unregister(ours)
    kept = {ours.fileno() for ours, _ in pairs[1::2]}
    seen: set[int] = set()
    while ready := by_fd(selector.select(0)):
        seen |= set(ready)
        for ours, _ in pairs[1::2]:
            with contextlib.suppress(BlockingIOError):
                if ours.fileno() in ready:
                    ours.recv(1)
    assert seen == kept


def test_a_reused_number_never_receives_an_event_of_the_file_before_it(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    number = os.dup(0)
    try:
        for i in range(100):
            (old, old_peer), (new, new_peer) = make_pair(), make_pair()
            os.dup2(old.fileno(), number)
            old.close()
            selector.register(number, READ, ("old", i))
            if i % 2:
                arm(selector)
            old_peer.send(b"x")
            if i % 3 == 0:
                assert selector.select(1)[0][0].data == ("old", i)
            selector.unregister(number)
            os.dup2(new.fileno(), number)  # closes the old file, as close() and open() would
            new.close()
            selector.register(number, READ, ("new", i))
            assert selector.select(0) == []
            new_peer.send(b"x")
            assert [key.data for key, _ in selector.select(1)] == [("new", i)]
            selector.unregister(number)
            old_peer.close()
            new_peer.close()
    finally:
        os.close(number)


def test_a_number_reused_before_its_watch_was_removed_is_clean_after_the_removal(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (old, old_peer), (new, new_peer) = make_pair(), make_pair()
    number = old.detach()
    try:
        selector.register(number, READ, "old")
        arm(selector)
        os.dup2(new.fileno(), number)
        selector.unregister(number)
        with contextlib.suppress(BrokenPipeError):  # right: nobody holds the old file any more
            old_peer.send(b"x")
        selector.register(number, READ, "new")
        assert selector.select(0) == []
        assert end_of_file_seen(old_peer)
        new_peer.send(b"x")
        assert [key.data for key, _ in selector.select(1)] == ["new"]
        selector.unregister(number)
    finally:
        os.close(number)


@pytest.mark.parametrize("events", [READ, WRITE, BOTH])
def test_the_peer_sees_end_of_file_right_after_unregister_and_close(
    selector: uringloop.Selector, pair: Pair, events: int
) -> None:
    selector.register(pair[0], events)
    selector.select(0)
    selector.select(0)
    selector.unregister(pair[0])
    pair[0].close()
    assert end_of_file_seen(pair[1])


def test_the_peer_sees_end_of_file_though_the_watch_was_changed_since_it_was_armed(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    arm(selector)
    selector.modify(pair[0], BOTH)
    selector.unregister(pair[0])
    pair[0].close()
    assert end_of_file_seen(pair[1])


def test_a_listening_socket_refuses_connections_right_after_unregister_and_close(
    selector: uringloop.Selector,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        address = server.getsockname()
        selector.register(server, READ)
        arm(selector)
        selector.unregister(server)
        server.close()
        assert client.connect_ex(address) == errno.ECONNREFUSED


@pytest.mark.parametrize("armed", [False, True])
def test_a_descriptor_closed_behind_our_back_is_reported_once_at_most_and_costs_no_cpu(
    selector: uringloop.Selector, pair: Pair, armed: bool
) -> None:
    fd = pair[0].detach()
    selector.register(fd, READ)
    if armed:
        arm(selector)
    os.close(fd)
    cpu_s = time.process_time()
    reports = [by_fd(selector.select(0.02)) for _ in range(15)]
    cpu_s = time.process_time() - cpu_s
    assert [report for report in reports if report] in ([], [{fd: READ}])
    assert cpu_s < 0.05
    selector.unregister(fd)
    assert wait_until(lambda: end_of_file_seen(pair[1]))


def test_a_descriptor_closed_behind_our_back_with_traffic_under_way_goes_quiet(
    selector: uringloop.Selector, pair: Pair
) -> None:
    fd = pair[0].detach()
    selector.register(fd, READ)
    arm(selector)
    os.close(fd)
    with contextlib.suppress(BrokenPipeError):  # epoll has let the file go, the others not yet
        pair[1].send(b"x")
    for _ in range(5):
        selector.select(0.01)
    cpu_s = time.process_time()
    assert [selector.select(0.05) for _ in range(6)] == [[]] * 6
    assert time.process_time() - cpu_s < 0.05


def test_other_watches_live_on_beside_a_descriptor_closed_behind_our_back(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (bad, _), (good, good_peer) = make_pair(), make_pair()
    fd = bad.detach()
    selector.register(fd, READ)
    selector.register(good, READ)
    os.close(fd)
    selector.select(0.01)
    for _ in range(5):
        good_peer.send(b"x")
        assert by_fd(selector.select(1)) == {good.fileno(): READ}
        good.recv(1)
    selector.unregister(fd)
    assert selector.statistics().watches == 1


# ---------------------------------------------------------------------- the same masks as epoll


def tcp_pair(stack: contextlib.ExitStack) -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = stack.enter_context(socket.create_connection(server.getsockname()))
        peer = stack.enter_context(server.accept()[0])
    ours.setblocking(False)
    peer.setblocking(False)
    return ours, peer


def fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for fd in ends:
        stack.callback(close_quietly, fd)
    return ends


def close_quietly(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def nothing() -> None:
    pass


# Each situation opens something and returns the descriptor to watch and what happens to it.
Situation = Callable[[contextlib.ExitStack], tuple[int, Callable[[], Any]]]


def pipe_situation(end: int, *actions: Callable[[int, int], Any]) -> Situation:
    def situation(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
        ends = pipe(stack)
        return ends[end], lambda: [action(*ends) for action in actions]

    return situation


def socket_situation(
    make: Callable[[contextlib.ExitStack], Pair],
    *actions: Callable[[socket.socket, socket.socket], Any],
) -> Situation:
    def situation(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
        ours, peer = make(stack)
        return ours.fileno(), lambda: [action(ours, peer) for action in actions]

    return situation


def unix_pair(stack: contextlib.ExitStack) -> Pair:
    ours, peer = socket.socketpair()
    for sock in (stack.enter_context(ours), stack.enter_context(peer)):
        sock.setblocking(False)
    return ours, peer


def refused_connect(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    sock = stack.enter_context(socket.socket())
    sock.setblocking(False)
    return sock.fileno(), lambda: sock.connect_ex(address)


def listening(connect: bool) -> Situation:
    def situation(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.socket())
        address = server.getsockname() if connect else None
        return server.fileno(), lambda: address and client.connect_ex(address)

    return situation


def refused_datagram(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
    gone = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    gone.bind(("127.0.0.1", 0))
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.connect(gone.getsockname())
    gone.close()
    return sock.fileno(), lambda: sock.send(b"x")


def terminal(*actions: Callable[[int, int], Any]) -> Situation:
    def situation(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
        ours, theirs = os.openpty()
        stack.callback(close_quietly, ours)
        stack.callback(close_quietly, theirs)
        return ours, lambda: [action(ours, theirs) for action in actions]

    return situation


def counter(value: int) -> Situation:
    def situation(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        stack.callback(os.close, fd)
        return fd, lambda: os.eventfd_write(fd, value)

    return situation


def ended_child(stack: contextlib.ExitStack) -> tuple[int, Callable[[], Any]]:
    child = stack.enter_context(subprocess.Popen(["cat"], stdin=subprocess.PIPE))
    fd = os.pidfd_open(child.pid)
    stack.callback(os.close, fd)

    def end() -> None:
        assert child.stdin
        child.stdin.close()
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)

    return fd, end


SITUATIONS: dict[str, Situation] = {
    "pipe, reader, empty": pipe_situation(0),
    "pipe, reader, data": pipe_situation(0, lambda r, w: os.write(w, b"x")),
    "pipe, reader, writer closed": pipe_situation(0, lambda r, w: os.close(w)),
    "pipe, reader, data and writer closed": pipe_situation(
        0, lambda r, w: os.write(w, b"x"), lambda r, w: os.close(w)
    ),
    "pipe, writer, room": pipe_situation(1),
    "pipe, writer, full": pipe_situation(1, lambda r, w: os.write(w, bytes(1 << 20))),
    "pipe, writer, reader closed": pipe_situation(1, lambda r, w: os.close(r)),
    "pipe, writer, full and reader closed": pipe_situation(
        1, lambda r, w: os.write(w, bytes(1 << 20)), lambda r, w: os.close(r)
    ),
    "unix, idle": socket_situation(unix_pair),
    "unix, data": socket_situation(unix_pair, lambda ours, peer: peer.send(b"x")),
    "unix, full": socket_situation(unix_pair, lambda ours, peer: fill(ours)),
    "unix, peer closed": socket_situation(unix_pair, lambda ours, peer: peer.close()),
    "unix, data and peer closed": socket_situation(
        unix_pair, lambda ours, peer: peer.send(b"x"), lambda ours, peer: peer.close()
    ),
    "unix, peer half closed": socket_situation(
        unix_pair, lambda ours, peer: peer.shutdown(socket.SHUT_WR)
    ),
    "unix, full and peer half closed": socket_situation(
        unix_pair, lambda ours, peer: fill(ours), lambda ours, peer: peer.shutdown(socket.SHUT_WR)
    ),
    "unix, full and our reading end shut": socket_situation(
        unix_pair, lambda ours, peer: fill(ours), lambda ours, peer: ours.shutdown(socket.SHUT_RD)
    ),
    "unix, our reading end shut": socket_situation(
        unix_pair, lambda ours, peer: ours.shutdown(socket.SHUT_RD)
    ),
    "unix, our writing end shut": socket_situation(
        unix_pair, lambda ours, peer: ours.shutdown(socket.SHUT_WR)
    ),
    "unix, both ends shut": socket_situation(
        unix_pair, lambda ours, peer: ours.shutdown(socket.SHUT_RDWR)
    ),
    "tcp, idle": socket_situation(tcp_pair),
    "tcp, FIN": socket_situation(tcp_pair, lambda ours, peer: peer.close()),
    "tcp, half close": socket_situation(tcp_pair, lambda ours, peer: peer.shutdown(socket.SHUT_WR)),
    "tcp, half closed by both": socket_situation(
        tcp_pair,
        lambda ours, peer: peer.shutdown(socket.SHUT_WR),
        lambda ours, peer: ours.shutdown(socket.SHUT_WR),
    ),
    "tcp, RST": socket_situation(tcp_pair, lambda ours, peer: reset(peer)),
    "tcp, full and RST": socket_situation(
        tcp_pair, lambda ours, peer: fill(ours), lambda ours, peer: reset(peer)
    ),
    "tcp, out of band": socket_situation(
        tcp_pair, lambda ours, peer: peer.send(b"!", socket.MSG_OOB)
    ),
    "tcp, data and out of band": socket_situation(
        tcp_pair,
        lambda ours, peer: peer.send(b"x"),
        lambda ours, peer: peer.send(b"!", socket.MSG_OOB),
    ),
    "tcp, never connected": lambda stack: (
        stack.enter_context(socket.socket()).fileno(),
        nothing,
    ),
    "tcp, connection refused": refused_connect,
    "tcp, listening": listening(connect=False),
    "tcp, listening, connection waits": listening(connect=True),
    "udp, refused": refused_datagram,
    "eventfd, zero": counter(0),
    "eventfd, one": counter(1),
    "eventfd, full": counter(2**64 - 2),
    "terminal, idle": terminal(),
    "terminal, data": terminal(lambda ours, theirs: os.write(theirs, b"x")),
    "terminal, hung up": terminal(lambda ours, theirs: os.close(theirs)),
    "process, ended": ended_child,
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_readiness_is_what_epoll_selector_reports(
    selector: uringloop.Selector, stack: contextlib.ExitStack, situation: str
) -> None:
    for armed_before in (False, True):
        for events in (READ, WRITE, BOTH):
            fd, happen = SITUATIONS[situation](stack)
            with EpollSelector() as model:
                model.register(fd, events)
                if not armed_before:
                    happen()
                selector.register(fd, events)
                if armed_before:
                    selector.select(0)
                    happen()

                def agree(model: EpollSelector = model) -> bool:
                    return by_fd(selector.select(0)) == by_fd(model.select(0))

                if situation.startswith("terminal"):
                    time.sleep(0.01)  # what one end does reaches the other through a kernel worker
                assert wait_until(agree, 2), (by_fd(selector.select(0)), by_fd(model.select(0)))
                for _ in range(3):
                    assert agree()
                if not model.select(0):
                    turns = selector.statistics().turns
                    assert selector.select(0.005) == []
                    assert selector.statistics().turns - turns <= 5, "it spins"
            selector.unregister(fd)


# ---------------------------------------------------------------------- time


def test_select_with_timeout_zero_or_less_does_not_wait(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    for timeout in (0, 0.0, -0.0, -1e-9, -1, -math.inf):
        assert min(elapsed_s(lambda t=timeout: selector.select(t)) for _ in range(5)) < 0.002  # type: ignore[misc]
    pair[1].send(b"x")
    for timeout in (0, -1):
        assert by_fd(selector.select(timeout)) == {pair[0].fileno(): READ}


@pytest.mark.parametrize("watching", [False, True])
def test_a_wait_is_never_early_and_not_much_late(
    selector: uringloop.Selector, pair: Pair, watching: bool
) -> None:
    if watching:
        selector.register(pair[0], READ)
    for timeout in (1e-9, 1e-6, 0.0002, 0.0035, 0.05):
        taken = [elapsed_s(lambda t=timeout: selector.select(t)) for _ in range(5)]  # type: ignore[misc]
        assert min(taken) >= timeout
        assert min(taken) < timeout + 0.0007  # EpollSelector would round up to a millisecond


def test_a_wait_of_a_microsecond_is_one_turn(selector: uringloop.Selector, pair: Pair) -> None:
    selector.register(pair[0], READ)
    before = selector.statistics()
    for _ in range(100):
        selector.select(1e-6)
    assert selector.statistics().turns - before.turns <= 110
    assert selector.statistics().enters - before.enters <= 110


def test_random_timeouts_hold_while_memory_is_collected(selector: uringloop.Selector) -> None:
    source = random.Random(25)
    timeouts = [source.uniform(0.001, 0.008) for _ in range(40)]
    late = []
    for timeout in timeouts:
        gc.collect(0)
        late.append(elapsed_s(lambda t=timeout: selector.select(t)) - timeout)  # type: ignore[misc]
    assert min(late) >= 0
    assert statistics.median(late) < 0.005


def test_an_event_before_the_timeout_leaves_nothing_that_shortens_a_later_wait(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    pair[1].send(b"x")
    assert by_fd(selector.select(0.05)) == {pair[0].fileno(): READ}
    pair[0].recv(1)
    assert elapsed_s(lambda: selector.select(0.12)) >= 0.12


def test_changes_queued_before_a_wait_do_not_shorten_it(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (a, _), (b, _) = make_pair(), make_pair()
    selector.register(a, READ)
    selector.register(b, WRITE)
    selector.select(0)
    selector.modify(b, READ)  # an exchange: its cancellation completes during the wait
    assert elapsed_s(lambda: selector.select(0.05)) >= 0.05


@pytest.mark.parametrize("timeout", [None, 5, 1e6, 2.0**33, 1e12])
def test_a_long_wait_ends_when_another_thread_makes_something_ready(
    selector: uringloop.Selector, pair: Pair, timeout: float | None
) -> None:
    selector.register(pair[0], READ)
    with waiting_in_thread(selector, timeout) as results:
        time.sleep(0.02)
        assert results == []
        pair[1].send(b"x")
        start = time.perf_counter()
        assert wait_until(lambda: bool(results))
        assert time.perf_counter() - start < 1
    assert by_fd(results[0]) == {pair[0].fileno(): READ}


# ---------------------------------------------------------------------- signals


@contextlib.contextmanager
def alarm(handler: Any, after_s: float, every_s: float = 0) -> Iterator[None]:
    """Run a handler for SIGALRM during the body."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s, every_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("queued", ["nothing", "a registration", "a change"])
def test_a_signal_handler_runs_during_a_wait_which_lasts_its_full_time(
    selector: uringloop.Selector, pair: Pair, queued: str
) -> None:
    if queued == "a change":
        selector.register(pair[0], WRITE)
        selector.select(0)
        selector.modify(pair[0], READ)
    if queued == "a registration":
        selector.register(pair[0], READ)
    ran: list[float] = []
    start = time.perf_counter()
    with alarm(lambda *_: ran.append(time.perf_counter() - start), 0.03):
        assert selector.select(0.15) == []
        assert time.perf_counter() - start >= 0.15
    assert len(ran) == 1
    assert ran[0] < 0.12


def test_a_storm_of_signals_neither_shortens_nor_prolongs_a_wait(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    ran: list[int] = []
    with alarm(lambda number, _: ran.append(number), 0.001, 0.001):
        taken_s = elapsed_s(lambda: selector.select(0.15))
    assert 0.15 <= taken_s < 0.5
    assert len(ran) >= 20


def test_a_signal_handler_may_make_something_ready(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    with alarm(lambda *_: pair[1].send(b"x"), 0.02):
        assert by_fd(selector.select(None)) == {pair[0].fileno(): READ}


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("timeout", [None, 5])
def test_keyboard_interrupt_leaves_a_wait_promptly_and_the_selector_intact(
    selector: uringloop.Selector, pair: Pair, timeout: float | None, queued: bool
) -> None:
    selector.register(pair[0], READ)
    if not queued:
        arm(selector)
    start = time.perf_counter()
    with alarm(signal.default_int_handler, 0.02), pytest.raises(KeyboardInterrupt):
        selector.select(timeout)
    assert time.perf_counter() - start < 0.5
    pair[1].send(b"x")
    assert by_fd(selector.select(1)) == {pair[0].fileno(): READ}


STOPPED = """
import sys, time, socket, uringloop
ours, peer = socket.socketpair()
with uringloop.Selector(sys.argv[1]) as selector:
    selector.register(ours, 1)
    print(flush=True)
    start = time.perf_counter()
    assert selector.select(0.4) == []
    print(time.perf_counter() - start)
"""


def test_stopping_and_continuing_the_process_does_not_shorten_a_wait(monitor: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, monitor],
        env=child_environment(PYTHONWARNINGS="ignore"),
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout
        child.stdout.readline()
        time.sleep(0.05)
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        child.send_signal(signal.SIGCONT)
        assert 0.4 <= float(child.stdout.read()) < 3


# ---------------------------------------------------------------------- many


@pytest.fixture
def make_counters(stack: contextlib.ExitStack) -> Callable[[int, int], list[int]]:
    """Makes eventfds with a value; skips what RLIMIT_NOFILE does not allow."""

    def make(count: int, value: int) -> list[int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < count + 200:
            pytest.skip(f"RLIMIT_NOFILE is {hard}, the test needs {count + 200}")
        if soft != resource.RLIM_INFINITY and soft < count + 200:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count + 200, hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        counters = []
        for _ in range(count):
            counters.append(os.eventfd(value, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            stack.callback(os.close, counters[-1])
        return counters

    return make


@pytest.mark.parametrize("count", [1000, 3000])
def test_everything_that_is_ready_at_registration_is_reported_by_one_select(
    selector: uringloop.Selector, make_counters: Callable[[int, int], list[int]], count: int
) -> None:
    counters = make_counters(count, 1)
    for fd in counters:
        selector.register(fd, READ)
    for _ in range(2):
        assert by_fd(selector.select(1)) == dict.fromkeys(counters, READ)
    for fd in counters:
        os.eventfd_read(fd)
    assert selector.select(0) == []


def test_more_armed_watches_than_the_completion_queue_holds_are_each_reported_once(
    selector: uringloop.Selector, make_counters: Callable[[int, int], list[int]]
) -> None:
    counters = make_counters(6000, 0)
    for fd in counters:
        selector.register(fd, READ)
    arm(selector)
    for fd in counters:
        os.eventfd_write(fd, 1)
    seen: set[int] = set()
    turns = 0
    while len(seen) < len(counters):
        ready = by_fd(selector.select(1))
        assert ready, f"only {len(seen)} were reported"
        assert not seen & set(ready), "reported again although it was read"
        for fd in ready:
            os.eventfd_read(fd)
        seen |= set(ready)
        turns += 1
    assert selector.select(0) == []
    assert turns <= 600


def test_a_watch_is_not_starved_by_many_that_are_always_ready(
    selector: uringloop.Selector, make_counters: Callable[[int, int], list[int]]
) -> None:
    busy, late = make_counters(1000, 1), make_counters(100, 0)
    for fd in late + busy:
        selector.register(fd, READ)
    selector.select(0)
    for fd in late:
        os.eventfd_write(fd, 1)
    seen: set[int] = set()
    for _ in range(20):
        seen |= set(by_fd(selector.select(1)))
    assert seen == set(busy + late)


# ---------------------------------------------------------------------- threads


def test_watches_are_kept_when_the_waiting_moves_from_thread_to_thread(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(5)]
    for ours, _ in pairs:
        selector.register(ours, READ)
    in_thread(lambda: arm(selector))

    def wait() -> dict[int, int]:
        return by_fd(selector.select(1))

    for i, (ours, peer) in enumerate(pairs * 2):
        peer.send(b"x")
        assert (wait() if i % 3 == 0 else in_thread(wait)) == {ours.fileno(): READ}
        ours.recv(1)
    assert selector.statistics().watches == 5


@pytest.mark.parametrize("timeout", [0, 0.01, None])
def test_a_watch_armed_by_a_thread_that_has_ended_still_fires(
    selector: uringloop.Selector, pair: Pair, timeout: float | None
) -> None:
    """The kernel ends such polls with -ECANCELED; the next thread often has the same pthread_t."""
    selector.register(pair[0], READ)
    in_thread(lambda: arm(selector))

    def wait() -> dict[int, int]:
        pair[1].send(b"x")
        deadline = time.monotonic() + 5
        while not (found := by_fd(selector.select(timeout))):
            assert time.monotonic() < deadline
        return found

    for _ in range(3):
        assert in_thread(wait) == {pair[0].fileno(): READ}
        pair[0].recv(10)
        in_thread(lambda: arm(selector))


def test_a_watch_removed_by_another_thread_lets_the_file_go_and_the_others_live(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (gone, gone_peer), (kept, kept_peer) = make_pair(), make_pair()
    selector.register(gone, READ)
    selector.register(kept, READ)
    arm(selector)
    in_thread(lambda: selector.unregister(gone))
    gone.close()
    assert wait_until(lambda: end_of_file_seen(gone_peer), 0.5)
    kept_peer.send(b"x")
    assert by_fd(selector.select(1)) == {kept.fileno(): READ}
    assert selector.statistics().watches == 1


def test_a_watch_removed_while_another_thread_waits_is_not_reported_and_ends_with_that_wait(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (gone, gone_peer), (kept, kept_peer) = make_pair(), make_pair()
    selector.register(gone, READ)
    selector.register(kept, READ)
    with waiting_in_thread(selector) as results:
        selector.unregister(gone)
        gone_peer.send(b"x")
        time.sleep(0.02)
        gone.close()
        assert results == []
        kept_peer.send(b"x")
    assert by_fd(results[0]) == {kept.fileno(): READ}
    in_thread(lambda: selector.select(0))
    with contextlib.suppress(ConnectionResetError):  # the byte that nobody read
        assert wait_until(lambda: end_of_file_seen(gone_peer), 0.5)


def test_a_number_reused_while_another_thread_waits_reports_only_the_new_file(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    (old, old_peer), (new, new_peer), (wake, wake_peer) = make_pair(), make_pair(), make_pair()
    number = old.detach()
    try:
        selector.register(number, READ, "old")
        selector.register(wake, READ, "wake")
        with waiting_in_thread(selector) as results:
            selector.unregister(number)
            os.dup2(new.fileno(), number)
            selector.register(number, READ, "new")
            with contextlib.suppress(BrokenPipeError):
                old_peer.send(b"x")
            wake_peer.send(b"x")
        assert [key.data for key, _ in results[0]] == ["wake"]
        wake.recv(1)
        assert selector.select(0) == []
        new_peer.send(b"x")
        assert [key.data for key, _ in selector.select(1)] == ["new"]
        selector.unregister(number)
    finally:
        os.close(number)


def test_what_another_thread_registers_is_seen_when_the_waiting_thread_is_woken(
    selector: uringloop.Selector, pair: Pair, make_pair: Callable[[], Pair]
) -> None:
    """As call_soon_threadsafe does it: change something, then wake the waiting thread."""
    ours, peer = pair
    selector.register(ours, READ, "wake")
    rounds = 300
    seen: list[int] = []

    def wait() -> None:
        while len(seen) < rounds:
            for key, _ in selector.select(5):
                if key.data == "wake":
                    with contextlib.suppress(BlockingIOError):
                        ours.recv(1)
                else:
                    selector.unregister(key.fd)
                    seen.append(key.data)

    ready, ready_peer = make_pair()
    ready_peer.send(b"x")
    with running(wait):
        for i in range(rounds):
            selector.register(ready, READ, i)
            peer.send(b"x")
            assert wait_until(lambda i=i: len(seen) > i)  # type: ignore[misc]
    assert seen == list(range(rounds))


def test_a_second_wait_at_the_same_time_is_refused_and_the_first_goes_on(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    with waiting_in_thread(selector) as results:
        for timeout in (0, 0.01, None):
            with pytest.raises(RuntimeError, match="already waiting"):
                selector.select(timeout)
        assert results == []
        pair[1].send(b"x")
    assert by_fd(results[0]) == {pair[0].fileno(): READ}
    assert by_fd(selector.select(0)) == {pair[0].fileno(): READ}


def test_a_selector_cannot_be_closed_under_a_waiting_thread(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    with waiting_in_thread(selector) as results:
        with pytest.raises(RuntimeError, match="waiting"):
            selector.close()
        pair[1].send(b"x")
    assert by_fd(results[0]) == {pair[0].fileno(): READ}
    assert selector.get_key(pair[0]).fd == pair[0].fileno()


def test_statistics_answer_while_another_thread_waits(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    with waiting_in_thread(selector) as results:
        assert elapsed_s(selector.statistics) < 0.5
        assert selector.statistics().watches == 1
        assert selector.monitor in MONITORS
        assert results == []
        pair[1].send(b"x")


def close_while_others_ask(monitor: str) -> int:
    """Ask in three threads while a selector is closed; a mistake here crashes the process."""
    closed = 0
    counters = [os.eventfd(0) for _ in range(300)]
    for _ in range(40):
        selector = uringloop.Selector(monitor)
        for fd in counters:
            selector.register(fd, READ)
        selector.select(0)
        done = threading.Event()

        def ask(selector: uringloop.Selector = selector, done: threading.Event = done) -> None:
            while not done.is_set():
                assert selector.statistics().turns == 1
                assert selector.monitor

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        selector.close()
        done.set()
        for thread in threads:
            thread.join()
        closed += selector.statistics().turns
    return closed


def test_statistics_may_be_asked_for_while_another_thread_closes_the_selector(monitor: str) -> None:
    assert run_child(close_while_others_ask, monitor, limit=20).value == 40


def test_a_select_between_another_selects_events_neither_loses_nor_doubles_any(
    selector: uringloop.Selector, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(10)]
    for ours, peer in pairs:
        selector.register(ours, READ, ours)
        peer.send(b"x")
    everything = {ours.fileno(): READ for ours, _ in pairs}
    outer = selector.select(1)
    assert by_fd(outer) == everything
    for key, _ in outer:
        assert by_fd(selector.select(0)) == everything
        key.data.recv(1)
        del everything[key.fd]
    assert selector.select(0) == []


# ---------------------------------------------------------------------- an outer loop


OUTER = {
    "epoll": EpollSelector,
    "poll": selectors.PollSelector,
    "select": selectors.SelectSelector,
}


@pytest.fixture(params=OUTER)
def outer(
    request: pytest.FixtureRequest, outer_selector: uringloop.Selector
) -> Iterator[Callable[[float], bool]]:
    """Whether an outer loop is woken within seconds to run the inner selector's select(0)."""
    host: BaseSelector = OUTER[request.param]()
    with host:
        host.register(outer_selector.fileno(), READ)
        yield lambda timeout: bool(host.select(timeout))


def serve(selector: uringloop.Selector, woken: Callable[[float], bool]) -> dict[int, int]:
    """What an outer loop does until it goes quiet: the events that it found on the way."""
    found: dict[int, int] = {}
    for _ in range(5):
        if not woken(0):
            return found
        found |= by_fd(selector.select(0))
    pytest.fail("the outer loop spins")


def test_an_outer_loop_is_woken_for_new_readiness_and_goes_quiet_after_it_was_taken(
    outer_selector: uringloop.Selector, outer: Callable[[float], bool], pair: Pair
) -> None:
    outer_selector.register(pair[0], READ)
    assert serve(outer_selector, outer) == {}
    for _ in range(5):
        assert not outer(0.01)
        timer = threading.Timer(0.01, pair[1].send, [b"x"])
        with running(timer.run):
            assert outer(5)
        assert by_fd(outer_selector.select(0)) == {pair[0].fileno(): READ}
        pair[0].recv(1)
        assert serve(outer_selector, outer) == {}


def test_an_outer_loop_is_woken_when_a_descriptor_that_is_already_ready_is_registered(
    outer_selector: uringloop.Selector, outer: Callable[[float], bool], pair: Pair
) -> None:
    assert serve(outer_selector, outer) == {}
    pair[1].send(b"x")
    outer_selector.register(pair[0], READ)
    assert outer(1)
    assert by_fd(outer_selector.select(0)) == {pair[0].fileno(): READ}


def test_an_outer_loop_is_woken_when_a_watch_is_changed_to_what_is_ready(
    outer_selector: uringloop.Selector, outer: Callable[[float], bool], pair: Pair
) -> None:
    outer_selector.register(pair[0], READ)
    assert serve(outer_selector, outer) == {}
    outer_selector.modify(pair[0], WRITE)
    assert outer(1)
    assert by_fd(outer_selector.select(0)) == {pair[0].fileno(): WRITE}


def test_an_outer_loop_is_woken_again_while_data_is_left_unread(
    outer_selector: uringloop.Selector, outer: Callable[[float], bool], pair: Pair
) -> None:
    outer_selector.register(pair[0], READ)
    pair[1].send(bytes(10))
    for _ in range(10):
        assert outer(1)
        assert by_fd(outer_selector.select(0)) == {pair[0].fileno(): READ}
        pair[0].recv(1)
    assert serve(outer_selector, outer) == {}


def test_an_outer_loop_goes_quiet_when_the_ready_watch_is_removed(
    outer_selector: uringloop.Selector, outer: Callable[[float], bool], pair: Pair
) -> None:
    pair[1].send(b"x")
    outer_selector.register(pair[0], READ)
    assert by_fd(outer_selector.select(0)) == {pair[0].fileno(): READ}
    outer_selector.unregister(pair[0])
    assert serve(outer_selector, outer) == {}
    assert not outer(0.02)


def test_an_outer_loop_finds_everything_however_much_is_ready_at_once(
    outer_selector: uringloop.Selector,
    outer: Callable[[float], bool],
    make_counters: Callable[[int, int], list[int]],
) -> None:
    counters = make_counters(200, 0)
    for fd in counters:
        outer_selector.register(fd, READ)
    assert serve(outer_selector, outer) == {}
    for fd in counters:
        os.eventfd_write(fd, 1)
    seen: set[int] = set()
    while len(seen) < len(counters):
        assert outer(1)
        ready = by_fd(outer_selector.select(0))
        assert not seen & set(ready)
        for fd in ready:
            os.eventfd_read(fd)
        seen |= set(ready)
    assert serve(outer_selector, outer) == {}


def test_an_outer_loop_is_still_woken_after_the_selector_was_used_in_another_thread(
    outer_selector: uringloop.Selector, outer: Callable[[float], bool], pair: Pair
) -> None:
    outer_selector.register(pair[0], READ)
    in_thread(lambda: arm(outer_selector))
    assert serve(outer_selector, outer) == {}
    pair[1].send(b"x")
    assert outer(1)
    assert by_fd(outer_selector.select(0)) == {pair[0].fileno(): READ}


def test_a_selector_can_watch_another_one(monitor: str, pair: Pair) -> None:
    if monitor == "poll":
        pytest.skip("the poll monitor has no descriptor of its own")
    with uringloop.Selector(monitor) as inner, uringloop.Selector(monitor) as host:
        inner.register(pair[0], READ)
        host.register(inner.fileno(), READ)
        for _ in range(3):
            while host.select(0):
                assert inner.select(0) == []
            pair[1].send(b"x")
            assert len(host.select(1)) == 1
            assert by_fd(inner.select(0)) == {pair[0].fileno(): READ}
            pair[0].recv(1)


def test_fileno_stays_the_same_and_exists_where_epoll_or_io_uring_is_used(
    selector: uringloop.Selector,
) -> None:
    assert hasattr(selector, "fileno") == (selector.monitor != "poll")
    if selector.monitor != "poll":
        fd = selector.fileno()
        selector.select(0)
        assert selector.fileno() == fd
        assert not os.get_inheritable(fd)
        assert select.select([fd], [], [], 0) == ([], [], [])


# ---------------------------------------------------------------------- its beginning and its end


AFTER_CLOSE: dict[str, Callable[[Any, socket.socket], Any]] = {
    "select": lambda s, sock: s.select(0),
    "select for ever": lambda s, sock: s.select(),
    "register": lambda s, sock: s.register(sock, READ),
    "unregister": lambda s, sock: s.unregister(sock),
    "modify": lambda s, sock: s.modify(sock, WRITE),
    "get_key": lambda s, sock: s.get_key(sock),
    "get_map": lambda s, sock: s.get_map(),
    "close": lambda s, sock: s.close(),
    "fileno": lambda s, sock: s.fileno(),
}


@pytest.mark.parametrize("use", AFTER_CLOSE)
def test_use_after_close_ends_as_with_epoll_selector(
    selector: uringloop.Selector, pair: Pair, use: str
) -> None:
    if use == "fileno" and selector.monitor == "poll":
        pytest.skip("the poll monitor has no descriptor of its own")
    model = EpollSelector()
    for one in (model, selector):
        one.register(pair[0], READ)
        one.close()
    expected = outcome(lambda: AFTER_CLOSE[use](model, pair[0]))
    actual = outcome(lambda: AFTER_CLOSE[use](selector, pair[0]))
    assert actual[:3] == expected[:3]
    assert selector.statistics().watches in (0, 1)  # as it was, or as it is; an answer in any case


@pytest.mark.parametrize("foreign", [False, True])
def test_close_lets_every_watched_file_go(
    selector: uringloop.Selector, make_pair: Callable[[], Pair], foreign: bool
) -> None:
    pairs = [make_pair() for _ in range(200)]
    for ours, _ in pairs:
        selector.register(ours, READ)
    arm(selector)
    if foreign:
        in_thread(selector.close)
    else:
        selector.close()
    for ours, _ in pairs:
        ours.close()
    for _, peer in pairs:
        # At once by the owner; a foreign thread drops the ring, which takes the kernel a moment.
        assert wait_until(lambda peer=peer: end_of_file_seen(peer), 0.5 if foreign else 0)  # type: ignore[misc]


def test_the_counters_and_the_name_outlive_the_selector(
    selector: uringloop.Selector, pair: Pair
) -> None:
    selector.register(pair[0], READ)
    arm(selector)
    before, name = selector.statistics(), selector.monitor
    selector.close()
    assert selector.monitor == name
    assert selector.statistics().turns == before.turns == 1


def test_a_selector_that_is_dropped_unclosed_says_so_and_leaves_nothing_behind(
    monitor: str, pair: Pair
) -> None:
    selector = uringloop.Selector(monitor)
    selector.register(pair[0], READ)
    arm(selector)
    del selector  # a cycle, as every selector with its map
    with pytest.warns(ResourceWarning, match="unclosed selector"):
        gc.collect()
    pair[0].close()
    assert end_of_file_seen(pair[1])


def test_a_selector_closes_with_its_block(monitor: str, pair: Pair) -> None:
    with uringloop.Selector(monitor) as selector:
        selector.register(pair[0], WRITE)
    with pytest.raises(ValueError, match="closed"):
        selector.select(0)


@pytest.mark.parametrize("value", ["", "uring", "EPOLL", "io_uring ", "epoll\0"])
def test_an_unknown_monitor_is_refused_with_the_list_of_the_known(value: str) -> None:
    with pytest.raises(ValueError, match="monitor must be one of auto, io_uring, epoll, poll"):
        uringloop.Selector(value)


@pytest.mark.parametrize("value", [0, b"epoll", True, ["epoll"]])
def test_a_monitor_that_is_no_string_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(value).__name__}"):
        uringloop.Selector(value)


def test_the_environment_names_the_monitor_unless_the_argument_does(
    monitor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URINGLOOP_MONITOR", monitor)
    with uringloop.Selector() as selector:
        assert (selector.monitor, selector.fallback_reason) == (monitor, None)
    other = "poll" if monitor == "epoll" else "epoll"
    with uringloop.Selector(other) as selector:
        assert selector.monitor == other


def test_a_wrong_monitor_in_the_environment_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("URINGLOOP_MONITOR", "kqueue")
    with pytest.raises(ValueError, match=r"URINGLOOP_MONITOR must be one of auto.* not 'kqueue'"):
        uringloop.Selector()
    monkeypatch.setenv("URINGLOOP_MONITOR", "")
    with uringloop.Selector() as selector:  # empty is as good as absent
        assert selector.monitor in MONITORS


def test_auto_takes_the_best_monitor_and_explains_any_other() -> None:
    with uringloop.Selector("auto") as selector:
        best = next(name for name in MONITORS if refusal(name) is None)
        assert selector.monitor == best
        assert (selector.fallback_reason is None) == (best == "io_uring")


# ------------------------------------------------------------------------------ events per select


def test_a_limited_selector_hands_over_the_rest_before_anything_new(
    monitor: str, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(8)]
    with uringloop.Selector(monitor, events_max=4) as selector:
        for ours, peer in pairs:
            peer.send(b"x")
            selector.register(ours, READ)
        first, second = selector.select(1), selector.select(1)
        assert len(first) == len(second) == 4
        seen = {key.fd for key, _ in first + second}
        assert seen == {ours.fileno() for ours, _ in pairs}


def test_a_rest_that_was_removed_does_not_hide_what_is_ready(
    monitor: str, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(6)]
    with uringloop.Selector(monitor, events_max=2) as selector:
        for ours, peer in pairs[:5]:
            peer.send(b"x")
            selector.register(ours, READ)
        assert len(selector.select(1)) == 2
        for ours, _ in pairs[:5]:
            selector.unregister(ours)
        ours, peer = pairs[5]
        peer.send(b"x")
        selector.register(ours, READ)
        assert [key.fd for key, _ in selector.select(0)] == [ours.fileno()]


def test_nobody_starves_behind_descriptors_that_are_always_ready(
    monitor: str, make_pair: Callable[[], Pair]
) -> None:
    pairs = [make_pair() for _ in range(12)]
    with uringloop.Selector(monitor, events_max=3) as selector:
        for ours, peer in pairs:
            peer.send(b"x")
            selector.register(ours, READ)
        counts = dict.fromkeys((ours.fileno() for ours, _ in pairs), 0)
        for _ in range(200):
            for key, _events in selector.select(1):
                counts[key.fd] += 1
        assert min(counts.values()) >= 0.8 * max(counts.values())


def test_a_removed_watch_is_not_among_the_rest(monitor: str, make_pair: Callable[[], Pair]) -> None:
    pairs = [make_pair() for _ in range(6)]
    with uringloop.Selector(monitor, events_max=1) as selector:
        for ours, peer in pairs:
            peer.send(b"x")
            selector.register(ours, READ)
        [(first, _)] = selector.select(1)
        for ours, _ in pairs:
            selector.unregister(ours)
        selector.register(first.fileobj, READ)
        events = selector.select(1)
        assert [key.fd for key, _ in events] == [first.fd]


@pytest.mark.parametrize("events_max", [0, -1, 1 << 20])
def test_a_limit_that_makes_no_sense_is_refused(monitor: str, events_max: int) -> None:
    with pytest.raises(ValueError, match="events_max must be"):
        uringloop.Selector(monitor, events_max=events_max)
