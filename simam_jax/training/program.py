"""The update, compiled while the data open, and refused where its memory is not to be had."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from simam_jax.errors import UserError
from simam_jax.task import Tree
from simam_jax.training.run import Run
from simam_jax.training.step import batch_sharded

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of a batch, by name


class Program:
    """A run's update, `program(state, batch) -> (state, values)`, compiled once for each shape of batch."""

    def __init__(self, run: Run):
        self._run, self._step = run, run.train_step()
        self._compiling: dict[Shapes, Future[Any]] = {}
        self._ready: dict[Shapes, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")

    def prepare(self, state: Tree) -> None:
        """Starts compiling for the batches that the task says it has; returns when they are traced.

        The compiler runs in a thread of its own and leaves the interpreter to what opens the data.
        """
        sharding, count = batch_sharded(self._run.mesh), self._run.config.batch_size
        for row in self._run.task.example:
            batch = {
                name: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding) for name, x in row.items()
            }
            with _collector_at_rest():
                lowered = self._step.lower(state, batch)
            self._compiling[_shapes(batch)] = self._thread.submit(lowered.compile)

    def executable(self, state: Tree, batch: Mapping[str, Any]) -> Any:
        """What is run for such a batch.

        Raises:
            UserError: it needs more memory than there is.
        """
        key = _shapes(batch)
        if key not in self._ready:
            compiling = self._compiling.get(key)
            executable = compiling.result() if compiling else self._step.lower(state, batch).compile()
            release_freed()
            check_memory(self._run, executable)
            self._ready[key] = executable
        return self._ready[key]

    def __call__(self, state: Tree, batch: Mapping[str, Any]) -> tuple[Tree, Any]:
        return self.executable(state, batch)(state, batch)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Keeps the garbage collector from walking over all that tracing makes: a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _shapes(batch: Mapping[str, Any]) -> Shapes:
    return tuple(sorted((name, tuple(x.shape)) for name, x in batch.items()))


def release_freed() -> None:
    """Gives memory that is free back to the system: compiling a detector leaves a gigabyte in glibc's malloc, which keeps it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim:
            trim(0)


def planned_memory(executable: Any) -> tuple[int, int] | None:
    """Bytes on a device beside the arguments: all, and those of maps, which grow with the batch; None: not known."""
    plan = executable.memory_analysis()
    if plan is None:
        return None
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes, plan.temp_size_in_bytes


def free_memory() -> float | None:
    """Bytes that are free on each of this process's devices; None: not known."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    table = Path("/proc/meminfo")
    if devices[0].platform != "cpu" or not table.exists():
        return None
    (line,) = (line for line in table.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1]) / len(devices)


def check_memory(run: Run, executable: Any) -> None:
    """Raises `UserError`, which names a batch that should fit, where the update plans more memory than is free."""
    plan, free = planned_memory(executable), free_memory()
    if plan is None or free is None or plan[0] <= free:
        return
    needed, of_maps = plan
    accum, batch = run.config.optimizer.grad_accum_steps, run.config.batch_size
    local = batch // (run.mesh.size * accum)  # images that are computed at once
    fitting = int(local * max(free - (needed - of_maps), 0) / of_maps)
    parts = next((n for n in range(2, local + 1) if local % n == 0 and local // n <= fitting), None)
    raise UserError(
        f"An update of {batch} images needs {needed / 2**30:.1f} GiB on each device, and {free / 2**30:.1f} GiB are free. "
        + (
            f"--config.optimizer.grad_accum_steps={accum * parts} computes the same batch in parts that fit (batch norm sees "
            f"each part of {local // parts} images alone), or take --config.batch_size={batch // parts}."
            if parts
            else "Not even single images fit: take smaller ones, or a smaller network."
        )
    )
