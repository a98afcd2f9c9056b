"""A Qt window that counts, and a server that tells the count: one thread, one main loop, Qt's.

    pip install uringloop PySide6-Essentials
    python examples/qt_server.py --port 8000 &
    curl http://127.0.0.1:8000

Promise: neither waits for the other, and when there is nothing to do, Qt sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import select
import signal
from typing import Any

from PySide6.QtCore import QSocketNotifier, QTimer
from PySide6.QtWidgets import QApplication, QLabel

import uringloop
from uringloop.hosted import Hosted

KINDS = {select.POLLIN: QSocketNotifier.Type.Read, select.POLLOUT: QSocketNotifier.Type.Write}


def host(loop: Any) -> Hosted:
    """Has Qt carry the loop: a notifier for whatever the loop wants watched."""
    notifiers: list[QSocketNotifier] = []

    def watch() -> None:
        for notifier in notifiers:
            notifier.setEnabled(False)
            notifier.deleteLater()  # not at once: it may be the one that calls us
        notifiers.clear()
        for fd, events in hosted.host_fds():
            for kind in (KINDS[bit] for bit in KINDS if events & bit):
                notifiers.append(QSocketNotifier(fd, kind))
                notifiers[-1].activated.connect(hosted.dispatch)

    hosted = Hosted(loop, on_fds_changed=watch)
    watch()
    return hosted


class Counter(QLabel):
    """The window."""

    ticks = requests = 0

    def tick(self) -> None:
        """Counts, called by a timer of Qt's."""
        self.ticks += 1
        self.refresh()

    def refresh(self) -> None:
        """Shows both numbers."""
        self.setText(f"{self.ticks} ticks, {self.requests} requests")

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers an HTTP request with what the window shows."""
        while (await reader.readline()).strip():
            pass  # the request line and its headers
        self.requests += 1
        self.refresh()
        writer.write(f"HTTP/1.0 200 OK\r\n\r\n{self.text()}\n".encode())
        writer.close()


def main() -> None:
    """Shows the window and serves, until the window is closed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="close the window after that")
    options = parser.parse_args()

    app = QApplication([])
    window = Counter()
    window.show()
    timer = QTimer(interval=50)
    timer.timeout.connect(window.tick)
    timer.start()
    signal.signal(signal.SIGINT, lambda *_: app.quit())
    if options.seconds is not None:
        QTimer.singleShot(int(options.seconds * 1000), window.close)

    with asyncio.Runner(loop_factory=uringloop.new_event_loop) as runner:
        server = runner.run(asyncio.start_server(window.answer, "127.0.0.1", options.port))
        print("http://{}:{}".format(*server.sockets[0].getsockname()), flush=True)
        with host(runner.get_loop()):
            app.exec()
        server.close()


if __name__ == "__main__":
    main()
