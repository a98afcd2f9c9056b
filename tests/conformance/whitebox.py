"""The ids of CPython's tests that are left out, because they test how the stock loop is built.

The promise: each stands here with its reason, is white-box (it reads or mocks `_ready`,
`_scheduled`, `_selector`, `_run_once` or an internal of the stock selector transport), and still
fails on uringloop on every Python it is listed for; test_conformance.py runs them to check.
In GLib's main loop nothing more is left out; test_selectors and the modules of `NO_LOOP_OF_OURS` do
not run there, because they have no loop that could wait in it.
`FLAKY` is another matter: tests that fail now and then on stock asyncio as well. They run like the
others, but each gets one second try, alone, and a warning says when it was used.
"""

from __future__ import annotations

import sys

MOST_PER_PYTHON = 120

# id: reason, on every Python
EVERYWHERE: dict[str, str] = {}

# minor version: {id: reason}
BY_PYTHON: dict[int, dict[str, str]] = {}

# id: where and why it fails on stock asyncio
FLAKY: dict[str, str] = {}


def left_out() -> dict[str, str]:
    """The ids that do not run on this Python, with their reasons."""
    return EVERYWHERE | BY_PYTHON.get(sys.version_info.minor, {})
