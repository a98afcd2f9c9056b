"""A Tk window that counts, and a server that tells the count: one thread, one main loop, Tk's.

    pip install uringloop  (and on Debian: apt install python3-tk)
    python examples/tk_server.py --port 8000 &
    curl http://127.0.0.1:8000

Promise: neither waits for the other, and when there is nothing to do, Tk sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import select
import signal
import tkinter as tk
from typing import Any

import uringloop
from uringloop.hosted import Hosted

MASKS = {
    select.POLLIN: tk.READABLE,
    select.POLLOUT: tk.WRITABLE,
    select.POLLIN | select.POLLOUT: tk.READABLE | tk.WRITABLE,
}


def host(loop: Any, root: tk.Tk) -> Hosted:
    """Has Tk carry the loop: a file handler for whatever the loop wants watched."""
    watched: list[int] = []

    def watch() -> None:
        for fd in watched:
            root.tk.deletefilehandler(fd)
        watched.clear()
        for fd, events in hosted.host_fds():
            root.tk.createfilehandler(fd, MASKS[events], lambda *_: hosted.dispatch())
            watched.append(fd)

    hosted = Hosted(loop, on_fds_changed=watch)
    watch()
    return hosted


class Counter(tk.Label):
    """What the window shows."""

    ticks = requests = 0

    def tick(self) -> None:
        """Counts, called by a timer of Tk's."""
        self.ticks += 1
        self.refresh()
        self.after(50, self.tick)

    def refresh(self) -> None:
        """Shows both numbers."""
        self["text"] = f"{self.ticks} ticks, {self.requests} requests"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers an HTTP request with what the window shows."""
        while (await reader.readline()).strip():
            pass  # the request line and its headers
        self.requests += 1
        self.refresh()
        writer.write(f"HTTP/1.0 200 OK\r\n\r\n{self['text']}\n".encode())
        writer.close()


def main() -> None:
    """Shows the window and serves, until the window is closed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="close the window after that")
    options = parser.parse_args()

    root = tk.Tk()
    window = Counter(root)
    window.pack()
    window.tick()
    signal.signal(signal.SIGINT, lambda *_: root.destroy())
    if options.seconds is not None:
        root.after(int(options.seconds * 1000), root.destroy)

    with asyncio.Runner(loop_factory=uringloop.new_event_loop) as runner:
        server = runner.run(asyncio.start_server(window.answer, "127.0.0.1", options.port))
        print("http://{}:{}".format(*server.sockets[0].getsockname()), flush=True)
        with host(runner.get_loop(), root):
            root.mainloop()
        server.close()


if __name__ == "__main__":
    main()
