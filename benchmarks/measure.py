"""How every benchmark measures: in turns within one run, medians of ratios, and a JSON file that says where and with what."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "tensorflow-cpu", "pillow")

_WHILE = 0.1  # seconds

Times = dict[str, list[float]]


def in_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int, *, settle: bool = False) -> Times:
    """Seconds of every contestant in every round; each has run twice before, to compile and to warm up.

    With `settle` each runs for a while (once where that takes longer) before it is timed for as long, as in use it follows
    itself: the threads of the one before may still wait for work in a busy loop, its own be asleep, and memory that it gave
    back costs time to get again.
    """
    for run in contestants.values():
        run()
        run()
    times: Times = {name: [] for name in contestants}
    for i in range(rounds):
        _say(f"round {i + 1}/{rounds}")
        for name, run in contestants.items():
            if settle:
                _seconds_a_call(run, _WHILE)
            times[name].append(_seconds_a_call(run, _WHILE if settle else 0))
    _say("")
    return times


def _seconds_a_call(run: Callable[[], Any], at_least: float) -> float:
    """The mean over as many calls, but one or more, as take `at_least` seconds."""
    calls, seconds = 0, 0.0
    start = time.perf_counter()
    while not calls or seconds < at_least:
        run()
        calls, seconds = calls + 1, time.perf_counter() - start
    return seconds / calls


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over / under, round by round: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def write(name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Writes `benchmarks/results/NAME.json` and prints the rows as a table."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions | {"python": platform.python_version()},
        "settings": settings,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def machine() -> str:
    """The accelerator, or the processor and how many of its cores this process may use."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
