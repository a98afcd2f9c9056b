"""Signals: Ctrl-C, handlers, storms, SIGCHLD.

The promise: a signal is seen while the loop waits in the kernel, costs no byte and no event, and no
wait gets longer by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import uringloop
from tests.support import echo_traffic, run, run_child, unexpected

#: An answer later than this was not the signal's doing. Wide, for busy machines.
SOON_S = 2.0


def signal_soon(number: int, delay_s: float = 0.1) -> list[float]:
    """Send this process a signal once it waits; the list gets the time when it was sent."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    threading.Timer(delay_s, send).start()
    return sent


@contextlib.contextmanager
def handled(number: int, handler: Callable[..., Any]) -> Iterator[None]:
    """Handle a signal so, and afterwards as before."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


# ---------------------------------------------------------------------- Ctrl-C


def interrupt_run(monitor: str) -> list[Any]:
    cleaned_up = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(True)

    sent = signal_soon(signal.SIGINT)
    try:
        uringloop.run(main(), monitor=monitor)
    except KeyboardInterrupt:
        return [time.monotonic() - sent[0], cleaned_up]
    return ["not interrupted"]


def interrupt_run_forever(monitor: str) -> list[Any]:
    loop = uringloop.new_event_loop(monitor=monitor)
    sent = signal_soon(signal.SIGINT)
    try:
        loop.run_forever()
    except KeyboardInterrupt:
        took = time.monotonic() - sent[0]
        # Interrupted and not broken: the loop goes on.
        exact = loop.run_until_complete(echo_traffic(2, 2000))
        loop.close()
        return [took, [exact]]
    return ["not interrupted"]


def interrupt_beside_changes(monitor: str) -> list[Any]:
    """The wait submits a change of its own: the kernel answers with a count and not with EINTR."""
    loop = uringloop.new_event_loop(monitor=monitor)
    ours, peer = socket.socketpair()
    loop.call_later(0.05, loop.add_reader, ours, peer.close)
    sent = signal_soon(signal.SIGINT, 0.2)
    try:
        loop.run_forever()
    except KeyboardInterrupt:
        took = time.monotonic() - sent[0]
        loop.remove_reader(ours)
        loop.close()
        ours.close()
        return [took, [True]]
    return ["not interrupted"]


@pytest.mark.parametrize("where", [interrupt_run, interrupt_run_forever, interrupt_beside_changes])
def test_ctrl_c_ends_an_idle_wait_at_once(monitor: str, where: Callable[[str], list[Any]]) -> None:
    took, went_well = run_child(where, monitor).value
    assert took < SOON_S
    assert went_well == [True]


def interrupt_selector(monitor: str) -> float:
    with uringloop.Selector(monitor) as selector, socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        idle.listen()
        selector.register(idle, 1)
        sent = signal_soon(signal.SIGINT)
        try:
            selector.select()
        except KeyboardInterrupt:
            return time.monotonic() - sent[0]
    return 1e9


def test_ctrl_c_ends_the_wait_of_a_bare_selector(monitor: str) -> None:
    assert run_child(interrupt_selector, monitor).value < SOON_S


# ---------------------------------------------------------------------- handlers


def test_a_signal_handler_of_the_loop_is_called_in_an_idle_wait(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> None:
        called: asyncio.Queue[int] = asyncio.Queue()
        loop.add_signal_handler(signal.SIGUSR1, called.put_nowait, 1)
        for _ in range(5):
            sent = signal_soon(signal.SIGUSR1, 0.02)
            await called.get()
            assert time.monotonic() - sent[0] < SOON_S
        assert called.empty()
        assert loop.remove_signal_handler(signal.SIGUSR1)

    run(loop, main())


def test_a_signal_handler_of_the_loop_that_raises_is_reported_and_the_loop_goes_on(
    loop: uringloop.EventLoop,
) -> None:
    reported: list[Any] = []
    loop.set_exception_handler(lambda loop, context: reported.append(context["exception"]))

    def fail() -> None:
        loop.call_soon(loop.stop)
        raise ValueError("on purpose")

    loop.add_signal_handler(signal.SIGUSR1, fail)
    signal_soon(signal.SIGUSR1, 0.02)
    loop.call_later(20, unexpected)
    loop.run_forever()
    assert [str(exc) for exc in reported] == ["on purpose"]
    loop.remove_signal_handler(signal.SIGUSR1)
    assert loop.run_until_complete(echo_traffic(2, 2000))


def test_an_exception_of_a_plain_handler_leaves_run_forever_and_the_loop_can_go_on(
    loop: uringloop.EventLoop,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    ours, peer = socket.socketpair()
    with ours, peer, handled(signal.SIGUSR1, fail):
        loop.add_reader(ours, unexpected)
        sent = signal_soon(signal.SIGUSR1, 0.02)
        with pytest.raises(ValueError, match="on purpose"):
            loop.run_forever()
        assert time.monotonic() - sent[0] < SOON_S
        loop.remove_reader(ours)
    assert loop.run_until_complete(echo_traffic(2, 2000))


def test_a_plain_handler_runs_during_a_wait_that_then_goes_on_for_the_rest_of_its_time(
    selector: uringloop.Selector,
) -> None:
    called: list[float] = []
    with handled(signal.SIGUSR1, lambda *_: called.append(time.monotonic())):
        signal_soon(signal.SIGUSR1, 0.05)
        started = time.monotonic()
        assert selector.select(0.3) == []
        ended = time.monotonic()
    assert len(called) == 1
    assert called[0] < ended
    assert 0.3 <= ended - started < 0.3 + SOON_S


def test_a_handler_may_call_into_the_loop_that_it_interrupts(loop: uringloop.EventLoop) -> None:
    with handled(signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(loop.stop)):
        sent = signal_soon(signal.SIGUSR1, 0.02)
        loop.call_later(20, unexpected)
        loop.run_forever()
    assert time.monotonic() - sent[0] < SOON_S


# ---------------------------------------------------------------------- storms


@contextlib.contextmanager
def storm(interval_s: float = 200e-6) -> Iterator[list[int]]:
    """Interrupt this process by a signal every 200 us; the list counts how often that was."""
    count = [0]

    def handler(*_: object) -> None:
        count[0] += 1

    with handled(signal.SIGALRM, handler):
        signal.setitimer(signal.ITIMER_REAL, interval_s, interval_s)
        try:
            yield count
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def storm_beside_traffic(monitor: str, seconds: float) -> list[Any]:
    latenesses: list[float] = []

    async def timers(loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(5):
            due = loop.time() + 0.05
            await asyncio.sleep(0.05)
            latenesses.append(loop.time() - due)

    async def main() -> bool:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        exact = True
        while loop.time() < end:
            ticking = asyncio.create_task(timers(loop))
            exact = exact and await echo_traffic(10, 100_000)
            await ticking
        return exact

    with storm() as count:
        exact = uringloop.run(main(), monitor=monitor)
    return [exact, count[0], min(latenesses), max(latenesses)]


def test_a_storm_of_signals_costs_no_byte_and_makes_no_timer_late(monitor: str) -> None:
    exact, signals, earliest, latest = run_child(storm_beside_traffic, monitor, 1).value
    assert exact
    assert signals > 100
    assert earliest >= 0
    assert latest < SOON_S


@pytest.mark.slow
def test_a_long_storm_of_signals_costs_no_byte_and_makes_no_timer_late(monitor: str) -> None:
    exact, signals, earliest, latest = run_child(storm_beside_traffic, monitor, 10).value
    assert exact
    assert signals > 1000
    assert earliest >= 0
    assert latest < SOON_S


def storm_beside_an_idle_wait(monitor: str) -> list[float]:
    with uringloop.Selector(monitor) as selector, socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        idle.listen()
        selector.register(idle, 1)
        with storm() as count:
            started = time.monotonic()
            ready = selector.select(0.5)
            took = time.monotonic() - started
        return [len(ready), count[0], took]


def test_a_storm_of_signals_makes_a_bounded_wait_neither_shorter_nor_longer(monitor: str) -> None:
    ready, signals, took = run_child(storm_beside_an_idle_wait, monitor).value
    assert ready == 0
    assert signals > 50
    assert 0.5 <= took < 0.5 + SOON_S


# ---------------------------------------------------------------------- SIGCHLD


def subprocesses_beside_sigchld(monitor: str) -> list[Any]:
    async def main() -> list[Any]:
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGCHLD, heard.set)
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", f"print({code}); raise SystemExit({code})", stdout=-1
            )
            for code in range(3)
        ]
        ends = await asyncio.gather(*(process.communicate() for process in processes))
        await heard.wait()
        loop.remove_signal_handler(signal.SIGCHLD)
        return [[process.returncode for process in processes], [out.decode() for out, _ in ends]]

    return uringloop.run(main(), monitor=monitor)


def test_subprocesses_end_beside_a_handler_of_sigchld(monitor: str) -> None:
    assert run_child(subprocesses_beside_sigchld, monitor).value == [
        [0, 1, 2],
        ["0\n", "1\n", "2\n"],
    ]


def test_a_process_that_a_signal_ends_is_reported_with_that_signal(
    loop: uringloop.EventLoop,
) -> None:
    async def main() -> int:
        process = await asyncio.create_subprocess_exec("sleep", "60", stdin=subprocess.DEVNULL)
        process.terminate()
        return await process.wait()

    assert run(loop, main()) == -signal.SIGTERM
