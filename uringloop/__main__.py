"""`python -m uringloop`: the command line, doctor, demo and bench.

It promises to start fast and to end in a sentence and an exit code, never in a traceback: a command
imports what it needs only when it is chosen, so that doctor needs no third-party module but cffi.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

NO_BENCHMARKS = (
    "uringloop: the benchmarks are not part of the installed package; run `make bench` or "
    "`python -m uringloop bench` in a checkout of the source."
)


def _doctor(argv: list[str]) -> int:
    from uringloop import doctor

    return doctor.main(argv)


def _demo(argv: list[str]) -> int:
    from uringloop import demo

    return demo.main(argv)


def _bench(argv: list[str]) -> int:
    """Hand over to the checkout's `benchmarks` package, which the wheel does not carry."""
    checkout = Path(__file__).resolve().parents[1]
    # The project file beside it tells ours from another package of that name in site-packages.
    if not all((checkout / name).exists() for name in ("pyproject.toml", "benchmarks/__main__.py")):
        print(NO_BENCHMARKS, file=sys.stderr)
        return 1
    sys.path.insert(0, str(checkout))
    return int(importlib.import_module("benchmarks.__main__").main(argv))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "doctor": (_doctor, "what io_uring allows here, which monitor a loop gets, and why"),
    "demo": (_demo, "an aiohttp application on uringloop, asyncio and uvloop, side by side"),
    "bench": (_bench, "the benchmarks (in a checkout of the source)"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m uringloop",
        description="uringloop: an asyncio event loop that waits through io_uring.",
        epilog="; ".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=list(COMMANDS))
    # Only the command itself is read here; what follows is the command's own, its --help too.
    arguments = sys.argv[1:] if argv is None else argv
    chosen = parser.parse_args(arguments[:1]).command
    command, _ = COMMANDS[chosen]
    return command(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
