"""A run from its beginning, or from its last checkpoint, to its end."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.progress import Progress, duration
from simam_jax.task import Scores, Task
from simam_jax.training import distributed, interruption, metrics, prefetch
from simam_jax.training.checkpointer import Checkpointer
from simam_jax.training.evaluation import RESULTS, describe, evaluate, prefixed
from simam_jax.training.meter import Meter
from simam_jax.training.profile import Profiler
from simam_jax.training.program import Program
from simam_jax.training.run import Run, build, initial_state, plain
from simam_jax.training.workdir import lock, writable


def train(config: ConfigDict, workdir: str, make_task: Callable[[ConfigDict], Task]) -> None:
    """Trains what `make_task(config)` describes, into `workdir`; continues what is there.

    SIGTERM, SIGINT and SIGHUP save a checkpoint and end the run in good order.

    Raises:
        UserError: the config, the data or the workdir cannot be used, the loss is not finite, nothing can be written.
    """
    folder = writable(workdir)
    with interruption.stop_on_signal() as should_stop, lock(folder):
        run = build(config, make_task)
        store = Checkpointer(folder, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best)
        progress = Progress(folder)
        try:
            _train(run, folder, store, progress, should_stop)
        except OSError as error:
            raise errors.UserError(
                f"{folder} cannot be written: {error}. {store.last_good()}. "
                f"Make room, then start the same command again."
            ) from error
        finally:
            progress.close()
            store.close()


def _train(run: Run, folder: Path, store: Checkpointer, progress: Progress, should_stop: Callable[[int], bool]) -> None:
    config, task, num_steps = run.config, run.task, run.num_steps

    # ---- where to begin
    progress.say(
        f"{task.title}, {task.num_train} images, {num_steps} updates of {config.batch_size} images on "
        f"{run.mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
    state = initial_state(run)
    restored = store.restore(state, task.spec)
    before, seen, scores = 0.0, 0, {}
    if restored:
        state, meta = restored
        task.check_meta(meta)
        before, scores = meta["elapsed_seconds"], meta["scores"]
        seen = meta.get("images_seen", int(state.step) * meta["config"]["batch_size"])
        _report_changes(meta["config"], plain(config))
        progress.say(f"Continuing from {store.path(int(state.step))}")
    first = int(state.step)

    def images(step: int) -> int:
        """Images that the updates up to this one have seen, also where the batch was another one before a restart."""
        return seen + (step - first) * config.batch_size

    def epochs(step: int) -> float:
        return images(step) / task.num_train

    def result(step: int, seconds: float) -> str:
        return _result(run, store, step, epochs(step), scores, seconds)

    if first >= num_steps:
        progress.say(f"This run is finished. {result(first, before)}")
        return

    # ---- the parts
    progress.show("compiling")
    program = Program(run)
    program.prepare(state)
    eval_step = run.eval_step()
    batches = prefetch.to_devices(task.train_batches(first), run.mesh, config.data.prefetch)
    eval_at, save_at = run.every(config.eval_every_epochs), run.every(config.checkpoint.every_epochs)
    draw_at = run.every(config.visualize_every_epochs) if task.pictures and config.visualize_every_epochs else set()
    report_at = eval_at | save_at | draw_at
    profiler = Profiler(config.profile_steps, folder)
    meter = Meter(run, first)

    # ---- update, look, save
    with (
        contextlib.closing(program),
        contextlib.closing(distributed.Watchdog(config.max_step_seconds)) as watchdog,
        contextlib.closing(metrics.MetricWriter(folder, plain(config))) as writer,
    ):
        if should_stop(first):
            progress.say(
                "Stopped on request before the first update of this start. The same command goes on from there."
            )
            return
        for step in range(first + 1, num_steps + 1):
            meter.resume()
            profiler.before(step)
            state, values = program(state, meter.wait_for(batches))
            meter.add(values)
            watchdog.beat(step)
            profiler.after(step, values)
            store.check()
            stop = should_stop(step) and step < num_steps

            log = config.log_every_steps and step % config.log_every_steps == 0
            if log or step in report_at or stop:
                scalars = meter.report(step, store.last_good)
                writer.write(step, epochs(step), scalars)
                progress.say(_line(run, step, epochs, scalars))
            else:
                progress.show(f"step {step}/{num_steps}  ETA {duration(meter.eta(step))}")

            if step in eval_at and not stop:
                own = evaluate(run, eval_step, state.variables, progress, folder / RESULTS / "eval")
                scores = prefixed(own, "eval")
                if state.ema is not None:
                    averaged = evaluate(run, eval_step, state.ema, progress, folder / RESULTS / "eval_ema")
                    scores |= prefixed(averaged, "eval_ema")
                writer.write(step, epochs(step), scores)
                progress.say(f"step {step}/{num_steps}  {describe(task, scores)}")
                watchdog.beat(step)
            if step in draw_at and task.pictures and jax.process_index() == 0:
                writer.write_images(step, task.pictures(_on_one_device(state.variables)))
            if step in save_at or stop:
                score = _best(task, scores) if step in eval_at and not stop else None
                clock = {"elapsed_seconds": before + meter.seconds_since_start(), "images_seen": images(step)}
                store.save(state, run.meta() | clock | {"scores": scores}, score)
            if stop:
                store.wait()
                progress.say(
                    f"Stopped on request after update {step}, saved in {store.path(step)}. "
                    f"The same command goes on from there."
                )
                break
        else:
            store.wait()
            progress.say(f"Finished. {result(num_steps, before + meter.seconds_since_start())}")


def _best(task: Task, scores: Scores) -> float:
    """The score by which checkpoints are compared: the average's, where the run keeps one."""
    return scores.get(f"eval_ema/{task.best}", scores[f"eval/{task.best}"])


def _on_one_device(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _line(run: Run, step: int, epochs: Callable[[int], float], scalars: metrics.Scalars) -> str:
    means = {name.removeprefix("train/"): x for name, x in scalars.items() if name.startswith("train/")}
    line = (
        f"step {step}/{run.num_steps}  epoch {epochs(step):.2f}/{epochs(run.num_steps):.2f}  {run.task.describe(means)}"
    )
    if "step_seconds" in scalars:  # not where the only update was the one that compiled
        line += (
            f"  {scalars['images_per_second']:.0f} images/s  data wait {scalars['data_wait_percent']:.0f} %  "
            f"ETA {duration(scalars['eta_seconds'])}"
        )
    return line


def _result(run: Run, store: Checkpointer, step: int, epochs: float, scores: Scores, seconds: float) -> str:
    best = store.best_step()
    return (
        f"{describe(run.task, scores)} on {run.task.num_eval} images after {step} updates "
        f"({epochs:.1f} epochs, {duration(seconds)}). Checkpoint: {store.path(step)}"
        f"{f' (best: {store.path(best)})' if best is not None and best != step else ''}"
    )


def _report_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, now = metrics.flat(old), metrics.flat(new)
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in now if before.get(name) != now.get(name)
    ]
    if changed:
        logging.warning("The config has changed since the checkpoint was written: %s", "; ".join(changed))
