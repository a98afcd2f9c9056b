"""uringloop: an asyncio event loop for Linux that waits through io_uring, and through epoll or poll
where that is denied.

import uringloop

uringloop.run(main())                                           # instead of asyncio.run
asyncio.Runner(loop_factory=uringloop.new_event_loop)           # or this
uvicorn app:app --loop uringloop:new_event_loop                 # or that

This file holds the public names and nothing else.
"""

from typing import TYPE_CHECKING, Any

from uringloop.fdmon import Statistics, UringUnavailable
from uringloop.loop import EventLoop
from uringloop.policy import install, new_event_loop, run
from uringloop.selector import Selector

if TYPE_CHECKING:
    from asyncio import DefaultEventLoopPolicy as EventLoopPolicy

__version__ = "0.1.0"

__all__ = [
    "EventLoop",
    "EventLoopPolicy",
    "Selector",
    "Statistics",
    "UringUnavailable",
    "install",
    "new_event_loop",
    "run",
]


def __getattr__(name: str) -> Any:
    # Made when asked for: asyncio's policies are deprecated, and asking for them warns.
    if name == "EventLoopPolicy":
        from uringloop import policy

        return policy.EventLoopPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
