"""Build the cffi extension `uringloop._fdmon`: the part that pyproject.toml cannot say.

The promise: one wheel for every Python from 3.11 on (stable ABI), and an installation outside Linux
gets no extension, so that `import uringloop` there can say in one sentence why it does not work.
"""

import sys
import sysconfig

from setuptools import setup

# Free-threaded builds have no stable ABI before 3.15: their wheels are tied to one version.
stable_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["ffi/build.py:ffibuilder"] if sys.platform == "linux" else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable_abi else {},
)
