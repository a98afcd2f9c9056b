"""What every test shares: the three monitors, and the check that nothing is left behind.

The promise: after each test no descriptor is leaked, no monitor is open and no request is in
flight, whatever the test was about.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import uringloop
from tests.support import make_loop_named, polls_in_kernel, ring_files
from uringloop import fdmon

MONITORS = ("io_uring", "epoll", "poll")


def refusal(monitor: str) -> str | None:
    """Why this machine cannot run a monitor, or None."""
    try:
        fdmon.FDMon.create(monitor).close()
    except uringloop.UringUnavailable as exc:
        return str(exc)
    return None


def pytest_collection_finish(session: pytest.Session) -> None:
    """What collecting the tests made stays; the collections of the leak check need not walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=MONITORS)
def monitor(request: pytest.FixtureRequest) -> str:
    """Each monitor in turn; one that this machine refuses is skipped with the reason, and is a
    failure in our CI. A test may ask for "io_uring ring" or "io_uring sends".
    """
    monitor, _, mode = request.param.partition(" ")
    choose_mode(request.getfixturevalue("monkeypatch"), mode)
    reason = refusal(monitor)
    if reason and os.environ.get("CI") and not os.environ.get("URINGLOOP_TEST_DENIED"):
        pytest.fail(f"CI must offer every monitor: {reason}")
    if reason:
        pytest.skip(reason)
    return str(monitor)


def choose_mode(patch: pytest.MonkeyPatch, mode: str) -> None:
    """A way to send or to receive, for the loops that are made from now on; "" is the default."""
    if mode == "sends":  # by the ring
        patch.setenv("URINGLOOP_SEND", "ring")
    elif mode in ("readiness", "auto", "ring"):
        patch.setenv("URINGLOOP_RECEIVE", mode)
    elif mode:
        patch.setenv("URINGLOOP_SEND", mode)


def loop_named(name: str, patch: pytest.MonkeyPatch) -> Iterator[asyncio.AbstractEventLoop]:
    """asyncio's own loop, or ours on a monitor, perhaps with a way to send or to receive."""
    monitor, _, mode = name.partition(" ")
    uses = {"stock": "poll", "stepwise": "io_uring"}.get(monitor, monitor)
    if reason := refusal(uses):
        pytest.skip(reason)
    choose_mode(patch, mode)
    loop = make_loop_named(monitor)
    yield loop
    loop.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for a thousand connections, both ends of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2500:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def make_loop(monitor: str) -> Iterator[Callable[[], uringloop.EventLoop]]:
    """Makes loops on the monitor under test and closes them afterwards."""
    loops: list[uringloop.EventLoop] = []

    def make() -> uringloop.EventLoop:
        loops.append(uringloop.new_event_loop(monitor=monitor))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


@pytest.fixture
def loop(make_loop: Callable[[], uringloop.EventLoop]) -> uringloop.EventLoop:
    """One loop on the monitor under test, not running."""
    return make_loop()


@pytest.fixture
def selector(monitor: str) -> Iterator[uringloop.Selector]:
    """One selector on the monitor under test."""
    with uringloop.Selector(monitor) as selector:
        yield selector


def open_files() -> dict[int, str]:
    """What is open here: descriptor to target. Rings apart: a thread may keep one spare."""
    files = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = Path(f"/proc/self/fd/{fd}").readlink()
        except FileNotFoundError:
            continue  # the directory listing itself
        if str(target) != "anon_inode:[io_uring]":
            files[int(fd)] = str(target)
    return files


def open_monitors() -> int:
    return sum(isinstance(held, fdmon.FDMon) and not held.closed for held in list(fdmon._held))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test that leaks a descriptor, a ring, a monitor or a request."""
    gc.collect()
    files, monitors = open_files(), open_monitors()
    yield
    gc.collect()
    leaked = {fd: target for fd, target in open_files().items() if files.get(fd) != target}
    assert not leaked, f"descriptors leaked: {leaked}"
    assert open_monitors() <= monitors, "a monitor was left open"
    if monitors == 0:
        assert len(ring_files()) <= len(fdmon._held), (
            "a ring was leaked: more than one spare a thread"
        )
        assert polls_in_kernel() == 0, "a request is still in flight"
