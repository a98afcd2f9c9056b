# What Python code of this package uses of the native half; the rest of it overrides asyncio's
# methods, whose types are asyncio's.

from asyncio import AbstractEventLoop, BaseProtocol
from typing import Any

from uringloop.selector import Selector

class LoopCore:
    _closed: bool
    _transports: Any  # loop._transports[fd]
    def _open(self, selector: Selector, send_policy: str, read_size: int) -> None: ...
    def _before_select(self) -> None: ...
    def _send_unsent(self) -> None: ...
    def _deliver_to_transport(self, fd: int, events: int) -> None: ...
    def _transport_at(self, fd: int) -> StreamTransport | None: ...
    def _transport_fds(self) -> list[int]: ...
    def _hide_transport(self, transport: StreamTransport, hidden: bool) -> None: ...

class StreamTransport:
    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: Any,
        protocol: BaseProtocol,
        waiter: Any = None,
        extra: Any = None,
        server: Any = None,
        context: Any = None,
    ) -> None: ...

def accept_all(loop: LoopCore, serving: tuple[Any, ...], context: Any) -> None: ...
