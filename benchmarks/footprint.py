"""What a loop costs beside throughput: idle CPU, memory, waits for the GIL, calls, instructions.

Each figure is taken once per loop; the promise: it is read from outside the loop (kernel, strace,
valgrind, another thread), and the loop's own count of enters, where it has one, beside strace's.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cells import GIL_LOADS, KIB, Cell
from benchmarks.host import Child, ChildError, Host, cpu_seconds, read_text
from benchmarks.load import Times, apply_load

IDLE_CONNECTIONS = 10_000
QUICK_CONNECTIONS = 1000
RESET = struct.pack("ii", 1, 0)  # close() resets: no port of a closed connection waits for a minute
CALLBACKS = (10_000, 50_000)
LOAD = Cell("raw", KIB, 10)
SHOWN_CALLS = 6


def start(host: Host, loop: str, mode: str = "raw") -> tuple[Child, int]:
    server = host.python("servers", loop, mode)
    try:
        return server, int(json.loads(server.read_line())["port"])
    except BaseException:
        server.__exit__()
        raise


def wakeups(pid: int) -> int:
    lines = read_text(f"/proc/{pid}/status").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


def idle(host: Host, loop: str) -> dict[str, float]:
    """CPU and wake-ups of one idle second of a server that has ten open connections."""
    server, port = start(host, loop)
    with server, contextlib.ExitStack() as stack:
        connect(stack, port, 10)
        time.sleep(0.2)
        cpu, woken = cpu_seconds(server.pid), wakeups(server.pid)
        time.sleep(1)
        return {
            "idle_cpu_ms": (cpu_seconds(server.pid) - cpu) * 1e3,
            "idle_wakeups": wakeups(server.pid) - woken,
        }


def connect(stack: contextlib.ExitStack, port: int, n: int) -> None:
    """n connections that have exchanged one message and are kept open by the stack."""
    for _ in range(n):
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.sendall(b"x" * KIB)
        left = KIB
        while left:
            data = sock.recv(left)
            if not data:
                raise ChildError("connection closed by the server")
            left -= len(data)


def resident_bytes(pid: int) -> int:
    for line in read_text(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * KIB
    return int(read_text(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGESIZE")


def memory(host: Host, loop: str, mode: str, wanted: int) -> dict[str, float]:
    """Resident set per idle connection: the whole, and its growth after ten have warmed it up."""
    n = min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    server, port = start(host, loop, mode)
    with server, contextlib.ExitStack() as stack:
        connect(stack, port, 10)
        before = resident_bytes(server.pid)
        connect(stack, port, n - 10)
        whole = resident_bytes(server.pid)
    return {"connections": n, "growth": (whole - before) / (n - 10), "whole": whole / n}


def gil_wait(host: Host, loop: str, cell: Cell, seconds: float) -> dict[str, float | bool]:
    """The waits (see gil.py) that ended within the client's window."""
    probe = ("--gil-probe", host.nap, str(host.client_core))
    with host.python("servers", loop, cell.server, *probe) as server:
        port = json.loads(server.read_line())["port"]
        window = apply_load(host, server, port, cell, Times(0.2, seconds))
        server.process.send_signal(signal.SIGUSR2)
        found = json.loads(server.read_line())
    begin_ns = window["started_s"] * 1e9
    end_ns = begin_ns + window["seconds"] * 1e9
    us = sorted(wait / 1e3 for at, wait in found["samples"] if begin_ns <= at <= end_ns)
    if not us:
        raise ChildError("the other thread never had the GIL")
    percentiles = {"p50_us": us[len(us) // 2], "p99_us": us[len(us) * 99 // 100], "max_us": us[-1]}
    return percentiles | {"samples": len(us), "real_time": found["real_time"]}


def instructions(host: Host, loop: str) -> float:
    """Per call_soon() and its callback, by callgrind: the difference of two counts over theirs."""
    valgrind = shutil.which("valgrind")
    if not valgrind:
        raise ChildError("skipped: valgrind is missing")
    totals = []
    for count in CALLBACKS:
        micro = ["-m", "benchmarks.micro", loop, "--timers", "0", "--only", "call_soon"]
        tool = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        argv = [*tool, sys.executable, *micro, "--count", str(count)]
        with Child(argv, host.server_core) as child:
            child.read_line(60)
            child.process.wait(20)
            words = [line.split() for line in child.error_text().splitlines()]
        counts = [int(w[3]) for w in words if w[1:3] == ["Collected", ":"]]
        if not counts:
            raise ChildError("skipped: valgrind counted nothing")
        totals.append(counts[0])
    # micro.measure() runs a tenth more, to warm up.
    return (totals[1] - totals[0]) / (1.1 * (CALLBACKS[1] - CALLBACKS[0]))


def parse_strace(text: str) -> dict[str, int]:
    """Calls by name, from the table of strace -c (% time, seconds, usecs/call, calls, errors)."""
    rows = [line.split() for line in text.splitlines()]
    rows = [row for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"]
    return {row[-1]: int(row[3]) for row in rows}


def system_calls(host: Host, loop: str, seconds: float) -> dict[str, float]:
    """Calls per request; strace is attached before the first connection and sees all of it."""
    strace = shutil.which("strace")
    if not strace:
        raise ChildError("skipped: strace is missing")
    output = host.scratch / f"strace-{loop}"
    server, port = start(host, loop)
    argv = [strace, "-f", "-c", "-o", str(output), "-p", str(server.pid)]
    with server, Child(argv, host.client_core) as tracer:
        await_tracer(server.pid)
        counted = enter_count(server)
        result = apply_load(host, server, port, LOAD, Times(0, seconds))
        if counted is not None:
            counted = (enter_count(server) or 0) - counted
        tracer.process.send_signal(signal.SIGINT)
        tracer.process.wait(10)
    calls = parse_strace(output.read_text())
    total = max(1, result["total"])
    rates = {name: n / total for name, n in sorted(calls.items(), key=lambda item: -item[1])}
    found = {"all": sum(calls.values()) / total} | dict(list(rates.items())[:SHOWN_CALLS])
    return found | ({} if counted is None else {"statistics": counted / total})


def await_tracer(pid: int) -> None:
    for _ in range(200):
        if "TracerPid:\t0" not in read_text(f"/proc/{pid}/status"):
            return
        time.sleep(0.01)
    raise ChildError("skipped: strace may not attach here")


def enter_count(server: Child) -> int | None:
    """statistics().enters of the server's loop, asked for by SIGUSR1; None where it has none."""
    if not catches_usr1(server.pid):
        return None
    os.kill(server.pid, signal.SIGUSR1)
    return int(json.loads(server.read_line(5))["enters"])


def enters(host: Host, loop: str, seconds: float) -> float | None:
    """The loop's own count of enters per request, without strace; None without statistics()."""
    server, port = start(host, loop)
    with server:
        before = enter_count(server)
        if before is None:
            return None
        result = apply_load(host, server, port, LOAD, Times(0, seconds))
        return ((enter_count(server) or 0) - before) / max(1, int(result["total"]))


def catches_usr1(pid: int) -> bool:
    for line in read_text(f"/proc/{pid}/status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def measure(host: Host, loop: str, quick: bool) -> dict[str, Any]:
    """All rows of one loop; a row that cannot be had is a text that says why."""
    seconds = 0.5 if quick else 2.0
    connections = QUICK_CONNECTIONS if quick else IDLE_CONNECTIONS
    rows: dict[str, Callable[[], object]] = {
        "idle": lambda: idle(host, loop),
        "rss raw": lambda: memory(host, loop, "raw", connections),
        "rss streams": lambda: memory(host, loop, "streams", connections),
        **{
            f"gil {cell.name}": lambda cell=cell: gil_wait(host, loop, cell, seconds)  # type: ignore[misc]
            for cell in GIL_LOADS[: 1 if quick else None]
        },
        "system_calls": lambda: system_calls(host, loop, seconds),
        "enters": lambda: enters(host, loop, seconds),
        "instructions": lambda: instructions(host, loop),
    }
    found: dict[str, Any] = {}
    for name, row in rows.items():
        try:
            found[name] = row()
        except (ChildError, OSError, KeyError) as error:
            found[name] = str(error)
    return found
