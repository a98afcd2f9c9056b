"""A loop inside a foreign main loop: a plain `poll()` host of twenty lines.

The promise: the host looks at the descriptors that it was told of and at nothing else, so a wake-up
that does not come hangs the test. Each test runs with a host that calls prepare() before it sleeps,
as GLib does, and with one that cannot, such as Tk.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import pytest

import uringloop
from tests.support import (
    Stepwise,
    deny,
    echo_traffic,
    in_thread,
    make_loop_named,
    run,
    run_child,
    unexpected,
)
from uringloop.hosted import Hosted

T = TypeVar("T")
AnyLoop = asyncio.AbstractEventLoop

WAKE_UP_S = 0.05  # the most that anything but a busy machine explains


class PollHost:
    """A main loop: sleeps in poll(), and dispatches when something is readable."""

    def __init__(self, loop: AnyLoop, prepares: bool = False) -> None:
        self.prepares = prepares
        self.wake_ups = 0
        self.stops = 0
        self.hosted = Hosted(loop, on_fds_changed=self.watch, on_stop=self.stopped)  # type: ignore[arg-type]
        self.watch()

    def watch(self) -> None:
        self.poller = select.poll()
        hosted = getattr(self, "hosted", None)
        for fd, events in hosted.host_fds() if hosted else ():
            self.poller.register(fd, events)

    def stopped(self) -> None:
        self.stops += 1

    def step(self, timeout_s: float = 10) -> bool:
        """Sleeps once; whether it was woken."""
        if self.prepares:
            due = self.hosted.prepare()
            assert not due or self.poller.poll(0), "due, and no descriptor says so"
        ready = self.poller.poll(timeout_s * 1000)
        if ready:
            self.wake_ups += 1
            revents = 0
            for _, bits in ready:
                revents |= bits
            assert self.hosted.check(revents)
            self.hosted.dispatch()
        return bool(ready)

    def until(self, done: Callable[[], object], limit_s: float = 10) -> None:
        end = time.monotonic() + limit_s
        while not done():
            left = end - time.monotonic()
            assert left > 0
            assert self.step(left), "slept, and nobody came"

    def run(self, main: Coroutine[Any, Any, T], limit_s: float = 10) -> T:
        task = self.hosted.loop.create_task(main)
        self.until(task.done, limit_s)
        result: T = task.result()
        return result

    def settle(self) -> None:
        """Until nothing is due any more."""
        for _ in range(10):
            if not self.step(0.02):
                return
        raise AssertionError("never idle")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hosted.close()


@pytest.fixture(params=[True, False], ids=["prepares", "only polls"])
def prepares(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def host(loop: uringloop.EventLoop, prepares: bool) -> Iterator[PollHost]:
    """A host that carries a loop on the monitor under test."""
    with PollHost(loop, prepares) as host:
        yield host


# ---------------------------------------------------------------------- all that a loop does


def test_streams_sleeps_and_tasks_work_while_the_host_sleeps(host: PollHost) -> None:
    async def main() -> bool:
        await asyncio.sleep(0.01)
        return await echo_traffic(connections=20, size_bytes=50_000)

    assert host.run(main())


def test_subprocesses_executors_and_other_threads_wake_the_host(host: PollHost) -> None:
    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('from a child')", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
        woken = loop.create_future()
        thread = threading.Timer(0.02, loop.call_soon_threadsafe, [woken.set_result, "by a thread"])
        thread.start()
        results = [output, await woken, await loop.run_in_executor(None, lambda: "executed")]
        thread.join()
        await loop.shutdown_default_executor()
        return results

    assert host.run(main()) == [b"from a child\n", "by a thread", "executed"]


def test_a_timer_is_never_early_and_needs_nothing_of_the_host(host: PollHost) -> None:
    late_s = []
    for delay_s in [0.002] * 20 + [0.03]:
        due = time.monotonic() + delay_s
        fired: list[float] = []
        host.hosted.loop.call_at(due, lambda: fired.append(time.monotonic()))  # noqa: B023
        host.until(lambda: fired)  # noqa: B023
        late_s.append(fired[0] - due)
    assert min(late_s) >= 0
    assert statistics.median(late_s) < WAKE_UP_S


def test_of_many_timers_each_comes_in_its_turn(host: PollHost) -> None:
    order: list[int] = []
    loop = host.hosted.loop
    now = loop.time()
    for index in (3, 1, 2):
        loop.call_at(now + index * 0.06, order.append, index)
    loop.call_at(now + 0.07, loop.call_at, now + 0.09, order.append, 10)  # set later, due earlier
    loop.call_later(0.001, unexpected).cancel()
    host.until(lambda: len(order) == 4)
    assert order == [1, 10, 2, 3]


# ---------------------------------------------------------------------- what the host itself queues


def test_what_the_hosts_callbacks_queue_is_run_with_no_other_wake_up(host: PollHost) -> None:
    loop = host.hosted.loop
    ran: list[str] = []

    async def task() -> None:
        await asyncio.sleep(0)
        ran.append("task")

    for queue in (
        lambda: loop.call_soon(ran.append, "soon"),
        lambda: loop.call_later(0.001, ran.append, "later"),
        lambda: loop.call_soon_threadsafe(ran.append, "threadsafe"),
        lambda: asyncio.create_task(task()),
    ):
        host.settle()
        started = time.monotonic()
        kept = queue()  # by a button's handler, say, and then the host goes to sleep
        count = len(ran)
        host.until(lambda: len(ran) > count)  # noqa: B023
        assert time.monotonic() - started < WAKE_UP_S
        del kept
    host.settle()
    assert ran == ["soon", "later", "threadsafe", "task"]


def test_a_socket_registered_by_the_host_is_served(host: PollHost) -> None:
    ours, peer = socket.socketpair()
    with ours, peer:
        host.settle()
        ran: list[bytes] = []
        ours.setblocking(False)
        started = time.monotonic()
        peer.send(b"before")
        host.hosted.loop.add_reader(ours, lambda: ran.append(ours.recv(100)))
        host.until(lambda: ran)
        assert time.monotonic() - started < WAKE_UP_S
        host.settle()
        peer.send(b"while it sleeps")
        host.until(lambda: len(ran) == 2)
        assert ran == [b"before", b"while it sleeps"]
        host.hosted.loop.remove_reader(ours)
        peer.send(b"nobody reads")
        host.settle()
        assert len(ran) == 2


def test_a_transport_that_the_host_uses_answers(host: PollHost) -> None:
    """Written to, paused and resumed from the host's callbacks; received data waits for that."""

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(sock=ours)

    ours, peer = socket.socketpair()
    with peer:
        reader, writer = host.run(connect())
        transport: Any = writer.transport
        for i in range(20):  # small messages: the monitor may receive them itself
            peer.send(b"%d" % i)
            host.run(reader.read(10))
        transport.pause_reading()
        peer.send(b"kept")
        host.settle()
        writer.write(b"at once")
        assert peer.recv(100) == b"at once"
        reading = host.hosted.loop.create_task(reader.read(10))
        host.settle()
        assert not reading.done()
        transport.resume_reading()
        host.until(reading.done)
        assert reading.result() == b"kept"
        writer.close()
        host.run(writer.wait_closed())


# ---------------------------------------------------------------------- idle


@pytest.mark.alone
def test_an_idle_second_wakes_nobody_and_costs_nothing(host: PollHost) -> None:
    ours, peer = socket.socketpair()
    with ours, peer:
        host.hosted.loop.add_reader(ours, unexpected)
        timer = host.hosted.loop.call_later(3600, unexpected)
        host.settle()
        host.wake_ups, cpu_s, end = 0, time.process_time(), time.monotonic() + 1
        while (left := end - time.monotonic()) > 0:
            host.step(left)
        assert host.wake_ups <= 5
        assert time.process_time() - cpu_s < 0.02
        timer.cancel()
        host.hosted.loop.remove_reader(ours)


def test_a_cancelled_timer_wakes_the_host_once_at_most(host: PollHost) -> None:
    for _ in range(50):
        host.hosted.loop.call_later(0.01, unexpected).cancel()
    host.settle()
    host.wake_ups = 0
    host.step(0.05)
    host.settle()
    assert host.wake_ups <= 2


# ---------------------------------------------------------------------- a running loop


def test_the_loop_counts_as_running_in_the_hosts_callbacks(host: PollHost) -> None:
    loop = host.hosted.loop
    assert asyncio.get_running_loop() is loop
    assert loop.is_running()
    with pytest.raises(RuntimeError, match="already running"):
        loop.run_forever()
    with pytest.raises(RuntimeError, match="Cannot close a running event loop"):
        loop.close()
    coroutine = asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
        uringloop.run(coroutine)
    coroutine.close()
    host.hosted.close()
    assert not loop.is_running()
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


def test_refusing_to_run_a_running_loop_leaves_it_running(loop: uringloop.EventLoop) -> None:
    async def main() -> bool:
        with pytest.raises(RuntimeError, match="already running"):
            loop.run_forever()
        await asyncio.sleep(0)
        return loop.is_running() and asyncio.get_running_loop() is loop

    assert run(loop, main())


def test_stop_ends_it_and_says_so_once(host: PollHost) -> None:
    loop = host.hosted.loop
    ran: list[str] = []
    loop.call_soon(loop.stop)
    loop.call_soon(ran.append, "the rest of the pass")
    host.until(lambda: host.hosted.closed)
    assert (host.stops, host.hosted.host_fds(), ran) == (1, [], ["the rest of the pass"])
    assert not host.step(0)  # the host was told to look at nothing
    host.hosted.dispatch()  # one that was queued already
    assert host.stops == 1
    assert not loop.is_running()


def test_stop_by_the_host_itself_wakes_it(host: PollHost) -> None:
    host.settle()
    host.hosted.loop.stop()
    host.until(lambda: host.hosted.closed)
    assert host.stops == 1


def test_the_loop_can_be_run_and_hosted_again_and_loses_nothing(
    make_loop: Callable[[], uringloop.EventLoop], prepares: bool
) -> None:
    loop = make_loop()
    ours, peer = socket.socketpair()

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(sock=ours)

    with peer:
        reader, writer = loop.run_until_complete(connect())
        for i in range(30):
            peer.send(b"%03d" % i)
            if i % 2:
                with PollHost(loop, prepares) as host:
                    piece = host.run(reader.readexactly(3))
            else:
                piece = loop.run_until_complete(reader.readexactly(3))
            assert piece == b"%03d" % i
        writer.close()
        loop.run_until_complete(writer.wait_closed())


def test_it_moves_to_a_host_in_another_thread_with_live_connections(
    loop: uringloop.EventLoop, prepares: bool
) -> None:
    pairs = [socket.socketpair() for _ in range(50)]
    got: dict[int, bytes] = {}

    def read(index: int) -> None:
        got[index] = got.get(index, b"") + pairs[index][0].recv(100)

    def hosted_for(sent: bytes) -> None:
        with PollHost(loop, prepares) as host:
            for _, peer in pairs:
                peer.send(sent)
            host.until(lambda: all(got.get(i, b"").endswith(sent) for i in range(50)))

    for index, (ours, _) in enumerate(pairs):
        ours.setblocking(False)
        loop.add_reader(ours, read, index)
    hosted_for(b"one")
    in_thread(lambda: hosted_for(b"two"))
    hosted_for(b"off")
    assert got == dict.fromkeys(range(50), b"onetwooff")
    for ours, peer in pairs:
        loop.remove_reader(ours)
        ours.close()
        peer.close()


def test_hosting_in_mid_pass_ends_when_the_pass_does(host: PollHost) -> None:
    loop = host.hosted.loop
    ran: list[object] = []
    loop.call_soon(host.hosted.close)
    loop.call_soon(lambda: ran.append(asyncio.get_running_loop()))
    host.until(lambda: host.hosted.closed)
    assert ran == [loop]
    assert (host.stops, loop.is_running()) == (0, False)


def test_a_loop_that_was_hosted_pays_for_it_no_more(
    make_loop: Callable[[], uringloop.EventLoop],
) -> None:
    """No descriptor is left, so the kernel signals none."""
    loop = make_loop()
    run(loop, asyncio.sleep(0))
    before = len(os.listdir("/proc/self/fd"))
    with PollHost(loop) as host:
        host.run(asyncio.sleep(0.01))
        assert len(os.listdir("/proc/self/fd")) > before
        timer = loop.call_later(0.05, unexpected)
        host.settle()
    assert len(os.listdir("/proc/self/fd")) == before
    timer.cancel()
    assert run(loop, echo_traffic(5, 20_000))
    with PollHost(loop) as host:
        assert host.run(echo_traffic(5, 20_000))


def test_an_interrupted_pass_leaves_the_host_awake(host: PollHost) -> None:
    """KeyboardInterrupt passes through; a host that catches it goes on, with all that was due."""
    loop = host.hosted.loop
    ran: list[str] = []

    def interrupt() -> None:
        loop.call_later(0.01, ran.append, "timer")
        raise KeyboardInterrupt

    loop.call_soon(interrupt)
    with pytest.raises(KeyboardInterrupt):
        host.until(lambda: ran)
    host.until(lambda: ran)
    loop.call_soon(ran.append, "soon")
    host.until(lambda: len(ran) == 2)
    assert ran == ["timer", "soon"]


def test_a_hosted_loop_that_nobody_closes_says_so(loop: uringloop.EventLoop) -> None:
    hosted = Hosted(loop)
    with pytest.warns(ResourceWarning, match="unclosed <uringloop.hosted.Hosted"):
        hosted.__del__()
    hosted.close()


def test_async_generators_are_the_loops_while_it_is_hosted(host: PollHost) -> None:
    hooks = sys.get_asyncgen_hooks()
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(True)

    async def main() -> None:
        async for _ in numbers():
            break

    host.run(main())
    host.until(lambda: closed)
    host.hosted.close()
    assert sys.get_asyncgen_hooks() == (None, None) != hooks


# ---------------------------------------------------------------------- trouble


def test_an_exception_of_a_callback_goes_to_the_handler_and_hosting_goes_on(host: PollHost) -> None:
    loop = host.hosted.loop
    problems: list[Any] = []
    ran: list[int] = []
    loop.set_exception_handler(lambda _, context: problems.append(context["exception"]))
    loop.call_soon(lambda: 1 / 0)
    loop.call_soon(ran.append, 1)
    host.until(lambda: ran)
    assert [type(problem) for problem in problems] == [ZeroDivisionError]


@pytest.mark.parametrize("exit_type", [KeyboardInterrupt, SystemExit])
def test_what_ends_run_forever_passes_through_and_the_rest_runs_afterwards(
    host: PollHost, exit_type: type[BaseException]
) -> None:
    def leave() -> None:
        raise exit_type

    ran: list[int] = []
    host.hosted.loop.call_soon(leave)
    host.hosted.loop.call_soon(ran.append, 1)
    with pytest.raises(exit_type):
        host.until(lambda: ran)
    assert not ran
    host.until(lambda: ran)


def test_a_host_nested_in_a_callback_sleeps_until_that_has_returned(host: PollHost) -> None:
    loop = host.hosted.loop
    ran: list[str] = []
    told: list[list[tuple[int, int]]] = []

    def nest() -> None:
        loop.call_soon(ran.append, "after")
        host.step(0.02)  # a modal dialogue
        assert ran == []
        told.append(host.hosted.host_fds())
        assert not host.step(0.02), "it spins"

    ours, peer = socket.socketpair()
    with ours, peer:
        loop.add_reader(ours, lambda: ran.append(ours.recv(10).decode()))
        host.settle()
        peer.send(b"data")
        loop.call_soon(nest)
        host.until(lambda: len(ran) == 2)
        loop.remove_reader(ours)
    assert sorted(ran) == ["after", "data"]


def test_signals_wake_a_host_that_sleeps(loop: uringloop.EventLoop, prepares: bool) -> None:
    ran: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: ran.append(number))
    try:
        with PollHost(loop, prepares) as host:
            host.settle()
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert host.step(2), "the host slept on"
            assert ran == [signal.SIGUSR1]
            loop.add_signal_handler(signal.SIGUSR2, ran.append, 2)
            os.kill(os.getpid(), signal.SIGUSR2)
            host.until(lambda: 2 in ran)
            loop.remove_signal_handler(signal.SIGUSR2)
            assert signal.set_wakeup_fd(-1) == cast("Any", loop)._csock.fileno()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_a_wake_up_descriptor_of_the_hosts_stays(loop: uringloop.EventLoop) -> None:
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.fileno())
        with PollHost(loop) as host:
            host.settle()
        assert signal.set_wakeup_fd(-1) == ours.fileno()


def lose_the_ring(prepares: bool) -> list[object]:
    loop = uringloop.new_event_loop(monitor="auto")
    before = loop.monitor
    done: list[bool] = []

    def progress(size: int) -> None:
        if not done:
            done.append(True)
            deny(errno.EPERM, "io_uring_enter")

    with PollHost(loop, prepares) as host:
        exact = host.run(echo_traffic(20, 100_000, progress), 30)
        host.run(asyncio.sleep(0.01))
        fds = len(host.hosted.host_fds())
    after = loop.monitor
    loop.close()
    return [before, exact, fds, after]


def test_a_downgrade_under_a_host_loses_nothing(prepares: bool) -> None:
    assert run_child(lose_the_ring, prepares, quiet=False).value == ["io_uring", True, 1, "epoll"]


def test_a_loop_with_replaced_parts_is_hosted_too(prepares: bool) -> None:
    loop = Stepwise(monitor="io_uring")
    with PollHost(loop, prepares) as host:
        assert host.run(echo_traffic(5, 20_000))
    loop.close()


def test_debug_mode_works_in_a_host(loop: uringloop.EventLoop, prepares: bool) -> None:
    loop.set_debug(True)
    with PollHost(loop, prepares) as host:
        assert host.run(echo_traffic(3, 5_000))
        with pytest.raises(RuntimeError, match="Non-thread-safe operation"):
            in_thread(lambda: loop.call_soon(unexpected))


def test_the_wrong_loop_thread_or_moment_is_refused(loop: uringloop.EventLoop) -> None:
    stock: Any = make_loop_named("stock")
    with pytest.raises(TypeError, match=r"only an uringloop.EventLoop can be hosted"):
        Hosted(stock)
    stock.close()
    with PollHost(loop) as host:
        for verb in (
            host.hosted.dispatch,
            host.hosted.prepare,
            host.hosted.host_fds,
            host.hosted.close,
        ):
            with pytest.raises(RuntimeError, match="belongs to the thread that hosts it"):
                in_thread(verb)
        with pytest.raises(RuntimeError, match="already running"):
            Hosted(loop)
        other = uringloop.new_event_loop(monitor="poll")
        with pytest.raises(RuntimeError, match="while another loop is running"):
            Hosted(other)
        other.close()
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            Hosted(other)

    async def host_in_a_coroutine() -> None:
        Hosted(loop)

    with pytest.raises(RuntimeError, match="already running"):
        run(loop, host_in_a_coroutine())


def test_a_monitor_tells_its_host_what_to_poll(
    make_loop: Callable[[], uringloop.EventLoop], monitor: str
) -> None:
    loop = make_loop()
    ours, peer = socket.socketpair()
    with ours, peer, PollHost(loop) as host:
        host.settle()
        before = host.hosted.host_fds()
        loop.add_writer(ours, unexpected)
        told = dict(host.hosted.host_fds())
        if monitor == "poll":
            assert told[ours.fileno()] == select.POLLOUT
            assert len(told) == len(before) + 1
        else:
            assert host.hosted.host_fds() == before
            assert list(told.values()) == [select.POLLIN]
            target = str(Path(f"/proc/self/fd/{next(iter(told))}").readlink())
            assert (
                target
                == {"io_uring": "anon_inode:[eventfd]", "epoll": "anon_inode:[eventpoll]"}[monitor]
            )
        loop.remove_writer(ours)
