"""The loops under test, in one table: a loop is added by one line and nothing else.

A name is all that crosses a process border: every measured process builds its loop with make().
"""

import asyncio
import importlib
import importlib.metadata
import json
import platform
import sys
from dataclasses import dataclass, field
from typing import Any

OURS = "uringloop"
BASE = "asyncio"
RIVAL = "uvloop"
RIVAL_AGAIN = "uvloop-again"


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
    "uringloop-io_uring": Loop("uringloop:new_event_loop", "uringloop", {"monitor": "io_uring"}),
    "uringloop-epoll": Loop("uringloop:new_event_loop", "uringloop", {"monitor": "epoll"}),
    "uringloop-poll": Loop("uringloop:new_event_loop", "uringloop", {"monitor": "poll"}),
}


def make(name: str) -> asyncio.AbstractEventLoop:
    """A new event loop of that name; what goes wrong is raised as it is."""
    loop = LOOPS[name]
    module, _, attribute = loop.factory.partition(":")
    made = getattr(importlib.import_module(module), attribute)(**loop.arguments)
    assert isinstance(made, asyncio.AbstractEventLoop), made
    return made


def version(name: str) -> str:
    """The version of the distribution, else of the module; stock asyncio has Python's."""
    loop = LOOPS[name]
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
