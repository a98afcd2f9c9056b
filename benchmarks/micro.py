"""In-process costs of one loop: `python -m benchmarks.micro LOOP` prints one JSON line.

Every figure is CPU time of the whole process per operation, so a busy neighbour costs little;
timers are lateness by the monotonic clock, read just before call_later() and first thing in the
callback.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks import loops

BATCH = 1000
TIMER_DELAYS_US = (50, 100, 200, 500, 1000, 2000, 5000, 10000)
EARLY_TOLERANCE_NS = 1000  # what a float of seconds may lose; anything beyond is a broken promise
Operation = Callable[[int], Awaitable[None]]


def nothing() -> None:
    pass


async def call_soon(n: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(n // BATCH):
        for _ in range(BATCH):
            loop.call_soon(nothing)
        await asyncio.sleep(0)


async def call_soon_threadsafe(n: int) -> None:
    """Posted by another thread while the loop runs: the lock, the wake-up and the GIL are in it."""
    loop = asyncio.get_running_loop()
    finished = loop.create_future()

    def post() -> None:
        for _ in range(n - 1):
            loop.call_soon_threadsafe(nothing)
        loop.call_soon_threadsafe(finished.set_result, None)

    await asyncio.gather(loop.run_in_executor(None, post), finished)


async def call_later_cancel(n: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(n // BATCH):
        for _ in range(BATCH):
            loop.call_later(60, nothing).cancel()
        await asyncio.sleep(0)


async def task_switch(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def finish() -> None:
    pass


async def gather(n: int) -> None:
    for _ in range(n // BATCH):
        await asyncio.gather(*(finish() for _ in range(BATCH)))


OPERATIONS: dict[str, tuple[Operation, int]] = {
    "call_soon": (call_soon, 200_000),
    "call_soon_threadsafe": (call_soon_threadsafe, 50_000),
    "call_later + cancel": (call_later_cancel, 100_000),
    "task switch, sleep(0)": (task_switch, 100_000),
    "gather of 1000, per task": (gather, 50_000),
}


def measure(loop: asyncio.AbstractEventLoop, operation: Operation, n: int) -> float:
    async def run() -> int:
        await operation(n // 10)
        start = time.process_time_ns()
        await operation(n)
        return time.process_time_ns() - start

    return loop.run_until_complete(run()) / n


def fire(fired: asyncio.Future[int]) -> None:
    fired.set_result(time.monotonic_ns())


async def timer_lateness_ns(delay_us: int, samples: int) -> list[int]:
    loop = asyncio.get_running_loop()
    late: list[int] = []
    for _ in range(samples):
        fired: asyncio.Future[int] = loop.create_future()
        due_ns = time.monotonic_ns() + delay_us * 1000
        loop.call_later(delay_us / 1e6, fire, fired)
        late.append(await fired - due_ns)
    return sorted(late)


def timers(loop: asyncio.AbstractEventLoop, samples: int) -> dict[str, dict[str, float]]:
    rows = {}
    for delay_us in TIMER_DELAYS_US:
        late = loop.run_until_complete(timer_lateness_ns(delay_us, samples))
        rows[str(delay_us)] = {
            "median_us": late[len(late) // 2] / 1e3,
            "p90_us": late[len(late) * 9 // 10] / 1e3,
            "early": sum(ns < -EARLY_TOLERANCE_NS for ns in late),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop")
    parser.add_argument("--timers", type=int, default=50, help="samples per delay")
    parser.add_argument("--only", choices=OPERATIONS, help="this operation alone")
    parser.add_argument("--count", type=int, help="of operations, default: each its own")
    options = parser.parse_args()
    loop = loops.make(options.loop)
    cpu_ns = {
        name: measure(loop, operation, options.count or n)
        for name, (operation, n) in OPERATIONS.items()
        if options.only in (None, name)
    }
    result: dict[str, Any] = {"cpu_ns": cpu_ns, "timers": {}}
    if options.timers:
        result["timers"] = timers(loop, options.timers)
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
