"""`--mode check`: does it compile, does it fit, how long will it take; with a few updates, nothing is written."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from simam_jax.progress import duration
from simam_jax.task import Task
from simam_jax.training import prefetch
from simam_jax.training.program import Program, free_memory, planned_memory
from simam_jax.training.run import build, initial_state
from simam_jax.training.workdir import writable

TIMED_STEPS = 4


def check(config: ConfigDict, workdir: str, make_task: Callable[[ConfigDict], Task]) -> None:
    """Builds the task, compiles the update, runs a few of them on real batches, prints the costs, stops.

    Nothing is written but the folder `workdir`, if it is not there yet.

    Raises:
        UserError: anything that would stop the run from starting.
    """
    writable(workdir)
    run = build(config, make_task)
    rows = dict(run.task.costs())
    rows["data"] = f"{run.task.num_train} training and {run.task.num_eval} evaluation images"
    rows["devices"] = f"{run.mesh.size} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es)"
    norm = (
        f"batch norm over {config.model.bn_group_size or 'a device'}"
        if run.task.batch_statistics
        else "batch norm fixed"
    )
    rows["batch"] = (
        f"{config.batch_size} images an update, {config.batch_size // run.mesh.size} on each device, "
        f"in {config.optimizer.grad_accum_steps} micro-batch(es), {norm}"
    )
    rows["length"] = f"{run.num_steps} updates, {run.epochs_at(run.num_steps):.2f} epochs"
    for name, text in rows.items():
        print(f"{name:16} {text}", flush=True)

    state = initial_state(run)
    program, began = Program(run), time.monotonic()
    program.prepare(state)
    batches = prefetch.to_devices(run.task.train_batches(0), run.mesh, config.data.prefetch)
    batch = next(batches)
    with contextlib.closing(program):
        compiled = program.executable(state, batch)
    print(f"{'compilation':16} {time.monotonic() - began:.1f} s, with the first batch", flush=True)
    if plan := planned_memory(compiled):
        free = free_memory()
        beside = f" of {free / 2**30:.2f} GiB that are free" if free is not None else ""
        print(f"{'memory':16} {plan[0] / 2**30:.2f} GiB per device beside the state{beside}", flush=True)

    seconds = []
    for inputs in itertools.islice(itertools.chain([batch], batches), 1 + TIMED_STEPS):
        began = time.monotonic()
        state, values = compiled(state, inputs)
        jax.block_until_ready(values)
        seconds.append(time.monotonic() - began)
    step = statistics.median(seconds[1:])
    print(f"{'speed':16} {step:.3f} s an update, {config.batch_size / step:.1f} images/s")
    print(f"{'estimated time':16} {duration(step * run.num_steps)} without evaluation")
