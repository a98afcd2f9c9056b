"""What we rest on and what we promise of ourselves: asyncio's private hooks, costs and sizes.

The promise: a Python that moves a hook of asyncio fails here, by name, before it fails elsewhere.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import re
import resource
import runpy
import selectors
import socket
import ssl
import subprocess
import sys
import tracemalloc
import weakref
from asyncio import base_events, sslproto
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import uringloop
from tests import support
from tests.support import ROOT, run
from uringloop import _core, _fdmon, fdmon, hosted, policy, selector
from uringloop import loop as loop_module

# typeshed does not know asyncio's private classes.
selector_events: Any = importlib.import_module("asyncio.selector_events")
unix_events: Any = importlib.import_module("asyncio.unix_events")

Loop = uringloop.EventLoop

# -------------------------------------------------------------------------- asyncio's private hooks

#: Where asyncio must have them. A class's attributes here; an instance's in INSTANCE_HOOKS.
HOOKS = {
    selector_events.BaseSelectorEventLoop: {
        "_make_socket_transport",
        "_make_datagram_transport",
        "_make_ssl_transport",
        "_accept_connection",
        "_start_serving",
        "_ensure_fd_no_transport",
        "_add_reader",
        "_remove_reader",
        "_add_writer",
        "_remove_writer",
        "_process_events",
        "_write_to_self",
    },
    base_events.BaseEventLoop: {
        "_run_once",
        "_add_callback",
        "_timer_handle_cancelled",
        "_check_thread",
        "_check_callback",
        "_check_closed",
        "_check_running",
        "_set_coroutine_origin_tracking",
        "_asyncgen_firstiter_hook",
        "_asyncgen_finalizer_hook",
    },
    unix_events._UnixSelectorEventLoop: {"_make_read_pipe_transport"},
    selector_events._SelectorSocketTransport: {"max_size"},
    selector_events._SelectorDatagramTransport: {"max_size"},
    unix_events._UnixReadPipeTransport: {"max_size"},
    sslproto.SSLProtocol: {"max_size"},
    selectors._BaseSelectorImpl: {"_fileobj_lookup", "get_key", "close"},
    base_events: {"_check_ssl_socket"},
}
#: What a stock loop's __init__ must set; ours takes it over.
LOOP_HOOKS = {
    "_clock_resolution",
    "_closed",
    "_csock",
    "_current_handle",
    "_debug",
    "_ready",
    "_scheduled",
    "_selector",
    "_signal_handlers",
    "_stopping",
    "_task_factory",
    "_thread_id",
    "_timer_cancelled_count",
    "_transports",
}
TLS_HOOKS = {"_ssl_protocol", "_app_transport"}  # of a TLS transport and of its protocol
OTHERS = {"_core", "_get_running_loop", "_set_running_loop"}  # ours, and asyncio's documented ones
HANDLE_HOOKS = {"_repr_info", "_run", "_cancelled", "_scheduled"}


@contextlib.asynccontextmanager
async def connected(
    make: Callable[[], asyncio.Protocol] = asyncio.Protocol,
) -> AsyncIterator[tuple[Any, socket.socket]]:
    """A transport of our loop, and the plain socket at its other end."""
    left, right = socket.socketpair()
    right.setblocking(False)
    with right:
        transport, _ = await asyncio.get_running_loop().create_connection(make, sock=left)
        yield transport, right
        transport.abort()
        await asyncio.sleep(0)


def test_every_private_hook_is_where_we_expect_it(loop: Loop) -> None:
    for owner, names in HOOKS.items():
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__} has no {name} any more"

    async def main() -> None:
        async with connected() as (transport, _):
            assert transport.max_size == loop_module._STREAM_READ_MAX_BYTES

    run(loop, main())
    with contextlib.closing(asyncio.SelectorEventLoop()) as stock_loop:
        for name in LOOP_HOOKS:
            assert name in vars(stock_loop), f"a loop has no {name} any more"
            assert name in dir(loop)
    for name in HANDLE_HOOKS:
        assert hasattr(asyncio.TimerHandle, name), f"a handle has no {name} any more"
    with selectors.DefaultSelector() as stock:
        assert hasattr(stock, "_fd_to_key")
        assert hasattr(stock, "_map")
        assert isinstance(stock.get_map(), selectors._SelectorMapping)  # type: ignore[attr-defined]


def private_names(module: Any) -> set[str]:
    """The private attributes that a module's code mentions."""
    return {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
    }


def own_names(module: Any) -> set[str]:
    """The private names that a module makes itself: functions, constants, attributes it assigns."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def own_names_of_the_core() -> set[str]:
    return set(vars(_core.LoopCore)) - set(dir(asyncio.SelectorEventLoop)) - LOOP_HOOKS


def test_the_docstring_of_loop_py_lists_every_private_hook_that_is_used() -> None:
    listed = set(re.findall(r"\b_[A-Za-z]\w+", loop_module.__doc__ or ""))
    stock = {name for owner in HOOKS for name in dir(owner)}
    overridden = {
        name
        for name in vars(Loop)
        if name in stock and not name.startswith("__") and name.startswith("_")
    }
    used = (
        private_names(loop_module) - own_names(loop_module) - own_names_of_the_core() | overridden
    )
    assert len(used) >= 5
    expected_elsewhere = {"_SelectorSocketTransport", "_SelectorDatagramTransport"}
    assert used - expected_elsewhere <= listed, "used, but not in the list"
    known = {name for names in HOOKS.values() for name in names}
    known |= LOOP_HOOKS | TLS_HOOKS | HANDLE_HOOKS
    owners = {owner.__name__ for owner in HOOKS}
    assert listed - owners - OTHERS <= known, (
        "in the list, but not checked by the test of the hooks"
    )


def test_only_loop_py_and_the_selector_use_private_names_of_the_standard_library() -> None:
    for module in (policy, fdmon, hosted):
        foreign = private_names(module) - own_names(module) - {"_get_running_loop"}
        assert {name for name in foreign if hasattr(asyncio.SelectorEventLoop, name)} == {
            name for name in foreign if name == "_loop_factory"
        }
    own = own_names(selector) - {"_map"}
    assert private_names(selector) - own <= {
        "_BaseSelectorImpl",
        "_SelectorMapping",
        "_fd_to_key",
        "_fileobj_lookup",
        "_map",
        "_selector",
        "_replace",  # a named tuple's public method
    }


def shapes(signature: inspect.Signature) -> Iterator[tuple[list[object], dict[str, object]]]:
    """Ways to call it: all by keyword, all by position, each optional argument given or not."""
    parameters = [
        p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    required = [p for p in parameters if p.default is p.empty]
    optional = [p for p in parameters if p.default is not p.empty]
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    yield (
        [p.name for p in required if p in positional],
        {p.name: p for p in required if p not in positional},
    )
    yield [p.name for p in positional], {p.name: p for p in parameters if p not in positional}
    if all(p.kind is not p.POSITIONAL_ONLY for p in parameters):
        yield [], {p.name: p for p in parameters if p.name != "self"}
    for option in optional:
        yield (
            [p.name for p in required if p in positional],
            {
                **{p.name: p for p in required if p not in positional},
                option.name: option,
            },
        )


OVERRIDES = [
    (ours, name)
    for ours in (Loop, _core.LoopCore)
    for name, value in vars(ours).items()
    if inspect.isroutine(value)
    and any(name in vars(base) for base in asyncio.SelectorEventLoop.__mro__[:-1])
    and not name.startswith("__")
]


def test_there_are_overrides_to_compare() -> None:
    names = {name for _, name in OVERRIDES}
    assert {"_make_socket_transport", "_make_ssl_transport", "start_tls", "call_soon"} <= names


@pytest.mark.parametrize(("ours", "name"), OVERRIDES)
def test_an_override_accepts_what_the_base_class_accepts(ours: type, name: str) -> None:
    base = next(vars(b)[name] for b in asyncio.SelectorEventLoop.__mro__ if name in vars(b))
    mine = inspect.signature(vars(ours)[name])
    for args, kwargs in shapes(inspect.signature(base)):
        mine.bind(*(args or ["self"]), **kwargs)
    assert inspect.iscoroutinefunction(base) is inspect.iscoroutinefunction(vars(ours)[name])


def test_that_comparison_can_fail() -> None:
    def base(self: object, sock: object, *, context: object = None) -> None: ...

    def too_narrow(self: object, sock: object) -> None: ...

    mine = inspect.signature(too_narrow)
    calls = list(shapes(inspect.signature(base)))
    mine.bind(*calls[0][0], **calls[0][1])
    args, kwargs = calls[-1]
    with pytest.raises(TypeError, match="context"):
        mine.bind(*args, **kwargs)


def test_the_loop_overrides_nothing_but_the_turn_transports_and_sock_calls() -> None:
    assert {name for _, name in OVERRIDES} - {"start_tls"} == {
        "sock_accept",
        "sock_recv",
        "sock_recv_into",
        "sock_recvfrom",
        "sock_recvfrom_into",
        "sock_sendall",
        "sock_sendto",
        "_accept_connection",
        "_add_callback",
        "_add_reader",
        "_add_writer",
        "_remove_reader",
        "_remove_writer",
        "_run_once",
        "_timer_handle_cancelled",
        "call_at",
        "call_later",
        "call_soon",
        "call_soon_threadsafe",
        "create_future",
        "create_task",
        "get_debug",
        "stop",
        "close",
        "run_forever",
        "remove_signal_handler",
        "is_closed",
        "is_running",
        "time",
        "_make_datagram_transport",
        "_make_read_pipe_transport",
        "_make_socket_transport",
        "_make_ssl_transport",
    }


def test_transports_carry_what_libraries_reach_for(loop: Loop) -> None:
    async def main() -> None:
        async with connected() as (transport, _):
            names = (
                "_sendfile_compatible _start_tls_compatible _sock _sock_fd _protocol_paused _loop"
            )
            names += " _force_close _make_empty_waiter _reset_empty_waiter _extra"
            for name in names.split():
                assert hasattr(transport, name), name
            assert loop._transports[transport._sock_fd] is transport
            assert isinstance(transport, selector_events._SelectorSocketTransport)
            assert weakref.ref(transport)() is transport

    run(loop, main())


def test_handles_pass_as_asyncios_own(loop: Loop) -> None:
    handle, timer = loop.call_soon(print), loop.call_later(1, print)
    assert handle.__class__ is asyncio.Handle
    assert timer.__class__ is asyncio.TimerHandle
    handle.cancel()
    timer.cancel()


# ------------------------------------------------------------------------------- the cost of a read


class Sizes(asyncio.Protocol):
    """Counts bytes, and the largest piece."""

    def __init__(self) -> None:
        self.total = self.largest = self.slack = 0
        self.changed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.total += len(data)
        self.largest = max(self.largest, len(data))
        self.slack = max(self.slack, sys.getsizeof(data) - len(data))
        self.changed.set()

    def eof_received(self) -> None:
        self.changed.set()

    async def until(self, size_bytes: int) -> None:
        while self.total < size_bytes:
            self.changed.clear()
            await self.changed.wait()


def test_a_large_stream_arrives_in_exact_pieces_no_larger_than_one_read(loop: Loop) -> None:
    sizes: list[Sizes] = []

    def make() -> Sizes:
        sizes.append(Sizes())
        return sizes[0]

    async def main() -> None:
        async with connected(make) as (_, sock):
            await asyncio.get_running_loop().sock_sendall(sock, bytes(4 << 20))
            await sizes[0].until(4 << 20)

    run(loop, main())
    assert 0 < sizes[0].largest <= loop_module._STREAM_READ_MAX_BYTES
    assert sizes[0].slack == sys.getsizeof(b"")


def test_a_read_stays_below_the_threshold_of_mmap_and_above_a_hundred_kibibytes() -> None:
    assert 100 * 1024 < loop_module._STREAM_READ_MAX_BYTES < 128 * 1024


Send = Callable[[], Awaitable[None]]


@contextlib.asynccontextmanager
async def stream_receiver() -> AsyncIterator[tuple[Sizes, Send]]:
    sizes = Sizes()
    loop = asyncio.get_running_loop()
    async with connected(lambda: sizes) as (_, sock):
        yield sizes, lambda: loop.sock_sendall(sock, bytes(1024))


@contextlib.asynccontextmanager
async def pipe_receiver() -> AsyncIterator[tuple[Sizes, Send]]:
    sizes = Sizes()
    read_fd, write_fd = os.pipe()
    reader = os.fdopen(read_fd, "rb", 0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: sizes, reader)

    async def send() -> None:
        os.write(write_fd, bytes(1024))

    yield sizes, send
    transport.close()
    os.close(write_fd)
    await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def udp_receiver() -> AsyncIterator[tuple[Sizes, Send]]:
    class Datagrams(asyncio.DatagramProtocol, Sizes):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.data_received(data)

    sizes = Datagrams()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: sizes, local_addr=("127.0.0.1", 0))
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(transport.get_extra_info("sockname"))

        async def send() -> None:
            sock.send(bytes(1024))

        yield sizes, send
    transport.close()
    await asyncio.sleep(0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for localhost, made now, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 7"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", key, "-out", certificate]
    try:
        subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    return certificate, key


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


def contexts(certificate: str, key: str) -> Contexts:
    """Server's and client's side of TLS."""
    server, client = (ssl.SSLContext(p) for p in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    server.load_cert_chain(certificate, key)
    client.load_verify_locations(certificate)
    return server, client


def tls_receiver(tls: Contexts, upgrade: bool) -> Callable[[], Any]:
    """The way in for a TLS connection, from its start or by start_tls."""

    @contextlib.asynccontextmanager
    async def receiver() -> AsyncIterator[tuple[Sizes, Send]]:
        sizes, loop = Sizes(), asyncio.get_running_loop()
        left, right = socket.socketpair()
        server: Any = None
        server_ssl, client_ssl = (None, None) if upgrade else tls
        accepting = asyncio.ensure_future(
            loop.connect_accepted_socket(asyncio.Protocol, right, ssl=server_ssl)
        )
        client: Any
        client, _ = await loop.create_connection(
            lambda: sizes,
            sock=left,
            ssl=client_ssl,
            server_hostname=None if upgrade else "localhost",
        )
        server, protocol = await accepting
        if upgrade:
            client, server = await asyncio.gather(
                loop.start_tls(client, sizes, tls[1], server_hostname="localhost"),
                loop.start_tls(server, protocol, tls[0], server_side=True),
            )

        async def send() -> None:
            server.write(bytes(1024))

        yield sizes, send
        client.abort()
        server.abort()
        await asyncio.sleep(0.01)

    return receiver


WAYS = ["stream", "pipe", "udp", "tls", "start_tls"]


def receiver_of(way: str, tls: Contexts) -> Callable[[], Any]:
    plain = {"stream": stream_receiver, "pipe": pipe_receiver, "udp": udp_receiver}
    return plain.get(way) or tls_receiver(tls, upgrade=way == "start_tls")


async def exchange(receiver: Callable[[], Any], messages: int, measure: Callable[[], int]) -> int:
    """How much a measure grows while this many messages of 1 KiB arrive one by one."""
    async with receiver() as (sizes, send):
        for number in itertools.count(1):
            if number == 20:
                before = measure()
            await send()
            await sizes.until(1024 * number)
            if number == 20 + messages:
                return measure() - before
    raise AssertionError


def faults_per_1000_messages(monitor: str, certificate: str, key: str) -> dict[str, int]:
    """What each way costs on our loop, and what a stream costs on asyncio's."""

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

    tls = contexts(certificate, key)
    found = {}
    for way in [*WAYS, "asyncio's own stream"]:
        stock = way.startswith("asyncio")
        loop = asyncio.SelectorEventLoop() if stock else uringloop.new_event_loop(monitor=monitor)
        receiver = receiver_of("stream" if stock else way, tls)
        found[way] = run(loop, exchange(receiver, 1000, faults))
        loop.close()
    return found


def test_a_message_of_1_kib_maps_no_memory(monitor: str, certificate: tuple[str, str]) -> None:
    code = "import json, sys\nfrom tests.test_contract import faults_per_1000_messages as measure\n"
    done = support.python(
        "-c",
        code + "print(json.dumps(measure(*sys.argv[1:])))",
        monitor,
        *certificate,
        cwd=ROOT,
        MALLOC_MMAP_THRESHOLD_=str(128 * 1024),  # glibc's own value, kept from adapting itself
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    control = found.pop("asyncio's own stream")
    assert max(found.values()) < 300, found
    if os.confstr("CS_GNU_LIBC_VERSION"):
        assert control > 1000, "this measurement would not notice a mapping per read"


class Keeper(asyncio.Protocol):
    """Holds what its connections received until all of them have."""

    held: ClassVar[list[bytes]] = []

    def data_received(self, data: bytes) -> None:
        self.held.append(data)


def faults_per_turn(monitor: str) -> float:
    """Page faults while 40 connections bring 40 KiB each and all of it is dropped."""

    async def main() -> float:
        ends = [socket.socketpair() for _ in range(40)]
        for ours, _ in ends:
            await loop.create_connection(Keeper, sock=ours)
        turns, before = 120, 0
        for number in range(turns):
            if number == 20:
                before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            for _, theirs in ends:
                theirs.send(bytes(40 * 1024))
            while sum(map(len, Keeper.held)) < 40 * 1024 * len(ends):
                await asyncio.sleep(0)
            Keeper.held.clear()
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        for pair in ends:
            for end in pair:
                end.close()
        return faults / (turns - 20)

    loop = uringloop.new_event_loop(monitor=monitor)
    return loop.run_until_complete(main())


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="it is glibc that trims its heap")
@pytest.mark.skipif("URINGLOOP_TEST_SANITIZED" in os.environ, reason="the heap is the sanitizer's")
def test_what_a_turn_frees_stays_with_the_process(monitor: str) -> None:
    code = "import sys\nfrom tests.test_contract import faults_per_turn as measure\n"

    command = ("-c", code + "print(measure(sys.argv[1]))", monitor)
    trimming = support.python(*command, cwd=ROOT, MALLOC_TRIM_THRESHOLD_=str(128 * 1024)).stdout
    assert float(support.python(*command, cwd=ROOT).stdout) < 20
    assert float(trimming) > 100, "this measurement notices nothing"


@pytest.mark.parametrize("way", WAYS)
def test_no_read_asks_for_as_much_as_128_kib(
    loop: Loop, way: str, certificate: tuple[str, str]
) -> None:
    peak = 0

    def measure() -> int:
        nonlocal peak
        if not peak:
            tracemalloc.reset_peak()
            peak = tracemalloc.get_traced_memory()[0]
            return 0
        return tracemalloc.get_traced_memory()[1] - peak

    tracemalloc.start(1)
    try:
        grown = run(loop, exchange(receiver_of(way, contexts(*certificate)), 50, measure), 30)
    finally:
        tracemalloc.stop()
    assert 0 <= grown < 128 * 1024


# --------------------------------------------------------------------------- one list of everything

FFI = ROOT / "ffi"
in_checkout = pytest.mark.skipif(not FFI.is_dir(), reason="the C sources are not here")


def lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def product_files() -> list[Path]:
    folders = ("ffi", "uringloop", "uringloop/_core")
    files = [path for folder in folders for path in (ROOT / folder).iterdir()]
    suffixes = (".c", ".h", ".py", ".pyi", ".pyx", ".pxd", ".pxi")
    return [path for path in files if path.suffix in suffixes]


@in_checkout
def test_the_c_core_fits_3050_lines_the_hot_path_3400_and_everything_9200() -> None:
    c_core = [path for path in product_files() if path.parent == FFI]
    hot_path = [path for path in product_files() if path.parent.name == "_core"]
    assert len(c_core) >= 8
    assert len(hot_path) >= 8
    assert lines(*c_core) <= 3050
    assert lines(*hot_path) <= 3400
    assert lines(*product_files()) <= 9200


@in_checkout
def test_every_source_file_opens_with_why_it_exists() -> None:
    for path in product_files():
        text = path.read_text()
        if path.suffix in (".c", ".h"):
            opening = text.removeprefix("/*").partition("*/")[0] if text.startswith("/*") else ""
        elif path.suffix == ".py":
            opening = ast.get_docstring(ast.parse(text)) or ""
        else:
            opening = text.lstrip('"#').splitlines()[0]
        assert len(opening.split()) >= 5, f"{path.name} does not say why it exists"


@in_checkout
def test_no_line_is_longer_than_130_columns() -> None:
    for path in product_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 130, f"{path.name}:{number}"


def importers(name: str) -> set[str]:
    found = set()
    for path in (ROOT / "uringloop").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            if any(part == name for full in names for part in full.split(".")):
                found.add(path.name)
    return found


def test_only_fdmon_py_knows_the_c_module() -> None:
    assert importers("_fdmon") == {"fdmon.py"}


@pytest.mark.parametrize("name", ["ctypes", "cffi", "select"])
def test_nobody_goes_around_the_c_core(name: str) -> None:
    assert importers(name) - {"doctor.py", "demo.py"} == set()


@in_checkout
def test_imports_point_down_only() -> None:
    order = ["fdmon", "selector", "loop", "policy"]
    for level, module in enumerate(order):
        for above in order[level + 1 :]:
            assert f"{module}.py" not in importers(above), f"{module} imports {above}"


@in_checkout
def test_the_python_side_declares_exactly_what_the_header_declares() -> None:
    pytest.importorskip("cffi")
    build = runpy.run_path(str(FFI / "build.py"))
    public = build["public_declarations"]((FFI / "fdmon.h").read_text())
    assert "cffi: begin" not in public
    declared = set(re.findall(r"\b(ul_\w+)\(", re.sub(r"/\*.*?\*/", "", public, flags=re.S)))
    constants = set(re.findall(r"\b(UL_[A-Z_]+) = ", public))
    assert len(declared) >= 10
    assert len(constants) >= 7
    assert set(dir(_fdmon.lib)) == declared | constants
    stub = (ROOT / "uringloop" / "_fdmon.pyi").read_text()
    assert set(re.findall(r"\b(ul_\w+)\(", stub)) <= declared
    used = set(re.findall(r"\blib\.(\w+)", inspect.getsource(fdmon)))
    assert used <= declared | constants
    assert declared <= used, "a function of the C core that Python does not need"


@in_checkout
def test_the_header_asks_for_no_change_by_hand_when_cffi_reads_it() -> None:
    cffi = pytest.importorskip("cffi")
    build = runpy.run_path(str(FFI / "build.py"))
    ffi = cffi.FFI()
    ffi.cdef(build["public_declarations"]((FFI / "fdmon.h").read_text()))
    assert ffi.typeof("ul_event").kind == "struct"
    counters = [name for name, _ in ffi.typeof("ul_statistics").fields]
    assert counters == [field.name for field in dataclasses.fields(fdmon.Statistics)]
    assert ffi.sizeof("ul_event") == fdmon._EVENT.size


def test_the_version_is_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", uringloop.__version__)
    if (ROOT / "pyproject.toml").exists():
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        assert project["project"]["dynamic"] == ["version"]
        assert (
            project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "uringloop.__version__"
        )


def test_every_module_imports_alone() -> None:
    for path in sorted((ROOT / "uringloop").glob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            importlib.import_module(f"uringloop.{path.stem}")


def test_the_loop_is_a_base_event_loop_of_this_python() -> None:
    assert issubclass(Loop, base_events.BaseEventLoop)
    assert Loop.__mro__[1:3] == (_core.LoopCore, asyncio.SelectorEventLoop)
