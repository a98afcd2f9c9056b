"""A state machine: whatever is done to descriptors, our selector and EpollSelector say the same.

The promise: both watch the same descriptors, so any difference is a difference of the selectors;
and in the end the kernel holds nothing for ours, which /proc tells and not our own counters.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from selectors import BaseSelector, EpollSelector
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import uringloop
from tests.support import polls_in_kernel

FIRST = 500  # the descriptors under test have numbers of their own, so that reuse is exact
SLOTS = 5  # few, so that rules meet; and fewer than the kernel completes in one enter
PLACES = st.integers(0, SLOTS - 1)
EVENTS = st.integers(1, 3)
DATA = st.sampled_from([None, "a", "b"])


def ready(selector: BaseSelector, timeout: float) -> dict[int, int]:
    """What a select() reports, by descriptor; its keys are those of the map."""
    events = selector.select(timeout)
    assert len({key.fd for key, _ in events}) == len(events)
    assert all(selector.get_key(key.fd) is key for key, _ in events)
    return {key.fd: mask for key, mask in events}


class Watched:
    """One place: a descriptor with a fixed number, and the peer of what is behind it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.peer: socket.socket | None = None
        self.sock: socket.socket | None = None

    def open(self) -> None:
        """Put a new connection behind the number; what was there before is closed."""
        self.close()
        ours, self.peer = socket.socketpair()
        self.sock = socket.socket(fileno=os.dup2(ours.fileno(), self.fd, inheritable=False))
        ours.close()
        for sock in (self.sock, self.peer):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)

    def close(self) -> None:
        """Close both ends."""
        for sock in (self.sock, self.peer):
            if sock is not None:
                sock.close()


class Twins(RuleBasedStateMachine):
    """Does the same to both selectors and compares."""

    monitor = ""

    @initialize(first=st.lists(EVENTS, min_size=SLOTS, max_size=SLOTS))
    def begin(self, first: list[int]) -> None:
        """Start with something registered, so that short runs are worth while too."""
        self.places = [Watched(FIRST + i) for i in range(SLOTS)]
        self.model = EpollSelector()
        self.ours = uringloop.Selector(self.monitor)
        self.touched: set[int] = set()  # what happened to a descriptor since the last select()
        for i, events in enumerate(first):
            self.places[i].open()
            self.register(i, events, None)

    def both(self, action: Callable[[Any], Any]) -> Any:
        """Do it to both; the same value or the same exception, which is then swallowed."""
        ends: list[tuple[Any, Any]] = []
        for selector in (self.model, self.ours):
            try:
                ends.append((action(selector), None))
            except (KeyError, ValueError, OSError) as exc:
                ends.append((None, (type(exc), exc.args)))
        assert ends[1] == ends[0]
        return ends[0][0]

    # -- what a user of the selector does --

    @rule(i=PLACES, events=EVENTS, data=DATA)
    def register(self, i: int, events: int, data: str | None) -> None:
        self.both(lambda s: s.register(self.places[i].fd, events, data))

    @rule(i=PLACES)
    def unregister(self, i: int) -> None:
        self.both(lambda s: s.unregister(self.places[i].fd))

    @rule(i=PLACES, events=EVENTS, data=DATA)
    def modify(self, i: int, events: int, data: str | None) -> None:
        self.both(lambda s: s.modify(self.places[i].fd, events, data))

    @rule(i=PLACES, events=st.sampled_from([0, 4, -1]))
    def register_for_nonsense(self, i: int, events: int) -> None:
        self.both(lambda s: s.register(self.places[i].fd, events))

    @rule(timeout=st.sampled_from([0, 0, 0, -1, 0.001]))
    def select(self, timeout: float) -> None:
        """The same keys with the same masks.

        io_uring remembers the mask of a wake-up and does not look again, so that one report may be
        out of date; it is never short of anything, and the next select() is exact.
        """
        turns = self.ours.statistics().turns
        expected, reported = ready(self.model, timeout), ready(self.ours, timeout)
        assert self.ours.statistics().turns - turns <= 5, "it spins"
        if self.ours.monitor == "io_uring" and reported != expected:
            outdated = {fd for fd in reported if reported[fd] != expected.get(fd)}
            assert outdated <= self.touched
            assert all(reported.get(fd, 0) & events == events for fd, events in expected.items())
            expected, reported = ready(self.model, 0), ready(self.ours, 0)
        assert reported == expected
        self.touched.clear()

    # -- what happens to the descriptors --

    @rule(i=PLACES, size=st.sampled_from([1, 10]))
    def peer_writes(self, i: int, size: int) -> None:
        with contextlib.suppress(OSError):
            self.peer(i).send(bytes(size))

    @rule(i=PLACES)
    def peer_reads_everything(self, i: int) -> None:
        with contextlib.suppress(OSError):
            while self.peer(i).recv(65536):
                pass

    @rule(i=PLACES)
    def we_read_everything(self, i: int) -> None:
        with contextlib.suppress(OSError):
            while self.sock(i).recv(65536):
                pass

    @rule(i=PLACES)
    def we_read_one_byte(self, i: int) -> None:
        with contextlib.suppress(OSError):
            self.sock(i).recv(1)

    @rule(i=PLACES)
    def we_write_until_full(self, i: int) -> None:
        with contextlib.suppress(OSError):
            while self.sock(i).send(bytes(4096)):
                pass

    @rule(i=PLACES)
    def peer_closes(self, i: int) -> None:
        self.peer(i).close()

    @rule(i=PLACES, how=st.sampled_from([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
    def peer_shuts_down(self, i: int, how: int) -> None:
        with contextlib.suppress(OSError):
            self.peer(i).shutdown(how)

    @rule(i=PLACES, how=st.sampled_from([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
    def we_shut_down(self, i: int, how: int) -> None:
        self.sock(i).shutdown(how) if self.peer(i).fileno() >= 0 else None

    @rule(i=PLACES, again=st.booleans(), events=EVENTS)
    def the_number_gets_a_new_file(self, i: int, again: bool, events: int) -> None:
        """In the right order: removed, closed, opened, perhaps registered."""
        place = self.places[i]
        self.both(lambda s: s.unregister(place.fd))
        peer = self.peer(i)
        self.sock(i).close()
        if peer.fileno() >= 0:
            with contextlib.suppress(ConnectionResetError):  # bytes were lost: an end as well
                while peer.recv(65536):  # BlockingIOError here: the kernel still holds our end
                    pass
        place.open()
        if again:
            self.both(lambda s: s.register(place.fd, events))

    @precondition(lambda self: len(self.ours.get_map()) < SLOTS)
    @rule(i=PLACES)
    def a_closed_number_is_refused(self, i: int) -> None:
        place = self.places[i]
        if place.fd not in self.model.get_map():
            self.sock(i).close()
            self.both(lambda s: s.register(place.fd, 1))
            place.open()

    # -- what always holds --

    @invariant()
    def keys_are_the_same(self) -> None:
        if hasattr(self, "ours"):
            assert dict(self.ours.get_map()) == dict(self.model.get_map())
            assert self.ours.statistics().watches == len(self.model.get_map())

    @invariant()
    def the_kernel_holds_at_most_one_poll_a_watch(self) -> None:
        """A change or a removal ends the old poll before the new one is waited for."""
        if hasattr(self, "ours"):
            assert polls_in_kernel() <= SLOTS

    def teardown(self) -> None:
        if not hasattr(self, "ours"):
            return
        try:
            self.select(0)
            for i in range(SLOTS):
                self.unregister(i)
            assert self.ours.statistics().watches == 0
            assert self.ours.select(0) == []
            assert polls_in_kernel() == 0
            assert self.ours.statistics().downgrades == 0
        finally:
            self.ours.close()
            self.model.close()
            for place in self.places:
                place.close()

    def sock(self, i: int) -> socket.socket:
        sock = self.places[i].sock
        assert sock is not None
        self.touched.add(self.places[i].fd)
        return sock

    def peer(self, i: int) -> socket.socket:
        peer = self.places[i].peer
        assert peer is not None
        self.touched.add(self.places[i].fd)
        return peer


def run_twins(monitor: str, examples: int) -> None:
    run_state_machine_as_test(
        type("Twins", (Twins,), {"monitor": monitor}),
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=examples,
            stateful_step_count=40,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_both_selectors_agree_whatever_is_done_to_them_and_to_their_descriptors(
    monitor: str,
) -> None:
    run_twins(monitor, examples=60)


@pytest.mark.slow
def test_both_selectors_agree_through_a_thousand_histories(monitor: str) -> None:
    run_twins(monitor, examples=1000)


def test_the_kernels_own_list_shows_a_poll_that_is_in_flight() -> None:
    """The check above can fail: an armed watch is seen."""
    ours, peer = socket.socketpair()
    with ours, peer, uringloop.Selector() as selector:
        if selector.monitor != "io_uring":
            pytest.skip(str(selector.fallback_reason))
        assert polls_in_kernel() == 0
        selector.register(ours, 1)
        selector.select(0)
        assert polls_in_kernel() == 1
        selector.unregister(ours)
        assert polls_in_kernel() == 0
