"""pytest-asyncio on our loop, by both of the ways it offers.

The promise: a project that puts uringloop under its tests by the README's lines gets it, on the
monitor it asks for.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uringloop
from tests import support

pytest.importorskip("pytest_asyncio")

BY_HOOK = """
import uringloop

def pytest_asyncio_loop_factories(config, item):
    return {"uringloop": uringloop.new_event_loop}
"""

BY_POLICY = """
import pytest
import uringloop

@pytest.fixture(scope="session")
def event_loop_policy():
    return uringloop.EventLoopPolicy()
"""

TESTS = """
import asyncio
import os
import pytest
import pytest_asyncio
import uringloop

pytestmark = pytest.mark.asyncio

@pytest_asyncio.fixture
async def server():
    async def serve(reader, writer):
        writer.write(await reader.readexactly(4))
        writer.close()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server

async def test_the_running_loop_is_ours():
    loop = asyncio.get_running_loop()
    assert type(loop) is uringloop.EventLoop
    assert loop.monitor == os.environ["URINGLOOP_MONITOR"]

async def test_a_fixture_and_its_test_share_the_loop(server):
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"ping")
    assert await reader.read() == b"ping"
    writer.close()
    await writer.wait_closed()

@pytest.mark.parametrize("number", range(5))
async def test_each_test_has_a_loop_of_its_own(number, seen=set()):
    loop = asyncio.get_running_loop()
    assert loop not in seen
    seen.add(loop)
    assert await asyncio.to_thread(int, "7") == 7

async def test_a_subprocess_runs():
    process = await asyncio.create_subprocess_exec("true")
    assert await process.wait() == 0

@pytest.mark.asyncio(loop_scope="module")
class TestOneLoopForAModule:
    loop = None

    async def test_first(self):
        type(self).loop = asyncio.get_running_loop()
        assert type(self.loop) is uringloop.EventLoop

    async def test_second(self):
        assert asyncio.get_running_loop() is self.loop
"""


SETTINGS = """
[pytest]
asyncio_mode = strict
asyncio_default_fixture_loop_scope = function
filterwarnings =
    error::ResourceWarning
    error::pytest.PytestUnraisableExceptionWarning
"""


def session(
    folder: Path, conftest: str, monitor: str, tests: str = TESTS
) -> subprocess.CompletedProcess[str]:
    """Run a project's tests in a pytest of its own."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_project.py").write_text(tests)
    (folder / "pytest.ini").write_text(SETTINGS)
    options = ["-p", "no:cacheprovider", "-p", "pytest_asyncio", "-rA", "-v"]
    return support.python("-m", "pytest", *options, cwd=folder, URINGLOOP_MONITOR=monitor)


def has_hook() -> bool:
    """Whether this pytest-asyncio offers the hook."""
    from pytest_asyncio import plugin

    return hasattr(getattr(plugin, "PytestAsyncioSpecs", None), "pytest_asyncio_loop_factories")


def test_the_hook_puts_it_under_a_project(monitor: str, tmp_path: Path) -> None:
    if not has_hook():
        pytest.skip("this pytest-asyncio has no pytest_asyncio_loop_factories")
    done = session(tmp_path, BY_HOOK, monitor)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b10 passed", done.stdout), done.stdout


@pytest.mark.skipif(sys.version_info >= (3, 16), reason="policies are gone since Python 3.16")
def test_the_policy_fixture_puts_it_under_a_project(monitor: str, tmp_path: Path) -> None:
    done = session(tmp_path, BY_POLICY, monitor)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b10 passed", done.stdout), done.stdout


def test_without_either_the_same_project_notices(tmp_path: Path) -> None:
    done = session(tmp_path, "", "epoll")
    assert done.returncode == 1
    assert "FAILED test_project.py::test_the_running_loop_is_ours" in done.stdout


def test_a_connection_left_open_by_a_test_is_reported(tmp_path: Path) -> None:
    leak = """
import asyncio, pytest, socket

@pytest.mark.asyncio
async def test_leaks():
    left, right = socket.socketpair()
    await asyncio.open_connection(sock=left)
    right.detach()

def test_that_collects_it():
    import gc
    gc.collect()
"""
    if not has_hook():
        pytest.skip("this pytest-asyncio has no pytest_asyncio_loop_factories")
    done = session(tmp_path, BY_HOOK, "auto", leak)
    assert "ResourceWarning: unclosed" in done.stdout, done.stdout


def test_one_hook_may_run_every_test_on_every_monitor(tmp_path: Path) -> None:
    if not has_hook():
        pytest.skip("this pytest-asyncio has no pytest_asyncio_loop_factories")
    usable = []
    for name in ("io_uring", "epoll", "poll"):
        with contextlib.suppress(uringloop.UringUnavailable), uringloop.Selector(name):
            usable.append(name)
    conftest = f"""
import functools, uringloop

def pytest_asyncio_loop_factories(config, item):
    return {{
        name: functools.partial(uringloop.new_event_loop, monitor=name) for name in {usable!r}
    }}
"""
    tests = """
import asyncio, pytest, uringloop

@pytest.mark.asyncio
async def test_monitor(request):
    assert asyncio.get_running_loop().monitor in request.node.name
"""
    done = session(tmp_path, conftest, "auto", tests)
    assert done.returncode == 0, done.stdout
    for name in usable:
        assert f"test_monitor[{name}] PASSED" in done.stdout
