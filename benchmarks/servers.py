"""The servers under load: one process per loop and mode, `python -m benchmarks.servers LOOP MODE`.

Each mode is the plainest program that a user of that interface would write. The promise: the
listening socket comes from here, the loop's behaviour (TCP_NODELAY, buffers, batching) is its
own. The port is printed once the server answers; where the loop has statistics(), SIGUSR1 prints
them as one JSON line.
"""

import argparse
import asyncio
import dataclasses
import json
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks import loops

BACKLOG = 2048
READ_BYTES = 256 * 1024
LIFE_LIMIT_S = 120  # a server whose runner was killed ends by itself
HTTP_BODY = b"Hello, World!"
Serve = Callable[[socket.socket, argparse.Namespace], Awaitable[object]]


class Echo(asyncio.Protocol):
    """What arrives is written back at once."""

    # Any: not every loop's transport is an asyncio.Transport.

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class BufferedEcho(asyncio.BufferedProtocol):
    """The same, received into the protocol's own buffer; the transport copies what it keeps."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_BYTES))

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(self.buffer[:nbytes])


class DatagramEcho(asyncio.DatagramProtocol):
    """Every datagram goes back to its sender."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


async def serve_raw(sock: socket.socket, _: argparse.Namespace) -> object:
    return await asyncio.get_running_loop().create_server(Echo, sock=sock, backlog=BACKLOG)


async def serve_buffered(sock: socket.socket, _: argparse.Namespace) -> object:
    return await asyncio.get_running_loop().create_server(BufferedEcho, sock=sock, backlog=BACKLOG)


async def serve_tls(sock: socket.socket, options: argparse.Namespace) -> object:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.certificate)
    loop = asyncio.get_running_loop()
    return await loop.create_server(Echo, sock=sock, backlog=BACKLOG, ssl=context)


async def echo_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def serve_streams(sock: socket.socket, _: argparse.Namespace) -> object:
    return await asyncio.start_server(echo_stream, sock=sock, backlog=BACKLOG)


async def echo_socket(sock: socket.socket) -> None:
    """recv_into one buffer and sendall, the sock_* interface as its users write it."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(READ_BYTES))
    with sock:
        try:
            while n := await loop.sock_recv_into(sock, buffer):
                await loop.sock_sendall(sock, buffer[:n])
        except ConnectionError:
            pass


async def accept_sockets(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    while True:
        sock, _ = await loop.sock_accept(listener)
        task = loop.create_task(echo_socket(sock))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def serve_sock(sock: socket.socket, _: argparse.Namespace) -> object:
    sock.setblocking(False)
    return asyncio.get_running_loop().create_task(accept_sockets(sock))


async def serve_udp(sock: socket.socket, _: argparse.Namespace) -> object:
    return await asyncio.get_running_loop().create_datagram_endpoint(DatagramEcho, sock=sock)


async def hello(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The ASGI application."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(HTTP_BODY))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": HTTP_BODY})


async def serve_uvicorn(sock: socket.socket, parser: str) -> object:
    import uvicorn

    config = uvicorn.Config(
        hello, http=parser, ws="none", lifespan="off", log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    return task


async def serve_httptools(sock: socket.socket, _: argparse.Namespace) -> object:
    return await serve_uvicorn(sock, "httptools")


async def serve_h11(sock: socket.socket, _: argparse.Namespace) -> object:
    return await serve_uvicorn(sock, "h11")


async def serve_aiohttp(sock: socket.socket, _: argparse.Namespace) -> object:
    from aiohttp import web

    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=HTTP_BODY, content_type="text/plain")

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock, backlog=BACKLOG).start()
    return runner


SERVERS: dict[str, Serve] = {
    "raw": serve_raw,
    "buffered": serve_buffered,
    "streams": serve_streams,
    "sock": serve_sock,
    "tls": serve_tls,
    "udp": serve_udp,
    "uvicorn-httptools": serve_httptools,
    "uvicorn-h11": serve_h11,
    "aiohttp": serve_aiohttp,
}


def bound_socket(mode: str) -> socket.socket:
    # The protocol is named as getaddrinfo() does in create_server(host, port): stock asyncio sets
    # TCP_NODELAY only where it reads IPPROTO_TCP, and uvicorn on it then does 22 requests/s.
    if mode == "udp":
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    if mode == "udp":
        # The default of 208 KiB overflows at about 100 waiting datagrams of 1 KiB.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.setblocking(False)
    else:
        sock.listen(BACKLOG)
    return sock


def print_line(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def answer_statistics(loop: Any) -> None:
    if hasattr(loop, "statistics"):
        show = lambda: print_line(dataclasses.asdict(loop.statistics()))  # noqa: E731
        loop.add_signal_handler(signal.SIGUSR1, show)


async def serve(options: argparse.Namespace) -> None:
    sock = bound_socket(options.mode)
    port = sock.getsockname()[1]
    kept = await SERVERS[options.mode](sock, options)
    loop = asyncio.get_running_loop()
    answer_statistics(loop)
    print_line({"port": port, "monitor": getattr(loop, "monitor", None)})
    if isinstance(kept, asyncio.Task):
        await kept
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop")
    parser.add_argument("mode", choices=SERVERS)
    parser.add_argument("--certificate", help="PEM file with key and certificate, for mode tls")
    parser.add_argument("--gil-probe", nargs=2, metavar=("LIBRARY", "CORE"), help="see gil.py")
    options = parser.parse_args()
    signal.alarm(LIFE_LIMIT_S)
    if options.gil_probe:
        from benchmarks import gil

        library, core = options.gil_probe
        gil.start_probe(library, int(core))
    loop = loops.make(options.loop)
    loop.run_until_complete(serve(options))


if __name__ == "__main__":
    main()
