"""Adaptive polling: a wait looks for events before it sleeps.

The promise: what is asserted is what the loop counts (waits that found something by looking, how
long the next one looks) and its CPU time when idle; how much faster that is stands in
docs/polling.md. The rule by which the time grows and shrinks is tested in tests/c/test_polling.c.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support import echo_traffic, in_thread, run

if TYPE_CHECKING:
    import uringloop

MAX_NS = 20_000_000  # more than a peer on a busy machine takes to answer


class Peer:
    """Answers every byte at once, in a thread of its own, until the connection ends."""

    def __init__(self, thinks_s: float = 0) -> None:
        self.thinks_s = thinks_s
        self.ours, self.theirs = socket.socketpair()
        self.thread = threading.Thread(target=self.answer)
        self.thread.start()

    def answer(self) -> None:
        while data := self.theirs.recv(100):
            time.sleep(self.thinks_s)
            self.theirs.send(data)
        self.theirs.close()

    async def exchange(self, count: int) -> None:
        reader, writer = await asyncio.open_connection(sock=self.ours)
        for _ in range(count):
            writer.write(b"x")
            await reader.readexactly(1)
        writer.close()
        await writer.wait_closed()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.ours.close()
    peer.thread.join(10)


def test_it_is_off_at_first(loop: uringloop.EventLoop, peer: Peer) -> None:
    assert (loop.poll_max_ns, loop.poll_grow, loop.poll_shrink) == (0, 0, 0)
    run(loop, peer.exchange(20))
    assert (loop.statistics().poll_ns, loop.statistics().polled) == (0, 0)


def test_a_wait_for_quick_answers_finds_them_by_looking(
    loop: uringloop.EventLoop, peer: Peer
) -> None:
    loop.poll_max_ns = MAX_NS
    run(loop, peer.exchange(200))
    assert loop.statistics().polled > 100
    assert 0 < loop.statistics().poll_ns <= MAX_NS


def test_after_a_long_wait_it_looks_no_more(loop: uringloop.EventLoop) -> None:
    loop.poll_max_ns = 1_000_000
    run(loop, echo_traffic(2, 10_000))
    run(loop, asyncio.sleep(0.05))
    assert loop.statistics().poll_ns == 0


def test_a_patient_loop_shrinks_by_and_by(loop: uringloop.EventLoop, peer: Peer) -> None:
    loop.poll_max_ns, loop.poll_shrink = MAX_NS, 2
    run(loop, peer.exchange(100))
    before = loop.statistics().poll_ns
    loop.run_until_complete(asyncio.sleep(0.1))
    assert 0 < loop.statistics().poll_ns <= before / 2


def test_setting_any_parameter_starts_anew(loop: uringloop.EventLoop, peer: Peer) -> None:
    loop.poll_max_ns, loop.poll_shrink = MAX_NS, 1000
    run(loop, peer.exchange(100))
    assert loop.statistics().poll_ns > 0
    loop.poll_grow = 4
    assert loop.statistics().poll_ns == 0
    assert (loop.poll_max_ns, loop.poll_grow, loop.poll_shrink) == (MAX_NS, 4, 1000)


@pytest.mark.alone
def test_an_idle_loop_costs_nothing(loop: uringloop.EventLoop) -> None:
    loop.poll_max_ns = 50_000
    run(loop, echo_traffic(2, 10_000))
    cpu_s = time.thread_time()
    loop.run_until_complete(asyncio.sleep(1))
    assert time.thread_time() - cpu_s < 0.02


def test_other_threads_have_the_interpreter_while_it_looks(loop: uringloop.EventLoop) -> None:
    """It looks for ever, as far as this test is concerned: only the other thread can end it."""
    peer = Peer(thinks_s=0.001)
    loop.poll_max_ns, loop.poll_grow, loop.poll_shrink = 10**12, 10**9, 1

    async def wait() -> int:
        done = asyncio.get_running_loop().create_future()
        timer = threading.Timer(0.1, loop.call_soon_threadsafe, [done.set_result, 1])
        timer.start()
        result: int = await done
        timer.join()
        return result

    run(loop, peer.exchange(5))
    peer.thread.join(10)
    assert loop.statistics().poll_ns > 10**9
    assert run(loop, wait()) == 1


def test_timers_are_kept_while_it_looks(loop: uringloop.EventLoop) -> None:
    peer = Peer(thinks_s=0.001)
    loop.poll_max_ns, loop.poll_grow, loop.poll_shrink = 10**12, 10**9, 1
    run(loop, peer.exchange(5))
    peer.thread.join(10)
    started = time.monotonic()
    loop.run_until_complete(asyncio.sleep(0.05))
    assert 0.05 <= time.monotonic() - started < 1


def test_a_signal_that_comes_while_it_looks_is_handled_before_it_sleeps(
    loop: uringloop.EventLoop,
) -> None:
    """Without a wake-up descriptor nothing but an interrupted system call would tell."""
    peer = Peer(thinks_s=0.001)
    loop.poll_max_ns, loop.poll_grow, loop.poll_shrink = 200_000_000, 10**9, 1
    run(loop, peer.exchange(5))
    peer.thread.join(10)
    assert loop.statistics().poll_ns == 200_000_000
    handled: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: handled.append(time.monotonic()))
    try:
        loop.call_soon(signal.setitimer, signal.ITIMER_REAL, 0.05)
        loop.call_later(2, loop.stop)
        started = time.monotonic()
        loop.run_forever()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(handled) == 1
    assert handled[0] - started < 1


def test_traffic_is_exact_while_it_looks(loop: uringloop.EventLoop) -> None:
    loop.poll_max_ns = MAX_NS
    assert run(loop, echo_traffic(20, 50_000))
    assert in_thread(lambda: run(loop, echo_traffic(20, 50_000)))


@pytest.mark.parametrize("name", ["poll_max_ns", "poll_grow", "poll_shrink"])
def test_what_makes_no_sense_is_refused(loop: uringloop.EventLoop, name: str) -> None:
    for wrong, error in ((1.5, TypeError), ("1", TypeError), (-1, ValueError), (2**63, ValueError)):
        with pytest.raises(error, match=f"{name} must be"):
            setattr(loop, name, wrong)
    assert getattr(loop, name) == 0
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        setattr(loop, name, 1)


def test_the_environment_sets_the_limit(
    monkeypatch: pytest.MonkeyPatch, make_loop: Callable[[], uringloop.EventLoop]
) -> None:
    monkeypatch.setenv("URINGLOOP_POLL_MAX_NS", "50000")
    assert make_loop().poll_max_ns == 50_000
    for wrong in ("-1", "50us", "1e3", "9" * 30):
        monkeypatch.setenv("URINGLOOP_POLL_MAX_NS", wrong)
        with pytest.raises(ValueError, match="URINGLOOP_POLL_MAX_NS must be a whole number from 0"):
            make_loop()
