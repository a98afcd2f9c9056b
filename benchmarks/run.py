"""The run: `python -m benchmarks [--quick]` from the repository's root.

For each cell, each round runs every loop once, in a fresh random order, each against a fresh
server: what the machine does meanwhile hits all loops alike, and ratios are taken within a round.
The promise: no loop, cell or failure disappears on the way to the table.
"""

import argparse
import importlib.util
import json
import pathlib
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import cells, footprint, loops, report
from benchmarks.host import Child, ChildError, Host, describe, prepared, stolen_ticks
from benchmarks.load import Times, sample

Results = dict[str, Any]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="11 cells, 2 rounds: four minutes")
    parser.add_argument("--loops", default=",".join(loops.DEFAULT), help="default: %(default)s")
    parser.add_argument("--cells", help='patterns, e.g. "raw/*,streams/1KiB/100"; "none" for none')
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--window", type=float, default=0.3, help="seconds per sample")
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=None, help="of the order of the loops")
    parser.add_argument("--no-micro", action="store_true", help="leave out the in-process rows")
    parser.add_argument(
        "--no-footprint", action="store_true", help="leave out idle, RSS, GIL, strace, callgrind"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="markdown")
    parser.add_argument("--chart", type=pathlib.Path, metavar="FILE.svg")
    options = parser.parse_args(argv)
    if options.chart and not importlib.util.find_spec("matplotlib"):
        parser.error("--chart needs matplotlib")
    options.loops = options.loops.split(",")
    try:
        for name in options.loops:
            loops.find(name)
    except ValueError as error:
        parser.error(str(error))
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seed = random.randrange(1 << 32) if options.seed is None else options.seed
    patterns = options.cells.split(",") if options.cells else cells.QUICK if options.quick else "*"
    options.cells = cells.select(list(patterns))
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def probe(host: Host, name: str) -> dict[str, str]:
    with host.python("loops", name) as child:
        try:
            return dict(json.loads(child.read_line()))
        except ChildError as error:
            return {"missing": str(error)}


def run_cells(host: Host, options: argparse.Namespace, names: list[str], results: Results) -> None:
    times = Times(options.warmup, options.window)
    order = random.Random(options.seed)
    cannot: dict[tuple[str, str], dict[str, Any]] = {}
    for number, cell in enumerate(options.cells, 1):
        say(f"[{number}/{len(options.cells)}] {cell.name}")
        for round_number in range(options.rounds):
            for name in order.sample(names, len(names)):
                key = (name, cell.mode)
                record = cannot.get(key) or sample(host, name, cell, times)
                if record.get("start"):
                    cannot[key] = record
                if "failure" in record and round_number == 0:
                    say(f"    {name}: {record['failure']}")
                where = {"cell": cell.name, "mode": cell.mode, "size_bytes": cell.size_bytes}
                where |= {"connections": cell.connections, "round": round_number, "loop": name}
                results["samples"].append(where | record)


def run_micro(host: Host, options: argparse.Namespace, names: list[str], results: Results) -> None:
    order = random.Random(options.seed + 1)
    for round_number in range(options.rounds):
        say(f"in-process rows, round {round_number + 1} of {options.rounds}")
        for name in order.sample(names, len(names)):
            with host.python("micro", name, "--timers", "20" if options.quick else "50") as child:
                try:
                    record = dict(json.loads(child.read_line(60)))
                except ChildError as error:
                    record = {"failure": str(error)}
            results["micro"].append({"loop": name, "round": round_number} | record)


def run_footprint(host: Host, options: argparse.Namespace, names: list[str], out: Results) -> None:
    for name in names:
        say(f"footprint of {name}")
        out["footprint"][name] = footprint.measure(host, name, options.quick)


def measure(host: Host, options: argparse.Namespace, results: Results) -> None:
    names = [name for name, found in results["loops"].items() if "missing" not in found]
    run_cells(host, options, names, results)
    if not options.no_micro:
        run_micro(host, options, names, results)
    if not options.no_footprint:
        run_footprint(host, options, names, results)


def run(options: argparse.Namespace) -> Results:
    results: Results = {"samples": [], "micro": [], "footprint": {}}
    with prepared() as host:
        results["machine"] = describe(host)
        results["loops"] = {name: probe(host, name) for name in options.loops}
        for name, found in results["loops"].items():
            say(f"{name}: {found.get('version') or 'MISSING, ' + found['missing']}")
        say(f"seed {options.seed}")
        started, (stolen, ticks) = time.monotonic(), stolen_ticks()
        try:
            measure(host, options, results)
        except KeyboardInterrupt:
            results["interrupted"] = True
        now_stolen, now_ticks = stolen_ticks()
        results["run"] = {
            "seed": options.seed,
            "rounds": options.rounds,
            "window_s": options.window,
            "warmup_s": options.warmup,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "stolen_percent": round(100 * (now_stolen - stolen) / max(1, now_ticks - ticks), 1),
            "autogroup_set": Child.autogroup_set,
        }
    return results


def our_failures(results: Results) -> list[str]:
    """What makes the run fail: our loop failed, answered wrongly or fired a timer early."""
    wrong = [
        f"{record['loop']} {record.get('cell', 'in-process')}: {record['failure']}"
        for record in results["samples"] + results["micro"]
        if record["loop"].startswith(loops.OURS)
        and "failure" in record
        # A tool that is missing here is no fault of the loop.
        and not record["failure"].startswith("skipped:")
    ]
    early = [
        f"{record['loop']}: a timer of {delay} us fired early"
        for record in results["micro"]
        if record["loop"].startswith(loops.OURS)
        for delay, row in record.get("timers", {}).items()
        if row["early"]
    ]
    unmeasured = [
        f"{name}, {key}: {value}"
        for name, rows in results["footprint"].items()
        if name.startswith(loops.OURS)
        for key, value in rows.items()
        if isinstance(value, str) and not value.startswith("skipped:")
    ]
    return sorted({*wrong, *early, *unmeasured})


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # SIGTERM as Ctrl-C: the children end and what was measured is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = run(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, options.table, options.chart)
    failures = our_failures(results)
    for failure in failures:
        say(f"FAILED: {failure}")
    return 130 if "interrupted" in results else 1 if failures else 0
