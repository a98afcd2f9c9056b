"""The machine and the processes on it: cores, sessions, clocks, limits.

The promise: every child has its own session and core, is waited for within a bound, and is ended
by its pid when its `with` block is left, whatever happened in it.
"""

import contextlib
import datetime as dt
import importlib.metadata
import os
import pathlib
import platform
import resource
import select
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Self

ROOT = pathlib.Path(__file__).resolve().parent.parent
NICE = "-20"
START_LIMIT_S = 20.0


class ChildError(Exception):
    """A child did not do its part; the text is fit for a table."""


def read_text(path: str, default: str = "") -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return default


def raise_limits(files: int = 12000) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def two_cores() -> tuple[int, int]:
    """One core for the server, another for the client; hyperthreads of one core count as one."""
    cores = sorted(os.sched_getaffinity(0))
    path = f"/sys/devices/system/cpu/cpu{cores[0]}/topology/thread_siblings_list"
    siblings = set(read_text(path).replace("-", ",").split(","))
    others = [core for core in cores[1:] if str(core) not in siblings] or cores[1:] or cores
    return cores[0], others[0]


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, ended ones too: clock_getcpuclockid(3) by hand."""
    return time.clock_gettime((~pid << 3) | 2)


class Child:
    """A process in its own session, pinned to a core, at nice -20 where its autogroup may be set.

    The session matters: with sched_autogroup on, nice counts only among processes of one session.
    """

    autogroup_set = True  # of the whole run: False once a write was refused

    def __init__(self, argv: Sequence[str], core: int) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # inherited, so the child never runs anywhere else
        try:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                cwd=ROOT,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, before)
        self.pid = self.process.pid
        self.pending = b""
        self.raise_priority()

    def raise_priority(self) -> None:
        try:
            pathlib.Path(f"/proc/{self.pid}/autogroup").write_text(NICE)
        except OSError:
            Child.autogroup_set = False

    def read_line(self, limit_s: float = START_LIMIT_S) -> str:
        assert self.process.stdout
        deadline = time.monotonic() + limit_s
        while b"\n" not in self.pending:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise ChildError(f"no answer in {limit_s:.0f} s")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise ChildError(self.last_words())
            self.pending += data
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode()

    def last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        lines = self.error_text().strip().splitlines()
        return lines[-1][:160] if lines else f"ended with status {self.process.returncode}"

    def error_text(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1)
        assert self.process.stdout
        self.process.stdout.close()
        self.errors.close()


class Host:
    """What the samples of one run share: cores, the compiled client, the certificate."""

    def __init__(self, scratch: str) -> None:
        self.scratch = pathlib.Path(scratch)
        self.server_core, self.client_core = two_cores()
        self.client = self.compile("client.c", "client", "-ldl")
        self.nap = self.compile("nap.c", "nap.so", "-shared", "-fPIC")
        self.certificate = self.make_certificate()

    def compile(self, source: str, target: str, *flags: str) -> str:
        to = str(self.scratch / target)
        path = str(pathlib.Path(__file__).with_name(source))
        compiler = os.environ.get("CC", "cc").split()
        try:
            command = [*compiler, "-O2", "-Wall", "-Wextra", "-o", to, path, *flags]
            subprocess.run(command, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            sys.exit(f"the load client needs a C compiler (cc, or $CC): {error}")
        return to

    def make_certificate(self) -> str | None:
        """A self-signed P-256 certificate and its key, one file; None without openssl."""
        key, certificate = self.scratch / "key.pem", self.scratch / "certificate.pem"
        new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        files = ["-keyout", str(key), "-out", str(certificate)]
        command = ["openssl", "req", "-x509", *new.split(), *files]
        try:
            subprocess.run(command, check=True, timeout=60, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            return None
        key.write_text(key.read_text() + certificate.read_text())
        return str(key)

    def python(self, module: str, *arguments: str) -> Child:
        return Child([sys.executable, "-m", f"benchmarks.{module}", *arguments], self.server_core)


@contextlib.contextmanager
def prepared() -> Iterator[Host]:
    raise_limits()
    with tempfile.TemporaryDirectory(prefix="uringloop-bench-") as scratch:
        yield Host(scratch)


def processor() -> str:
    for line in read_text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def stolen_ticks() -> tuple[int, int]:
    """(stolen by the hypervisor, all) since boot, from /proc/stat."""
    fields = [int(n) for n in read_text("/proc/stat").splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)


def libraries() -> str:
    """Versions of what serves HTTP and TLS."""
    found = [f"OpenSSL {ssl.OPENSSL_VERSION.split()[1]}"]
    for name in ("uvicorn", "httptools", "h11", "aiohttp"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def describe(host: Host) -> dict[str, object]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    governor = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    sysctl = "/proc/sys/kernel/"
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": libraries(),
        "kernel": platform.release(),
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "server_core": host.server_core,
        "client_core": host.client_core,
        "governor": read_text(governor, "not exposed"),
        "open_files": files,
        "somaxconn": read_text("/proc/sys/net/core/somaxconn"),
        "io_uring_disabled": read_text(sysctl + "io_uring_disabled", "absent"),
        "sched_autogroup": read_text(sysctl + "sched_autogroup_enabled", "absent"),
        "load_before": read_text("/proc/loadavg"),
    }
