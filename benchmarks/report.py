"""The report: JSON of a run -> markdown tables, and one chart by chart.py.

`python -m benchmarks.report run.json [--table FILE] [--chart FILE.svg]`. The promise: every loop
and cell of the JSON is in the tables, with its losses, its failures and the cells that do not
count.
"""

import argparse
import json
import pathlib
from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks import targets
from benchmarks.cells import GIL_LOADS, TITLES
from benchmarks.figures import (
    METRICS,
    Figures,
    Mean,
    Ratio,
    Results,
    by_cell,
    mean,
    micro_ratio,
    modes,
)
from benchmarks.loops import BASE, OURS, RIVAL, RIVAL_AGAIN

Cells = dict[str, dict[str, Figures]]
LEGEND = f"""\
- A figure `1.50 / 1.04 (0.99-1.10)` is the ratio to {BASE}, the ratio to {RIVAL}, and the lowest
  and highest ratio of a round to {RIVAL} (to {BASE} for {RIVAL} itself, or where it is missing).
  Ratios are medians of the rounds' ratios; higher is better. {RIVAL_AGAIN} to {RIVAL} is the error
  of the run.
- ‡ The server core was not the busy one (< 85 %, or less than the client's): not in the means.
- † One connection: bound by latency, not by the server; these have a mean of their own.
- "Connections without an answer": the most in one window, while others were answered.
- Means are geometric, n is the number of cells in them. **Bold** is a failure.
"""


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [row(head), row("---" for _ in head), *map(row, rows), ""]


def heading(results: Results) -> list[str]:
    facts = [["date", results["machine"]["date"]], *machine_facts(results["machine"])]
    facts += run_facts(results["run"])
    lines = [f"- {name}: {fact}" for name, fact in facts] + [""]
    if results.get("interrupted"):
        lines += ["**Interrupted: incomplete.**", ""]
    found = results["loops"].items()
    described = [[name, loop.get("version", "-"), state(loop)] for name, loop in found]
    return lines + table(["loop", "version", "state"], described)


def machine_facts(machine: dict[str, Any]) -> list[list[str]]:
    cores = f"server on {machine['server_core']}, client on {machine['client_core']}"
    limits = f"open files {machine['open_files']}, somaxconn {machine['somaxconn']}"
    return [
        ["Python", f"{machine['python']}; {machine['libraries']}"],
        ["kernel", f"Linux {machine['kernel']}, io_uring_disabled {machine['io_uring_disabled']}"],
        ["CPU", f"{machine['cpu']}, {machine['cpus']} of them ({cores})"],
        ["governor", machine["governor"]],
        ["limits", f"{limits}, load before the run {machine['load_before']}"],
    ]


def run_facts(run: dict[str, Any]) -> list[list[str]]:
    sample = f"{run['window_s']} s after {run['warmup_s']} s of warm-up"
    return [
        [
            "run",
            f"{run['rounds']} rounds of {sample}, seed {run['seed']}, {run['minutes']} minutes",
        ],
        ["stolen by the hypervisor", f"{run['stolen_percent']} %"],
        ["nice -20 for each child's session", "yes" if run["autogroup_set"] else "refused"],
    ]


def state(loop: dict[str, str]) -> str:
    if "missing" in loop:
        return f"**missing**: {loop['missing']}"
    return f"monitor {loop['monitor']}" if "monitor" in loop else "runs"


def ratio_text(values: list[float | None], spread: Ratio | None) -> str:
    text = " / ".join("-" if value is None else f"{value:.2f}" for value in values)
    return f"{text} ({spread.low:.2f}-{spread.high:.2f})" if spread else text


def cell_text(loop: str, found: Figures | None, metric: str) -> str:
    if not found:
        return "missing"
    if found.failure:
        return f"**{found.failure.partition(':')[0]}**"
    marks = " †" if found.single else "" if found.busy(metric) else " ‡"
    if loop == BASE:
        used = f"{found.server_percent:.0f}/{found.client_percent:.0f} %"
        return f"{found.value[metric]:,.0f} ({used}){marks}"
    ratios = found.ratios[metric]
    middle = [ratios[o].middle if o in ratios else None for o in (BASE, RIVAL)]
    if loop == RIVAL:
        middle[1] = 1.0
    return ratio_text(middle, ratios.get(RIVAL) or ratios.get(BASE)) + marks


def mean_text(cells: Cells, names: list[str], loop: str, metric: str, single: bool) -> str:
    if loop == BASE:
        return ""
    means = [mean(cells, names, loop, other, metric, single) for other in (BASE, RIVAL)]
    if loop == RIVAL:
        means[1] = Mean(1.0, 1.0, 1.0, means[0].cells) if means[0] else None
    counts = "/".join(str(m.cells if m else 0) for m in means)
    return f"{ratio_text([m.value if m else None for m in means], None)} (n={counts})"


def label(cell: str) -> str:
    """Size and connections; an HTTP cell has no size of its own."""
    _, size, connections = cell.split("/")
    return f"{connections} connections" if size == "0KiB" else f"{size} x {connections}"


def target_tables(results: Results, cells: Cells) -> list[str]:
    """Versions stand in the heads: this table is read without the rest."""
    loops = {name: v["version"] for name, v in results["loops"].items() if "missing" not in v}
    if RIVAL not in loops:
        return []
    names = [name for name in loops if name.startswith(OURS)]
    names += [name for name in loops if name not in names]
    head = ["target", *(f"{name} {loops[name]}" for name in names)]
    lines = ["## Targets", ""]
    rows = targets.rows(results, cells, names)
    lines += table(["row", *head], (row.texts(names) for row in rows))
    singles = targets.single_cells(cells, names)
    lines += table(["cell", *head], (row.texts(names) for row in singles)) if singles else []
    return [*lines, (targets.__doc__ or "").partition("\n\n")[2]]


def mode_tables(results: Results, cells: Cells, mode: str, names: list[str]) -> list[str]:
    loops = list(results["loops"])
    first = f"{BASE}, absolute (CPU server/client)" if BASE in loops else ""
    lines = [f"### {TITLES[mode]}", ""]
    for metric, title in METRICS.items():
        rows = []
        for name in names:
            texts = [cell_text(loop, cells[name].get(loop), metric) for loop in loops]
            rows.append([label(name), *texts])
        for single, mean_label in ((False, "**mean**"), (True, "**mean †**")):
            if any(f.single == single for name in names for f in cells[name].values()):
                texts = [mean_text(cells, names, loop, metric, single) for loop in loops]
                rows.append([mean_label, *texts])
        head = [title, *(first if loop == BASE else loop for loop in loops)]
        lines += table(head, rows)
    return lines + latency_table(loops, cells, names) + notes(results, mode)


def latency_table(loops: list[str], cells: Cells, names: list[str]) -> list[str]:
    def text(found: Figures | None) -> str:
        if not found or not found.value["wall"]:
            return "-"
        return f"{found.p50_us:,.0f} / {found.p99_us:,.0f}"

    rows = [[label(name), *(text(cells[name].get(o)) for o in loops)] for name in names]
    return table(["latency p50 / p99, us", *loops], rows)


def notes(results: Results, mode: str) -> list[str]:
    """Failures in full, datagrams that had to be sent again, connections that were left out."""
    resent: Counter[str] = Counter()
    starved: Counter[str] = Counter()
    texts = set()
    for record in results["samples"]:
        if record["mode"] != mode:
            continue
        where = f"- {record['loop']}, {record['cell']}"
        if "failure" in record:
            texts.add(f"{where}: {record['failure']}")
            continue
        resent[where] += record["resends"]
        starved[where] = max(starved[where], record["starved"])
    texts |= {f"{where}: {n} datagrams had to be sent again" for where, n in resent.items() if n}
    texts |= {f"{where}: {n} connections without an answer" for where, n in starved.items() if n}
    return [*sorted(texts), ""] if texts else []


def summary(results: Results, cells: Cells) -> list[str]:
    loops = [loop for loop in results["loops"] if loop != BASE]
    lines = ["## Geometric means", ""]
    for metric, title in METRICS.items():
        rows = [
            [TITLES[mode], *(mean_text(cells, names, loop, metric, False) for loop in loops)]
            for mode, names in modes(cells).items()
        ]
        lines += table([f"{title}, to {BASE} / to {RIVAL}", *loops], rows)
    return lines + again(cells)


def again(cells: Cells) -> list[str]:
    """The A/A spread: uvloop against itself."""
    texts = []
    for metric, title in METRICS.items():
        if found := mean(cells, list(cells), RIVAL_AGAIN, RIVAL, metric):
            span = f"{found.low:.2f}-{found.high:.2f} over {found.cells} cells"
            texts.append(f"{title} {found.value:.3f} ({span})")
    return [f"{RIVAL_AGAIN} against {RIVAL}, the error of this run: {'; '.join(texts)}.", ""]


def micro_tables(results: Results) -> list[str]:
    records: dict[str, list[dict[str, Any]]] = {loop: [] for loop in results["loops"]}
    for record in results["micro"]:
        if "failure" not in record:
            records[record["loop"]].append(record)
    good = {loop: found for loop, found in records.items() if found}
    lines = ["## In one process", ""]
    failed = {f"- {r['loop']}: **{r['failure']}**" for r in results["micro"] if "failure" in r}
    if good:
        lines += operation_table(results, good) + timer_table(list(records), good)
    return [*lines, *sorted(failed), ""] if failed else lines


def operation_table(results: Results, good: dict[str, list[dict[str, Any]]]) -> list[str]:
    loops = list(results["loops"])

    def text(loop: str, operation: str) -> str:
        if loop not in good:
            return "missing"
        mine = [record["cpu_ns"][operation] for record in good[loop]]
        found = [micro_ratio(results, operation, loop, other) for other in (BASE, RIVAL)]
        ratios = ratio_text([r.middle if r else None for r in found], None)
        return f"{median(mine):.0f} ({min(mine):.0f}-{max(mine):.0f}); {ratios}"

    operations = next(iter(good.values()))[0]["cpu_ns"]
    rows = [[operation, *(text(loop, operation) for loop in loops)] for operation in operations]
    return table([f"CPU ns per operation; speed to {BASE} / to {RIVAL}", *loops], rows)


def timer_table(loops: list[str], good: dict[str, list[dict[str, Any]]]) -> list[str]:
    def text(loop: str, delay: str) -> str:
        if loop not in good:
            return "missing"
        timers = [record["timers"][delay] for record in good[loop]]
        middle, p90 = (median([t[key] for t in timers]) for key in ("median_us", "p90_us"))
        early = sum(t["early"] for t in timers)
        return f"{middle:.0f} / {p90:.0f}" + (f" **{early} early**" if early else "")

    delays = next(iter(good.values()))[0]["timers"]
    rows = [[f"{delay} us", *(text(loop, delay) for loop in loops)] for delay in delays]
    return table(["call_later: lateness median / p90, us", *loops], rows)


def footprint_table(results: Results) -> list[str]:
    formats = {
        "idle": ("idle second: CPU ms, wake-ups", idle_text),
        "rss raw": ("RSS per idle connection, Protocol: growth (whole process)", rss_text),
        "rss streams": ("RSS per idle connection, streams: growth (whole process)", rss_text),
        **{
            f"gil {cell.name}": (
                f"another thread's wait for the GIL under {cell.name}: p50 / p99 / max, us",
                gil_text,
            )
            for cell in GIL_LOADS
        },
        "system_calls": ("system calls per request (strace, 1 KiB x 10)", calls_text),
        "enters": ("enters per request by statistics(), not traced", "{:.3f}".format),
        "instructions": ("instructions per call_soon() and callback", "{:,.0f}".format),
    }
    found = results["footprint"]
    rows = []
    for key, (title, show) in formats.items():
        values = [found.get(loop, {}).get(key, "missing") for loop in results["loops"]]
        texts = [v if isinstance(v, str) else "-" if v is None else show(v) for v in values]
        rows.append([title, *texts])
    return ["## Footprint", "", *table(["", *results["loops"]], rows)]


def rss_text(found: dict[str, float]) -> str:
    return f"{found['growth']:,.0f} B ({found['whole']:,.0f} B) of {found['connections']:,}"


def gil_text(found: dict[str, float]) -> str:
    return f"{found['p50_us']:,.0f} / {found['p99_us']:,.0f} / {found['max_us']:,.0f}"


def idle_text(found: dict[str, float]) -> str:
    return f"{found['idle_cpu_ms']:.2f}, {found['idle_wakeups']:.0f}"


def calls_text(found: dict[str, float]) -> str:
    rates = {name: n for name, n in found.items() if name not in ("all", "statistics")}
    text = ", ".join(f"{name} {n:.3g}" for name, n in rates.items() if n >= 0.005)
    counted = f"; enters by statistics() {found['statistics']:.3g}" if "statistics" in found else ""
    return f"{found['all']:.2f}: {text}{counted}"


def markdown(results: Results) -> str:
    cells = by_cell(results)
    lines = ["# Benchmark", "", *heading(results), *target_tables(results, cells)]
    if cells:
        lines += [*summary(results, cells), LEGEND, "## By cell", ""]
    for mode, names in modes(cells).items():
        lines += mode_tables(results, cells, mode, names)
    if results["micro"]:
        lines += micro_tables(results)
    if results["footprint"]:
        lines += footprint_table(results)
    return "\n".join(lines).rstrip() + "\n"


def write(results: Results, to: pathlib.Path | None, svg: pathlib.Path | None) -> None:
    """The tables go to a file or to standard output."""
    text = markdown(results)
    if to:
        to.write_text(text)
    else:
        print(text)
    if svg:
        # Imported here: matplotlib is needed for the chart alone.
        from benchmarks import chart

        chart.draw(results, svg)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--chart", type=pathlib.Path, metavar="FILE.svg")
    options = parser.parse_args()
    write(json.loads(options.results.read_text()), options.table, options.chart)


if __name__ == "__main__":
    main()
