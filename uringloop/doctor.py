"""`python -m uringloop doctor`: which monitor does a loop get here, and if not io_uring, why.

It promises an answer for every refusal: the kernel's own errno, the likely cause on this machine,
and what to change. It needs nothing but the standard library and the package itself. (Where the
package's extension is missing, `import uringloop` has said so before this file is reached.)
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import grp
import json
import os
import platform
import resource
import socket
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uringloop import __version__, fdmon, new_event_loop
from uringloop.fdmon import FDMon

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

MONITORS = fdmon.MONITORS[1:]  # each by itself: all but "auto"
OLDEST_KERNEL = "6.1"
EPOLL_IS_FINE = (
    "Most production containers deny io_uring; epoll is fully supported there, with the same "
    "behaviour and the same tests."
)

# Bits of io_uring_params.features, in the kernel's order from bit 0.
FEATURES = (
    "SINGLE_MMAP NODROP SUBMIT_STABLE RW_CUR_POS CUR_PERSONALITY FAST_POLL POLL_32BITS "
    "SQPOLL_NONFIXED EXT_ARG NATIVE_WORKERS RSRC_TAGS CQE_SKIP LINKED_FILE REG_REG_RING "
    "RECVSEND_BUNDLE MIN_TIMEOUT RW_ATTR NO_IOWAIT"
).split()


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the kernel says about this process, before any ring is tried."""

    kernel: str
    python: str
    platform: str
    free_threaded: bool
    uid: int
    io_uring_disabled: int | None  # None: the sysctl is not there (before 6.6) or not readable
    io_uring_group: int | None
    in_io_uring_group: bool
    has_sys_admin: bool
    seccomp_mode: int | None  # 0 none, 1 strict, 2 filter
    memlock_bytes: tuple[int, int]  # soft, hard; -1 is unlimited
    open_files: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One monitor, tried by itself."""

    name: str
    works: bool
    step: str = ""  # the step of the set-up ladder that was taken
    features: int = 0
    errno: int | None = None
    refusal: str = ""
    cause: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an application gets when it asks for a loop now."""

    requested: str
    runs: bool
    monitor: str | None = None
    fallback_reason: str | None = None
    error: str = ""


class Advice(NamedTuple):
    """Why the kernel said no, and what changes that."""

    cause: str
    remedy: str


# ---------------------------------------------------------------------- looking around


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _own_status() -> dict[str, str]:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _limits(which: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(which)
    return soft, hard


def look_around() -> Surroundings:
    """Read everything that decides about io_uring; no system call that could be refused loudly."""
    status = _own_status()
    group = _read_int("/proc/sys/kernel/io_uring_group")
    cap_sys_admin = 1 << 21
    return Surroundings(
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        uid=os.getuid(),
        io_uring_disabled=_read_int("/proc/sys/kernel/io_uring_disabled"),
        io_uring_group=group,
        in_io_uring_group=group is not None and group in {os.getegid(), *os.getgroups()},
        has_sys_admin=bool(int(status.get("CapEff", "0"), 16) & cap_sys_admin),
        seccomp_mode=int(status["Seccomp"]) if "Seccomp" in status else None,
        memlock_bytes=_limits(resource.RLIMIT_MEMLOCK),
        open_files=_limits(resource.RLIMIT_NOFILE),
    )


# ---------------------------------------------------------------------- causes and cures


def _group_text(gid: int | None) -> str:
    if gid is None or gid < 0:
        return "no group (-1)"
    try:
        return f"group {grp.getgrgid(gid).gr_name} ({gid})"
    except KeyError:
        return f"group {gid}"


def _advise_eperm(here: Surroundings) -> Advice:
    if here.io_uring_disabled == 2:
        return Advice(
            "the sysctl kernel.io_uring_disabled is 2: io_uring is switched off for everybody "
            "(RHEL 9 and many hardened hosts ship this)",
            "as root: sysctl kernel.io_uring_disabled=0 (keep it in /etc/sysctl.d)",
        )
    if here.io_uring_disabled == 1 and not (here.has_sys_admin or here.in_io_uring_group):
        return Advice(
            "the sysctl kernel.io_uring_disabled is 1: only CAP_SYS_ADMIN and members of "
            f"kernel.io_uring_group, now {_group_text(here.io_uring_group)}, may use io_uring",
            "as root: add this user to a group and set kernel.io_uring_group to its id, or "
            "sysctl kernel.io_uring_disabled=0",
        )
    if here.seccomp_mode:
        return Advice(
            f"a seccomp filter is active (mode {here.seccomp_mode}) and the sysctl does not forbid "
            "io_uring, so the filter does: Docker >= 25 and containerd >= 2 drop the io_uring "
            "calls from their default profile",
            "run the container with a profile that allows io_uring_setup, io_uring_enter and "
            "io_uring_register (docker run --security-opt seccomp=PROFILE.json; Kubernetes: a "
            "Localhost seccompProfile; systemd: SystemCallFilter=). " + EPOLL_IS_FINE,
        )
    return Advice(
        "neither the sysctl nor a seccomp filter of this process forbids io_uring: a security "
        "module (SELinux, AppArmor, BPF-LSM) or an outer sandbox does",
        "look at the audit log of the host (ausearch -m avc). " + EPOLL_IS_FINE,
    )


def _advise_enomem(here: Surroundings) -> Advice:
    soft, hard = here.memlock_bytes
    return Advice(
        "a ring's memory, about 84 KiB, counts as locked memory of this user (kernel 6.14 and "
        f"later), and RLIMIT_MEMLOCK is {_size(soft)} (hard {_size(hard)}); or memory ran out",
        "raise the limit (ulimit -l, LimitMEMLOCK= in systemd, docker run --ulimit memlock=-1) or "
        "keep fewer loops alive at a time",
    )


def _advise_enosys(here: Surroundings) -> Advice:
    inside = (
        "; a seccomp filter is active and may answer so (Podman and CRI-O never allow io_uring)"
        if here.seccomp_mode
        else ""
    )
    return Advice(
        "this kernel has no io_uring: built without CONFIG_IO_URING, or a sandbox that plays the "
        f"kernel (gVisor, emulation){inside}",
        f"a kernel >= {OLDEST_KERNEL} with CONFIG_IO_URING, or a profile that allows the io_uring "
        "calls. " + EPOLL_IS_FINE,
    )


def _advise_descriptors(here: Surroundings) -> Advice:
    return Advice(
        f"there is no free descriptor: RLIMIT_NOFILE is {here.open_files[0]} (hard "
        f"{here.open_files[1]}), or the whole system is at its limit",
        "raise the limit (ulimit -n, LimitNOFILE= in systemd) or close what is not needed",
    )


def _advise_other(number: int | None, here: Surroundings) -> Advice:
    """For epoll and poll, which nothing forbids but limits and the odd sandbox."""
    if number in (errno.EMFILE, errno.ENFILE):
        return _advise_descriptors(here)
    return Advice(
        "memory ran out, or a sandbox denies what every Linux program uses",
        "look at the sandbox's profile; without epoll a loop still runs on poll",
    )


def advise(number: int | None, here: Surroundings) -> Advice:
    """Name the likely cause of a refusal with this errno, on this machine, and the remedy."""
    match number:
        case errno.EPERM | errno.EACCES:
            return _advise_eperm(here)
        case errno.ENOSYS:
            return _advise_enosys(here)
        case errno.ENOMEM:
            return _advise_enomem(here)
        case errno.EMFILE | errno.ENFILE:
            return _advise_descriptors(here)
        case errno.EINVAL:
            return Advice(
                f"the kernel does not know what uringloop asks for: older than {OLDEST_KERNEL}",
                f"a kernel >= {OLDEST_KERNEL} (6.6 and later take the best flags). {EPOLL_IS_FINE}",
            )
        case errno.EOPNOTSUPP | errno.EIO | errno.EBADF | errno.EFAULT:
            return Advice(
                "a ring could be made but did not work: the self-test failed or a feature is "
                "missing, as on an old kernel or one that emulates io_uring",
                f"a real Linux kernel >= {OLDEST_KERNEL}. {EPOLL_IS_FINE}",
            )
        case _:
            return Advice(
                "not a refusal that is known to happen",
                f"the errno above is the kernel's own; nothing needs to be done. {EPOLL_IS_FINE}",
            )


# ---------------------------------------------------------------------- trying


def try_monitor(name: str, here: Surroundings) -> Trial:
    """Make this monitor alone, without fallback, and close it again."""
    try:
        monitor = FDMon.create(name)
    except OSError as error:
        advice = (
            advise(error.errno, here) if name == "io_uring" else _advise_other(error.errno, here)
        )
        return Trial(
            name,
            works=False,
            errno=error.errno,
            refusal=str(error),
            cause=advice.cause,
            remedy=advice.remedy,
        )
    try:
        return Trial(name, works=True, step=monitor.setup_step or "", features=monitor.features)
    finally:
        monitor.close()


async def _answer(loop: AbstractEventLoop) -> bytes:
    """Send one byte through the kernel and see it come back as readiness."""
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        await loop.sock_sendall(left, b"?")
        return await loop.sock_recv(right, 1)


def try_loop() -> Verdict:
    """Make and run a loop exactly as an application does, URINGLOOP_MONITOR included."""
    requested = os.environ.get("URINGLOOP_MONITOR") or "auto"
    try:
        loop = new_event_loop()
    except (OSError, ValueError) as error:
        return Verdict(requested, runs=False, error=str(error))
    try:
        runs = loop.run_until_complete(_answer(loop)) == b"?"
        return Verdict(requested, runs, loop.monitor, loop.fallback_reason)
    except OSError as error:
        return Verdict(requested, runs=False, monitor=loop.monitor, error=str(error))
    finally:
        loop.close()


# ---------------------------------------------------------------------- telling


def _size(size_bytes: int) -> str:
    if size_bytes == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{size_bytes // 1024} KiB"


def _count(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _errno_name(number: int | None) -> str:
    return "" if number is None else errno.errorcode.get(number, f"errno {number}")


def _feature_names(features: int) -> str:
    known = [name for bit, name in enumerate(FEATURES) if features >> bit & 1]
    rest = features >> len(FEATURES) << len(FEATURES)
    return " ".join([*known, *([hex(rest)] if rest else [])])


def _sysctl_text(here: Surroundings) -> str:
    meaning = {
        None: "not there or not readable (kernels before 6.6 have none)",
        0: "0: everybody may",
        1: f"1: only CAP_SYS_ADMIN and {_group_text(here.io_uring_group)} may",
        2: "2: nobody may",
    }
    return meaning.get(here.io_uring_disabled, str(here.io_uring_disabled))


def _seccomp_text(mode: int | None) -> str:
    names = {0: "none", 1: "strict", 2: "a filter is active (it may or may not deny io_uring)"}
    return "unknown" if mode is None else names.get(mode, f"mode {mode}")


def _surroundings_lines(here: Surroundings) -> list[str]:
    version = "free-threaded: not promised to work" if here.free_threaded else "with the GIL"
    return [
        f"kernel              {here.kernel}",
        f"platform            {here.platform}",
        f"Python              {here.python}, {version}",
        f"user                uid {here.uid}",
        f"io_uring_disabled   {_sysctl_text(here)}",
        f"seccomp             {_seccomp_text(here.seccomp_mode)}",
        f"RLIMIT_MEMLOCK      {_size(here.memlock_bytes[0])} (hard {_size(here.memlock_bytes[1])})",
        f"RLIMIT_NOFILE       {_count(here.open_files[0])} (hard {_count(here.open_files[1])})",
    ]


def _trial_lines(trial: Trial) -> list[str]:
    if trial.works:
        lines = [f"{trial.name:<20}works{': ' + trial.step if trial.step else ''}"]
        if trial.features:
            lines.append(f"{'':<20}features {_feature_names(trial.features)}")
        return lines
    return [
        f"{trial.name:<20}refused: {trial.refusal}",
        f"{'':<20}cause: {trial.cause}",
        f"{'':<20}remedy: {trial.remedy}",
    ]


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"URINGLOOP_MONITOR   {verdict.requested}"]
    if verdict.error:
        lines.append(f"no loop runs        {verdict.error}")
    elif not verdict.runs:
        lines.append("no loop runs        a byte sent through a socket pair did not come back")
    else:
        lines.append(f"a loop runs on      {verdict.monitor}")
        if verdict.fallback_reason:
            lines.append(f"instead of io_uring {verdict.fallback_reason}")
    return lines


def render(here: Surroundings, trials: list[Trial], verdict: Verdict, version: str) -> str:
    """Put the report into words."""
    lines = [f"uringloop           {version}", *_surroundings_lines(here), ""]
    for trial in trials:
        lines += _trial_lines(trial)
    return "\n".join([*lines, "", *_verdict_lines(verdict)])


def render_json(here: Surroundings, trials: list[Trial], verdict: Verdict, version: str) -> str:
    """Put the report into one JSON object."""
    report = {
        "uringloop": version,
        "surroundings": dataclasses.asdict(here),
        "monitors": {
            trial.name: dataclasses.asdict(trial) | {"errno_name": _errno_name(trial.errno)}
            for trial in trials
        },
        "loop": dataclasses.asdict(verdict),
    }
    return json.dumps(report, indent=2)


def main(argv: list[str]) -> int:
    """Print the report; 0 when a loop can run with the settings in force, 1 when none can."""
    parser = argparse.ArgumentParser(
        prog="python -m uringloop doctor",
        description="Says which monitor a loop gets here and why; exit 0 when a loop can run.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args(argv)
    here = look_around()
    trials = [try_monitor(name, here) for name in MONITORS]
    verdict = try_loop()
    show = render_json if arguments.json else render
    print(show(here, trials, verdict, __version__))
    return 0 if verdict.runs else 1
