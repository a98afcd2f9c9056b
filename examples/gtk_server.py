"""A GTK window that counts, and a server that tells the count: one thread, one main loop, GLib's.

    pip install uringloop[glib]  (and on Debian: apt install gir1.2-gtk-4.0)
    python examples/gtk_server.py --port 8000 &
    curl http://127.0.0.1:8000

Promise: neither waits for the other, and when there is nothing to do, GLib sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import gi

gi.require_version("Gtk", "4.0")

from gi.repository import GLib, Gtk  # noqa: E402

import uringloop.glib  # noqa: E402


class Counter:
    """The window."""

    def __init__(self) -> None:
        self.ticks = self.requests = 0
        self.label = Gtk.Label()
        self.closed = asyncio.Event()
        self.window = Gtk.Window(title="uringloop", child=self.label)
        self.window.connect("close-request", lambda _: self.closed.set())
        self.window.present()
        GLib.timeout_add(50, self.tick)

    def tick(self) -> bool:
        """Counts, called by a timer of GLib's."""
        self.ticks += 1
        self.refresh()
        return True  # GLib.SOURCE_CONTINUE

    def refresh(self) -> None:
        """Shows both numbers."""
        self.label.set_text(f"{self.ticks} ticks, {self.requests} requests")

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers an HTTP request with what the window shows."""
        while (await reader.readline()).strip():
            pass  # the request line and its headers
        self.requests += 1
        self.refresh()
        writer.write(f"HTTP/1.0 200 OK\r\n\r\n{self.label.get_text()}\n".encode())
        writer.close()


async def main() -> None:
    """Shows the window and serves, until the window is closed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="close the window after that")
    options = parser.parse_args()

    counter = Counter()
    if options.seconds is not None:
        GLib.timeout_add(int(options.seconds * 1000), counter.window.close)
    async with await asyncio.start_server(counter.answer, "127.0.0.1", options.port) as server:
        print("http://{}:{}".format(*server.sockets[0].getsockname()), flush=True)
        await counter.closed.wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uringloop.glib.run(main())
