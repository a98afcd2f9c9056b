"""The targets: what uringloop on io_uring and on epoll has to reach in one run, peers beside it.

A ratio is one to uvloop per server-CPU second (in-process rows: per CPU second), the median of the
rounds, unless the row says otherwise. All cells of a row count, busy or not: a loop that makes its
client the bottleneck must not lose the cell for it. A cell's A/A spread is half the range of the
rounds of uvloop-again to uvloop, at most 8 %. The promise: every loop of the run has its value in
every row, no row is left out because of its result, and one that has not all cells says so (n=).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import ECHO_TARGETS, GIL_LOADS, SOCK_TARGETS, TITLES
from benchmarks.figures import Figures, Ratio, Results, geometric_mean, micro_ratio
from benchmarks.loops import BASE, OURS, RIVAL, RIVAL_AGAIN

Cells = dict[str, dict[str, Figures]]
SINGLE_FLOOR = 0.95
SPREAD_LIMIT = 0.08
GIL_LIMIT_US = 1000
RATIO = "{:.2f}".format
COUNT = "{:,.0f}".format
# Title, cells, floor, the loop to compare with.
CELL_ROWS: list[tuple[str, list[str], float | None, str]] = [
    ("Echo, Protocol 1 KiB", [f"raw/1KiB/{n}" for n in (10, 100, 1000)], 1.15, RIVAL),
    ("Echo, streams 1 KiB", [f"streams/1KiB/{n}" for n in (10, 100, 1000)], 1.3, RIVAL),
    ("Echo, sock_*", [cell.name for cell in SOCK_TARGETS], 1.3, RIVAL),
    ("UDP echo 1 KiB x 50", ["udp/1KiB/50"], 1.2, RIVAL),
    (TITLES["uvicorn-httptools"], ["uvicorn-httptools/0KiB/50"], 1.5, RIVAL),
    (TITLES["uvicorn-h11"], ["uvicorn-h11/0KiB/50"], 1.3, RIVAL),
    (TITLES["aiohttp"], ["aiohttp/0KiB/50"], 1.5, RIVAL),
    (f"TLS echo 1 KiB x 10, to {BASE}", ["tls/1KiB/10"], 1.2, BASE),
    ("TLS echo 1 KiB x 10", ["tls/1KiB/10"], None, RIVAL),
    (f"TLS echo 100 KiB x 10, to {BASE}", ["tls/100KiB/10"], 1.2, BASE),
    ("TLS echo 100 KiB x 10", ["tls/100KiB/10"], None, RIVAL),
    (TITLES["churn"], ["churn/1KiB/10", "churn/1KiB/100"], 1.05, RIVAL),
]
# A floor of None is 1.0 less the A/A spread.
MICRO_ROWS: dict[str, float | None] = {
    "call_soon": 1.1,
    "call_soon_threadsafe": 1.1,
    "call_later + cancel": 1.1,
    "task switch, sleep(0)": None,
    "gather of 1000, per task": None,
}


@dataclass(frozen=True)
class Value:
    figure: float | None
    text: str


@dataclass(frozen=True)
class Row:
    """met: None for a row that is reported and has no target."""

    title: str
    wanted: str
    values: dict[str, Value]
    met: Callable[[float], bool] | None

    def texts(self, loops: list[str]) -> list[str]:
        return [self.title, self.wanted, *(self.text(loop) for loop in loops)]

    def text(self, loop: str) -> str:
        value = self.values.get(loop)
        if not value:
            return "-"
        if not loop.startswith(OURS) or not self.met:
            return value.text
        if value.figure is not None and self.met(value.figure):
            return f"{value.text} met"
        return f"**{value.text} short**"


def floor_row(title: str, floor: float, values: dict[str, Value], why: str = "") -> Row:
    return Row(title, f"≥ {floor:.2f}{why}", values, lambda figure: figure >= floor)


def cell_ratio(found: Figures | None, other: str) -> Ratio | None:
    return None if not found or found.failure else found.ratios["cpu"].get(other)


def ratio_value(cells: Cells, names: list[str], loop: str, other: str) -> Value:
    """The geometric mean of all these cells."""
    if loop == other:
        return Value(1.0, "1")
    found = [r.middle for name in names if (r := cell_ratio(cells.get(name, {}).get(loop), other))]
    if not found:
        return Value(None, "none")
    mean = geometric_mean(found)
    return Value(mean, RATIO(mean) + ("" if len(found) == len(names) else f" (n={len(found)})"))


def spread(ratio: Ratio | None) -> float:
    """The A/A spread: half the range of uvloop's rounds against itself, at most 8 %."""
    return min(SPREAD_LIMIT, (ratio.high - ratio.low) / 2) if ratio else 0.0


def cell_floor(cells: Cells, name: str) -> float:
    if name.endswith("/1"):
        return SINGLE_FLOOR
    return 1 - spread(cell_ratio(cells[name].get(RIVAL_AGAIN), RIVAL))


def echo_cells(cells: Cells) -> list[str]:
    return [cell.name for cell in ECHO_TARGETS if cell.name in cells]


def echo_row(cells: Cells, loops: list[str]) -> Row:
    """The one row whose floor is the peers' as well."""
    names = [cell.name for cell in ECHO_TARGETS if cell.connections > 1]
    values = {loop: ratio_value(cells, names, loop, RIVAL) for loop in loops}
    peers = {loop: v.figure for loop, v in values.items() if v.figure}
    peers = {loop: figure for loop, figure in peers.items() if not loop.startswith((OURS, RIVAL))}
    best = max(peers, key=lambda loop: peers[loop], default="none")
    ahead_of = peers.get(best, 0.0)
    title = "Echo: Protocol, streams, BufferedProtocol x 1/10/100 KiB x 10/100/1000"
    wanted = f"≥ 1.15, > every peer (best: {best} {ahead_of:.2f})"
    return Row(title, wanted, values, lambda figure: figure >= 1.15 and figure > ahead_of)


def worst_row(cells: Cells, loops: list[str], single: bool) -> Row:
    """The cell that is farthest below its floor, or nearest above it."""
    names = [name for name in echo_cells(cells) if name.endswith("/1") == single]

    def value(loop: str) -> Value:
        found = [(name, cell_ratio(cells[name].get(loop), RIVAL)) for name in names]
        margins = {name: r.middle - cell_floor(cells, name) for name, r in found if r}
        if len(margins) < len(names):
            return Value(None, f"{len(names) - len(margins)} of {len(names)} failed")
        worst = min(margins, key=lambda name: margins[name])
        below = sum(margin < 0 for margin in margins.values())
        ratio = margins[worst] + cell_floor(cells, worst)
        return Value(margins[worst], f"{ratio:.2f} in {worst} ({below} of {len(names)} below)")

    title = f"Echo, the worst cell of {'1 connection' if single else '10/100/1000 connections'}"
    wanted = f"≥ {SINGLE_FLOOR}" if single else "≥ 1 less A/A"
    values = {loop: value(loop) for loop in loops if loop != RIVAL}
    return Row(title, wanted, values, lambda margin: margin >= 0)


def cell_rows(cells: Cells, loops: list[str]) -> list[Row]:
    rows = []
    for title, names, floor, other in CELL_ROWS:
        if not any(name in cells for name in names):
            continue
        values = {loop: ratio_value(cells, names, loop, other) for loop in loops}
        rows.append(floor_row(title, floor, values) if floor else Row(title, "-", values, None))
    return rows


def micro_rows(results: Results, loops: list[str]) -> list[Row]:
    rows = []
    for operation, fixed in MICRO_ROWS.items():
        ratios = {loop: micro_ratio(results, operation, loop, RIVAL) for loop in loops}
        floor = 1 - spread(ratios.get(RIVAL_AGAIN)) if fixed is None else fixed
        values = {loop: Value(r.middle, RATIO(r.middle)) for loop, r in ratios.items() if r}
        rows.append(floor_row(operation, floor, values, "" if fixed else " (1 less A/A)"))
    return rows


def footprint_value(results: Results, loop: str, key: str, show: Callable[[Any], Value]) -> Value:
    """What was not had is a text; the footprint's own table says it in full."""
    found = results["footprint"].get(loop, {}).get(key, "missing")
    return Value(None, found.partition(":")[0]) if isinstance(found, str) else show(found)


def ceiling_row(results: Results, title: str, key: str, part: str, loops: list[str]) -> Row:
    """A figure of the footprint that must not be above uvloop's."""

    def show(found: Any) -> Value:
        figure = found[part] if part else found
        return Value(figure, COUNT(figure))

    values = {loop: footprint_value(results, loop, key, show) for loop in loops}
    limit = values[RIVAL].figure or 0.0
    return Row(title, f"≤ {RIVAL}'s", values, lambda figure: figure <= limit)


def gil_rows(results: Results, loops: list[str]) -> list[Row]:
    def show(found: Any) -> Value:
        text = f"{found['p99_us']:,.0f} ({found['max_us']:,.0f})"
        return Value(found["p99_us"], text + ("" if found["real_time"] else " no real time"))

    rows = []
    for cell in GIL_LOADS:
        key = f"gil {cell.name}"
        values = {loop: footprint_value(results, loop, key, show) for loop in loops}
        if any(v.figure is not None for v in values.values()):
            title = f"another thread's wait for the GIL under {cell.name}: p99 (max), us"
            met = lambda figure: figure <= GIL_LIMIT_US  # noqa: E731
            rows.append(Row(title, f"≤ {GIL_LIMIT_US} p99", values, met))
    return rows


def footprint_rows(results: Results, loops: list[str]) -> list[Row]:
    measured = results["footprint"].get(RIVAL, {}).get("rss raw")
    n = f"{measured['connections']:,}" if isinstance(measured, dict) else "?"
    rows = [
        ceiling_row(results, f"RSS / connection, {n} idle, {mode}: {what}, B", key, part, loops)
        for mode, key in (("Protocol", "rss raw"), ("streams", "rss streams"))
        for part, what in (("growth", "growth"), ("whole", "whole process"))
    ]
    title = "instructions per call_soon and callback (callgrind)"
    return [
        ceiling_row(results, title, "instructions", "", loops),
        *rows,
        *gil_rows(results, loops),
    ]


def rows(results: Results, cells: Cells, loops: list[str]) -> list[Row]:
    found = []
    if any(not name.endswith("/1") for name in echo_cells(cells)):
        found += [echo_row(cells, loops), worst_row(cells, loops, single=False)]
    if any(name.endswith("/1") for name in echo_cells(cells)):
        found += [worst_row(cells, loops, single=True)]
    found += cell_rows(cells, loops)
    if results["micro"]:
        found += micro_rows(results, loops)
    if results["footprint"]:
        found += footprint_rows(results, loops)
    return found


def single_cells(cells: Cells, loops: list[str]) -> list[Row]:
    """Every cell of the first three rows, by itself."""
    found = []
    for name in echo_cells(cells):
        values = {loop: ratio_value(cells, [name], loop, RIVAL) for loop in loops}
        found.append(floor_row(name, cell_floor(cells, name), values))
    return found
