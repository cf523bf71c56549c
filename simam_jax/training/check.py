"""What one wants to know before a long job: does it compile, does it fit, how long will it take."""

import itertools
import statistics
import time

import jax
from ml_collections import ConfigDict

from simam_jax import checkpoints, data
from simam_jax.progress import duration
from simam_jax.summary import summarize
from simam_jax.training import prefetch, setup
from simam_jax.training.step import make_train_step

TIMED_STEPS = 4


def check(config: ConfigDict, workdir: str) -> None:
    """Builds the model and the data, compiles the update, runs a few of them on real batches, prints the costs, stops.

    Nothing is written but the folder `workdir`, if it is not there yet.

    Raises:
        UserError: anything that would stop the run from starting.
    """
    checkpoints.writable(workdir)
    run = setup.build(config)
    rows = {"model": f"{config.model.name}, attention {config.model.attention}, {run.data.num_classes} classes"}
    totals = summarize(run.model, config.data.image_size)
    rows["parameters"] = f"{totals.params / 1e6:.2f} M"
    rows["FLOPs"] = f"{totals.flops / 1e9:.2f} G for one image of {config.data.image_size} pixels squared"
    rows["data"] = f"{run.data.num_train} training and {run.data.num_eval} evaluation images"
    rows["devices"] = f"{run.mesh.size} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es)"
    rows["batch"] = (
        f"{config.batch_size} images an update, {config.batch_size // run.mesh.size} on each device, "
        f"in {config.optimizer.grad_accum_steps} micro-batch(es), batch norm over {config.model.bn_group_size or 'a device'}"
    )
    rows["length"] = f"{run.num_steps} updates, {run.epochs_at(run.num_steps):.2f} epochs"
    for name, text in rows.items():
        print(f"{name:16} {text}", flush=True)

    state = setup.initial_state(run)
    batches = prefetch.to_devices(
        data.train_batches(config.data, seed=config.seed, start_step=0, global_batch_size=config.batch_size),
        run.mesh,
        config.data.prefetch,
    )
    batch = next(batches)
    train_step = make_train_step(run.model, run.optimizer, run.rate, config, run.mesh)
    began = time.monotonic()
    compiled = train_step.lower(state, batch).compile()
    print(f"{'compilation':16} {time.monotonic() - began:.1f} s", flush=True)
    memory = compiled.memory_analysis()
    if memory is not None:
        peak = (
            memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        print(
            f"{'memory':16} {peak / 2**30:.2f} GiB per device{f' of {limit / 2**30:.2f} GiB' if limit else ''}",
            flush=True,
        )

    seconds = []
    for inputs in itertools.islice(itertools.chain([batch], batches), 1 + TIMED_STEPS):
        began = time.monotonic()
        state, values = compiled(state, inputs)
        jax.block_until_ready(values)
        seconds.append(time.monotonic() - began)
    step = statistics.median(seconds[1:])
    print(f"{'speed':16} {step:.3f} s an update, {config.batch_size / step:.1f} images/s")
    print(f"{'estimated time':16} {duration(step * run.num_steps)} without evaluation")
