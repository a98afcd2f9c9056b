"""One sample: a server and the C client against it, for a bounded time.

The promise: a sample is either the client's figures, every byte checked, or the reason why not.
"""

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import Cell
from benchmarks.host import Child, ChildError, Host
from benchmarks.servers import HTTP_BODY

SKIPPED = 77  # exit status of the client where libssl is missing


@dataclass(frozen=True)
class Times:
    warmup_s: float
    window_s: float


def start_server(host: Host, loop: str, cell: Cell) -> Child:
    if cell.mode == "tls" and not host.certificate:
        raise ChildError("skipped: no openssl command to make a certificate")
    extra = ("--certificate", host.certificate) if cell.mode == "tls" and host.certificate else ()
    return host.python("servers", loop, cell.server, *extra)


def apply_load(host: Host, server: Child, port: int, cell: Cell, times: Times) -> dict[str, Any]:
    """The client's JSON; the client reads the server's CPU clock at both ends of its window."""
    options = {
        "-m": cell.client,
        "-p": port,
        "-s": cell.size_bytes or 1,
        "-c": cell.connections,
        "-k": cell.think_us,
        "-w": times.warmup_s,
        "-t": times.window_s,
        "-P": server.pid,
        "-b": HTTP_BODY.decode(),
    }
    argv = [host.client] + [str(word) for pair in options.items() for word in pair]
    with Child(argv, host.client_core) as client:
        result: dict[str, Any] = json.loads(client.read_line(40 + times.warmup_s + times.window_s))
        status = client.process.wait(10)
    if status == SKIPPED:
        raise ChildError(f"skipped: {result['skip']}")
    if status or not result["requests"]:
        kind = "MISMATCH" if result["mismatches"] else "error"
        result["failure"] = f"{kind}: {result['reason'] or 'no request was answered'}"
    return result


def sample(host: Host, loop: str, cell: Cell, times: Times) -> dict[str, Any]:
    """What goes wrong before the load is marked "start": repeating will not mend it."""
    try:
        with start_server(host, loop, cell) as server:
            port = json.loads(server.read_line())["port"]
            result = apply_load(host, server, port, cell, times)
            words = server.error_text().strip().splitlines()
            return result | ({"stderr": words[-1][:200]} if words else {})
    except (ChildError, json.JSONDecodeError) as error:
        return {"failure": str(error), "start": True}
