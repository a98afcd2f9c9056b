"""What is measured: the cells (mode, message size, connections) of a full and of a quick run.

The promise: full() has every cell that the targets name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

KIB = 1024
HTTP_MODES = ("uvicorn-httptools", "uvicorn-h11", "aiohttp")
HTTP_CONNECTIONS = 50

TITLES = {
    "raw": "Echo, Protocol",
    "buffered": "Echo, BufferedProtocol",
    "streams": "Echo, streams",
    "sock": "Echo, sock_recv_into and sock_sendall",
    "tls": "Echo over TLS, Protocol",
    "udp": "Echo over UDP, DatagramProtocol",
    "churn": "Connect, one echo, close",
    "uvicorn-httptools": "HTTP, uvicorn with httptools",
    "uvicorn-h11": "HTTP, uvicorn with h11",
    "aiohttp": "HTTP, aiohttp",
}


@dataclass(frozen=True)
class Cell:
    mode: str
    size_bytes: int
    connections: int
    think_us: int = 0  # the peer's pause between an answer and its next request

    @property
    def name(self) -> str:
        name = f"{self.mode}/{self.size_bytes // KIB}KiB/{self.connections}"
        return f"{name}/{self.think_us}us" if self.think_us else name

    @property
    def server(self) -> str:
        """The server's mode: churn is the client's business."""
        return "raw" if self.mode == "churn" else self.mode

    @property
    def client(self) -> str:
        if self.mode in HTTP_MODES:
            return "http"
        return self.mode if self.mode in ("tls", "udp", "churn") else "tcp"


def product(modes: Sequence[str], sizes: Sequence[int], connections: Sequence[int]) -> list[Cell]:
    return [Cell(mode, size * KIB, n) for mode in modes for size in sizes for n in connections]


# The cells that the targets are set for, see targets.py.
ECHO_TARGETS = product(("raw", "buffered", "streams"), (1, 10, 100), (1, 10, 100, 1000))
SOCK_TARGETS = product(("sock",), (1, 10, 100), (10, 100, 1000))

# A turn of a thousand connections is the longest; large messages make the longest system calls.
GIL_LOADS = (Cell("raw", KIB, 100), Cell("raw", KIB, 1000), Cell("raw", 100 * KIB, 100))


def full() -> list[Cell]:
    cells = ECHO_TARGETS + SOCK_TARGETS
    cells += product(("tls",), (1, 100), (10, 100)) + product(("udp",), (1,), (10, 50, 100))
    cells += [Cell("udp", 10 * KIB, 10), Cell("churn", KIB, 10), Cell("churn", KIB, 100)]
    # A response has the size of the application's body; the size of the cell is not used.
    return cells + [Cell(mode, 0, HTTP_CONNECTIONS) for mode in HTTP_MODES]


QUICK = (
    "raw/1KiB/10",
    "raw/1KiB/100",
    "raw/100KiB/100",
    "buffered/1KiB/100",
    "streams/1KiB/100",
    "sock/1KiB/100",
    "tls/1KiB/100",
    "udp/1KiB/10",
    "churn/1KiB/100",
    "uvicorn-httptools/0KiB/50",
    "aiohttp/0KiB/50",
)


def select(patterns: list[str]) -> list[Cell]:
    """The cells of a full run that match one of the patterns, e.g. "raw/*" or "*/1KiB/100"."""
    return [cell for cell in full() if any(fnmatch(cell.name, p) for p in patterns)]
