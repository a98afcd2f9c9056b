"""The native half of the loop; `uringloop.loop` and `uringloop.glib` are its only users."""

from uringloop._core.core import (
    DatagramTransport,
    LoopCore,
    StreamTransport,
    Transport,
    accept_all,
    dispatch_source,
    prepare_source,
)

__all__ = [
    "DatagramTransport",
    "LoopCore",
    "StreamTransport",
    "Transport",
    "accept_all",
    "dispatch_source",
    "prepare_source",
]
