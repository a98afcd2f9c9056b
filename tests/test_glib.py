"""asyncio inside GLib's main loop, with the real PyGObject.

The promise: GLib does the waiting, in its own poll, and everything of the loop goes on. The first
part has the behaviours that QEMU's `/aio-gsource/*` tests ask of an AioContext under GLib.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.support import (
    child_environment,
    echo_traffic,
    in_thread,
    make_loop_named,
    python,
    require,
    unexpected,
)

if TYPE_CHECKING:
    import uringloop

require("PyGObject", "from gi.repository import GLib")
GLib: Any = importlib.import_module("gi.repository.GLib")
glib: Any = importlib.import_module("uringloop.glib")
GLib.MainContext.default().iteration(False)  # makes the descriptor that the context keeps


class Glib:
    """A GLib context that carries a loop, driven by the test."""

    def __init__(self, loop: uringloop.EventLoop) -> None:
        self.loop = loop
        self.context = GLib.MainContext.new()
        self.attachment = glib.attach(loop, self.context)

    def iterate(self) -> bool:
        """One iteration that does not block; whether it did anything."""
        return bool(self.context.iteration(False))

    def settle(self) -> int:
        """Iterates until it is idle; how often that was."""
        for count in range(100):
            if not self.iterate():
                return count
        raise AssertionError("it never becomes idle")

    def until(self, done: Callable[[], object], limit_s: float = 10) -> None:
        alarm = GLib.timeout_source_new(round(limit_s * 1000))
        rang: list[bool] = []
        alarm.set_callback(lambda *_: rang.append(True))
        alarm.attach(self.context)
        while not done():
            self.context.iteration(True)
            assert not rang, "GLib slept, and nobody came"
        alarm.destroy()


@pytest.fixture
def hosted(loop: uringloop.EventLoop) -> Iterator[Glib]:
    hosted = Glib(loop)
    hosted.settle()
    with hosted.attachment:
        yield hosted
    del hosted.context, hosted.attachment  # pytest keeps the rest, and the context has a descriptor


@contextlib.contextmanager
def notifier() -> Iterator[Any]:
    """A descriptor that is readable once it is set, until it is read."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    with ours, peer:
        ours_and_peer: Any = ours, peer
        yield ours_and_peer


# ---------------------------------------------------------------------- what QEMU asks


def test_flush_a_woken_context_becomes_idle_again(hosted: Glib) -> None:
    hosted.loop.call_soon_threadsafe(lambda: None)
    assert 1 <= hosted.settle() <= 3
    assert not hosted.iterate()


def test_bh_schedule_a_callback_runs_once(hosted: Glib) -> None:
    ran: list[int] = []
    hosted.loop.call_soon(ran.append, 1)
    assert hosted.iterate()
    assert ran == [1]
    assert hosted.settle() <= 2
    assert ran == [1]


def test_bh_schedule10_a_callback_that_queues_itself_runs_once_an_iteration(hosted: Glib) -> None:
    ran: list[int] = []

    def again() -> None:
        ran.append(len(ran))
        if len(ran) < 10:
            hosted.loop.call_soon(again)

    hosted.loop.call_soon(again)
    for count in range(1, 11):
        assert hosted.iterate()
        assert len(ran) == count
    assert hosted.settle() <= 2
    assert len(ran) == 10


def test_bh_cancel_and_delete_what_is_cancelled_never_runs(hosted: Glib) -> None:
    handle = hosted.loop.call_soon(unexpected)
    handle.cancel()
    hosted.loop.call_soon(unexpected).cancel()
    del handle
    assert hosted.settle() <= 2


def test_bh_callback_delete_callbacks_cancel_themselves_and_each_other(hosted: Glib) -> None:
    lives = {1: 1, 2: 3, 3: 2, 4: 4}
    ran = dict.fromkeys(lives, 0)
    handles: dict[int, asyncio.Handle] = {}

    def live(number: int) -> None:
        ran[number] += 1
        handles[number].cancel()  # it runs: nothing happens
        if ran[number] < lives[number]:
            handles[number] = hosted.loop.call_soon(live, number)

    def run_all() -> None:
        for number in lives:
            handles[number] = hosted.loop.call_soon(live, number)
        handles[4].cancel()
        handles[4] = hosted.loop.call_soon(live, 4)

    run_all()
    hosted.settle()
    assert ran == lives


def test_bh_flush_a_blocking_iteration_returns_for_a_callback(hosted: Glib) -> None:
    ran: list[int] = []
    hosted.loop.call_soon(ran.append, 1)
    hosted.until(lambda: ran)


def test_event_add_remove_what_is_not_ready_is_not_dispatched(hosted: Glib) -> None:
    with notifier() as (ours, _):
        hosted.loop.add_reader(ours, unexpected)
        assert hosted.settle() <= 3
        hosted.loop.remove_reader(ours)
        assert hosted.settle() <= 3


def test_event_wait_each_set_is_one_event(hosted: Glib) -> None:
    with notifier() as (ours, peer):
        ran: list[bytes] = []
        hosted.loop.add_reader(ours, lambda: ran.append(ours.recv(10)))
        hosted.settle()
        for count in range(1, 4):
            peer.send(b"x")
            hosted.until(lambda: len(ran) == count)  # noqa: B023
            assert hosted.settle() <= 3
            assert len(ran) == count
        hosted.loop.remove_reader(ours)
        peer.send(b"x")
        hosted.settle()
        assert len(ran) == 3


def test_event_wait_beside_another_notifier(hosted: Glib) -> None:
    with notifier() as (quiet, _), notifier() as (ours, peer):
        ran: list[bytes] = []
        hosted.loop.add_reader(quiet, unexpected)
        hosted.loop.add_reader(ours, lambda: ran.append(ours.recv(10)))
        for count in (1, 2):
            peer.send(b"x")
            hosted.until(lambda: len(ran) == count)  # noqa: B023
            hosted.settle()
            assert len(ran) == count
        hosted.loop.remove_reader(quiet)
        hosted.loop.remove_reader(ours)


def test_event_flush_a_handler_that_sets_its_own_notifier_runs_as_often(hosted: Glib) -> None:
    with notifier() as (ours, peer):
        ran: list[bytes] = []

        def handle() -> None:
            ran.append(ours.recv(1))
            if len(ran) < 10:
                peer.send(b"x")

        hosted.loop.add_reader(ours, handle)
        peer.send(b"x")
        hosted.until(lambda: len(ran) == 10)
        assert hosted.settle() <= 3
        assert len(ran) == 10
        hosted.loop.remove_reader(ours)


def test_timer_schedule_a_timer_fires_once_overdue_or_waited_for(hosted: Glib) -> None:
    ran: list[float] = []
    for waits in (False, True):
        ran.clear()
        due = time.monotonic() + 0.05
        hosted.loop.call_at(due, lambda: ran.append(time.monotonic()))
        if not waits:
            time.sleep(0.06)
            hosted.settle()
        hosted.until(lambda: ran)
        hosted.settle()
        assert len(ran) == 1
        assert ran[0] >= due


# ---------------------------------------------------------------------- asyncio in GLib


def test_run_is_asyncio_run_with_glib_alive(monitor: str) -> None:
    ticks: list[int] = []

    def tick() -> bool:
        ticks.append(1)
        return True

    source = GLib.timeout_add(5, tick)

    async def main() -> str:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('child')", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
        assert await echo_traffic(connections=10, size_bytes=50_000)
        assert await asyncio.to_thread(lambda: "thread") == "thread"
        await asyncio.sleep(0.05)
        loop: Any = asyncio.get_running_loop()
        return f"{output.decode().strip()} {loop.monitor}"

    assert glib.run(main(), monitor=monitor) == f"child {monitor}"
    GLib.source_remove(source)
    assert len(ticks) >= 5


def test_run_raises_what_main_raises_and_refuses_to_nest(monitor: str) -> None:
    async def fail() -> None:
        raise LookupError("main's own")

    async def nest() -> None:
        coroutine = fail()
        with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
            glib.run(coroutine)
        coroutine.close()

    with pytest.raises(LookupError, match="main's own"):
        glib.run(fail(), monitor=monitor)
    glib.run(nest(), monitor=monitor)


def test_a_runner_takes_it_and_cancels_what_is_left(monitor: str) -> None:
    left: list[str] = []

    async def linger() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            left.append("cancelled")
            raise

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            left.append("generator closed")

    async def main() -> None:
        kept.append(asyncio.create_task(linger()))
        async for _ in numbers():
            break
        await asyncio.sleep(0)

    kept: list[asyncio.Task[None]] = []
    with asyncio.Runner(loop_factory=lambda: glib.GLibEventLoop(monitor=monitor)) as runner:
        runner.run(main())
        runner.run(asyncio.sleep(0))
    assert left == ["generator closed", "cancelled"]


def test_threads_run_loops_of_their_own_at_once(monitor: str) -> None:
    async def main(number: int) -> int:
        await asyncio.sleep(0.02)
        assert await echo_traffic(connections=2, size_bytes=5_000)
        return number

    with ThreadPoolExecutor(max_workers=3) as threads:
        running = [threads.submit(glib.run, main(i), monitor=monitor) for i in range(3)]
        assert glib.run(main(3), monitor=monitor) == 3
        assert [thread.result(10) for thread in running] == [0, 1, 2]


def test_a_context_that_another_thread_iterates_is_refused(monitor: str) -> None:
    context = GLib.MainContext.new()
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        context.acquire()
        held.set()
        let_go.wait(10)
        context.release()

    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(hold)
        held.wait(10)
        main = asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another thread iterates this GLib context"):
            glib.run(main, context=context, monitor=monitor)
        main.close()
        let_go.set()


def test_an_attached_loop_is_never_run_by_another_thread(
    loop: uringloop.EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    hosted = Glib(loop)
    loop.call_soon(unexpected)
    for _ in range(3):
        in_thread(hosted.iterate)
    with pytest.raises(RuntimeError, match="belongs to the thread that hosts it"):
        hosted.attachment.__exit__(None, None, None)
    assert not loop.is_running()
    (record,) = caplog.records
    assert record.message == "another thread iterates the GLib context that carries a loop"
    cast("Any", loop)._ready.clear()


def test_glib_and_asyncio_timers_take_turns(hosted: Glib) -> None:
    order: list[str] = []
    source = GLib.timeout_source_new(120)
    source.set_callback(lambda *_: order.append("glib"))
    source.attach(hosted.context)
    hosted.loop.call_later(0.06, order.append, "early")
    hosted.loop.call_later(0.18, order.append, "late")
    hosted.until(lambda: len(order) == 3)
    assert order == ["early", "glib", "late"]


def test_a_callback_of_glib_may_use_asyncio(hosted: Glib) -> None:
    results: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0.001)
        results.append("done")

    def clicked(*_: object) -> bool:
        task = asyncio.create_task(work())
        task.add_done_callback(lambda task: results.append(type(task).__name__))
        assert asyncio.get_running_loop() is hosted.loop
        return GLib.SOURCE_REMOVE  # type: ignore[no-any-return]

    source = GLib.idle_source_new()
    source.set_callback(clicked)
    source.attach(hosted.context)
    hosted.until(lambda: len(results) == 2)
    assert results == ["done", "Task"]


def test_a_socket_registered_in_an_idle_callback_is_served_at_once(hosted: Glib) -> None:
    with notifier() as (ours, peer):
        times: list[float] = []

        def read() -> None:
            times.append(time.monotonic())
            ours.recv(10)

        def register(*_: object) -> bool:
            times.append(time.monotonic())
            peer.send(b"x")
            hosted.loop.add_reader(ours, read)
            return GLib.SOURCE_REMOVE  # type: ignore[no-any-return]

        source = GLib.idle_source_new()
        source.set_callback(register)
        source.attach(hosted.context)
        hosted.until(lambda: len(times) == 2)
        assert times[1] - times[0] < 0.05
        hosted.loop.remove_reader(ours)


def test_another_thread_wakes_glib(hosted: Glib) -> None:
    woken: list[float] = []
    hosted.settle()
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        hosted.loop.call_soon_threadsafe(lambda: woken.append(time.monotonic()))

    thread = threading.Timer(0.05, send)
    thread.start()
    hosted.until(lambda: woken)
    thread.join()
    assert woken[0] - sent[0] < 0.05


# ---------------------------------------------------------------------- trouble


def test_no_exception_of_a_callback_destroys_the_source(hosted: Glib) -> None:
    problems: list[type] = []
    hosted.loop.set_exception_handler(
        lambda _, context: problems.append(type(context["exception"]))
    )

    def fail(exc: BaseException) -> None:
        raise exc

    for exc in (ValueError(), asyncio.CancelledError(), GeneratorExit(), OSError()):
        hosted.loop.call_soon(fail, exc)
    ran: list[int] = []
    hosted.loop.call_later(0.01, ran.append, 1)
    hosted.until(lambda: ran)
    assert problems == [
        ValueError,
        asyncio.CancelledError,
        GeneratorExit,
        OSError,
    ]
    assert hosted.attachment.attached


@pytest.mark.parametrize("exit_type", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_loop_detaches_it_and_is_raised_by_the_with_block(
    loop: uringloop.EventLoop, exit_type: type[BaseException]
) -> None:
    def leave() -> None:
        raise exit_type("out")

    main_loop = GLib.MainLoop.new(None, False)
    held = glib.attach(loop, on_stop=main_loop.quit)
    loop.call_soon(leave)
    with pytest.raises(exit_type, match="out"), held:
        main_loop.run()
    assert not held.attached
    assert not loop.is_running()
    assert loop.run_until_complete(asyncio.sleep(0, "it goes on")) == "it goes on"


def test_stop_detaches_and_calls_on_stop(loop: uringloop.EventLoop) -> None:
    main_loop = GLib.MainLoop.new(None, False)
    with glib.attach(loop, on_stop=main_loop.quit) as attachment:
        loop.call_later(0.01, loop.stop)
        main_loop.run()
        assert not attachment.attached
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_run_while_glib_sleeps(monitor: str, number: int) -> None:
    """In a child: once for the main task, as asyncio.run() does it; and SIGTERM as ever."""
    program = f"""
import asyncio, signal, uringloop.glib
signal.signal(signal.SIGINT, signal.default_int_handler)
async def main():
    print("sleeps", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        print("cancelled", flush=True)
uringloop.glib.run(main(), monitor={monitor!r})
"""
    import subprocess

    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "sleeps\n"
        child.send_signal(number)
        output, errors = child.communicate(timeout=20)
    if number == signal.SIGINT:
        assert output == "cancelled\n"
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert child.returncode in (1, -signal.SIGINT)
    else:
        assert (output, errors, child.returncode) == ("", "", -signal.SIGTERM)


def test_a_nested_iteration_in_a_callback_dispatches_no_asyncio_and_ends(hosted: Glib) -> None:
    ran: list[str] = []
    nested: list[int] = []

    def nest() -> None:
        hosted.loop.call_soon(ran.append, "asyncio")
        source = GLib.timeout_source_new(10)
        source.set_callback(lambda *_: ran.append("glib"))
        source.attach(hosted.context)
        while "glib" not in ran:
            hosted.context.iteration(True)
            nested.append(1)
        assert ran == ["glib"]

    hosted.loop.call_soon(nest)
    hosted.until(lambda: len(ran) == 2)
    assert ran == ["glib", "asyncio"]
    assert len(nested) <= 5, "it spins"


def test_it_moves_to_another_context_with_fifty_live_descriptors(loop: uringloop.EventLoop) -> None:
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(notifier()) for _ in range(50)]
        got: dict[int, bytes] = {}

        def read(index: int) -> None:
            got[index] = got.get(index, b"") + pairs[index][0].recv(10)

        for index, (ours, _) in enumerate(pairs):
            loop.add_reader(ours, read, index)
        for round_ in range(4):
            hosted = Glib(loop)
            for _, peer in pairs:
                peer.send(b"x")
            hosted.until(lambda: all(len(got.get(i, b"")) == round_ + 1 for i in range(50)))  # noqa: B023
            hosted.attachment.detach()
            hosted.attachment.detach()
            assert not hosted.iterate()
        for ours, _ in pairs:
            loop.remove_reader(ours)


def test_an_attachment_that_nobody_ends_makes_no_noise_at_exit(monitor: str) -> None:
    ended = python(
        "-c",
        f"""
import uringloop, uringloop.glib
from gi.repository import GLib
loop = uringloop.new_event_loop(monitor={monitor!r})
attachment = uringloop.glib.attach(loop)
loop.call_later(0.01, print, "ran")
while loop._scheduled: GLib.MainContext.default().iteration(True)
GLib.MainContext.default().iteration(False)
""",
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ran\n", "")


def test_only_an_uringloop_can_be_attached() -> None:
    stock = make_loop_named("stock")
    with pytest.raises(TypeError, match=r"make one with uringloop\.new_event_loop"):
        glib.attach(stock)
    stock.close()


# ---------------------------------------------------------------------- cost


@pytest.mark.alone
def test_an_idle_second_under_glib_wakes_nobody(hosted: Glib) -> None:
    timer = hosted.loop.call_later(3600, unexpected)
    hosted.settle()
    over: list[bool] = []
    source = GLib.timeout_source_new(1000)
    source.set_callback(lambda *_: over.append(True))
    source.attach(hosted.context)
    cpu_s, wake_ups = time.process_time(), 0
    while not over:
        hosted.context.iteration(True)
        wake_ups += 1
    assert wake_ups <= 5
    assert time.process_time() - cpu_s < 0.02
    timer.cancel()


@pytest.mark.alone
def test_short_timers_are_not_rounded_to_glibs_milliseconds(hosted: Glib, monitor: str) -> None:
    late_s = []
    for _ in range(50):
        fired: list[float] = []
        due = time.monotonic() + 0.002
        hosted.loop.call_at(due, lambda: fired.append(time.monotonic()))  # noqa: B023
        while not fired:
            hosted.context.iteration(True)
        late_s.append(fired[0] - due)
    assert min(late_s) >= 0
    assert statistics.median(late_s) < 0.0005


@pytest.mark.alone
def test_round_trips_take_less_time_than_in_pygobjects_own_loop(monitor: str) -> None:
    events: Any = pytest.importorskip("gi.events", reason="PyGObject older than 3.50 has no loop")

    async def round_trips(count: int) -> float:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100):
                writer.write(data)
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        started = time.process_time()  # whoever else is busy here does not count
        for _ in range(count):
            writer.write(b"ping")
            await reader.readexactly(4)
        took = time.process_time() - started
        writer.close()
        server.close()
        return took

    def of_pygobject(context: Any) -> Any:
        return events.GLibEventLoop(context)

    def seconds(make: Callable[[], Any]) -> float:
        loop = make()
        try:
            return float(loop.run_until_complete(round_trips(2000)))
        finally:
            loop.run_until_complete(asyncio.sleep(0.01))
            loop.close()

    context = GLib.MainContext.default()
    ours, theirs = [], []
    for _ in range(5):
        theirs.append(seconds(lambda: of_pygobject(context)))
        ours.append(seconds(lambda: glib.GLibEventLoop(monitor=monitor)))
    assert min(ours) <= 0.67 * min(theirs), (ours, theirs)


# ---------------------------------------------------------------------- signals


def interrupted(handler_raises: str, monitor: str, times: int) -> list[str]:
    """What a program under GLib says that gets a signal, or several, while GLib sleeps."""
    program = f"""
import asyncio, os, signal, sys, threading, time, uringloop.glib

class Alarm(BaseException): pass
def handler(number, frame): raise {handler_raises}
signal.signal(signal.SIGUSR1, handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
number = signal.SIGINT if {times} > 1 else signal.SIGUSR1

def send():
    for _ in range({times}):
        time.sleep(0.2)
        os.kill(os.getpid(), number)
    time.sleep(10)
    print("it was lost", flush=True)
    os._exit(3)

async def main():
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        print("cancelled")
        await asyncio.sleep({times - 1} * 100)  # a clean-up that takes long
    finally:
        print("cleaned up")

threading.Thread(target=send, daemon=True).start()
try:
    uringloop.glib.run(main(), monitor={monitor!r})
except BaseException as exc:
    print(type(exc).__name__)
finally:
    print("finally")
"""
    ended = python("-c", program)
    assert ended.stderr == ""
    return ended.stdout.split("\n")[:-1]


def test_what_a_signal_handler_raises_while_glib_sleeps_comes_out_of_run(monitor: str) -> None:
    for name, raises in (("Alarm", "Alarm"), ("SystemExit", "SystemExit(7)")):
        said = interrupted(raises, monitor, 1)
        assert said[-2:] == [name, "finally"]
        assert "cleaned up" in said


def test_a_second_ctrl_c_ends_a_clean_up_that_takes_too_long(monitor: str) -> None:
    said = interrupted("Alarm", monitor, 2)
    assert said[0] == "cancelled"
    assert said[-2:] == ["KeyboardInterrupt", "finally"]


def test_the_wake_up_descriptor_of_a_closed_loop_is_forgotten(loop: uringloop.EventLoop) -> None:
    """PyGObject's main loop remembers the one it finds, and brings it back when it ends."""
    main_loop = GLib.MainLoop.new(None, False)
    with glib.attach(loop, on_stop=main_loop.quit):
        loop.call_later(0.01, loop.stop)
        main_loop.run()
    loop.close()
    assert signal.set_wakeup_fd(-1) == -1


def test_signal_handlers_added_before_the_main_loop_runs_are_called(
    loop: uringloop.EventLoop,
) -> None:
    main_loop = GLib.MainLoop.new(None, False)
    handled: list[int] = []
    with glib.attach(loop, on_stop=main_loop.quit):
        loop.add_signal_handler(signal.SIGUSR1, handled.append, 1)
        loop.call_later(0.02, signal.raise_signal, signal.SIGUSR1)
        loop.call_later(0.1, loop.stop)
        main_loop.run()
        loop.remove_signal_handler(signal.SIGUSR1)
    assert handled == [1]


# ---------------------------------------------------------------------- edges


def test_an_attach_that_fails_leaves_no_running_loop(loop: uringloop.EventLoop) -> None:
    for wrong in ({"context": "no context"}, {"priority": "no number"}):
        with pytest.raises(TypeError):
            glib.attach(loop, **wrong)
        assert not loop.is_running()
        assert loop.run_until_complete(asyncio.sleep(0, "it runs")) == "it runs"


def test_what_a_callback_wrote_leaves_before_a_main_loop_that_it_opens_sleeps(
    hosted: Glib,
) -> None:
    with notifier() as (ours, peer):
        seen: list[bytes] = []

        async def connect() -> asyncio.StreamWriter:
            _, writer = await asyncio.open_connection(sock=ours)
            return writer

        def write_and_open_a_dialogue() -> None:
            writer.write(b"saving...")
            source = GLib.timeout_source_new(10)
            source.set_callback(lambda *_: seen.append(peer.recv(100, socket.MSG_DONTWAIT)))
            source.attach(hosted.context)
            while not seen:
                hosted.context.iteration(True)

        task = hosted.loop.create_task(connect())
        hosted.until(task.done)
        writer = task.result()
        hosted.loop.call_soon(write_and_open_a_dialogue)
        hosted.until(lambda: seen)
        assert seen == [b"saving..."]
        writer.close()
        task2 = hosted.loop.create_task(writer.wait_closed())
        hosted.until(task2.done)


def test_an_exception_of_on_stop_is_reported_and_harmless(loop: uringloop.EventLoop) -> None:
    problems: list[Any] = []
    loop.set_exception_handler(lambda _, context: problems.append(context))
    attachment = glib.attach(loop, on_stop=lambda: 1 / 0)
    loop.stop()
    while attachment.attached:
        GLib.MainContext.default().iteration(True)
    assert [type(problem["exception"]) for problem in problems] == [ZeroDivisionError]
    problems.clear()


def test_the_exception_of_a_body_says_what_had_ended_the_loop(loop: uringloop.EventLoop) -> None:
    def leave() -> None:
        raise KeyboardInterrupt("out")

    attachment = glib.attach(loop)
    loop.call_soon(leave)
    body = LookupError("of the body")

    def use() -> None:
        with attachment:
            while attachment.attached:
                GLib.MainContext.default().iteration(True)
            raise body

    with pytest.raises(LookupError, match="of the body"):
        use()
    assert body.__notes__ == ["The event loop had ended with KeyboardInterrupt('out') before."]
