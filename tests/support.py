"""What several test files share: bounded runs, children, denied system calls, byte-exact traffic.

The promise: nothing hangs, and what a loop reported to its exception handler does not go unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

import uringloop

T = TypeVar("T")

#: The folder that holds the package under test: what a child needs on its path.
ROOT = Path(uringloop.__file__).resolve().parents[1]


def run(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, T], limit: float = 10) -> T:
    """Run a coroutine to its end; fail when the loop's default exception handler was called."""
    problems: list[dict[str, Any]] = []

    async def bounded() -> T:
        async with asyncio.timeout(limit):
            result = await main
        for _ in range(10):  # a closed transport closes its file some turns later
            await asyncio.sleep(0)
        return result

    if loop.get_exception_handler() is None:
        loop.set_exception_handler(lambda loop, context: problems.append(context))
    result = loop.run_until_complete(bounded())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    assert not problems
    return result


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child that imports the package under test and picks its own monitor."""
    environment = {key: value for key, value in os.environ.items() if key != "URINGLOOP_MONITOR"}
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path), **changes}


def python(
    *arguments: str, limit: float = 60, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python of its own to its end; environment variables are keywords."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=child_environment(**environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=limit,
    )


@functools.cache
def _failure_of(statement: str) -> str | None:
    done = python("-c", statement)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else None


def require(what: str, statement: str) -> None:
    """Skip the test, or the module, where Python cannot run the statement; fail it in our CI."""
    if (failure := _failure_of(statement)) is None:
        return
    reason = f"{what} cannot be used here ({failure}); EXTRAS in the Makefile says what to do"
    if os.environ.get("CI"):
        pytest.fail(f"CI must have it: {reason}")
    pytest.skip(reason, allow_module_level=True)


# ---------------------------------------------------------------------- a function in a child

_CHILD = """
import faulthandler, importlib, json, sys
module, name, arguments, limit = sys.argv[1:]
faulthandler.dump_traceback_later(float(limit), exit=True)
value = getattr(importlib.import_module(module), name)(*json.loads(arguments))
print(json.dumps(value), flush=True)
"""


@dataclasses.dataclass
class Child:
    """How a child ended: its exit code, what it wrote, and the value of the function it ran."""

    code: int
    err: str
    value: Any


def run_child(
    function: Callable[..., Any], *arguments: Any, limit: float = 30, quiet: bool = True
) -> Child:
    """Run a module's function in a fresh Python, for what would harm this process.

    Arguments and the value travel as JSON. A child that hangs is ended, with everything it forked.
    """
    command = [sys.executable, "-c", _CHILD, function.__module__, function.__name__]
    with subprocess.Popen(
        [*command, json.dumps(arguments), str(limit)],
        env=child_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            process.wait(limit + 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    assert not quiet or (process.returncode, err) == (0, ""), f"{process.returncode}: {out}{err}"
    return Child(process.returncode, err, json.loads(out.splitlines()[-1]) if out else None)


def unexpected(*_: object) -> None:
    """A callback that must not run. SystemExit leaves a loop; another exception would be logged."""
    raise SystemExit("a callback ran that nobody expected")


def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread that ends with it; return or raise what it does."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function).result(30)


class Stepwise(uringloop.EventLoop):
    """Replaces a building block of the turn, as looptime does: it gets asyncio's own turn."""

    def time(self) -> float:
        return super().time()


def make_loop_named(name: str) -> asyncio.AbstractEventLoop:
    """asyncio's own loop, or ours on a monitor; "stepwise" is ours under asyncio's own turn."""
    if name == "stock":
        return asyncio.SelectorEventLoop()
    if name == "stepwise":
        return Stepwise(monitor="io_uring")
    return uringloop.new_event_loop(monitor=name)


# ---------------------------------------------------------------------- what a process has

#: The mappings and descriptors of rings, of which a thread may keep one spare.
RING = "anon_inode:[io_uring]"


def ring_mappings() -> int:
    """How many mappings of ring memory this process has; a ring has two."""
    return Path("/proc/self/maps").read_text().count(RING)


def ring_files() -> list[int]:
    """The descriptors of this process that are rings."""
    return files_that_are(RING)


def polls_in_kernel() -> int:
    """How many polls the rings of this process hold, according to the kernel."""
    polls = 0
    for fd in ring_files():
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        polls += sum(line.strip().startswith("op=") for line in lines)
    return polls


def files_that_are(target: str) -> list[int]:
    """The descriptors of this process with this target in /proc."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            if os.readlink(f"/proc/self/fd/{fd}") == target:
                found.append(int(fd))
    return found


# ---------------------------------------------------------------------- denial

IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_ARCHITECTURE, _EPOLL_CREATE1 = {
    "x86_64": (0xC000003E, 291),
    "aarch64": (0xC00000B7, 20),
}.get(os.uname().machine, (0, 0))
_NUMBERS = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "epoll_create1": _EPOLL_CREATE1,
    "epoll_pwait2": 441,
}


def deny(number: int, *calls: str) -> None:
    """Make the kernel answer these calls of this thread, and of its future ones, with an errno.

    There is no way back: only in a child.
    """
    assert _ARCHITECTURE, "the numbers of this architecture's system calls are not known here"
    load, equal, answer = 0x20, 0x15, 0x06
    lines = [
        (load, 0, 0, 4),  # the architecture: another one's calls have other numbers
        (equal, 0, len(calls) + 1, _ARCHITECTURE),
        (load, 0, 0, 0),
        *((equal, len(calls) - i, 0, _NUMBERS[call]) for i, call in enumerate(calls)),
        (answer, 0, 0, 0x7FFF0000),  # allow
        (answer, 0, 0, 0x00050000 | number),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    program = ctypes.create_string_buffer(code)
    seccomp_filter = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, seccomp_filter, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP


NOBODY = 65534


def become_nobody(memlock_bytes: int, hard_bytes: int | None = None, user: int = NOBODY) -> None:
    """Go on as an ordinary user with this RLIMIT_MEMLOCK. There is no way back: only in a child."""
    hard = memlock_bytes if hard_bytes is None else hard_bytes
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_bytes, hard))
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    # Without PR_SET_DUMPABLE a process that has changed its user may not read its own /proc.
    assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0


# ---------------------------------------------------------------------- traffic


class EchoServer:
    """Echoes streams; when it is closed, so are its ends of the connections."""

    def __init__(self) -> None:
        self.connections: list[asyncio.Task[None] | None] = []

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(asyncio.current_task())
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def open(self, backlog: int = 100) -> int:
        """Listen; return the port."""
        self.server = await asyncio.start_server(self.echo, "127.0.0.1", 0, backlog=backlog)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        self.server.close()
        await asyncio.gather(*filter(None, self.connections))
        await self.server.wait_closed()


async def _exchange(
    port: int, seed: int, size_bytes: int, progress: Callable[[int], object]
) -> bool:
    source = random.Random(seed)
    data = source.randbytes(size_bytes)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        start = 0
        while start < size_bytes:
            end = start + source.randint(1, 4096)
            writer.write(data[start:end])
            await writer.drain()
            await asyncio.sleep(0)
            start = end
        writer.write_eof()

    sending = asyncio.create_task(send())
    received = bytearray()
    while piece := await reader.read(1 << 16):
        received += piece
        progress(len(piece))
    await sending
    writer.close()
    await writer.wait_closed()
    return received == data


async def echo_traffic(
    connections: int, size_bytes: int, progress: Callable[[int], object] = lambda _: None
) -> bool:
    """Send each connection's own random bytes through an echo server; whether all came back, once.

    Both ends belong to the running loop. `progress` is called with the size of every piece.
    """
    server = EchoServer()
    port = await server.open(backlog=connections)
    exact = await asyncio.gather(
        *(_exchange(port, seed, size_bytes, progress) for seed in range(connections))
    )
    await server.close()
    return all(exact)
