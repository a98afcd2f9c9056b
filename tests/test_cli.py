"""The command line: what doctor, demo and bench say, and the exit codes that scripts rely on.

The promise: what doctor explains is a real refusal where a test can make one (a seccomp filter),
and the demo's byte check is shown to catch what it is there for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import uringloop
from tests.conftest import MONITORS, refusal
from uringloop import demo, doctor

PACKAGE = Path(uringloop.__file__).parent

# Denies io_uring with the errno argv[1] to this process and to what it becomes.
DENIED = """
import os, sys
from tests.support import IO_URING, deny
deny(int(sys.argv[1]), *IO_URING)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclasses.dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def json(self) -> Any:
        return json.loads(self.out)


def run(
    *arguments: str,
    monitor: str | None = None,
    denied: int | None = None,
    cwd: Path | None = None,
) -> Ran:
    """Run `python -m uringloop` as a user does, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "URINGLOOP_MONITOR"}
    if monitor is not None:
        environment["URINGLOOP_MONITOR"] = monitor
    command = [sys.executable]
    if denied is not None:
        command += ["-c", DENIED, str(denied)]
    done = subprocess.run(
        [*command, "-m", "uringloop", *arguments],
        env=environment,
        cwd=cwd or PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


# ---------------------------------------------------------------------- doctor


def test_doctor_says_in_words_which_monitor_a_loop_gets() -> None:
    ran = run("doctor")
    assert ran.code == 0, ran.text
    assert ran.err == ""
    expected = "epoll" if refusal("io_uring") else "io_uring"
    assert f"a loop runs on      {expected}" in ran.out
    for word in (os.uname().release, uringloop.__version__, "RLIMIT_MEMLOCK", "RLIMIT_NOFILE"):
        assert word in ran.out


def test_doctor_tells_the_same_in_json_as_a_loop_does() -> None:
    ran = run("doctor", "--json")
    assert ran.code == 0, ran.text
    report = ran.json()
    loop = uringloop.new_event_loop(monitor="auto")
    try:
        assert report["loop"]["monitor"] == loop.monitor
        assert report["loop"]["fallback_reason"] == loop.fallback_reason
    finally:
        loop.close()
    assert report["loop"]["requested"] == "auto"
    assert list(report["monitors"]) == list(MONITORS)
    assert report["surroundings"]["memlock_bytes"] == list(doctor.look_around().memlock_bytes)


@pytest.mark.skipif(refusal("io_uring") is not None, reason="this machine denies io_uring")
def test_doctor_names_the_step_of_the_ladder_that_was_taken() -> None:
    trial = run("doctor", "--json").json()["monitors"]["io_uring"]
    assert trial["works"]
    assert "SINGLE_ISSUER" in trial["step"]
    assert "EXT_ARG" in doctor._feature_names(trial["features"])


def test_doctor_honours_a_forced_monitor(monitor: str) -> None:
    ran = run("doctor", "--json", monitor=monitor)
    assert ran.code == 0, ran.text
    assert ran.json()["loop"] == {
        "requested": monitor,
        "runs": True,
        "monitor": monitor,
        "fallback_reason": None,
        "error": "",
    }


def test_doctor_answers_a_wrong_monitor_name_with_the_right_ones() -> None:
    ran = run("doctor", monitor="kqueue")
    assert ran.code == 1
    assert "Traceback" not in ran.text
    for name in ("kqueue", "auto", *MONITORS):
        assert name in ran.out


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_doctor_explains_a_seccomp_filter_and_the_loop_runs_on_epoll(number: int) -> None:
    report = run("doctor", "--json", denied=number)
    assert report.code == 0, report.text
    answer = report.json()
    assert answer["loop"]["monitor"] == "epoll"
    assert errno.errorcode[number] in answer["loop"]["fallback_reason"]
    assert answer["surroundings"]["seccomp_mode"] == 2
    trial = answer["monitors"]["io_uring"]
    assert trial["errno"] == number
    assert "seccomp" in trial["cause"]
    assert "epoll is fully supported" in trial["remedy"]


def test_doctor_fails_where_the_forced_monitor_is_refused_and_says_why() -> None:
    ran = run("doctor", monitor="io_uring", denied=errno.EPERM)
    assert ran.code == 1
    assert "Traceback" not in ran.text
    assert "no loop runs" in ran.out
    assert "EPERM" in ran.out
    assert "seccomp" in ran.out
    assert "--security-opt" in ran.out


def test_a_missing_extension_is_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    copy = shutil.copytree(
        PACKAGE, tmp_path / "uringloop", ignore=shutil.ignore_patterns("*.so", "*.pyc")
    )
    # Without this an editable installation would lend the copy its own extension.
    (copy / "_fdmon.py").write_text("raise ImportError(f'No module named {__name__}')")
    ran = run("doctor", cwd=tmp_path)
    assert ran.code == 1
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert "extension" in ran.err


def surroundings(**changes: Any) -> doctor.Surroundings:
    nothing_denied: dict[str, Any] = {
        "io_uring_disabled": 0,
        "io_uring_group": -1,
        "in_io_uring_group": False,
        "has_sys_admin": False,
        "seccomp_mode": 0,
    }
    return dataclasses.replace(doctor.look_around(), **(nothing_denied | changes))


@pytest.mark.parametrize(
    ("number", "changes", "cause", "remedy"),
    [
        (errno.EPERM, {"io_uring_disabled": 2}, "io_uring_disabled is 2", "io_uring_disabled=0"),
        (errno.EPERM, {"io_uring_disabled": 1}, "io_uring_disabled is 1", "io_uring_group"),
        (errno.EPERM, {"seccomp_mode": 2}, "Docker >= 25", "--security-opt"),
        (
            errno.EPERM,
            {"io_uring_disabled": 1, "in_io_uring_group": True, "seccomp_mode": 2},
            "seccomp",
            "SystemCallFilter",
        ),
        (errno.EACCES, {}, "SELinux", "audit log"),
        (errno.ENOSYS, {}, "CONFIG_IO_URING", "6.1"),
        (errno.ENOSYS, {"seccomp_mode": 2}, "Podman", "profile"),
        (errno.ENOMEM, {"memlock_bytes": (8 << 20, 8 << 20)}, "8192 KiB", "ulimit -l"),
        (errno.EMFILE, {"open_files": (64, 4096)}, "RLIMIT_NOFILE is 64", "ulimit -n"),
        (errno.EINVAL, {}, "older than 6.1", "kernel >= 6.1"),
        (errno.EOPNOTSUPP, {}, "did not work", "real Linux kernel"),
        (errno.EXDEV, {}, "not a refusal that is known", "nothing needs to be done"),
        (None, {}, "not a refusal that is known", "nothing needs to be done"),
    ],
)
def test_each_errno_has_its_cause_and_its_remedy(
    number: int | None, changes: dict[str, Any], cause: str, remedy: str
) -> None:
    advice = doctor.advise(number, surroundings(**changes))
    assert cause in advice.cause
    assert remedy in advice.remedy


# ---------------------------------------------------------------------- demo


def needs_aiohttp() -> None:
    pytest.importorskip("aiohttp")


def test_the_demo_prints_a_row_for_each_loop_and_ends_well() -> None:
    needs_aiohttp()
    ran = run("demo", "--seconds", "0.9", "--connections", "4")
    assert ran.code == 0, ran.text
    rows = [line.split()[0] for line in ran.out.splitlines() if line.startswith(demo.LOOPS)]
    assert rows[:3] == list(demo.LOOPS)
    assert "answers were compared byte for byte" in ran.out


def test_the_demo_runs_on_the_monitor_in_force(monitor: str) -> None:
    needs_aiohttp()
    ran = run("demo", "--seconds", "0.3", "--connections", "2", monitor=monitor)
    assert ran.code == 0, ran.text
    row = next(line for line in ran.out.splitlines() if line.startswith("uringloop "))
    assert f"({monitor})" in row
    p50, p90, p99, server_us = map(float, row.split()[-4:])
    assert 0 < p50 <= p90 <= p99
    assert server_us > 0


def test_the_demo_without_aiohttp_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == demo.MISSING_AIOHTTP + "\n"


def test_a_missing_uvloop_is_a_missing_row_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_aiohttp()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvloop" else find_spec(name)
    )
    cores = os.sched_getaffinity(0)
    assert demo.main(["--seconds", "0.3", "--connections", "2"]) == 0
    assert os.sched_getaffinity(0) == cores
    assert demo.MISSING_UVLOOP in capsys.readouterr().out


def answer(body: bytes, digest_of: bytes | None = None) -> bytes:
    digest = hashlib.sha256(body if digest_of is None else digest_of).hexdigest()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nX-Body-SHA256: {digest}\r\n\r\n"
    return head.encode() + body


@contextlib.contextmanager
def server_that_answers(data: bytes) -> Iterator[int]:
    """A server for one connection: reads a request, sends these bytes in two pieces, closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(data[: len(data) // 2])
                connection.sendall(data[len(data) // 2 :])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join()


def one_exchange(data: bytes, exchange: demo.Exchange) -> int:
    with server_that_answers(data) as port:
        connection = demo.Connection(port, [exchange], 0)
        try:
            connection.send()
            while not (latency_ns := connection.receive()):
                pass
            return latency_ns
        finally:
            connection.sock.close()


BODY = bytes(range(256)) * 4


def test_the_demo_accepts_the_right_answer() -> None:
    assert one_exchange(answer(BODY), demo._echo(BODY)) > 0


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (answer(BODY[:-1] + b"?", digest_of=BODY), "not what the application sends"),
        (answer(BODY, digest_of=b"something else"), "wrong head"),
        (answer(BODY + b"!", digest_of=BODY), "Content-Length"),
        (answer(BODY) + b"HTTP/1.1 200 OK\r\n", "not what the application sends"),
        (answer(BODY)[:-5], "closed"),
        (answer(BODY).replace(b"200 OK", b"500 No"), "wrong head"),
        (b"", "closed"),
    ],
    ids=["a byte", "digest", "length", "more than asked", "cut short", "status", "nothing"],
)
def test_the_demo_refuses_a_wrong_answer(data: bytes, complaint: str) -> None:
    with pytest.raises(demo.Mismatch, match=complaint):
        one_exchange(data, demo._echo(BODY))


def test_the_demo_with_a_monitor_that_is_refused_is_one_sentence() -> None:
    needs_aiohttp()
    ran = run("demo", monitor="io_uring", denied=errno.EPERM)
    assert ran.code == 1
    assert ran.err.startswith("uringloop: no loop can run: ")
    assert len(ran.err.splitlines()) == 1
    assert ran.out == ""


def test_a_server_that_does_not_start_is_a_sentence_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_aiohttp()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert demo.main(["--seconds", "0.3"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "uringloop: the demo failed: the server on uringloop did not start (exit 1)\n"


# ---------------------------------------------------------------------- the rest


def test_bench_outside_a_checkout_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "uringloop")
    ran = run("bench", cwd=tmp_path)
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert "make bench" in ran.err


@pytest.mark.parametrize("arguments", [[], ["serve"]])
def test_a_command_that_is_not_there_is_a_usage_error(arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert "doctor" in ran.err


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_each_command_has_its_own_help(command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"python -m uringloop {command}" in ran.out
