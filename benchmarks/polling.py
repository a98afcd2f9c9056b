"""What adaptive polling gains and costs: `python -m benchmarks.polling` from the repository's root.

One connection, where a loop waits for most of the time: 1 KiB is echoed to a peer that sends its
next request at once, or after a pause. The promise: the latency that looking saves stands beside
the CPU time that it takes, and an idle second and the pauses where it does not help are shown too.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks import footprint, report, run
from benchmarks.cells import KIB, TITLES, Cell
from benchmarks.figures import Results
from benchmarks.host import ChildError, prepared
from benchmarks.loops import BASE, OURS, RIVAL

POLLING = " poll_max_ns="
PAUSES = {0: "at once", 20: "after 20 us", 100: "after 100 us", 1000: "after 1 ms"}
MODES = ("raw", "streams")
RING, EPOLL = f"{OURS}-io_uring", f"{OURS}-epoll"
LIMITS_US = {RING: (10, 50, 100, 200), EPOLL: (50,)}
LOOPS = [BASE, RIVAL] + [
    name
    for loop, limits in LIMITS_US.items()
    for name in (loop, *(f"{loop}{POLLING}{limit * 1000}" for limit in limits))
]
# Okabe and Ito's colours, as in chart.py: one per monitor.
MARKS = dict(zip(LOOPS[:2], [("s", "#666666"), ("D", "#E69F00")], strict=True))
MARKS |= {loop: (m, "#0072B2") for loop, m in zip(LOOPS[2:7], "ov^P*", strict=True)}
MARKS |= {loop: (m, "#009E73") for loop, m in zip(LOOPS[7:], "o^", strict=True)}
CAPTION = (
    "Median round trip of 1 KiB, one connection, Protocol. Left is faster, down is cheaper; a thin "
    "line joins poll_max_ns to off."
)
CELLS = [Cell(mode, KIB, 1, pause) for mode in MODES for pause in PAUSES]


def label(loop: str) -> str:
    base, _, limit_ns = loop.removeprefix(f"{OURS}-").partition(POLLING)
    return f"{base}, {int(limit_ns) // 1000} us" if limit_ns else base


def samples(results: Results, cell: Cell, loop: str) -> list[dict[str, Any]]:
    found = [s for s in results["samples"] if (s["cell"], s["loop"]) == (cell.name, loop)]
    return [s for s in found if "failure" not in s]


def cpu_us(sample: dict[str, Any]) -> float:
    return float(1e6 * sample["server_cpu_s"] / sample["requests"])


def cpu_percent(sample: dict[str, Any]) -> float:
    return float(100 * sample["server_cpu_s"] / sample["seconds"])


def saved(results: Results, cell: Cell, loop: str) -> str:
    """The round trip relative to the same loop that does not look, within the rounds."""
    off = {s["round"]: s["p50_us"] for s in samples(results, cell, loop.partition(POLLING)[0])}
    mine = {s["round"]: s["p50_us"] for s in samples(results, cell, loop)}
    ratios = [us / off[number] for number, us in mine.items() if number in off]
    return f", x{median(ratios):.2f}" if POLLING in loop and ratios else ""


def latency_text(results: Results, cell: Cell, loop: str) -> str:
    found = samples(results, cell, loop)
    if not found:
        return "**failed**"
    us = [s["p50_us"] for s in found]
    spread = f"{median(us):.0f} ({min(us):.0f}-{max(us):.0f}{saved(results, cell, loop)})"
    return f"{spread} / {median(s['p99_us'] for s in found):.0f}"


def cpu_text(results: Results, cell: Cell, loop: str) -> str:
    found = samples(results, cell, loop)
    if not found:
        return "**failed**"
    return f"{median(map(cpu_us, found)):.0f} / {median(map(cpu_percent, found)):.0f} %"


def idle_text(results: Results, loop: str) -> str:
    idle = results["footprint"].get(loop, {}).get("idle", "-")
    return idle if isinstance(idle, str) else f"{idle['idle_cpu_ms']:.1f}"


def markdown(results: Results) -> str:
    loops = [name for name, found in results["loops"].items() if "missing" not in found]
    lines = report.heading(results)
    figures: dict[str, Callable[[Results, Cell, str], str]] = {
        "round trip in us: median (lowest-highest round, relative to off) / p99": latency_text,
        "server CPU time per request in us / share of a core": cpu_text,
    }
    for mode in MODES:
        cells = [cell for cell in CELLS if cell.mode == mode]
        for title, text in figures.items():
            lines += [f"{TITLES[mode]}: {title}", ""]
            rows = [[label(loop), *(text(results, cell, loop) for cell in cells)] for loop in loops]
            lines += report.table(["loop", *PAUSES.values()], rows)
    lines += ["An idle second after that, with ten connections: CPU time in ms", ""]
    lines += report.table([*map(label, loops)], [[idle_text(results, loop) for loop in loops]])
    return "\n".join(lines)


def panel(axes: Any, results: Results, cell: Cell) -> None:
    """A dot per loop; a line joins a loop that looks to itself that does not."""
    for loop, (marker, colour) in MARKS.items():
        both = [samples(results, cell, name) for name in (loop, loop.partition(POLLING)[0])]
        if not all(both):
            continue
        x = [median(s["p50_us"] for s in found) for found in both]
        y = [median(map(cpu_percent, found)) for found in both]
        inside = "white" if loop in LIMITS_US else colour
        style = {"color": colour, "markerfacecolor": inside, "linewidth": 0.7}
        axes.plot(x, y, marker, linestyle="-", markevery=[0], label=label(loop), **style)
    axes.set_title(f"next request {PAUSES[cell.think_us]}", fontsize=10)
    axes.set_xlabel("round trip, us")
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)


def draw(results: Results, to: pathlib.Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    machine, cells = results["machine"], [cell for cell in CELLS if cell.mode == "raw"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "uringloop", "font.size": 10}):
        figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(cells), sharex=True, sharey=True)
        for axes, cell in zip(panels, cells, strict=True):
            panel(axes, results, cell)
        panels[0].set(xlim=(0, None), ylim=(0, 105), ylabel="server CPU, % of a core")
        title = f"{machine['python']}, Linux {machine['kernel']}, {machine['cpu']}\n{CAPTION}"
        figure.suptitle(title, fontsize=9, x=0.01, ha="left", color="#444444")
        entries = panels[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def measure(options: argparse.Namespace) -> Results:
    results = run.run(options)
    with prepared() as host:
        for name, found in results["loops"].items():
            if "missing" in found or "interrupted" in results:
                continue
            try:
                results["footprint"][name] = {"idle": footprint.idle(host, name)}
            except (ChildError, OSError) as error:
                results["footprint"][name] = {"idle": str(error)}
    return results


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.polling", description=__doc__)
    parser.add_argument("--rounds", default="4", help="default: 4, in three minutes")
    for name in ("--json", "--table", "--chart"):
        parser.add_argument(name, metavar="FILE")
    wanted = {f"--{name}": text for name, text in vars(parser.parse_args()).items() if text}
    wanted["--loops"] = ",".join(LOOPS)
    words = [word for pair in wanted.items() for word in pair]
    options = run.parse([*words, "--no-micro", "--no-footprint"])
    options.cells = CELLS
    results = measure(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.table:
        options.table.write_text(markdown(results) + "\n")
    else:
        print(markdown(results))
    if options.chart:
        draw(results, options.chart)
    failures = run.our_failures(results)
    for failure in failures:
        run.say(f"FAILED: {failure}")
    return 130 if "interrupted" in results else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
