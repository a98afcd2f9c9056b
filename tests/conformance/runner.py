"""Runs CPython's own asyncio and selectors tests with uringloop in the place of asyncio's loop.

    python -m tests.conformance.runner --monitor epoll test_events test_selectors
    python -m tests.conformance.runner --monitor epoll --host glib test_events
    python -m tests.conformance.runner --monitor stock test.test_asyncio.test_tasks.SleepTests

A process of its own, because it replaces asyncio's classes for good. A module name runs the module
without the ids that whitebox.py lists; a longer name runs whatever the list says. `--host glib`
makes loops that wait in GLib.

The promise: what is counted as a loop of ours is a `uringloop.EventLoop` on the monitor that was
asked for, in the host that was asked for, and a loop of asyncio's own that a test made all the same
is counted too, so nobody can mistake a green run of asyncio for one of uringloop. `--monitor stock`
replaces nothing: that is the control.
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.base_events
import asyncio.unix_events
import collections
import faulthandler
import importlib
import json
import math
import os
import selectors
import sys
import time
import traceback
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

STOCK = "stock"
TEST_TIMEOUT_S = 120  # the longest test of the suites takes 12 s on a quiet machine
SELECTOR_TESTS = "test.test_selectors.UringloopSelectorTestCase"

# What the tests made: counts by "ours", by the name of another loop class of asyncio's or ours,
# "own" (a loop class which the test itself defines), "selectors" (of ours), "turns" (of our loops,
# till closed), "hosted" (turns that a host had them make).
made: collections.Counter[str] = collections.Counter()


def full_name(name: str) -> str:
    """`test_events` is short for `test.test_asyncio.test_events`."""
    if name.startswith("test."):
        return name
    return f"test.{name}" if name == "test_selectors" else f"test.test_asyncio.{name}"


def count_every_loop(ours: type | None) -> None:
    """Wraps the one constructor that every loop of asyncio goes through."""
    base = asyncio.base_events.BaseEventLoop
    construct: Callable[..., None] = base.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if ours is None or not isinstance(self, ours):
            cls = type(self)
            foreign = cls.__module__.startswith(("asyncio.", "uringloop."))
            made[cls.__name__ if foreign else "own"] += 1

    base.__init__ = counting  # type: ignore[method-assign]


def install(monitor: str, host: str | None) -> type:
    """Puts uringloop wherever a test can make a loop or a selector, and counts what is made."""
    os.environ["URINGLOOP_MONITOR"] = monitor
    import uringloop

    loop_class: Any = uringloop.EventLoop if host is None else in_glib()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        policy_class = uringloop.EventLoopPolicy
    take_stock_selectors(loop_class, monitor)
    count_selectors(uringloop.Selector, monitor)
    count_turns(loop_class)

    names = ["SelectorEventLoop"] + ["EventLoop"] * (sys.version_info >= (3, 13))
    for name in names:
        for module in (asyncio, asyncio.unix_events):
            setattr(module, name, loop_class)
    if sys.version_info >= (3, 14):  # asyncio.DefaultEventLoopPolicy reads this one
        asyncio.unix_events._DefaultEventLoopPolicy = policy_class  # type: ignore[attr-defined]
    else:
        asyncio.DefaultEventLoopPolicy = policy_class
        asyncio.unix_events.DefaultEventLoopPolicy = policy_class
    selectors.DefaultSelector = uringloop.Selector  # type: ignore[assignment,misc]
    return loop_class  # type: ignore[no-any-return]


def in_glib() -> type:
    """The class of our loops that wait in GLib; the policy makes these, and their turns count."""
    from uringloop import glib, hosted, policy

    dispatch = hosted.Hosted.dispatch

    def counting(self: Any) -> None:
        made["hosted"] += 1
        dispatch(self)

    hosted.Hosted.dispatch = counting  # type: ignore[method-assign]
    policy.EventLoop = glib.GLibEventLoop  # type: ignore[attr-defined]
    return glib.GLibEventLoop


def take_stock_selectors(loop_class: Any, monitor: str) -> None:
    """`asyncio.SelectorEventLoop(selectors.PollSelector())` becomes our loop on our monitor.

    That is how EPollEventLoopTests, PollEventLoopTests and SelectEventLoopTests ask for a loop. The
    class itself stays the real one, and so takes every path that its users get.
    """
    construct = loop_class.__init__

    def constructing(self: Any, selector: Any = None, **kwargs: Any) -> None:
        if selector is not None:
            if not isinstance(selector, selectors.BaseSelector):
                raise TypeError(f"conformance runner: not a real selector: {selector!r}")
            selector.close()
        construct(self, **kwargs)
        if self.monitor != monitor:
            raise RuntimeError(f"asked for {monitor}, got a loop on {self.monitor}")
        made["ours"] += 1

    loop_class.__init__ = constructing


def count_selectors(selector_class: Any, monitor: str) -> None:
    construct = selector_class.__init__

    def constructing(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if self.monitor != monitor:
            raise RuntimeError(f"asked for {monitor}, got a selector on {self.monitor}")
        made["selectors"] += 1

    selector_class.__init__ = constructing


def count_turns(loop_class: Any) -> None:
    close = loop_class.close

    def closing(self: Any) -> None:
        if not self.is_closed():
            made["turns"] += self.statistics().turns
        close(self)

    loop_class.close = closing


def add_selector_tests() -> None:
    """The suite's own invitation: subclass, and name the class to test.

    Two of the kqueue tests hold for epoll as well, and nobody else runs them on Linux.
    """
    module = importlib.import_module("test.test_selectors")
    kqueue = module.KqueueSelectorTestCase
    names = ("test_register_bad_fd", "test_empty_select_timeout")
    body: dict[str, Any] = {name: kqueue.__dict__[name] for name in names}
    body.update(SELECTOR=selectors.DefaultSelector, __module__=module.__name__)
    name = SELECTOR_TESTS.rpartition(".")[2]
    setattr(module, name, type(name, (module.EpollSelectorTestCase,), body))


class Result(unittest.TextTestResult):
    """Keeps, for each test id, what has to be said about it in JSON."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ids: list[str] = []
        self.tracebacks: dict[str, str] = {}
        self.skip_reasons: dict[str, str] = {}
        self.expected: list[str] = []
        self.slowest: tuple[float, str] = (0.0, "")
        self._start_s = math.inf  # what a class or module skips is stopped without a start

    def startTest(self, test: Any) -> None:
        # A test that hangs ends the process, and the log says where it hung.
        faulthandler.dump_traceback_later(TEST_TIMEOUT_S, exit=True)
        self.ids.append(test.id())
        self._start_s = time.monotonic()
        super().startTest(test)

    def stopTest(self, test: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.slowest = max(self.slowest, (time.monotonic() - self._start_s, test.id()))
        self._start_s = math.inf
        super().stopTest(test)

    def _keep(self, test: Any, err: Any) -> None:
        text = "".join(traceback.format_exception(*err))
        self.tracebacks[test.id()] = self.tracebacks.get(test.id(), "") + text

    def addError(self, test: Any, err: Any) -> None:
        self._keep(test, err)
        super().addError(test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._keep(test, err)
        super().addFailure(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._keep(test, err)
        super().addSubTest(test, subtest, err)

    def addSkip(self, test: Any, reason: str) -> None:
        self.skip_reasons[getattr(test, "test_case", test).id()] = reason
        super().addSkip(test, reason)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.expected.append(test.id())
        super().addExpectedFailure(test, err)

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.tracebacks[test.id()] = "unexpected success\n"
        super().addUnexpectedSuccess(test)


def flatten(suite: Any) -> Iterator[unittest.TestCase]:
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def load(name: str, stock: bool) -> tuple[list[unittest.TestCase], str | None]:
    """The tests that a module or an id stands for; or none, and why the whole module skips."""
    if name == "test.test_selectors" and not stock:
        name = SELECTOR_TESTS
    if name.startswith(SELECTOR_TESTS):
        add_selector_tests()
    whole = name.count(".") < 3 or name == SELECTOR_TESTS
    try:
        tests = list(flatten(unittest.defaultTestLoader.loadTestsFromName(name)))
    except unittest.SkipTest as skip:
        return [], str(skip)
    if not whole:
        return tests, None
    here = __package__ + "." if __package__ else ""
    left_out = importlib.import_module(here + "whitebox").left_out()
    return [test for test in tests if test.id() not in left_out], None


def run_one(name: str, stock: bool) -> dict[str, Any]:
    """Runs one module or id, and returns what there is to say about it."""
    before, start = made.copy(), time.monotonic()
    tests, whole_skip = load(name, stock)
    report: dict[str, Any] = {"name": name, "skipped_whole": whole_skip}
    runner = unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=Result)
    result: Any = runner.run(unittest.TestSuite(tests))
    report["ids"] = result.ids
    report["failures"] = result.tracebacks
    report["skips"] = result.skip_reasons
    report["expected_failures"] = result.expected
    report["slowest"] = result.slowest
    report["made"] = dict(made - before)
    report["seconds"] = round(time.monotonic() - start, 2)
    return report


def watch_unraisable(seen: list[dict[str, Any]]) -> None:
    """An exception in a finaliser fails no test by itself; it is kept, and judged, apart."""
    show = sys.unraisablehook
    package = os.path.dirname(getattr(sys.modules.get("uringloop"), "__file__", None) or "?")

    def hook(unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        ours = any(os.path.dirname(frame.filename) == package for frame in frames)
        text = traceback.format_exception(
            unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback
        )
        what = f"{unraisable.err_msg}: {unraisable.object!r}\n"
        seen.append({"ours": ours, "text": what + "".join(text)})
        show(unraisable)

    sys.unraisablehook = hook


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--monitor", required=True, choices=["io_uring", "epoll", "poll", STOCK])
    parser.add_argument("--host", choices=["glib"], help="whose main loop carries the loops")
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument("names", nargs="+", metavar="MODULE-OR-ID")
    options = parser.parse_args()
    faulthandler.enable()
    stock = options.monitor == STOCK
    count_every_loop(None if stock else install(options.monitor, options.host))
    unraisable: list[dict[str, Any]] = []
    watch_unraisable(unraisable)
    from test.support import os_helper

    out = os.path.abspath(options.json) if options.json else None
    with os_helper.temp_cwd(f"conformance_{os.getpid()}"):
        reports = [run_one(full_name(name), stock) for name in options.names]
    document = {
        "python": sys.version,
        "monitor": options.monitor,
        "reports": reports,
        "unraisable": unraisable,
    }
    if out is not None:
        with open(out, "w") as file:
            json.dump(document, file, indent=1)
    for report in reports:
        print(report["name"], len(report["ids"]), "run", report["made"], f"{report['seconds']} s")
    return 1 if any(report["failures"] for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
