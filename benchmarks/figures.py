"""From samples to figures: medians, per-round ratios, what counts and what does not.

The rules, in one place (README.md says them in words):
- a ratio is taken within one round and the median of a cell's rounds is its figure; low and high
  are the smallest and the largest of them;
- a cell is *busy* for a loop when its server used >= 85 % of its core, and not less than the client
  used of its own; for requests per server-CPU second, time in which the server was ready to run but
  somebody else had the core counts as used;
- a ratio enters the geometric mean when the cell has more than one connection, is busy for both
  loops, and neither failed. 1-connection cells wait for wake-ups instead: they have a mean of
  their own.
"""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.loops import BASE, RIVAL

BUSY_PERCENT = 85
Results = dict[str, Any]
METRICS = {"wall": "requests/s", "cpu": "requests per server-CPU second"}


@dataclass(frozen=True)
class Ratio:
    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """One loop in one cell; values by metric ("wall", "cpu"), ratios also by the other loop."""

    value: dict[str, float]
    ratios: dict[str, dict[str, Ratio]]
    server_percent: float
    wait_percent: float
    client_percent: float
    p50_us: float
    p99_us: float
    failure: str
    single: bool

    def busy(self, metric: str) -> bool:
        used = self.server_percent + (self.wait_percent if metric == "cpu" else 0)
        return not self.failure and used >= max(BUSY_PERCENT, self.client_percent)


def rate(sample: dict[str, Any], metric: str) -> float:
    seconds = sample["seconds"] if metric == "wall" else sample["server_cpu_s"]
    return float(sample["requests"] / seconds) if seconds else 0.0


def ratio(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], metric: str) -> Ratio | None:
    other = {sample["round"]: rate(sample, metric) for sample in theirs}
    values = [
        rate(sample, metric) / other[sample["round"]]
        for sample in mine
        if other.get(sample["round"])
    ]
    return Ratio(median(values), min(values), max(values)) if values else None


def figures(loop: str, cell: dict[str, list[dict[str, Any]]]) -> Figures:
    """cell: the samples of one cell by loop."""
    failures = [s["failure"] for s in cell[loop] if "failure" in s]
    good = {name: [s for s in samples if "failure" not in s] for name, samples in cell.items()}
    mine = good[loop]

    def middle(value: Any) -> float:
        return float(median([value(s) for s in mine])) if mine else 0.0

    ratios: dict[str, dict[str, Ratio]] = {}
    for metric in METRICS:
        found = {o: ratio(mine, good.get(o, []), metric) for o in (BASE, RIVAL) if o != loop}
        ratios[metric] = {other: r for other, r in found.items() if r}
    return Figures(
        value={metric: middle(lambda s, m=metric: rate(s, m)) for metric in METRICS},
        ratios=ratios,
        server_percent=middle(lambda s: 100 * s["server_cpu_s"] / s["seconds"]),
        wait_percent=middle(lambda s: 100 * s["server_wait_s"] / s["seconds"]),
        client_percent=middle(lambda s: 100 * s["client_cpu_s"] / s["seconds"]),
        p50_us=middle(lambda s: s["p50_us"]),
        p99_us=middle(lambda s: s["p99_us"]),
        failure=failures[0] if failures else "",
        single=cell[loop][0]["connections"] == 1,
    )


def by_cell(results: Results) -> dict[str, dict[str, Figures]]:
    """Cell name -> loop -> figures, in the order of the run."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in results["samples"]:
        samples.setdefault(record["cell"], {}).setdefault(record["loop"], []).append(record)
    return {name: {loop: figures(loop, cell) for loop in cell} for name, cell in samples.items()}


def modes(cells: dict[str, dict[str, Figures]]) -> dict[str, list[str]]:
    """Mode -> names of its cells."""
    found: dict[str, list[str]] = {}
    for name in cells:
        found.setdefault(name.partition("/")[0], []).append(name)
    return found


@dataclass(frozen=True)
class Mean:
    """A geometric mean of cells' ratios, with the lowest and highest cell and their number."""

    value: float
    low: float
    high: float
    cells: int


def mean(
    cells: dict[str, dict[str, Figures]],
    names: list[str],
    loop: str,
    other: str,
    metric: str,
    single: bool = False,
) -> Mean | None:
    """By the rule above; single=True gives the 1-connection cells, busy or not."""
    values = []
    for name in names:
        mine, theirs = cells[name].get(loop), cells[name].get(other)
        if not mine or not theirs or mine.single != single or mine.failure or theirs.failure:
            continue
        if (single or (mine.busy(metric) and theirs.busy(metric))) and other in mine.ratios[metric]:
            values.append(mine.ratios[metric][other].middle)
    if not values:
        return None
    return Mean(geometric_mean(values), min(values), max(values), len(values))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def micro_ratio(results: Results, operation: str, loop: str, other: str) -> Ratio | None:
    """How many times as fast as the other an in-process operation is, per CPU second."""
    cpu_ns: dict[tuple[str, int], float] = {
        (record["loop"], record["round"]): record["cpu_ns"][operation]
        for record in results["micro"]
        if "failure" not in record
    }
    values = [
        theirs / mine
        for (name, number), mine in cpu_ns.items()
        if name == loop and (theirs := cpu_ns.get((other, number)))
    ]
    return Ratio(median(values), min(values), max(values)) if values else None
