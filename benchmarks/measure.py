"""How every benchmark measures: in turns within one run, medians of ratios, and a JSON file that says where and with what."""

import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from simam_jax.errors import UserError

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "tensorflow-cpu", "pillow")

_WHILE = 0.1  # seconds
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # see the README; glibc reads it when a process starts

Run = Callable[[], Any]
Timer = Callable[[float], float]  # runs something for at least so many seconds, once or more: the mean seconds of a run
Times = dict[str, list[float]]


def in_turns(contestants: Mapping[str, Timer], rounds: int, *, settle: bool = False) -> Times:
    """Seconds of every contestant in every round; each has run twice before, to compile and to warm up.

    With `settle` each runs for a while (once where that takes longer) before it is timed for as long: in use it follows
    itself, its threads awake and its memory at hand.
    """
    for timer in contestants.values():
        timer(0)
        timer(0)
    times: Times = {name: [] for name in contestants}
    for i in range(rounds):
        _say(f"round {i + 1}/{rounds}")
        for name, timer in contestants.items():
            if settle:
                timer(_WHILE)
            times[name].append(timer(_WHILE if settle else 0))
    _say("")
    return times


def torchvision(module: str = "") -> Any:
    """A module of torchvision, such as ".ops". Raises `UserError` where there is none that fits this torch."""
    try:
        return importlib.import_module(f"torchvision{module}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators do not fit this torch
        raise UserError(f"torchvision cannot be imported ({error}): install the one of torch's release.") from None


def burst(start: Run, calls: int) -> Run:
    """Calls `start`, which gives JAX's arrays, so many times, then waits for the device once."""
    import jax

    def run() -> None:
        result = None
        for _ in range(calls):
            result = start()
        jax.block_until_ready(result)

    return run


def here(run: Run) -> Timer:
    """Times `run` in this process."""
    return partial(_seconds_a_run, run)


@contextmanager
def in_processes(contestants: Mapping[str, Callable[[], Run]]) -> Iterator[dict[str, Timer]]:
    """Timers of what each of `contestants` makes, each in a process of its own and with memory in huge pages.

    In one process two libraries share an allocator and the cores with each other's waiting threads: a step of ours was
    timed a fifth slower beside PyTorch's than alone. What makes a contestant is pickled.

    Raises:
        UserError: from a timer whose process has ended, for want of PyTorch or of memory.
    """
    start = multiprocessing.get_context("spawn")
    processes, timers = [], {}
    try:
        for name, make in contestants.items():
            ours, theirs = start.Pipe()
            process = start.Process(target=_serve, args=(theirs, make), daemon=True)
            with _environment(_HUGE_PAGES):
                process.start()
            theirs.close()  # or the end of the process would not be seen here
            processes.append(process)
            timers[name] = partial(_ask, ours, name)
        yield timers
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """The variables that are not set yet, for the processes started inside the block."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _serve(questions: Connection, make: Callable[[], Run]) -> None:
    run = make()
    while True:
        questions.send(_seconds_a_run(run, questions.recv()))


def _ask(process: Connection, name: str, at_least: float) -> float:
    try:
        process.send(at_least)
        return process.recv()
    except (EOFError, OSError):
        raise UserError(f"{name!r} ended and cannot be timed: its process says why above.") from None


def _seconds_a_run(run: Run, at_least: float) -> float:
    runs, seconds = 0, 0.0
    start = time.perf_counter()
    while not runs or seconds < at_least:
        run()
        runs, seconds = runs + 1, time.perf_counter() - start
    return seconds / runs


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over / under, round by round: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def write(name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Writes `benchmarks/results/MACHINE/NAME.json` and prints the rows as a table.

    Each kind of machine has its folder, because what is quicker on one need not be so on another.
    """
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
    folder = RESULTS / re.sub("[^a-z0-9]+", "-", machine().lower())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with the columns of all of them; what a row has not stays empty."""
    names = list({name: None for row in rows for name in row})
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
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
