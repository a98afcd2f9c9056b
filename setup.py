"""Build the two extensions: the part that pyproject.toml cannot say.

Why two: `_fdmon` is cffi's face of the C core, for Python code; `_core.core` is Cython's, for the
hot path. Both compile the same C files. The promise: an installation outside Linux gets neither, so
that `import uringloop` there can say in one sentence why it does not work.
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup

DIRECTIVES: dict[str, object] = {
    "binding": False,  # plain method descriptors, which the interpreter calls fastest
    "boundscheck": False,
    "embedsignature": True,
    "embedsignature.format": "clinic",  # for inspect.signature()
    "initializedcheck": False,
    "language_level": 3,
    "nonecheck": False,
    "wraparound": False,
}

if sys.platform == "linux":
    from Cython.Build import cythonize

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from ffi.build import CORE, sources

    core = Extension("uringloop._core.core", ["uringloop/_core/core.pyx", *sources], **CORE)  # type: ignore[arg-type]
    core.depends = [*core.depends, *glob("uringloop/_core/*.p*")]
    setup(
        ext_modules=cythonize(  # type: ignore[no-untyped-call]
            [core], build_dir="build", compiler_directives=DIRECTIVES
        ),
        cffi_modules=["ffi/build.py:ffibuilder"],
    )
else:
    setup()
