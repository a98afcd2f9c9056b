"""CPython's `test_selectors` and `test_asyncio`, of the running interpreter, on uringloop.

The promise: on each monitor every test passes that whitebox.py does not list, on loops that are
ours, and again on loops that wait in GLib's main loop. A failure counts as ours unless the same
test, run as a control, fails on stock asyncio on this machine too (no IPv6, no name server...);
that, and each second try of a test in `whitebox.FLAKY`, is said in a warning that pytest shows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import uringloop
from tests.support import require

from . import whitebox

MONITORS = ("io_uring", "epoll", "poll")
RUN_TIMEOUT_S = 400

# Modules that share a process; the slow ones first, so that two workers end together. What this
# Python has and no group names is in "rest", so that a new module cannot be forgotten.
GROUPS: dict[str, tuple[str, ...]] = {
    "tasks": ("test_tasks",),
    "waits": ("test_taskgroups", "test_eager_task_factory", "test_selectors"),
    "events": ("test_events", "test_sendfile", "test_sock_lowlevel"),
    "subprocess": ("test_subprocess",),
    "tls": ("test_ssl", "test_sslproto", "test_server_context"),
    "rest": (),
}

# Why a module may make no loop of ours. Every other module must.
NO_LOOP_OF_OURS = {
    "test_futures": "runs on the virtual-time loop of test.test_asyncio.utils",
    "test_pep492": "runs on a BaseEventLoop with a mocked selector",
    "test_runners": "runs on a BaseEventLoop with a mocked selector, but for one test since 3.14",
    "test_selector_events": "tests the stock selector loop through a subclass of its own",
    "test_proactor_events": "tests the proactor loop of Windows with mocks",
    "test_protocols": "makes no loop",
    "test_transports": "makes no loop",
    "test_tools": "makes no loop: it tests the output of `python -m asyncio ps`",
    "test_windows_events": "skips itself on Linux",
    "test_windows_utils": "skips itself on Linux",
}

# The loop classes of asyncio's own that a module names itself, besides what we put in their place.
STOCK_LOOPS = {
    "test_base_events": {"BaseEventLoop", "BaseSelectorEventLoop"},  # the abstract classes
    "test_pep492": {"BaseEventLoop"},
    "test_runners": {"BaseEventLoop"},
    "test_proactor_events": {"BaseProactorEventLoop"},
}

MOST_TURNS_BY_A_TEST = 3  # in a module: test_events calls _run_once() itself


def modules_of(group: str, host: str | None) -> list[str]:
    """In a host only those that make loops of ours."""
    import test.test_asyncio

    (folder,) = test.test_asyncio.__path__
    here = {path.stem for path in Path(folder).glob("test_*.py")}
    here = here | {"test_selectors"} if host is None else here - NO_LOOP_OF_OURS.keys()
    if group != "rest":
        return [name for name in GROUPS[group] if name in here]
    return sorted(here.difference(*GROUPS.values()))


@pytest.fixture(scope="module", autouse=True)
def cpython_tests() -> None:
    """Skips, and in CI fails, where the interpreter came without its tests."""
    try:
        found = importlib.util.find_spec("test.test_asyncio") is not None
    except ModuleNotFoundError:
        found = False
    if found:
        return
    reason = f"{sys.executable} has no `test` package (Debian: libpython3-testsuite)"
    if os.environ.get("CI") and not os.environ.get("URINGLOOP_ALLOW_NO_TEST_PACKAGE"):
        pytest.fail(reason + "; CI must have it, or set URINGLOOP_ALLOW_NO_TEST_PACKAGE=1")
    pytest.skip(reason)


@pytest.fixture(params=MONITORS)
def monitor(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        uringloop.Selector(name).close()
    except uringloop.UringUnavailable as refusal:
        pytest.skip(f"{name} is refused here: {refusal}")
    return name


@pytest.fixture(params=[None, pytest.param("glib", marks=pytest.mark.slow)], ids=["own", "glib"])
def host(request: pytest.FixtureRequest) -> str | None:
    """Whose main loop waits: None for our own."""
    name: str | None = request.param
    if name == "glib":
        require("PyGObject", "from gi.repository import GLib")
    return name


def environment() -> dict[str, str]:
    """Ours, without what would change the tests; the child shall find the uringloop we found."""
    drop = ("PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONWARNINGS", "URINGLOOP_MONITOR")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    folder = str(Path(uringloop.__file__).resolve().parent.parent)
    if folder not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, env.get("PYTHONPATH"))))
    return env


Document = dict[str, Any]
Run = Callable[[str, str | None, Iterable[str]], Document]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs modules or ids in a bounded process of their own; its log comes with any failure."""

    def run_names(monitor: str, host: str | None, names: Iterable[str]) -> Document:
        out, log = tmp_path / f"{monitor}.json", tmp_path / f"{monitor}.log"
        out.unlink(missing_ok=True)
        script = str(Path(__file__).with_name("runner.py"))
        command = [sys.executable, script, "--monitor", monitor, "--json", str(out), *names]
        command += ["--host", host] if host else []
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment(),
                cwd=tmp_path,
                start_new_session=True,
            )
            try:
                process.wait(RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not out.exists():
            tail = log.read_text(errors="replace")[-6000:]
            pytest.fail(f"the {monitor} run ended with {process.returncode}; its log ends:\n{tail}")
        document: Document = json.loads(out.read_text())
        return document

    return run_names


def failures_of(document: Document) -> dict[str, str]:
    return {key: text for one in document["reports"] for key, text in one["failures"].items()}


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def judge(
    monitor: str, host: str | None, failures: dict[str, str], run: Run
) -> tuple[list[str], list[str]]:
    """Splits failures into what is ours and what is only to be reported."""
    if not failures:
        return [], []
    ids = [key for key in failures if key.startswith("test.")]  # not "setUpClass (...)"
    control = failures_of(run("stock", None, ids)) if ids else {}
    again = failures_of(run(monitor, host, ids)) if ids else {}
    ours, notes = [], []
    for key, text in failures.items():
        if key in control:
            cause = last_line(control[key])
            notes.append(f"{key} fails on stock asyncio too: {last_line(text)} | stock: {cause}")
        elif key in whitebox.FLAKY and key not in again:
            notes.append(f"{key} passed at its second try; it is flaky: {whitebox.FLAKY[key]}")
        else:
            alone = "fails again" if key in again else "passes alone, at a second try"
            ours.append(f"{key} ({alone}; passes on stock asyncio)\n{text}")
    return ours, notes


def whose_loops(report: dict[str, Any], host: str | None) -> list[str]:
    """What is wrong with the loops that one module made."""
    name = report["name"].rpartition(".")[2]
    count = report["made"]
    fine = {"ours", "own", "selectors", "turns", "hosted"} | STOCK_LOOPS.get(name, set())
    wrong = [
        f"{name} made {count[stock]} loops of class {stock} behind our back"
        for stock in sorted(count.keys() - fine)
    ]
    wanted = ["selectors"] if name == "test_selectors" else ["ours", "turns"]
    if name not in NO_LOOP_OF_OURS:
        wrong += [f"{name} made no {what}" for what in wanted if not count.get(what)]
    if host and count.get("turns", 0) > count.get("hosted", 0) + MOST_TURNS_BY_A_TEST:
        wrong.append(f"{name} made turns that no host asked for: {count}")
    return wrong


def summary(monitor: str, host: str | None, group: str, document: Document) -> str:
    reports = document["reports"]
    python = document["python"].split()[0]
    where = f"{monitor} in {host}" if host else monitor
    ran = sum(len(one["ids"]) for one in reports)
    skips = sum(len(one["skips"]) for one in reports)
    loops = sum(one["made"].get("ours", 0) for one in reports)
    seconds = sum(one["seconds"] for one in reports)
    slowest_s, slowest = max(tuple(one["slowest"]) for one in reports)
    return (
        f"{python} {where} {group}: {ran} tests ({skips} skips), {loops} loops of ours, "
        f"{len(failures_of(document))} failures, {seconds:.0f} s, "
        f"slowest {slowest_s:.0f} s: {'.'.join(slowest.split('.')[-2:])}"
    )


@pytest.mark.filterwarnings("always:conformance")  # a note is to be read, not an error
@pytest.mark.parametrize("group", GROUPS)
def test_cpythons_own_tests_pass_on_loops_of_ours(
    monitor: str,
    host: str | None,
    group: str,
    run: Run,
    record_property: Callable[[str, object], None],
) -> None:
    document = run(monitor, host, modules_of(group, host))
    record_property("conformance", summary(monitor, host, group, document))
    ours, notes = judge(monitor, host, failures_of(document), run)
    for note in notes:
        warnings.warn(f"conformance: {note}", stacklevel=1)
    wrong = [line for one in document["reports"] for line in whose_loops(one, host)]
    wrong += [entry["text"] for entry in document["unraisable"] if entry["ours"]]
    assert not ours + wrong, "\n\n".join(ours + wrong)


def test_each_left_out_test_exists_and_still_fails(monitor: str, run: Run) -> None:
    listed = whitebox.left_out()
    if not listed:
        pytest.skip("no test is left out on this Python")
    document = run(monitor, None, listed)
    ran = {key for one in document["reports"] for key in one["ids"]}
    assert not listed.keys() - ran, "listed, but no longer there"
    assert not listed.keys() - failures_of(document).keys(), "passes now: take it off the list"


def test_the_list_of_left_out_tests_stays_short() -> None:
    assert len(whitebox.left_out()) <= whitebox.MOST_PER_PYTHON
    assert all(reason.strip() for reason in whitebox.left_out().values())
