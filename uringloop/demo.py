"""`python -m uringloop demo`: one real aiohttp application on uringloop, asyncio and uvloop.

It promises that every number comes from requests whose answers were compared byte for byte, that
all loops were measured in one run in interleaved rounds, and that a wrong byte is an exit code, not
a footnote. The servers are processes of their own; this process is the client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import platform
import random
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uringloop

if TYPE_CHECKING:
    from aiohttp import web

LOOPS = ("uringloop", "asyncio", "uvloop")
ROUNDS = 3
DOWNLOAD_SIZE_BYTES = 100 * 1024
ECHO_SIZE_BYTES = 1024
WARM_UP_S = 0.2
STALL_S = 10.0
SATURATED = 0.9  # a server that got less of its core was held up by something else
MISSING_AIOHTTP = (
    "uringloop: the demo needs aiohttp, which is not installed: pip install 'uringloop[demo]'"
)
MISSING_UVLOOP = "not installed (pip install 'uringloop[demo]')"


@functools.cache
def _download_body() -> bytes:
    """Return bytes that repeat nowhere, so that a lost or doubled piece shows."""
    return hashlib.shake_128(b"uringloop demo").digest(DOWNLOAD_SIZE_BYTES)


# ---------------------------------------------------------------------- the server


async def _json_route(request: web.Request) -> web.Response:
    from aiohttp import web

    number = int(request.query["n"])
    return web.json_response({"n": number, "square": number * number})


async def _echo_route(request: web.Request) -> web.Response:
    from aiohttp import web

    body = await request.read()
    digest = hashlib.sha256(body).hexdigest()
    return web.Response(body=body, headers={"X-Body-SHA256": digest})


async def _download_route(_: web.Request) -> web.Response:
    from aiohttp import web

    return web.Response(body=_download_body())


async def _serve() -> None:
    """Serve until standard input ends, which it does at the latest when the client dies."""
    from aiohttp import web

    loop = asyncio.get_running_loop()
    application = web.Application()
    application.router.add_get("/json", _json_route)
    application.router.add_post("/echo", _echo_route)
    application.router.add_get("/download", _download_route)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    await web.SockSite(runner, listener).start()
    ready = {"port": listener.getsockname()[1], "monitor": getattr(loop, "monitor", None)}
    print(json.dumps(ready), flush=True)
    ended = asyncio.Event()
    os.set_blocking(0, False)
    loop.add_reader(0, ended.set)
    await ended.wait()
    loop.remove_reader(0)
    await runner.cleanup()


def serve(name: str, core: int | None) -> None:
    """Run the application on the named loop; the entry point of a server process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    if name == "uringloop":
        uringloop.run(_serve())
    elif name == "uvloop":
        import uvloop

        uvloop.run(_serve())
    else:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(_serve())


@dataclasses.dataclass
class Server:
    """One server process: how to reach it, and what it costs."""

    name: str
    process: subprocess.Popen[str]
    port: int
    monitor: str | None

    def cpu_s(self) -> float:
        """CPU time spent so far; the clock's number is that of clock_getcpuclockid(3)."""
        return time.clock_gettime((~self.process.pid << 3) | 2)


class DemoError(Exception):
    """The demo cannot give an honest answer; its text is the sentence for the user."""


@contextlib.contextmanager
def _server(name: str, core: int | None) -> Iterator[Server]:
    code = f"from uringloop.demo import serve; serve({name!r}, {core!r})"
    # A session of its own keeps Ctrl-C from the server: it ends when its standard input does.
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise DemoError(f"the server on {name} did not start (exit {process.wait(STALL_S)})")
        ready = json.loads(line)
        yield Server(name, process, ready["port"], ready["monitor"])
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(STALL_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------- the client


class Mismatch(DemoError):
    """An answer was not, byte for byte, what the application sends."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """A request and the answer that it must get."""

    request: bytes
    body: bytes
    header: bytes = b""  # a line that must stand in the head of the answer


def _get(path: str, body: bytes) -> Exchange:
    return Exchange(f"GET {path} HTTP/1.1\r\nHost: demo\r\n\r\n".encode(), body)


def _echo(body: bytes) -> Exchange:
    head = f"POST /echo HTTP/1.1\r\nHost: demo\r\nContent-Length: {len(body)}\r\n\r\n"
    digest = hashlib.sha256(body).hexdigest()
    return Exchange(head.encode() + body, body, f"X-Body-SHA256: {digest}\r\n".encode())


def make_exchanges(count: int) -> list[Exchange]:
    """Make the mix: of ten requests six are small JSON, three echo 1 KiB, one downloads 100 KiB."""
    source = random.Random(count)
    exchanges: list[Exchange] = []
    for number in range(count):
        if number % 10 == 9:
            exchanges.append(_get("/download", _download_body()))
        elif number % 10 in (2, 5, 8):
            exchanges.append(_echo(source.randbytes(ECHO_SIZE_BYTES)))
        else:
            text = json.dumps({"n": number, "square": number * number})
            exchanges.append(_get(f"/json?n={number}", text.encode()))
    return exchanges


class Connection:
    """One keep-alive connection with one request at a time under way."""

    def __init__(self, port: int, exchanges: list[Exchange], start: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.exchanges = exchanges
        self.next = start
        self.sent_ns = 0
        self.received = bytearray()
        self.expected_size_bytes = 0  # head and body; 0 while the head is not complete

    def send(self) -> None:
        """Send the next request; it is small enough for the socket's buffer."""
        self.received.clear()
        self.expected_size_bytes = 0
        self.sent_ns = time.monotonic_ns()
        self.sock.sendall(self.exchanges[self.next].request)

    def receive(self) -> int:
        """Take what has come; return the request's latency in ns when the answer is complete."""
        piece = self.sock.recv(1 << 17)
        if not piece:
            raise Mismatch("the server closed a keep-alive connection")
        self.received += piece
        if not self.expected_size_bytes:
            self._read_head()
        if not self.expected_size_bytes or len(self.received) < self.expected_size_bytes:
            return 0
        latency_ns = time.monotonic_ns() - self.sent_ns
        self._check()
        self.next = (self.next + 1) % len(self.exchanges)
        return latency_ns

    def _read_head(self) -> None:
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[: end + 2])
        exchange = self.exchanges[self.next]
        if not head.startswith(b"HTTP/1.1 200 ") or exchange.header not in head:
            raise Mismatch(f"a wrong head: {head[:300]!r}")
        length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
        if int(length or b"-1") != len(exchange.body):
            raise Mismatch(f"Content-Length is {length!r} instead of {len(exchange.body)}")
        self.expected_size_bytes = end + 4 + len(exchange.body)

    def _check(self) -> None:
        body = self.exchanges[self.next].body
        if len(self.received) != self.expected_size_bytes or not self.received.endswith(body):
            request = self.exchanges[self.next].request.split(b"\r\n")[0].decode()
            raise Mismatch(f"the answer to {request} is not what the application sends")


@dataclasses.dataclass(frozen=True)
class Round:
    """What one loop did in one round."""

    requests: int
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    server_cpu_s: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def server_cpu_us(self) -> float:
        """The server's CPU time per request, which other load on the machine changes least."""
        return self.server_cpu_s / self.requests * 1e6

    @property
    def server_share(self) -> float:
        """How much of a core the server got."""
        return self.server_cpu_s / self.seconds


class Client:
    """All connections to one server, on plain epoll: no event loop takes part on this side."""

    def __init__(self, server: Server, connections: int, exchanges: list[Exchange]) -> None:
        self.server = server
        self.poller = select.epoll()
        self.connections: dict[int, Connection] = {}
        for index in range(connections):
            connection = Connection(server.port, exchanges, index * 7 % len(exchanges))
            self.connections[connection.sock.fileno()] = connection
            self.poller.register(connection.sock, select.EPOLLIN)

    def close(self) -> None:
        """Close every connection."""
        for connection in self.connections.values():
            connection.sock.close()
        self.poller.close()

    def drive(self, seconds: float) -> list[int]:
        """Keep every connection busy for so long, finish what is under way; return latencies."""
        latencies_ns: list[int] = []
        end = time.monotonic() + seconds
        for connection in self.connections.values():
            connection.send()
        under_way = len(self.connections)
        while under_way:
            events = self.poller.poll(STALL_S)
            if not events:
                raise DemoError(f"the server on {self.server.name} did not answer in {STALL_S} s")
            more = time.monotonic() < end
            for fd, _ in events:
                connection = self.connections[fd]
                latency_ns = connection.receive()
                if not latency_ns:
                    continue
                latencies_ns.append(latency_ns)
                if more:
                    connection.send()
                else:
                    under_way -= 1
        return latencies_ns

    def measure(self, seconds: float) -> Round:
        """Drive for so long and sum up."""
        cpu_s, begin = self.server.cpu_s(), time.monotonic()
        latencies_ns = sorted(self.drive(seconds))
        elapsed_s = time.monotonic() - begin
        count = len(latencies_ns)

        def percentile_ms(percent: int) -> float:
            return latencies_ns[min(count - 1, count * percent // 100)] / 1e6

        return Round(
            requests=count,
            seconds=elapsed_s,
            p50_ms=percentile_ms(50),
            p90_ms=percentile_ms(90),
            p99_ms=percentile_ms(99),
            server_cpu_s=self.server.cpu_s() - cpu_s,
        )


# ---------------------------------------------------------------------- the run


def two_cores() -> tuple[int, int] | tuple[None, None]:
    """A core for the server and another one for the client, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[-1], cores[0]) if len(cores) > 1 else (None, None)


def _label(server: Server) -> str:
    if server.name == "asyncio":
        return f"asyncio {platform.python_version()}"
    monitor = f" ({server.monitor})" if server.monitor else ""
    return f"{server.name} {importlib.import_module(server.name).__version__}{monitor}"


def run_rounds(
    names: list[str], connections: int, round_s: float
) -> tuple[dict[str, list[Round]], dict[str, str]]:
    """Start all servers, warm each up, then measure them in rounds of fresh random order."""
    server_core, client_core = two_cores()
    exchanges = make_exchanges(500)
    results: dict[str, list[Round]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(_server(name, server_core)) for name in names]
        if client_core is not None:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, {client_core})
        clients = []
        for server in servers:
            client = Client(server, connections, exchanges)
            stack.callback(client.close)
            client.drive(WARM_UP_S)
            clients.append(client)
        for _ in range(ROUNDS):
            for client in random.sample(clients, len(clients)):
                results[client.server.name].append(client.measure(round_s))
        return results, {server.name: _label(server) for server in servers}


def middle(rounds: list[Round], field: str) -> float:
    """The median of the rounds."""
    return statistics.median([float(getattr(one, field)) for one in rounds])


def ratios(results: dict[str, list[Round]], field: str) -> str:
    """Compare uringloop with each other loop: the median of the ratios of their rounds."""

    def ratio(other: str) -> float:
        pairs = zip(results["uringloop"], results[other], strict=True)
        return float(statistics.median([getattr(a, field) / getattr(b, field) for a, b in pairs]))

    others = [name for name in results if name != "uringloop"]
    return ", ".join(f"{ratio(name):.2f} x {name}'s" for name in others)


def render(results: dict[str, list[Round]], labels: dict[str, str], layout: str) -> str:
    """Put the run into a table and the sentences that belong to it."""
    width = max(len(label) for label in labels.values()) + 2
    head = f"{'loop':<{width}}{'requests/s':>11}{'(min - max)':>18}"
    lines = [
        "One aiohttp application: of ten requests six JSON, three POST 1 KiB, one GET of 100 KiB.",
        layout,
        "loops interleaved; medians of the rounds, and the lowest and highest rate.",
        "",
        head + f"{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'server us/request':>19}",
    ]
    for name in LOOPS:
        if name not in results:
            lines.append(f"{name:<{width}}{MISSING_UVLOOP}")
            continue
        rounds = results[name]
        rates = [one.rate for one in rounds]
        lines.append(
            f"{labels[name]:<{width}}{middle(rounds, 'rate'):>11.0f}"
            f"{f'({min(rates):.0f} - {max(rates):.0f})':>18}"
            + "".join(f"{middle(rounds, f'p{percent}_ms'):>9.2f}" for percent in (50, 90, 99))
            + f"{middle(rounds, 'server_cpu_us'):>19.0f}"
        )
    total = sum(one.requests for rounds in results.values() for one in rounds)
    lines += ["", f"{total} answers were compared byte for byte: all right."]
    for what, field in (("Rate", "rate"), ("Server CPU per request", "server_cpu_us")):
        lines.append(f"{what} of uringloop: {ratios(results, field)}.")
    return "\n".join([*lines, *_notes(results)])


def _notes(results: dict[str, list[Round]]) -> list[str]:
    notes = ["Most of a request is aiohttp's own work; for the loops by themselves: make bench."]
    if two_cores() == (None, None):
        notes.append("There is one core only: client and server shared it, the rates are low.")
    held_up = [
        name for name, rounds in results.items() if middle(rounds, "server_share") < SATURATED
    ]
    if held_up:
        notes.append(
            f"The server was not saturated on {', '.join(held_up)} (client or other load): trust "
            "CPU, not rates."
        )
    return notes


def main(argv: list[str]) -> int:
    """Run the demo; 0 when every answer was right, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m uringloop demo",
        description="An aiohttp application on uringloop, asyncio and uvloop, side by side.",
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="measuring time in all (12)")
    parser.add_argument("--connections", type=int, default=32, help="kept alive per loop (32)")
    arguments = parser.parse_args(argv)
    if arguments.seconds <= 0 or arguments.connections <= 0:
        parser.error("--seconds and --connections must be above zero")
    if importlib.util.find_spec("aiohttp") is None:
        print(MISSING_AIOHTTP, file=sys.stderr)
        return 1
    try:
        uringloop.new_event_loop().close()
    except (OSError, ValueError) as error:
        print(f"uringloop: no loop can run: {error} (python -m uringloop doctor)", file=sys.stderr)
        return 1
    names = [name for name in LOOPS if name != "uvloop" or importlib.util.find_spec(name)]
    round_s = arguments.seconds / (ROUNDS * len(names))
    try:
        results, labels = run_rounds(names, arguments.connections, round_s)
    except (DemoError, OSError) as error:
        print(f"uringloop: the demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("uringloop: the demo was interrupted", file=sys.stderr)
        return 130
    layout = f"{arguments.connections} keep-alive connections; {ROUNDS} rounds of {round_s:.2f} s,"
    print(render(results, labels, layout))
    return 0
