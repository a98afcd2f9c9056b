"""The ways in: run, new_event_loop, Runner, the policy, a selector, uvicorn, the environment.

The promise: each way that the README names ends on our loop, and each mistake ends in one clear
sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import uringloop
from tests import support
from uringloop import fdmon

DEPRECATED = sys.version_info >= (3, 14)
has_policies = pytest.mark.skipif(
    sys.version_info >= (3, 16), reason="policies are gone since Python 3.16"
)


async def which() -> asyncio.AbstractEventLoop:
    await asyncio.sleep(0)
    return asyncio.get_running_loop()


@contextlib.contextmanager
def environment(value: str | None) -> Iterator[None]:
    """URINGLOOP_MONITOR for a while."""
    with pytest.MonkeyPatch.context() as patch:
        if value is None:
            patch.delenv("URINGLOOP_MONITOR", raising=False)
        else:
            patch.setenv("URINGLOOP_MONITOR", value)
        yield


# ---------------------------------------------------------------------------------------------- run


def test_run_returns_the_result_and_closes_its_loop(monitor: str) -> None:
    loop = uringloop.run(which(), monitor=monitor)
    assert isinstance(loop, uringloop.EventLoop)
    assert loop.monitor == monitor
    assert loop.is_closed()


def test_run_raises_what_the_coroutine_raises() -> None:
    async def main() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        uringloop.run(main())


def test_run_ends_what_the_coroutine_left_behind() -> None:
    ended: list[str] = []

    async def left_behind() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("task")
            raise

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(left_behind())
        await asyncio.to_thread(ended.append, "thread")
        return task

    assert uringloop.run(main()).cancelled()
    assert ended == ["thread", "task"]


@pytest.mark.parametrize("debug", [True, False])
def test_run_sets_the_debug_mode(debug: bool) -> None:
    assert uringloop.run(which(), debug=debug).get_debug() is debug


def test_run_leaves_the_debug_mode_to_asyncio_when_not_asked() -> None:
    code = "import asyncio, uringloop\n"
    code += "async def main(): print(asyncio.get_running_loop().get_debug())\n"
    code += "uringloop.run(main())"
    assert support.python("-c", code, PYTHONASYNCIODEBUG="1").stdout == "True\n"
    assert support.python("-c", code, PYTHONASYNCIODEBUG="").stdout == "False\n"


def test_run_refuses_an_unknown_keyword() -> None:
    coroutine = which()
    with pytest.raises(TypeError, match="speed"):
        uringloop.run(coroutine, speed="fast")
    coroutine.close()


def test_run_refuses_what_is_no_coroutine() -> None:
    with pytest.raises((TypeError, ValueError), match="coroutine"):
        uringloop.run(which)  # type: ignore[arg-type]


def test_run_inside_a_running_loop_is_refused() -> None:
    async def main() -> None:
        coroutine = which()
        with pytest.raises(
            RuntimeError, match=r"uringloop\.run\(\) cannot be called from a running event loop"
        ):
            uringloop.run(coroutine)
        coroutine.close()

    uringloop.run(main())


def test_ctrl_c_cancels_the_coroutine_and_leaves_run_as_keyboard_interrupt(monitor: str) -> None:
    seen: list[str] = []

    async def main() -> None:
        # It meets the loop idle in its wait.
        sender = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        sender.start()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            sender.join()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        uringloop.run(main(), monitor=monitor)
    assert seen == ["cancelled"]
    assert time.monotonic() - started < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_coroutine_that_survives_ctrl_c_still_gives_its_result() -> None:
    async def main() -> str:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "cleaned up"

    assert uringloop.run(main()) == "cleaned up"


# ------------------------------------------------------------------------------ loops and factories


def test_new_event_loop_makes_a_loop_on_the_monitor_asked_for(monitor: str) -> None:
    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        assert isinstance(loop, uringloop.EventLoop)
        assert isinstance(loop, asyncio.SelectorEventLoop)
        assert loop.monitor == monitor
        assert loop.fallback_reason is None
        assert loop.run_until_complete(which()) is loop


@pytest.mark.parametrize("factory", [uringloop.new_event_loop, uringloop.EventLoop])
def test_runner_takes_either_as_its_loop_factory(factory: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        loop = runner.run(which())
        assert isinstance(loop, uringloop.EventLoop)
        assert runner.run(which()) is loop


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.run got loop_factory in 3.12")
def test_asyncio_run_takes_it_as_its_loop_factory() -> None:
    loop = asyncio.run(which(), loop_factory=uringloop.new_event_loop)  # type: ignore[call-arg,unused-ignore]
    assert isinstance(loop, uringloop.EventLoop)


def test_a_subclass_of_the_loop_keeps_working() -> None:
    class Mine(uringloop.EventLoop):
        def time(self) -> float:
            return super().time() + 1000

    with asyncio.Runner(loop_factory=Mine) as runner:
        assert type(runner.run(which())) is Mine


def test_asyncios_own_loop_runs_on_the_selector(monitor: str) -> None:
    selector = uringloop.Selector(monitor)
    with contextlib.closing(asyncio.SelectorEventLoop(selector)) as loop:

        async def main() -> bytes:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(await reader.readexactly(4))
                writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"ping")
            answer = await reader.read()
            writer.close()
            server.close()
            return answer

        assert support.run(loop, main()) == b"ping"
        assert selector.statistics().turns > 0


# ----------------------------------------------------------------------------------------- policies


@pytest.fixture
def no_policy() -> Iterator[None]:
    """Sets asyncio back to its own policy afterwards."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(None)


@has_policies
@pytest.mark.usefixtures("no_policy")
def test_install_makes_it_the_loop_of_asyncio_run() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        uringloop.install()
    deprecations = [w for w in warned if issubclass(w.category, DeprecationWarning)]
    assert bool(deprecations) is DEPRECATED
    assert isinstance(asyncio.run(which()), uringloop.EventLoop)


@has_policies
@pytest.mark.usefixtures("no_policy")
def test_the_policy_can_be_set_by_hand() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(uringloop.EventLoopPolicy())
        assert type(asyncio.get_event_loop_policy()) is uringloop.EventLoopPolicy
        assert isinstance(asyncio.get_event_loop_policy(), asyncio.DefaultEventLoopPolicy)
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        assert isinstance(loop, uringloop.EventLoop)


@has_policies
@pytest.mark.usefixtures("no_policy")
def test_subprocesses_work_under_the_policy() -> None:
    async def main() -> bytes:
        process = await asyncio.create_subprocess_exec(
            "echo", "hello", stdout=asyncio.subprocess.PIPE
        )
        return (await process.communicate())[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        uringloop.install()
    assert asyncio.run(main()) == b"hello\n"


@has_policies
def test_the_policy_is_one_class_with_a_public_name() -> None:
    assert uringloop.EventLoopPolicy is uringloop.EventLoopPolicy
    assert repr(uringloop.EventLoopPolicy) == "<class 'uringloop.EventLoopPolicy'>"


WITHOUT_POLICIES = """
import asyncio, uringloop
vars(asyncio).pop("DefaultEventLoopPolicy", None)  # as in Python 3.16
vars(asyncio).pop("__getattr__", None)             # where 3.14 and 3.15 keep it
for way_in in (lambda: uringloop.EventLoopPolicy, uringloop.install):
    try:
        way_in()
    except AttributeError as exc:
        assert "asyncio.Runner" in str(exc), exc
    else:
        raise SystemExit("no AttributeError")
uringloop.run(asyncio.sleep(0))
"""


def test_where_policies_are_gone_the_way_in_is_named() -> None:
    done = support.python("-c", WITHOUT_POLICIES)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------------------- what an import does


def test_importing_warns_about_nothing() -> None:
    code = "import uringloop, uringloop.policy, uringloop.selector, uringloop.__main__"
    done = support.python("-W", "error", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_running_warns_about_nothing() -> None:
    code = "import asyncio, uringloop; uringloop.run(asyncio.sleep(0.001))"
    done = support.python("-X", "dev", "-W", "error", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_starts_no_heavy_module() -> None:
    code = "import sys, uringloop; print({'cffi', 'aiohttp', 'uvloop'} & set(sys.modules))"
    assert support.python("-c", code).stdout == "set()\n"


def test_every_public_name_exists() -> None:
    names = [n for n in uringloop.__all__ if n != "EventLoopPolicy" or sys.version_info < (3, 16)]
    assert len(names) >= 7
    for name in names:
        assert getattr(uringloop, name).__module__.split(".")[0] == "uringloop"
    assert sorted(uringloop.__all__) == uringloop.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = uringloop.nonsense


TYPED = """
import uringloop

async def main() -> int:
    return 1

reveal_type(uringloop.run(main(), monitor="epoll", debug=True))
reveal_type(uringloop.new_event_loop().statistics().turns)
reveal_type(uringloop.Selector().monitor)
uringloop.run(main(), debug="yes")
"""


def test_a_type_checker_sees_the_public_types(tmp_path: Path) -> None:
    assert (Path(uringloop.__file__).parent / "py.typed").exists()
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    program = tmp_path / "program.py"
    program.write_text(TYPED)
    cache = f"--cache-dir={tmp_path / 'cache'}"
    done = support.python("-m", "mypy", "--strict", cache, str(program), cwd=tmp_path, limit=120)
    lines = [line.partition(":")[2] for line in done.stdout.splitlines()]
    assert '7: note: Revealed type is "int"' in [line.replace("builtins.", "") for line in lines]
    assert '8: note: Revealed type is "int"' in [line.replace("builtins.", "") for line in lines]
    assert '9: note: Revealed type is "str"' in [line.replace("builtins.", "") for line in lines]
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1, done.stdout
    assert errors[0].startswith("10: error: Argument")


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The message of the ImportError that ended a child."""
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    kind, _, sentence = last.partition(": ")
    assert kind == "ImportError", done.stderr
    return sentence


def test_a_missing_extension_is_explained_in_one_sentence() -> None:
    code = "import sys; sys.modules['uringloop._fdmon'] = None; import uringloop"
    sentence = one_sentence(support.python("-c", code))
    assert sentence.startswith("uringloop's C extension is missing")
    assert "install uringloop with pip" in sentence


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_another_platform_is_told_so_in_one_sentence(platform: str) -> None:
    code = f"import asyncio, sys; sys.platform = {platform!r}; import uringloop"
    assert "works on Linux only" in one_sentence(support.python("-c", code))


# ------------------------------------------------------------------------------- choosing a monitor


def made(monitor: str | None = None) -> str:
    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        return loop.monitor


def test_the_environment_chooses_the_monitor(monitor: str) -> None:
    with environment(monitor):
        assert made() == monitor
        assert uringloop.run(which()).monitor == monitor  # type: ignore[attr-defined]
        with uringloop.Selector() as selector:
            assert selector.monitor == monitor


def test_the_argument_is_stronger_than_the_environment() -> None:
    with environment("poll"):
        assert made("epoll") == "epoll"


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_no_choice_means_the_best_that_works(value: str | None) -> None:
    with environment(None):
        best = made("auto")
    with environment(value):
        assert made() == best


def test_auto_as_an_argument_is_a_choice_too() -> None:
    with environment(None):
        best = made("auto")
    with environment("poll"):
        assert made("auto") == best


@pytest.mark.parametrize("value", ["uring", "IO_URING", " epoll", "0"])
def test_a_wrong_monitor_is_a_value_error_that_lists_the_right_ones(value: str) -> None:
    right = "auto, io_uring, epoll, poll"
    with pytest.raises(ValueError, match=f"^monitor must be one of {right}, not '{value}'$"):
        uringloop.new_event_loop(monitor=value)
    with (
        environment(value),
        pytest.raises(ValueError, match=f"^URINGLOOP_MONITOR must be one of {right}, not"),
    ):
        uringloop.new_event_loop()


def test_a_monitor_that_is_no_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="monitor must be a str or None, not int"):
        uringloop.new_event_loop(monitor=1)  # type: ignore[arg-type]


def test_a_loop_that_cannot_be_made_leaves_nothing_open() -> None:
    with environment("wrong"):
        for _ in range(3):
            with pytest.raises(ValueError, match="wrong"):
                uringloop.EventLoop()  # the autouse fixture counts descriptors


NO_DESCRIPTORS = """
import errno, os, resource, uringloop
highest = max(map(int, os.listdir("/proc/self/fd")))
spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest + 2)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, max(spare) + 1))
for monitor in ("io_uring", "epoll"):
    try:
        uringloop.Selector(monitor)
    except uringloop.UringUnavailable as exc:
        print(isinstance(exc, OSError), errno.errorcode[exc.errno], exc)
"""


def test_a_forced_monitor_that_is_refused_names_errno_and_cause() -> None:
    done = support.python("-c", NO_DESCRIPTORS)
    assert done.stderr == ""
    io_uring, epoll = done.stdout.splitlines()
    assert io_uring.startswith("True ")
    assert "io_uring" in io_uring
    assert epoll.startswith("True EMFILE ")
    assert "EMFILE (RLIMIT_NOFILE is used up)" in epoll


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EACCES])
def test_a_refusal_is_described_by_step_errno_and_cause(number: int) -> None:
    text = fdmon.describe_refusal("io_uring_setup", number)
    assert text.startswith(f"io_uring_setup: {errno.errorcode[number]} (")
    assert text.endswith(")")


# --------------------------------------------------------------------------------------- statistics


def test_statistics_count_and_cannot_be_changed(monitor: str) -> None:
    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        before = loop.statistics()
        loop.run_until_complete(asyncio.sleep(0.001))
        after = loop.statistics()
        assert isinstance(after, uringloop.Statistics)
        assert after.turns > before.turns
        assert after.watches == 1, "the loop watches its own wake-up socket"
        assert (after.enters > 0) is (monitor == "io_uring")
        assert after.downgrades == 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            after.turns = 0  # type: ignore[misc]
        names = "turns enters sqes cqes overflows downgrades watches poll_ns polled"
        assert [field.name for field in dataclasses.fields(after)] == names.split()
    assert loop.statistics().turns == after.turns
    assert loop.monitor == monitor


def test_statistics_may_be_asked_from_any_thread_while_the_loop_waits(monitor: str) -> None:
    seen: list[int] = []

    def ask(loop: uringloop.EventLoop) -> None:
        seen.extend(loop.statistics().turns for _ in range(200))
        loop.call_soon_threadsafe(loop.stop)

    with contextlib.closing(uringloop.new_event_loop(monitor=monitor)) as loop:
        thread = threading.Thread(target=ask, args=[loop])
        loop.call_soon(thread.start)
        loop.run_forever()
        thread.join()
    assert len(seen) == 200
    assert seen == sorted(seen)


# ------------------------------------------------------------------------------------------ uvicorn

APPLICATION = """
import asyncio, json

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    loop = asyncio.get_running_loop()
    body = {"loop": f"{type(loop).__module__}.{type(loop).__qualname__}", "monitor": loop.monitor}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
"""


def request(path: str) -> bytes:
    """One HTTP request to a unix socket, when somebody listens there."""
    deadline = time.monotonic() + 20
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        while True:
            try:
                sock.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = bytearray()
        while piece := sock.recv(65536):
            answer += piece
    return bytes(answer)


def test_uvicorn_serves_on_it(monitor: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("uvicorn is not installed")
    (tmp_path / "application.py").write_text(APPLICATION)
    path = str(tmp_path / "socket")
    command = "-m uvicorn application:app --loop uringloop:new_event_loop --lifespan off --uds"
    with subprocess.Popen(
        [sys.executable, *command.split(), path],
        env=support.child_environment(URINGLOOP_MONITOR=monitor),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            head, _, body = request(path).partition(b"\r\n\r\n")
        finally:
            server.send_signal(signal.SIGINT)
            _, log = server.communicate(timeout=20)
    assert head.startswith(b"HTTP/1.1 200"), log
    assert b'"monitor": "%s"' % monitor.encode() in body
    assert json.loads(body[body.index(b"{") : body.index(b"}") + 1]) == {
        "loop": "uringloop.loop.EventLoop",
        "monitor": monitor,
    }
    assert "Finished server process" in log
