"""The probe: how long another thread of a server waits for the GIL while the loop is under load.

The thread sleeps 1 ms without the GIL, in C (nap.c). It notes the time in C, before it asks for the
GIL, and again in its first bytecode with it: the difference is the wait for the GIL and nothing
of the sleep's lateness.

Where it runs matters. A loop that lets the GIL go for a microsecond per system call gives it to
a waiter on its own core (it is woken at once), but often not to one on another core, which wakes
up too late; and threads of real servers do run on other cores. So the thread is bound to the
client's core, the only other one that two cores leave. There it must not be kept from running by
the client, which would count as waiting: it has real-time priority (SCHED_FIFO), which wins over
the client for some 1 % of the time. Where that is refused, the record says so.
"""

import contextlib
import ctypes
import json
import os
import signal
import threading
import time

NAP_NS = 1_000_000


def start_probe(library: str, core: int) -> None:
    """Begin to measure, in the server; SIGUSR2 ends it and has the samples printed as JSON.

    To be called before the process has other threads: all must block that signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    nap = ctypes.CDLL(library).nap  # a CDLL's functions run without the GIL
    nap.restype, nap.argtypes = ctypes.c_int64, [ctypes.c_int64]

    def probe() -> None:
        os.sched_setaffinity(0, {core})  # 0 is this thread
        real_time = False
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            real_time = True
        samples: list[tuple[int, int]] = []
        while signal.SIGUSR2 not in signal.sigpending():
            stamp = nap(NAP_NS)
            samples.append((stamp, time.monotonic_ns() - stamp))
        print(json.dumps({"real_time": real_time, "samples": samples}), flush=True)

    threading.Thread(target=probe, daemon=True).start()
