"""The ways in: `run`, `new_event_loop`, `install`, `EventLoopPolicy`.

Why it exists: a loop is picked in four ways, by asyncio.Runner, by a server's `--loop`, by
pytest-asyncio and by the old policy. Promise: importing this module touches no deprecated name of
asyncio; the policy class is made when somebody asks for it.
"""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Coroutine
from typing import Any, TypeVar

from uringloop.loop import EventLoop

_T = TypeVar("_T")


def new_event_loop(*, monitor: str | None = None, **loop_kwargs: Any) -> EventLoop:
    """Makes an event loop; also a `loop_factory`, and what `uvicorn --loop
    uringloop:new_event_loop` wants.

    `monitor`: None (URINGLOOP_MONITOR, else "auto"), "auto" (the first that works), "io_uring",
    "epoll" or "poll". A forced one that is refused raises UringUnavailable, an unknown name
    ValueError.
    """
    return EventLoop(monitor=monitor, **loop_kwargs)


def run(
    main: Coroutine[Any, Any, _T],
    *,
    debug: bool | None = None,
    monitor: str | None = None,
    **loop_kwargs: Any,
) -> _T:
    """`asyncio.run(main)` on an uringloop: the same rules, signals and clean-up. Other keywords go
    to `EventLoop`.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("uringloop.run() cannot be called from a running event loop")
    factory = functools.partial(new_event_loop, monitor=monitor, **loop_kwargs)
    with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
        return runner.run(main)


def install() -> None:
    """Makes uringloop the loop of everything in this process that asks asyncio's policy for one.

    Policies are deprecated since Python 3.14 (asyncio says so with a DeprecationWarning) and gone
    in 3.16; prefer `run()` or `asyncio.Runner(loop_factory=uringloop.new_event_loop)`.
    """
    asyncio.set_event_loop_policy(_policy_class()())


@functools.cache
def _policy_class() -> Any:
    """The policy, derived from asyncio's default one: 3.11 and 3.12 need its child watchers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        base: Any = getattr(asyncio, "DefaultEventLoopPolicy", None)
    if base is None:
        raise AttributeError(
            "this Python has no event loop policies any more;"
            " use asyncio.Runner(loop_factory=uringloop.new_event_loop) or uringloop.run()"
        )

    class EventLoopPolicy(base):  # type: ignore[misc]
        """An event loop policy whose loops are uringloops."""

        def _loop_factory(self) -> EventLoop:
            return new_event_loop()

    EventLoopPolicy.__module__ = "uringloop"
    EventLoopPolicy.__qualname__ = "EventLoopPolicy"
    return EventLoopPolicy


def __getattr__(name: str) -> Any:
    if name == "EventLoopPolicy":
        return _policy_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
