"""Builds `uringloop._fdmon`, the cffi face of the C core.

Why it exists: cffi's API mode compiles the C files and checks every declaration against them.
Promise: the declarations are read from `fdmon.h` itself, so there is no second list that could
drift.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = ("ring.c", "fdmon.c", "fdmon_io_uring.c", "fdmon_epoll.c", "fdmon_poll.c")


def public_declarations(header: str) -> str:
    """The part of fdmon.h between its two cffi marks."""
    return header.split("/* cffi: begin */")[1].split("/* cffi: end */")[0]


ffibuilder = FFI()
ffibuilder.cdef(public_declarations((HERE / "fdmon.h").read_text()))
ffibuilder.set_source(
    "uringloop._fdmon",
    '#include "fdmon.h"',
    # setuptools wants paths relative to setup.py.
    sources=[os.path.relpath(HERE / name) for name in SOURCES],
    depends=[os.path.relpath(path) for path in sorted(HERE.glob("*.h"))],
    include_dirs=[os.path.relpath(HERE)],
    extra_compile_args=["-std=gnu11", "-O2", "-pthread"],
    extra_link_args=["-pthread"],
)
