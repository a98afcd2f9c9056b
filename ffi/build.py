"""Builds `uringloop._fdmon`, the cffi face of the C core, and says how the core is compiled.

Why it exists: cffi's API mode compiles the C files and checks every declaration against them.
Promise: the declarations are read from `fdmon.h` itself, so there is no second list.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))  # as setuptools wants it
FILES = (
    "ring.c",
    "fdmon.c",
    "fdmon_io_uring.c",
    "stream_io_uring.c",
    "fdmon_epoll.c",
    "fdmon_poll.c",
    "hosting.c",
    "polling.c",
)

#: For both extensions that contain the core.
sources = [str(HERE / name) for name in FILES]
CORE = {
    "include_dirs": [str(HERE)],
    "depends": sorted(map(str, HERE.glob("*.h"))),
    "extra_compile_args": ["-std=gnu11", "-O2", "-pthread", "-fvisibility=hidden"],
    "extra_link_args": ["-pthread"],
}


def public_declarations(header: str) -> str:
    """The part of fdmon.h between its two cffi marks."""
    return header.split("/* cffi: begin */")[1].split("/* cffi: end */")[0]


ffibuilder = FFI()
ffibuilder.cdef(public_declarations((HERE / "fdmon.h").read_text()))
ffibuilder.set_source("uringloop._fdmon", '#include "fdmon.h"', sources=sources, **CORE)  # type: ignore[arg-type]
