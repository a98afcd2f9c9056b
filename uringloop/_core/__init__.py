"""The native half of the loop; `uringloop.loop` is its only user."""

from uringloop._core.core import DatagramTransport, LoopCore, StreamTransport, Transport, accept_all

__all__ = ["DatagramTransport", "LoopCore", "StreamTransport", "Transport", "accept_all"]
