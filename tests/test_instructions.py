"""Instructions that a callback costs in user space, counted by callgrind: ours below uvloop's.

The promise: a count does not depend on how busy the machine is, and start-up is taken out of it by
a child that does everything but the callbacks that are counted.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from tests import support

COUNT = 10_000

# A string, because a module would import pytest: seconds under callgrind.
CHILD = """
import contextvars, gc, os, sys

name, counted, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
if name == "uvloop":
    import uvloop
    loop = uvloop.new_event_loop()
else:
    import uringloop
    loop = uringloop.new_event_loop(monitor=name)

def nothing():
    pass

def call_soon(schedule=loop.call_soon):
    for _ in range(100):
        schedule(nothing)

def call_soon_threadsafe(schedule=loop.call_soon_threadsafe):
    for _ in range(100):
        schedule(nothing)

def call_later_and_cancel(schedule=loop.call_later):
    for _ in range(100):
        schedule(10, nothing).cancel()

def passes(batch, left):
    if left:
        batch()
        loop.call_soon(passes, batch, left - 1)
    else:
        loop.stop()

gc.disable()
for batch in (call_soon, call_soon_threadsafe, call_later_and_cancel):
    loop.call_soon(passes, batch, 20)
    loop.run_forever()
if counted != "nothing":
    loop.call_soon(passes, globals()[counted], count // 100)
    loop.run_forever()
os._exit(0)
"""


def counted(name: str, case: str) -> int:
    """Instructions of a child that runs COUNT callbacks of this case on this loop."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, sys.executable, "-c", CHILD, name, case, str(COUNT)],
        env=support.child_environment(PYTHONHASHSEED="0"),
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"Collected *: *(\d+)", done.stderr)
    assert done.returncode == 0, done.stderr
    assert found, done.stderr
    return int(found[1])


@functools.cache
def without_callbacks(name: str) -> int:
    return counted(name, "nothing")


@functools.cache
def per_callback(name: str, case: str) -> float:
    return (counted(name, case) - without_callbacks(name)) / COUNT


def hindrance() -> str | None:
    """Why nothing can be counted here, or None."""
    if not shutil.which("valgrind"):
        return "valgrind is not installed; on Debian: apt-get install valgrind"
    if importlib.util.find_spec("uvloop") is None:
        return "uvloop, the measure, is not installed"
    tried = subprocess.run(
        ["valgrind", "--tool=none", sys.executable, "-c", ""], capture_output=True, text=True
    )
    if tried.returncode:
        return f"valgrind cannot run this Python: {tried.stderr.strip().splitlines()[-1]}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("case", ["call_soon", "call_soon_threadsafe", "call_later_and_cancel"])
def test_a_callback_costs_fewer_instructions_than_on_uvloop(monitor: str, case: str) -> None:
    if reason := hindrance():
        pytest.skip(reason)
    ours, uvloops = per_callback(monitor, case), per_callback("uvloop", case)
    assert 0 < ours < uvloops, f"{ours:.0f} instructions, uvloop {uvloops:.0f}"
