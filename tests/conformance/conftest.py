"""Shows what the conformance runs did, also when they pass: one line per run, none is silent."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", None) == "call"
    ]
    lines = [
        str(value)
        for report in reports
        for name, value in report.user_properties
        if name == "conformance"
    ]
    if lines:
        terminalreporter.section("CPython's own tests on uringloop")
        for line in lines:
            terminalreporter.write_line(line)
