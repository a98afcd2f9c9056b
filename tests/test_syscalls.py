"""System calls, counted by strace: what the selector and the loop really ask of the kernel.

The promise: the figures come from outside the process; statistics() must agree with them.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

import uringloop
from tests.conftest import refusal
from tests.support import ROOT, child_environment
from uringloop import Selector

CALLS = (
    "io_uring_setup io_uring_enter io_uring_register epoll_create1 epoll_ctl ?epoll_wait"
    " epoll_pwait epoll_pwait2 ?poll ppoll ?select pselect6"
).split()
STREAM_CALLS = "recvfrom recvmsg sendto sendmsg sendmmsg".split()
MARK = "/uringloop/mark/"
CHILD = "import sys; from tests import test_syscalls; test_syscalls.child(*sys.argv[1:])"


def child(scenario: str, monitor: str) -> None:
    """In the traced process: run a scenario, print its marks' statistics as JSON."""
    enters: dict[str, int] = {}
    globals()[scenario](monitor, enters)
    print(json.dumps(enters))


def mark(name: str) -> None:
    """Leave a trace: strace sees a readlink of a path that does not exist."""
    try:
        os.readlink(MARK + name)
    except FileNotFoundError:
        return


@contextmanager
def marked(
    name: str, enters: dict[str, int], counted: Selector | uringloop.EventLoop
) -> Iterator[None]:
    """Count what the body does, from outside by two marks and from inside by statistics()."""
    before = counted.statistics().enters
    mark(name)
    yield
    mark("rest")
    enters[name] = counted.statistics().enters - before


def tracing_refused(log: Path) -> str | None:
    """Why no process can be traced here, or None."""
    if not shutil.which("strace"):
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", log, "true"], capture_output=True, text=True)
    return tried.stderr if tried.returncode else None


def traced(
    scenario: Callable[[str, dict[str, int]], None],
    monitor: str,
    tmp_path: Path,
    *more_calls: str,
    **environment: str,
) -> tuple[dict[str, collections.Counter[str]], dict[str, int]]:
    """Run a scenario under strace: the calls between its marks, and what statistics() said."""
    log = tmp_path / "strace"
    if problem := tracing_refused(log):
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to trace: {problem}")
        pytest.skip(f"no system calls can be counted: {problem}")
    if problem := refusal(monitor):
        pytest.skip(problem)
    trace = "trace=" + ",".join([*CALLS, *more_calls, "?readlink", "readlinkat"])
    command = [sys.executable, "-c", CHILD, scenario.__name__, monitor]
    run = subprocess.run(
        ["strace", "-f", "-qq", "-e", trace, "-e", "signal=none", "-o", log, *command],
        env=child_environment(PYTHONWARNINGS="ignore", **environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return parse(log.read_text()), json.loads(run.stdout)


def parse(log: str) -> dict[str, collections.Counter[str]]:
    """The calls by the mark they follow; one that was cut in two counts where it began."""
    sections: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    section = "start"
    for line in log.splitlines():
        call = re.match(r"(?:\d+ +)?(\w+)\(", line)
        if call and (name := re.search(re.escape(MARK) + r"(\w+)", line)):
            section = name.group(1)
        elif call and not call.group(1).startswith("readlink"):
            sections[section][call.group(1)] += 1
    return sections


def pairs(count: int) -> list[tuple[socket.socket, socket.socket]]:
    return [socket.socketpair() for _ in range(count)]


# ---------------------------------------------------------------------- scenarios, in the child


def selector_scenario(monitor: str, enters: dict[str, int]) -> None:
    """Every promise that the selector makes about its calls, one mark each."""
    selector = Selector(monitor)
    watched = pairs(50)
    with marked("registrations", enters, selector):
        for ours, _ in watched:
            selector.register(ours, 1)
    with marked("first_wait", enters, selector):
        selector.select(0.01)
    with marked("idle_select_zero", enters, selector):
        for _ in range(1000):
            assert not selector.select(0)
    with marked("idle_waits", enters, selector):
        for _ in range(20):
            assert not selector.select(0.001)
    with marked("turns_with_events", enters, selector):
        for _ in range(50):
            for _, peer in watched[:15]:
                peer.send(b"x")
            assert len(selector.select(1)) == 15
            for ours, _ in watched[:15]:
                ours.recv(1)
    with marked("unread_turns", enters, selector):
        watched[0][1].send(b"x")
        for _ in range(20):
            assert len(selector.select(1)) == 1
    with marked("data_changes", enters, selector):
        for i in range(50):
            selector.modify(watched[1][0], 1, i)
    with marked("event_changes", enters, selector):
        for ours, _ in watched[:30]:
            selector.modify(ours, 3)
    with marked("unarmed_removals", enters, selector):
        watched[0][0].recv(1)
        late = pairs(20)
        for ours, _ in late:
            selector.register(ours, 1)
            selector.unregister(ours)
    with marked("armed_removals", enters, selector):
        for ours, _ in watched[30:40]:
            selector.unregister(ours)
    with marked("close", enters, selector):
        selector.close()


def everything_scenario(monitor: str, enters: dict[str, int]) -> None:
    """Nothing but a total: an echo over the loop, from the loop's making to its last turn."""

    async def main() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100):
                writer.write(data)
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(200):
            writer.write(b"x")
            await reader.readexactly(1)
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0.001)
        writer.close()
        server.close()

    mark("loop")
    loop = uringloop.new_event_loop(monitor=monitor)
    loop.run_until_complete(main())
    mark("rest")
    enters["loop"] = loop.statistics().enters
    loop.close()


def idle_scenario(monitor: str, enters: dict[str, int]) -> None:
    """A loop with many watches and nothing to do, for a second."""
    loop = uringloop.new_event_loop(monitor=monitor)
    watched = pairs(100)
    for ours, _ in watched:
        loop.add_reader(ours, print)
    loop.run_until_complete(asyncio.sleep(0.01))
    cpu_s = time.process_time()
    with marked("idle", enters, loop):
        loop.run_until_complete(asyncio.sleep(1))
    enters["cpu_ms"] = int(1000 * (time.process_time() - cpu_s))
    loop.close()


class Echo(asyncio.Protocol):
    """Sends back what it gets."""

    def __init__(self) -> None:
        self.received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.transport.write(data)


def echo_scenario(monitor: str, enters: dict[str, int]) -> None:
    """100 connections, each with one request a round; what the clients do is not traced."""
    loop = uringloop.new_event_loop(monitor=monitor)
    watched = pairs(100)
    echoes: list[Echo] = []

    async def rounds(count: int, size_bytes: int) -> None:
        expected = [echo.received + count * size_bytes for echo in echoes]
        for _ in range(count):
            for _, peer in watched:
                os.write(peer.fileno(), bytes(size_bytes))
            for _, peer in watched:
                answered = 0
                while answered < size_bytes:
                    try:
                        answered += len(os.read(peer.fileno(), size_bytes))
                    except BlockingIOError:
                        await asyncio.sleep(0)
        assert [echo.received for echo in echoes] == expected

    async def main() -> None:
        for ours, peer in watched:
            peer.setblocking(False)
            echoes.append((await loop.create_connection(Echo, sock=ours))[1])
        await rounds(5, 1024)
        with marked("small", enters, loop):
            await rounds(10, 1024)
        await rounds(5, 10240)
        with marked("large", enters, loop):
            await rounds(10, 10240)

    loop.run_until_complete(main())
    loop.close()


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def selector_calls(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, collections.Counter[str]], dict[str, int]]:
    """The selector's scenario on io_uring, traced once for all tests."""
    return traced(selector_scenario, "io_uring", tmp_path_factory.mktemp("strace"))


# What each section may cost in all; entered by no other call than io_uring_enter.
ENTERS = {
    "registrations": 0,
    "first_wait": 1,
    "idle_select_zero": 0,
    "idle_waits": 20,
    "turns_with_events": 50,
    "unread_turns": 20,
    "data_changes": 0,
    "event_changes": 0,
    "unarmed_removals": 0,
    "armed_removals": 10,
}


@pytest.mark.parametrize("section", ENTERS)
def test_the_selector_enters_the_kernel_exactly_as_often_as_promised(
    selector_calls: tuple[dict[str, collections.Counter[str]], dict[str, int]], section: str
) -> None:
    calls, enters = selector_calls
    expected = {"io_uring_enter": ENTERS[section]} if ENTERS[section] else {}
    assert calls.get(section, {}) == expected  # no other call either
    assert enters[section] == ENTERS[section]


def test_strace_and_statistics_agree_on_a_loops_life(tmp_path: Path) -> None:
    calls, enters = traced(everything_scenario, "io_uring", tmp_path)
    assert enters["loop"] >= 400
    assert calls["loop"]["io_uring_enter"] == pytest.approx(enters["loop"], rel=0.02)
    assert calls["loop"]["epoll_wait"] == 0


def test_an_idle_second_of_a_loop_is_at_most_five_enters(tmp_path: Path) -> None:
    calls, enters = traced(idle_scenario, "io_uring", tmp_path)
    assert 1 <= calls["idle"]["io_uring_enter"] <= 5
    assert calls["idle"]["io_uring_enter"] == enters["idle"]
    assert sum(calls["idle"].values()) == calls["idle"]["io_uring_enter"]
    assert enters["cpu_ms"] < 50


@pytest.mark.parametrize(
    ("monitor", "waits"), [("epoll", {"epoll_pwait2", "epoll_wait"}), ("poll", {"ppoll", "poll"})]
)
def test_a_forced_monitor_waits_with_its_own_call_and_never_touches_io_uring(
    tmp_path: Path, monitor: str, waits: set[str]
) -> None:
    calls, enters = traced(everything_scenario, monitor, tmp_path)
    assert enters["loop"] == 0
    everywhere: collections.Counter[str] = sum(calls.values(), collections.Counter())
    assert not [name for name in everywhere if name.startswith("io_uring")]
    waited = {name for name in calls["loop"] if re.search("wait|poll$|select", name)}
    assert waited
    assert waited <= waits


@pytest.mark.parametrize("receive", ["readiness", "auto"])
@pytest.mark.parametrize("send", ["turn", "ring"])
def test_1000_small_requests_cost_a_hundred_calls_when_the_ring_carries_them(
    tmp_path: Path, receive: str, send: str
) -> None:
    calls, _ = traced(
        echo_scenario,
        "io_uring",
        tmp_path,
        *STREAM_CALLS,
        URINGLOOP_RECEIVE=receive,
        URINGLOOP_SEND=send,
    )
    small, large = calls["small"], calls["large"]
    assert (small["recvfrom"] == 0) if receive == "auto" else (small["recvfrom"] >= 1000)
    assert large["recvfrom"] >= 1000
    sent = small["sendto"] + small["sendmsg"]
    assert (sent == 0) if send == "ring" else (sent >= 1000)
    if (receive, send) == ("auto", "ring"):
        assert sum(small.values()) <= 100


def test_the_parser_counts_calls_where_they_began() -> None:
    log = f"""\
7     io_uring_enter(4, 0, 1, IORING_ENTER_GETEVENTS, NULL, 8) = 0
7     readlink("{MARK}a", 0x7ffe, 4095) = -1 ENOENT (No such file or directory)
7     io_uring_enter(4, 0, 1, IORING_ENTER_GETEVENTS, NULL, 8 <unfinished ...>
8     readlink("{MARK}rest", 0x7ffe, 4095) = -1 ENOENT (No such file or directory)
7     <... io_uring_enter resumed>) = 1
readlink("/proc/self/exe", "python", 4096) = 6
epoll_wait(3, [], 1, 0) = 0
"""
    assert parse(log) == {
        "start": {"io_uring_enter": 1},
        "a": {"io_uring_enter": 1},
        "rest": {"epoll_wait": 1},
    }
