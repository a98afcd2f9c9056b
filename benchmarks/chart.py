"""The chart: a dot per loop and mode, the mean of requests per server-CPU second over asyncio.

The promise: it shows exactly the means of the tables, with the line from the worst to the best
cell and, in grey, how far uvloop was from itself in the same run.
"""

import pathlib
from typing import Any

from matplotlib import rc_context, ticker
from matplotlib.figure import Figure

from benchmarks.cells import TITLES
from benchmarks.figures import Figures, Results, by_cell, mean, modes
from benchmarks.loops import BASE, RIVAL, RIVAL_AGAIN

# Okabe and Ito's palette, told apart by most colour-blind readers; the markers differ as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8c6d31")
MARKERS = "osD^vPX*"
METRIC = "cpu"
TICKS = (0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 4, 8, 16)
STEP = 0.8  # of the height of a mode, shared by its loops


def dots(axes: Any, cells: dict[str, dict[str, Figures]], loops: list[str]) -> None:
    groups = modes(cells)
    for index, loop in enumerate(loops):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        labelled = False
        for row, names in enumerate(groups.values()):
            found = mean(cells, names, loop, BASE, METRIC)
            if not found:
                continue
            y = row + STEP * ((index + 0.5) / len(loops) - 0.5)
            axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(
                [found.value],
                [y],
                linestyle="",
                marker=marker,
                color=colour,
                markersize=6,
                label="" if labelled else loop,
            )
            labelled = True


def error_band(axes: Any, cells: dict[str, dict[str, Figures]]) -> None:
    found = mean(cells, list(cells), RIVAL_AGAIN, RIVAL, METRIC)
    if found:
        label = f"error of the run ({RIVAL} against itself)"
        low, high = min(found.low, 1.0), max(found.high, 1.0)
        axes.axvspan(low, high, color="#999999", alpha=0.25, linewidth=0, label=label)


def dress(axes: Any, cells: dict[str, dict[str, Figures]], results: Results) -> None:
    groups = modes(cells)
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(groups)), [TITLES[mode] for mode in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    for row in range(1, len(groups)):
        axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
    for row, names in enumerate(groups.values()):
        if not any(mean(cells, names, loop, BASE, METRIC) for loop in results["loops"]):
            axes.text(1.02, row, "no busy cell", color="#666666", va="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(ticker.FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%gx"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"requests per server-CPU second, relative to stock {BASE} (log scale)")
    axes.set_title(title(results), fontsize=9, loc="left", color="#444444")


def title(results: Results) -> str:
    machine, run = results["machine"], results["run"]
    return (
        f"{machine['python']}, Linux {machine['kernel']}, {machine['cpu']}, "
        f"{run['rounds']} rounds\n"
        "Dot: geometric mean of the busy cells; line: worst to best cell. Further right is better."
    )


def draw(results: Results, to: pathlib.Path) -> None:
    cells = by_cell(results)
    loops = [
        loop
        for loop, found in results["loops"].items()
        if loop not in (BASE, RIVAL_AGAIN) and "missing" not in found
    ]
    height = 1.6 + max(1, len(modes(cells))) * (0.25 + 0.11 * len(loops))
    # Text stays text, and no date: the same results give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "uringloop", "font.size": 10}):
        figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
        axes = figure.subplots()
        error_band(axes, cells)
        dots(axes, cells, loops)
        dress(axes, cells, results)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
