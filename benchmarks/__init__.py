"""The benchmarks of uringloop: not installed with the package, run from the repository's root.

`python -m benchmarks` measures every loop of `loops.LOOPS` in one interleaved run; see README.md.
"""
