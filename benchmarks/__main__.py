"""Start of `python -m benchmarks`; the one promise: the exit code is that of run.main()."""

import sys

from benchmarks.run import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
