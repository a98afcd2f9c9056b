"""The life of a loop: threads, fork, close, garbage, the end of the interpreter, idleness.

The promise: wherever a loop is made, run, closed or dropped, its watches are kept as long as they
are wanted, its peers see the end of file at once, and afterwards nothing of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import multiprocessing
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import uringloop
from tests.conftest import open_files
from tests.support import (
    NOBODY,
    EchoServer,
    become_nobody,
    echo_traffic,
    files_that_are,
    in_thread,
    ring_files,
    ring_mappings,
    run,
    run_child,
    unexpected,
)

MakeLoop = Callable[[], uringloop.EventLoop]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected non-blocking sockets: the loop's and its peer's."""
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        peer.setblocking(False)
        yield ours, peer


def settle(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until everything is armed in the kernel and nothing is left to do."""
    loop.run_until_complete(asyncio.sleep(0.01))


def sees_end(peer: socket.socket, limit: float = 2) -> float:
    """Seconds until the peer sees the end of file; fails when it does not."""
    start = time.monotonic()
    readable, _, _ = select.select([peer], [], [], limit)
    took = time.monotonic() - start
    assert readable, "the peer sees no end of file: the kernel still holds the socket"
    assert peer.recv(1) == b""
    return took


# ---------------------------------------------------------------------- threads


class Kept:
    """What stays on a loop while it moves: a reader, an open server, a client connection."""

    def __init__(self, loop: uringloop.EventLoop, ours: socket.socket, peer: socket.socket) -> None:
        self.loop, self.ours, self.peer = loop, ours, peer
        self.taken, self.took, self.server = bytearray(), asyncio.Event(), EchoServer()
        loop.add_reader(ours, self.take)

    def take(self) -> None:
        self.taken += self.ours.recv(100)
        self.took.set()

    async def open(self) -> None:
        self.port = await self.server.open()
        self.client = await asyncio.open_connection("127.0.0.1", self.port)

    async def use(self, text: bytes) -> None:
        """Old connection, old server and old reader all work."""
        reader, writer = self.client
        writer.write(text)
        assert await reader.readexactly(len(text)) == text
        fresh_reader, fresh_writer = await asyncio.open_connection("127.0.0.1", self.port)
        fresh_writer.write(text)
        assert await fresh_reader.readexactly(len(text)) == text
        fresh_writer.close()
        await fresh_writer.wait_closed()
        expected = len(self.taken) + len(text)
        self.peer.send(text)
        async with asyncio.timeout(5):
            while len(self.taken) < expected:
                self.took.clear()
                await self.took.wait()

    async def close(self) -> None:
        self.loop.remove_reader(self.ours)
        self.client[1].close()
        await self.client[1].wait_closed()
        await self.server.close()


def test_a_loop_goes_from_thread_to_thread_and_keeps_its_watches(
    loop: uringloop.EventLoop, monitor: str
) -> None:
    with pair() as (ours, peer):
        kept = Kept(loop, ours, peer)
        peer.send(b"before any run ")
        in_thread(lambda: run(loop, kept.open()))
        in_thread(lambda: run(loop, kept.use(b"second thread ")))
        peer.send(b"in between ")
        in_thread(lambda: run(loop, kept.use(b"third thread ")))
        run(loop, kept.use(b"and here"))
        assert kept.taken == b"before any run second thread in between third thread and here"
        assert loop.monitor == monitor
        assert loop.statistics().downgrades == 0
        run(loop, kept.close())


def test_a_reader_added_by_a_thread_that_has_ended_still_works(loop: uringloop.EventLoop) -> None:
    with pair() as (ours, peer):
        loop.add_reader(ours, loop.stop)
        in_thread(functools.partial(settle, loop))  # armed by a thread that is gone
        peer.send(b"!")
        loop.call_later(5, unexpected)
        loop.run_forever()
        loop.remove_reader(ours)


@pytest.mark.parametrize("way", ["remove_reader", "close"])
def test_the_peer_sees_the_end_within_50_ms_of_a_close_in_another_thread(
    make_loop: MakeLoop, way: str
) -> None:
    took = []
    for _ in range(3):  # one disturbed attempt says something about the machine, three about us
        loop = make_loop()
        with pair() as (ours, peer), ThreadPoolExecutor(max_workers=1) as thread_a:
            loop.add_reader(ours, unexpected)
            thread_a.submit(settle, loop).result(10)  # thread A stays, idle
            if way == "close":
                loop.close()
            else:
                loop.remove_reader(ours)
            ours.close()
            took.append(sees_end(peer))
            loop.close()
        if min(took) < 0.05:
            break
    assert min(took) < 0.05


def test_the_peer_of_a_transport_sees_the_end_when_another_thread_closes_it(
    loop: uringloop.EventLoop,
) -> None:
    with pair() as (ours, peer), ThreadPoolExecutor(max_workers=1) as thread_a:

        async def connect() -> asyncio.Transport:
            transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
            await asyncio.sleep(0.01)
            return transport

        transport = thread_a.submit(loop.run_until_complete, connect()).result(10)
        transport.close()
        settle(loop)  # the turn that carries it out is in this thread
        assert sees_end(peer) < 1


@pytest.mark.parametrize("stopped", [False, True], ids=["running on", "stopped at once"])
def test_peer_sees_end_of_file_after_remove_reader_and_close(
    loop: uringloop.EventLoop, stopped: bool
) -> None:
    with pair() as (ours, peer), pair() as (other, _):

        def leave() -> None:
            loop.remove_reader(ours)
            ours.close()
            if stopped:
                loop.stop()
            else:
                loop.call_later(0.02, loop.stop)

        loop.add_reader(ours, unexpected)
        loop.add_reader(other, unexpected)
        loop.call_later(0.01, leave)
        loop.run_forever()
        assert sees_end(peer) < 0.5
        loop.remove_reader(other)


def test_a_listening_socket_that_was_closed_accepts_nobody(loop: uringloop.EventLoop) -> None:
    async def listen() -> int:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        await asyncio.sleep(0.01)
        port: int = server.sockets[0].getsockname()[1]
        server.close()
        return port

    port = loop.run_until_complete(listen())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1).close()


def test_a_loop_that_is_garbage_in_another_thread_lets_its_peers_go(monitor: str) -> None:
    with pair() as (ours, peer), ThreadPoolExecutor(max_workers=1) as thread_a:

        def make() -> weakref.ref[uringloop.EventLoop]:
            loop = uringloop.new_event_loop(monitor=monitor)
            loop.add_reader(ours, unexpected)
            settle(loop)
            return weakref.ref(loop)

        gc.disable()  # it must not become garbage in its own thread
        try:
            alive = thread_a.submit(make).result(10)
            with pytest.warns(ResourceWarning, match="unclosed event loop"):
                gc.collect()
        finally:
            gc.enable()
        assert alive() is None
        ours.close()
        assert sees_end(peer) < 1


def drop_a_loop(monitor: str) -> None:
    loop = uringloop.new_event_loop(monitor=monitor)
    settle(loop)
    del loop
    gc.collect()


def test_loops_that_are_dropped_warn_and_leave_nothing(monitor: str) -> None:
    tracemalloc.start()  # the warning then says where the loop was made; it must not fail on it
    try:
        files = len(os.listdir("/proc/self/fd"))
        mappings = ring_mappings()
        for _ in range(20):
            with pytest.warns(ResourceWarning, match="unclosed event loop"):
                drop_a_loop(monitor)
        assert len(os.listdir("/proc/self/fd")) <= files + 1  # the thread's spare ring
        assert ring_mappings() <= max(mappings, 2)
    finally:
        tracemalloc.stop()


def test_five_loops_in_five_threads_hand_tokens_to_each_other(make_loop: MakeLoop) -> None:
    loops = [make_loop() for _ in range(5)]
    hops = [0] * len(loops)
    tokens, rounds = 10, 200
    over = threading.Semaphore(0)

    def hop(index: int, left: int) -> None:
        hops[index] += 1
        if left == 0:
            over.release()
        else:
            following = (index + 1) % len(loops)
            loops[following].call_soon_threadsafe(hop, following, left - 1)

    threads = [threading.Thread(target=loop.run_forever) for loop in loops]
    for thread in threads:
        thread.start()
    for token in range(tokens):
        index = token % len(loops)
        loops[index].call_soon_threadsafe(hop, index, rounds - 1)
    all_over = [over.acquire(timeout=20) for _ in range(tokens)]
    for loop, thread in zip(loops, threads, strict=True):
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
    assert all(all_over)
    assert hops == [tokens * rounds // len(loops)] * len(loops)
    assert not any(thread.is_alive() for thread in threads)


def test_a_hundred_thousand_threadsafe_calls_all_run_in_their_order(
    loop: uringloop.EventLoop,
) -> None:
    calls = 25_000
    seen: list[list[int]] = [[], [], [], []]

    def call(number: int) -> None:
        for index in range(calls):
            loop.call_soon_threadsafe(seen[number].append, index)

    async def main() -> None:
        threads = [loop.run_in_executor(None, call, number) for number in range(len(seen))]
        await asyncio.gather(*threads)
        # The last calls stand in the queue before the wake-up of this task: they have run.

    run(loop, main(), limit=60)
    assert seen == [list(range(calls))] * len(seen)


# ---------------------------------------------------------------------- fork


class Echoes:
    """Pairs whose one end a reader of the loop echoes, and whose other end the loop drives."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.loop = loop
        self.pairs = [socket.socketpair() for _ in range(count)]
        for ours, peer in self.pairs:
            ours.setblocking(False)
            peer.setblocking(False)
            loop.add_reader(ours, self.echo, ours)

    def echo(self, ours: socket.socket) -> None:
        if piece := ours.recv(1000):
            ours.send(piece)

    async def _exchange(self, index: int, name: str, rounds: int) -> None:
        peer = self.pairs[index][1]
        for number in range(rounds):
            text = f"{name} {index} {number}".encode()
            await self.loop.sock_sendall(peer, text)
            async with asyncio.timeout(10):
                assert await self.loop.sock_recv(peer, 1000) == text

    async def drive(self, name: str, rounds: int = 5) -> None:
        """Exchange messages; each must come back exactly once."""
        await asyncio.gather(
            *(self._exchange(index, name, rounds) for index in range(len(self.pairs)))
        )
        with pytest.raises(BlockingIOError):
            self.pairs[0][1].recv(1)

    def leave(self) -> None:
        """Take the readers away and close this process's copies."""
        for ours, peer in self.pairs:
            self.loop.remove_reader(ours)
            ours.close()
            peer.close()


def fork(child: Callable[[], object]) -> int:
    """Run this in a forked child, which ends with it and tells by its code how it went."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return pid


def ended(pid: int) -> int | None:
    """The exit code of a child; None while it lives."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


async def drive_until_ended(echoes: Echoes, pid: int) -> int:
    """Keep the traffic going as long as the child lives; how the child ended."""
    deadline = time.monotonic() + 20
    while (code := ended(pid)) is None:
        assert time.monotonic() < deadline, "the child hangs"
        await echoes.drive("meanwhile", 1)
    await echoes.drive("afterwards", 20)
    return code


def own_loop_works(monitor: str) -> None:
    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        assert loop.monitor == monitor
        assert loop.run_until_complete(echo_traffic(3, 5000))


def fork_between_runs(monitor: str, what: str) -> list[Any]:
    loop = uringloop.new_event_loop(monitor=monitor)
    stays, goes = Echoes(loop, 10), Echoes(loop, 10)
    loop.run_until_complete(stays.drive("before"))
    loop.run_until_complete(goes.drive("before"))

    def child() -> None:
        if what == "closes the loop":
            loop.close()
        elif what == "closes the loop and runs its own":
            loop.close()
            own_loop_works(monitor)
        elif what == "runs its own":
            own_loop_works(monitor)
        elif what == "goes on with the inherited loop":
            stays.leave()
            for number in range(20):
                loop.run_until_complete(goes.drive(f"child {number}"))
            assert loop.monitor == monitor
            loop.close()
            own_loop_works(monitor)
        elif what == "forks again":
            pid = fork(functools.partial(own_loop_works, monitor))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        elif what == "closes every descriptor":
            os.closerange(3, 200)
            time.sleep(0.05)

    pid = fork(child)
    if what == "goes on with the inherited loop":
        goes.leave()
    code = loop.run_until_complete(drive_until_ended(stays, pid))
    if what != "goes on with the inherited loop":
        loop.run_until_complete(goes.drive("at the end"))
        goes.leave()
    stays.leave()
    result = [code, loop.monitor, loop.statistics().downgrades]
    loop.close()
    return result


@pytest.mark.parametrize(
    "what",
    [
        "ends at once",
        "closes the loop",
        "closes the loop and runs its own",
        "runs its own",
        "goes on with the inherited loop",
        "forks again",
        "closes every descriptor",
    ],
)
def test_a_parent_with_live_connections_is_unharmed_by_a_child_that(
    monitor: str, what: str
) -> None:
    assert run_child(fork_between_runs, monitor, what).value == [0, monitor, 0]


def fork_inside_a_run(monitor: str) -> list[Any]:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, uringloop.EventLoop)
        echoes = Echoes(loop, 10)
        await echoes.drive("before")
        pid = fork(functools.partial(own_loop_works, monitor))
        code = await drive_until_ended(echoes, pid)
        echoes.leave()
        return [code, loop.monitor, loop.statistics().downgrades]

    return uringloop.run(main(), monitor=monitor)


def test_a_fork_from_a_callback_leaves_the_parent_its_traffic(monitor: str) -> None:
    assert run_child(fork_inside_a_run, monitor).value == [0, monitor, 0]


def fork_while_another_thread_waits(monitor: str) -> list[Any]:
    loop = uringloop.new_event_loop(monitor=monitor)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    time.sleep(0.05)  # it is in the kernel now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads and fork
        pid = fork(functools.partial(own_loop_works, monitor))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    exact = asyncio.run_coroutine_threadsafe(echo_traffic(3, 5000), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
    return [code, exact]


def test_a_fork_while_another_thread_waits_in_the_kernel_harms_nobody(monitor: str) -> None:
    assert run_child(fork_while_another_thread_waits, monitor).value == [0, True]


def close_beside_a_living_child(monitor: str, way: str) -> float:
    loop = uringloop.new_event_loop(monitor=monitor)
    with pair() as (ours, peer):
        loop.add_reader(ours, unexpected)
        settle(loop)
        ready, say_ready = os.pipe()
        lives, end = os.pipe()

        def child() -> None:
            ours.close()
            peer.close()
            os.close(end)
            os.write(say_ready, b"!")
            os.read(lives, 1)  # until the parent closes its end

        pid = fork(child)
        os.read(ready, 1)
        if way == "remove_reader":
            loop.remove_reader(ours)
        elif way == "close":
            loop.close()
        else:
            in_thread(loop.close)
        ours.close()
        took = sees_end(peer)
        os.close(end)
        os.waitpid(pid, 0)
        loop.close()
        return took


@pytest.mark.parametrize("way", ["remove_reader", "close", "close in another thread"])
def test_a_living_child_does_not_delay_the_end_that_peers_see(monitor: str, way: str) -> None:
    assert run_child(close_beside_a_living_child, monitor, way).value < 0.5


def serve_in_child(monitor: str) -> None:
    own_loop_works(monitor)
    assert uringloop.run(echo_traffic(3, 5000), monitor=monitor)


def multiprocess(method: str, monitor: str) -> list[Any]:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        assert await echo_traffic(3, 5000)
        echoes = Echoes(loop, 5)
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=serve_in_child, args=[monitor])
        process.start()
        while process.is_alive():
            await echoes.drive("meanwhile", 1)
        process.join()
        assert await echo_traffic(3, 5000)
        echoes.leave()
        return [process.exitcode]

    return uringloop.run(main(), monitor=monitor)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_runs_loops_in_parent_and_child(monitor: str, method: str) -> None:
    assert run_child(multiprocess, method, monitor).value == [0]


# ---------------------------------------------------------------------- subprocesses


def test_subprocesses_of_an_executor_do_not_disturb_the_traffic(loop: uringloop.EventLoop) -> None:
    async def main() -> None:
        echoes = Echoes(loop, 10)
        call = functools.partial(subprocess.run, ["true"], check=True)
        running = [loop.run_in_executor(None, call) for _ in range(8)]
        own = [await asyncio.create_subprocess_exec("true") for _ in range(2)]
        while not all(future.done() for future in running):
            await echoes.drive("beside subprocesses", 1)
        assert all(future.result().returncode == 0 for future in running)
        assert [await process.wait() for process in own] == [0, 0]
        await echoes.drive("afterwards")
        echoes.leave()

    run(loop, main())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_subprocess_with_preexec_fn_does_not_disturb_the_traffic(
    loop: uringloop.EventLoop, monitor: str
) -> None:
    async def main() -> None:
        echoes = Echoes(loop, 10)
        await echoes.drive("before")
        for _ in range(3):  # preexec_fn makes it a real fork, in which Python code runs
            process = await asyncio.create_subprocess_exec("true", preexec_fn=gc.collect)
            await echoes.drive("meanwhile")
            assert await process.wait() == 0
        await echoes.drive("afterwards")
        echoes.leave()

    run(loop, main())
    assert loop.monitor == monitor
    assert loop.statistics().downgrades == 0


# ---------------------------------------------------------------------- close


def close_with_everything_armed(monitor: str) -> None:
    """Made and closed in a thread; when that has ended, not even the spare ring may be left."""
    loop = uringloop.new_event_loop(monitor=monitor)
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    full, unread = socket.socketpair()
    full.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            full.send(bytes(65536))

    kept: list[object] = []

    async def arm() -> int:
        loop.add_reader(ours, unexpected)
        loop.add_writer(full, unexpected)
        server = await asyncio.start_server(lambda r, w: kept.append((r, w)), "127.0.0.1", 0)
        kept.append(await asyncio.open_connection(*server.sockets[0].getsockname()))
        await loop.create_unix_server(asyncio.Protocol, f"\0uringloop-{os.getpid()}")
        await loop.create_datagram_endpoint(asyncio.DatagramProtocol, ("127.0.0.1", 0))
        process = await asyncio.create_subprocess_exec("sleep", "60", stdout=subprocess.PIPE)
        loop.call_later(60, unexpected)
        await loop.run_in_executor(None, time.sleep, 0)
        await asyncio.sleep(0.01)
        kept.append(process)
        return process.pid

    pid = loop.run_until_complete(arm())
    assert loop.statistics().watches >= 9
    assert len(kept) == 3
    loop.close()
    os.kill(pid, signal.SIGKILL)  # a thread of 3.11's asyncio waits for the process, loop or not
    for sock in (ours, peer, full, unread):
        sock.close()


def armed_and_closed(monitor: str) -> dict[str, Any]:
    # Transports and tasks that are alive when their loop is closed say so when they are collected.
    warnings.simplefilter("ignore", ResourceWarning)
    sys.unraisablehook = lambda args: None
    import logging

    logging.disable()
    run(uringloop.new_event_loop(monitor="poll"), asyncio.sleep(0))  # what stays for good is there
    gc.collect()
    files, threads = open_files(), len(os.listdir("/proc/self/task"))
    in_thread(functools.partial(close_with_everything_armed, monitor))
    deadline = time.monotonic() + 5
    left, tasks = {-1: "not looked yet"}, 0
    while (left or tasks > threads) and time.monotonic() < deadline:
        gc.collect()
        tasks = len(os.listdir("/proc/self/task"))
        # From 3.12 asyncio itself forgets the pidfd of a process that outlives its loop.
        left = {fd: to for fd, to in open_files().items() if fd not in files and "pidfd" not in to}
        time.sleep(0.01)
    return {
        "files": list(left.values()),
        "threads": tasks - threads,
        "mappings": ring_mappings(),
        "rings": len(ring_files()),
    }


def test_close_with_everything_armed_leaves_no_descriptor_mapping_or_thread(monitor: str) -> None:
    left = run_child(armed_and_closed, monitor).value
    assert left == {"files": [], "threads": 0, "mappings": 0, "rings": 0}


def test_close_says_no_while_another_thread_waits_and_yes_afterwards(
    loop: uringloop.EventLoop,
) -> None:
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        time.sleep(0.02)
        with pytest.raises(RuntimeError, match="running"):
            loop.close()
        with pytest.raises(RuntimeError, match="another thread is waiting"):
            loop._uring_selector.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
    loop.close()
    assert loop.is_closed()


def one_life(monitor: str) -> tuple[str, str | None]:
    """Make, run and close a loop; its monitor and the size of its ring."""
    with (
        contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop,
        pair() as (ours, peer),
    ):
        peer.send(b"!")
        loop.add_reader(ours, loop.stop)
        loop.run_forever()
        loop.remove_reader(ours)
        return loop.monitor, loop._uring_selector._fdmon.setup_step


def test_two_hundred_loops_leave_no_descriptor_and_no_mapping(monitor: str) -> None:
    life = one_life(monitor)
    assert life[0] == monitor
    files, mappings = len(os.listdir("/proc/self/fd")), ring_mappings()
    assert [one_life(monitor) for _ in range(200)] == [life] * 200
    assert len(os.listdir("/proc/self/fd")) == files
    assert ring_mappings() == mappings


def test_loops_in_a_hundred_short_threads_leave_no_descriptor_and_no_mapping(monitor: str) -> None:
    files, mappings = len(os.listdir("/proc/self/fd")), ring_mappings()
    assert {in_thread(lambda: one_life(monitor))[0] for _ in range(100)} == {monitor}
    assert len(os.listdir("/proc/self/fd")) == files
    assert ring_mappings() == mappings


def many_lives(count: int) -> list[Any]:
    become_nobody(8 << 20)
    life = one_life("io_uring")
    files, mappings = len(os.listdir("/proc/self/fd")), ring_mappings()
    # The ring of each is the same size: a smaller one means that memory ran short.
    alike = sum(one_life("auto") == life for _ in range(count))
    more_files = len(os.listdir("/proc/self/fd")) - files
    return [life[0], alike, more_files, ring_mappings() - mappings, os.getuid()]


@pytest.mark.slow
@pytest.mark.root
@as_root
@pytest.mark.parametrize("monitor", ["io_uring"], indirect=True)
def test_ten_thousand_loops_as_an_ordinary_user_all_get_io_uring(monitor: str) -> None:
    found = run_child(many_lives, 10_000, limit=240).value
    assert found == [monitor, 10_000, 0, 0, NOBODY]


def exit_with_open_loops(monitor: str, *, daemon: bool) -> None:
    loop = uringloop.new_event_loop(monitor=monitor)
    ours, peer = socket.socketpair()
    loop.add_reader(ours, unexpected)
    if daemon:
        loop.call_later(0.001, str)
        threading.Thread(target=loop.run_forever, daemon=True).start()
        time.sleep(0.05)
    else:
        settle(loop)
    sys.modules["kept for the end"] = (loop, peer)  # type: ignore[assignment]


def exit_beside_a_running_loop(monitor: str) -> None:
    exit_with_open_loops(monitor, daemon=True)


def exit_with_a_loop_not_closed(monitor: str) -> None:
    exit_with_open_loops(monitor, daemon=False)


@pytest.mark.parametrize("how", [exit_beside_a_running_loop, exit_with_a_loop_not_closed])
def test_the_interpreter_ends_well_with_an_open_loop(
    monitor: str, how: Callable[[str], None]
) -> None:
    for _ in range(3):
        child = run_child(how, monitor)
        assert child.code == 0
        assert child.err == ""


def lose_every_descriptor(monitor: str) -> list[Any]:
    loop = uringloop.new_event_loop(monitor=monitor)
    loop.set_exception_handler(lambda loop, context: None)
    warnings.simplefilter("ignore")

    async def main() -> list[Any]:
        echoes = Echoes(loop, 5)
        await echoes.drive("before")
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        await asyncio.sleep(0.01)
        os.closerange(3, 200)
        started_cpu, started = time.process_time(), time.monotonic()
        outcome = "went on"
        try:
            for _ in range(5):
                await asyncio.sleep(0.1)
        except OSError as exc:
            outcome = repr(exc)
        del server
        return [outcome, time.monotonic() - started, time.process_time() - started_cpu]

    try:
        result = loop.run_until_complete(main())
    except (OSError, RuntimeError) as exc:  # an error is an answer; a hang or a spin is none
        result = [repr(exc), 0.5, 0.0]
    print("\n" + repr(result).replace("'", '"'), flush=True)
    os._exit(0)


def test_losing_every_descriptor_is_an_error_or_a_downgrade_and_never_a_spin(monitor: str) -> None:
    outcome, seconds, cpu_s = run_child(lose_every_descriptor, monitor, quiet=False).value
    assert outcome
    assert 0.5 <= seconds < 3
    assert cpu_s < 0.2, f"{outcome}: the loop spins"


def close_a_watched_descriptor(monitor: str) -> list[float]:
    calls = 0
    ours, peer = socket.socketpair()
    kept = ours.dup()  # the file lives on under another number, ready for ever

    def close() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.close(ours.detach())

    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        number = ours.fileno()
        loop.add_reader(number, close)
        peer.send(b"!")
        cpu_s = time.process_time()
        loop.run_until_complete(asyncio.sleep(0.5))
        cpu_s = time.process_time() - cpu_s
        loop.remove_reader(number)
    kept.close()
    peer.close()
    return [calls, cpu_s]


@pytest.mark.parametrize("monitor", ["io_uring", "poll"], indirect=True)
def test_a_watched_descriptor_that_was_closed_is_reported_once_and_does_not_spin(
    monitor: str,
) -> None:
    # Stock asyncio on epoll does spin here: epoll goes on reporting the file under the old number.
    calls, cpu_s = run_child(close_a_watched_descriptor, monitor).value
    assert calls == 2
    assert cpu_s < 0.2


# ---------------------------------------------------------------------- idleness


def idle_second(monitor: str) -> list[float]:
    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop, pair() as (ours, _):
        loop.add_reader(ours, unexpected)
        settle(loop)
        cpu_s, before = time.process_time(), loop.statistics()
        loop.run_until_complete(asyncio.sleep(1))
        after = loop.statistics()
        cpu_s = time.process_time() - cpu_s
        loop.remove_reader(ours)
        return [cpu_s, after.turns - before.turns, after.enters - before.enters]


def test_an_idle_second_costs_no_processor_time(monitor: str) -> None:
    cpu_s, turns, enters = run_child(idle_second, monitor).value
    assert cpu_s < 0.05
    assert turns <= 5
    assert enters <= 5


def pressure_us() -> int | None:
    """The machine's time with a task that waits for I/O, in us; None where nobody counts it."""
    try:
        some = Path("/proc/pressure/io").read_text().splitlines()[0]
    except OSError:
        return None
    return int(some.rpartition("total=")[2])


def pressure_while(wait: Callable[[float], object], enough: float) -> float:
    """The share of a tenth of a second booked as waiting for I/O; the least of ten, or enough."""
    shares = []
    for _ in range(10):
        before, started = pressure_us(), time.monotonic()
        wait(0.1)
        took_us = (time.monotonic() - started) * 1e6
        shares.append(((pressure_us() or 0) - (before or 0)) / took_us)
        if shares[-1] < enough:
            break
    return min(shares)


def test_an_idle_loop_is_not_booked_as_waiting_for_io(loop: uringloop.EventLoop) -> None:
    if pressure_us() is None:
        pytest.skip("this kernel keeps no pressure figures")
    # The figure is weighted by processor: one that waits while all others work is 1/n of it.
    bound = 0.4 / (os.cpu_count() or 1)
    if pressure_while(time.sleep, bound) >= bound:
        pytest.skip("others on this machine wait for I/O all the time")
    with pair() as (ours, _):
        loop.add_reader(ours, unexpected)
        settle(loop)
        idle = pressure_while(lambda time_s: loop.run_until_complete(asyncio.sleep(time_s)), bound)
        loop.remove_reader(ours)
    assert idle < bound


# ---------------------------------------------------------------- numbers that are ours no more


def close_after_the_number_was_taken(monitor: str) -> bool:
    """Whether the application's file survives close(), after it got our descriptor's number."""
    selector = uringloop.Selector(monitor)
    left, right = socket.socketpair()
    with left, right:
        selector.register(left, selectors.EVENT_READ)
        selector.select(0)
        target = "anon_inode:[io_uring]" if monitor == "io_uring" else "anon_inode:[eventpoll]"
        [ours] = files_that_are(target)
        os.close(ours)
        theirs = os.open(os.devnull, os.O_RDONLY)
        assert theirs == ours
        selector.close()
        survives = os.path.samestat(os.fstat(theirs), os.stat(os.devnull))
        os.close(theirs)
    return survives


@pytest.mark.parametrize("monitor", ["io_uring", "epoll"])
def test_close_leaves_alone_a_number_that_is_the_applications_by_now(monitor: str) -> None:
    assert run_child(close_after_the_number_was_taken, monitor).value is True


def spare_after_the_number_was_taken() -> tuple[bool, str]:
    uringloop.Selector("io_uring").close()
    [spare] = files_that_are("anon_inode:[io_uring]")
    os.close(spare)
    theirs = os.open(os.devnull, os.O_RDONLY)
    assert theirs == spare
    with uringloop.Selector("auto") as selector:
        name = selector.monitor
    survives = os.path.samestat(os.fstat(theirs), os.stat(os.devnull))
    os.close(theirs)
    return survives, name


def test_a_spare_ring_whose_number_is_the_applications_by_now_is_forgotten() -> None:
    assert list(run_child(spare_after_the_number_was_taken).value) == [True, "io_uring"]


def spare_beside_other_monitors() -> int:
    uringloop.Selector("io_uring").close()
    for monitor in ("epoll", "poll"):
        uringloop.Selector(monitor).close()
    return len(files_that_are("anon_inode:[io_uring]"))


def test_loops_on_other_monitors_leave_the_spare_ring_alone() -> None:
    assert run_child(spare_beside_other_monitors).value == 1


EARLY_FORK_HANDLER = """
import os
held = []
os.register_at_fork(after_in_child=lambda: [one.close() for one in held])
import selectors, socket
import uringloop  # its own handler runs after that one
left, right = socket.socketpair()
one = uringloop.Selector({monitor!r})
one.register(left, selectors.EVENT_READ)
one.select(0)
held.append(one)
child = os.fork()
if child == 0:
    os._exit(0)
_, status = os.waitpid(child, 0)
right.send(b"x")
[(key, _)] = one.select(5)
print(status, key.fileobj is left)
one.close()
"""


def test_a_child_may_close_a_selector_before_our_own_fork_handler_has_run(monitor: str) -> None:
    code = EARLY_FORK_HANDLER.format(monitor=monitor)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert process.stdout.split() == ["0", "True"], process.stderr
