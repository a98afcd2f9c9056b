"""The loops under test, in one table: a loop is added by one line and nothing else.

A name is all that crosses a process border: every measured process builds its loop with make().
A name may carry settings, "uringloop-epoll send=now recv_bytes=65536": the environment variables
URINGLOOP_SEND, URINGLOOP_RECEIVE, URINGLOOP_RECV_BYTES and URINGLOOP_POLL_MAX_NS of the processes
that measure this entry.
"""

import asyncio
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from typing import Any

OURS = "uringloop"
BASE = "asyncio"
RIVAL = "uvloop"
RIVAL_AGAIN = "uvloop-again"
SETTINGS = ("send", "receive", "recv_bytes", "poll_max_ns")


@dataclass(frozen=True)
class Loop:
    """The factory ("module:callable"), its arguments, and the distribution with its version."""

    factory: str
    distribution: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


LOOPS = {
    BASE: Loop("asyncio:SelectorEventLoop"),
    RIVAL: Loop("uvloop:new_event_loop", "uvloop"),
    RIVAL_AGAIN: Loop("uvloop:new_event_loop", "uvloop"),
    "rloop": Loop("rloop:new_event_loop", "rloop"),
    # zuvloop needs Python 3.14, rsloop's wheels glibc 2.39.
    "zuvloop": Loop("zuvloop:new_event_loop", "zuvloop"),
    "rsloop": Loop("rsloop:new_event_loop", "rsloop"),
    "uringloop-io_uring": Loop("uringloop:new_event_loop", "uringloop", {"monitor": "io_uring"}),
    "uringloop-epoll": Loop("uringloop:new_event_loop", "uringloop", {"monitor": "epoll"}),
    "uringloop-poll": Loop("uringloop:new_event_loop", "uringloop", {"monitor": "poll"}),
}

# poll is epoll's code path with another system call: to be asked for by name.
DEFAULT = [name for name in LOOPS if name != "uringloop-poll"]


def find(name: str) -> Loop:
    """The entry of that name, whatever its settings; ValueError tells a user what is wrong."""
    base, *settings = name.split(" ")
    if base not in LOOPS:
        raise ValueError(f"no such loop: {base}; known: {', '.join(LOOPS)}")
    if wrong := [setting for setting in settings if setting.partition("=")[0] not in SETTINGS]:
        raise ValueError(f"{name}: no such setting: {wrong[0]}; known: {', '.join(SETTINGS)}")
    return LOOPS[base]


def make(name: str) -> Any:
    """A new event loop of that name, not always an AbstractEventLoop; what goes wrong is raised."""
    loop = find(name)
    for setting in name.split(" ")[1:]:
        key, _, value = setting.partition("=")
        os.environ[f"{OURS.upper()}_{key.upper()}"] = value
    module, _, attribute = loop.factory.partition(":")
    return getattr(importlib.import_module(module), attribute)(**loop.arguments)


def version(name: str) -> str:
    """The version of the distribution, else of the module; stock asyncio has Python's."""
    loop = find(name)
    if not loop.distribution:
        return platform.python_version()
    try:
        return importlib.metadata.version(loop.distribution)
    except importlib.metadata.PackageNotFoundError:
        module = importlib.import_module(loop.factory.partition(":")[0])
        return str(getattr(module, "__version__", "unknown"))


def probe(name: str) -> dict[str, str]:
    """Version and monitor of a loop that really ran something, or why it cannot run here."""
    try:
        loop = make(name)
        try:
            loop.run_until_complete(asyncio.sleep(0))
            found = {"version": version(name), "class": type(loop).__qualname__}
            monitor = getattr(loop, "monitor", None)
            return found | ({"monitor": str(monitor)} if monitor else {})
        finally:
            loop.close()
    except Exception as error:  # noqa: BLE001 (whatever it is goes into the table)
        return {"missing": f"{type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
