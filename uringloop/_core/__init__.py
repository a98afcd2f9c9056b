"""The native half of the loop; `uringloop.loop` is its only user."""

from uringloop._core.core import LoopCore, StreamTransport, accept_all

__all__ = ["LoopCore", "StreamTransport", "accept_all"]
