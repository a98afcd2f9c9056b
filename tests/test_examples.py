"""The examples as a user runs them: a window that stays live while a server answers requests.

The promise: a real toolkit with a real window (Qt's offscreen, the others' on a virtual X server),
real clients, every monitor. Whatever a toolkit or the loop complains about fails the test.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import child_environment, python, require

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LIMIT_S = 60

#: The example of each toolkit, what it needs, how that is found out, and what the child's
#: environment says.
OFFSCREEN = {"QT_QPA_PLATFORM": "offscreen"}
QT = ("qt_server.py", "PySide6-Essentials", "import PySide6.QtWidgets")
TOOLKITS = {
    "qt": (*QT, OFFSCREEN),  # sleeps in GLib's main loop
    "qt_alone": (*QT, {**OFFSCREEN, "QT_NO_GLIB": "1"}),  # sleeps in one of its own
    "tk": ("tk_server.py", "tkinter (Debian: python3-tk)", "import tkinter", {}),
    "gtk": (
        "gtk_server.py",
        "PyGObject with GTK 4 (Debian: gir1.2-gtk-4.0)",
        "import gi; gi.require_version('Gtk', '4.0')",
        {"GDK_BACKEND": "x11", "GTK_A11Y": "none", "GSETTINGS_BACKEND": "memory"},
    ),
}


@pytest.fixture(scope="module")
def display(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An X server of our own, without a screen."""
    require("Xvfb (Debian: xvfb)", "import shutil; assert shutil.which('Xvfb'), 'not found'")
    log = tmp_path_factory.mktemp("xvfb") / "log"
    receiving, sending = os.pipe()
    command = ["Xvfb", "-displayfd", str(sending), "-nolisten", "tcp", "-noreset"]
    with log.open("w") as stream:
        server = subprocess.Popen(command, pass_fds=[sending], stdout=stream, stderr=stream)
    os.close(sending)
    with server:
        with open(receiving) as pipe:
            number = pipe.readline().strip()
        assert number, log.read_text()
        yield f":{number}"
        server.terminate()


class Program:
    """A running example."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        assert port, process.communicate()[1]
        self.address = host, int(port)

    def get(self, *_: object) -> tuple[int, int]:
        """How many ticks and how many requests the window shows, asked by a request."""
        connection = http.client.HTTPConnection(*self.address, timeout=LIMIT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return shown(connection.getresponse().read())

    def cpu_s(self) -> float:
        """User and system time, fields 14 and 15 of proc_pid_stat(5)."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def assert_clean_end(self) -> None:
        out, err = self.process.communicate(timeout=LIMIT_S)
        assert (self.process.returncode, out, err) == (0, "", "")


def shown(body: bytes) -> tuple[int, int]:
    match = re.fullmatch(rb"(\d+) ticks, (\d+) requests\n", body)
    assert match, body
    return int(match[1]), int(match[2])


Start = Callable[..., contextlib.AbstractContextManager[Program]]


@pytest.fixture(params=TOOLKITS)
def start(request: pytest.FixtureRequest, monitor: str, tmp_path: Path) -> Start:
    """Starts the example of a toolkit on the monitor under test; it ends in time, or is killed."""
    example, needs, statement, variables = TOOLKITS[request.param]
    require(needs, statement)
    if example != "qt_server.py":
        variables = {**variables, "DISPLAY": request.getfixturevalue("display")}
    environment = child_environment(
        **variables,
        URINGLOOP_MONITOR=monitor,
        PYTHONWARNINGS="always",
        HOME=str(tmp_path),
        XDG_RUNTIME_DIR=str(tmp_path),
    )

    @contextlib.contextmanager
    def starting(*arguments: str) -> Iterator[Program]:
        command = [sys.executable, str(EXAMPLES / example), *arguments]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            watchdog = threading.Timer(LIMIT_S, process.kill)
            watchdog.start()
            try:
                yield Program(process)
            finally:
                process.kill()  # unless it has ended
                watchdog.cancel()
                watchdog.join()

    return starting


def test_the_window_goes_on_counting_while_the_server_answers(start: Start) -> None:
    with start() as program, socket.create_connection(program.address) as slow:
        slow.sendall(b"GET / HTTP/1.0\r\n")  # the rest comes when all others are served
        seen: list[tuple[int, int]] = []
        with ThreadPoolExecutor(5) as clients:
            while not seen or seen[-1][0] < seen[0][0] + 10:
                seen += clients.map(program.get, range(20))
        slow.sendall(b"\r\n")
        with slow.makefile("rb") as answer:
            seen.append(shown(answer.read().partition(b"\r\n\r\n")[2]))
        seen.sort(key=lambda counts: counts[1])
        assert [requests for _, requests in seen] == list(range(1, len(seen) + 1))
        assert seen == sorted(seen), "a later request saw fewer ticks"
        program.process.send_signal(signal.SIGINT)
        program.assert_clean_end()


def test_an_idle_program_sleeps_and_ends_when_its_window_is_closed(start: Start) -> None:
    with start("--seconds", "2") as program:
        program.get()
        before_s = program.cpu_s()
        time.sleep(1)
        assert program.cpu_s() - before_s < 0.4
        program.assert_clean_end()


def test_the_gtk_program_of_the_documentation_runs(
    monitor: str, display: str, tmp_path: Path
) -> None:
    """Its button is pressed, and shows what a child process has answered."""
    _, needs, statement, variables = TOOLKITS["gtk"]
    environment: dict[str, Any] = {**variables, "LC_ALL": "C", "TZ": "UTC"}
    require(needs, statement)
    chapter = (EXAMPLES.parent / "docs" / "hosting.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    user = """
import runpy, gi
gi.require_version("Gtk", "4.0")
from gi.repository import GLib, Gtk

def press():
    application = Gtk.Application.get_default()
    window = application and application.get_active_window()
    if not window or not window.button.get_label().startswith("What"):
        return True
    window.button.emit("clicked")
    GLib.timeout_add(10, look, window)
    return False

def look(window):
    if window.button.get_label().startswith("What"):
        return True
    print(window.button.get_label())
    window.close()
    return False

GLib.timeout_add(10, press)
runpy.run_path("program.py", run_name="__main__")
"""
    ended = python(
        "-c",
        user,
        cwd=tmp_path,
        **environment,
        DISPLAY=display,
        URINGLOOP_MONITOR=monitor,
        HOME=str(tmp_path),
        XDG_RUNTIME_DIR=str(tmp_path),
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert re.fullmatch(r"\w+ \w+ +\d+ [\d:]+ UTC \d{4}\n", ended.stdout)
