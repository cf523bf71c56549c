"""A run from its beginning, or from its last checkpoint, to its end."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from simam_jax import data, errors
from simam_jax.training import checkpoints, distributed, interruption, metrics, prefetch, setup
from simam_jax.training.evaluation import describe, evaluate
from simam_jax.training.profile import Profiler
from simam_jax.training.progress import Progress, duration
from simam_jax.training.step import make_eval_step, make_train_step

RUN_AHEAD = 2  # updates that the host may be ahead of the devices


def train(config: ConfigDict, workdir: str) -> None:
    """Trains as `config` says, into `workdir`; continues what is there.

    SIGTERM and SIGINT save a checkpoint and end the run in good order.

    Raises:
        UserError: the config, the data or the workdir cannot be used, the loss is not finite, nothing can be written.
    """
    folder = checkpoints.writable(workdir)
    run = setup.build(config)
    store = checkpoints.Checkpoints(
        folder, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best
    )
    progress = Progress(folder)
    try:
        _train(run, folder, store, progress)
    except OSError as error:
        raise errors.UserError(f"{folder} cannot be written: {error}. {store.way_out()}") from error
    finally:
        progress.close()
        store.close()


def _train(run: setup.Run, folder: Path, store: checkpoints.Checkpoints, progress: Progress) -> None:
    config, num_steps = run.config, run.num_steps

    # ---- where to begin
    progress.say(
        f"{config.model.name} (attention {config.model.attention}), {run.data.num_train} images, {num_steps} updates "
        f"of {config.batch_size} images on {run.mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
    state = setup.initial_state(run)
    restored = store.restore(state, run.model_spec())
    before, scores = 0.0, {}
    if restored:
        state, meta = restored
        before, scores = meta["elapsed_seconds"], meta["scores"]
        _report_changes(meta["config"], setup.plain(config))
        progress.say(f"Continuing from {store.path(int(state.step))}")
    first = int(state.step)
    if first >= num_steps:
        progress.say(f"This run is finished. {_result(run, store, first, scores, before)}")
        return

    # ---- the parts
    train_step = make_train_step(run.model, run.optimizer, run.rate, config, run.mesh)
    eval_step = make_eval_step(run.model, config, run.mesh)
    stream = data.train_batches(config.data, seed=config.seed, start_step=first, global_batch_size=config.batch_size)
    batches = prefetch.to_devices(stream, run.mesh, config.data.prefetch)
    eval_at, save_at = run.every(config.eval_every_epochs), run.every(config.checkpoint.every_epochs)
    writer = metrics.MetricWriter(folder, setup.plain(config))
    profiler = Profiler(config.profile_steps, folder)
    watchdog = distributed.Watchdog(config.max_step_seconds)
    interval = Interval(run, first)
    elapsed = lambda: before + time.monotonic() - interval.started  # noqa: E731

    # ---- update, look, save
    progress.show("compiling")
    with interruption.watched() as stop_requested:
        for step in range(first + 1, num_steps + 1):
            profiler.before(step)
            state, values = train_step(state, interval.wait_for(batches))
            interval.add(values)
            watchdog.beat(step)
            profiler.after(step, values)
            store.check()
            stop = stop_requested(step)

            if step % config.log_every_steps == 0 or step in eval_at or step in save_at or stop:
                scalars = interval.finish(step)
                writer.write(step, run.epochs_at(step), scalars)
                progress.say(_line(run, step, scalars))
            else:
                progress.show(f"step {step}/{num_steps}  ETA {duration(interval.eta(step))}")

            if step in eval_at and not stop:
                scores = evaluate(run, eval_step, state.variables, "eval", progress)
                if state.ema is not None:
                    scores |= evaluate(run, eval_step, state.ema, "eval_ema", progress)
                writer.write(step, run.epochs_at(step), scores)
                progress.say(f"step {step}/{num_steps}  {describe(scores)}")
                watchdog.beat(step)
            if step in save_at or stop:
                top1 = scores.get("eval_ema/top1", scores["eval/top1"]) if step in eval_at and not stop else None
                store.save(state, run.meta() | {"elapsed_seconds": elapsed(), "scores": scores}, top1)
            if stop and step < num_steps:
                store.wait()
                progress.say(
                    f"Stopped on request after update {step}, saved in {store.path(step)}. "
                    f"The same command goes on from there."
                )
                break
            interval.resume()
        else:
            store.wait()
            progress.say(f"Finished. {_result(run, store, num_steps, scores, elapsed())}")
    watchdog.stop()
    writer.close()


class Interval:
    """The updates since the last report: their metrics, still on the devices, and where their time went."""

    def __init__(self, run: setup.Run, step: int):
        self._run = run
        self._values: list[Mapping[str, Any]] = []
        self._first = self._start = step
        self.started = self._since = time.monotonic()
        self._compiled: float | None = None
        self._waited = 0.0

    def wait_for(self, batches: Iterator[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """The next batch; the time until it is there counts as waiting for data."""
        asked = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - asked
        return batch

    def add(self, values: Mapping[str, Any]) -> None:
        """Takes in an update's metrics, and holds the host back when it is too far ahead of the devices."""
        self._values.append(values)
        if len(self._values) > RUN_AHEAD:
            jax.block_until_ready(self._values[-1 - RUN_AHEAD]["loss"])
        if self._compiled is None:
            jax.block_until_ready(values)
            self._compiled = time.monotonic()

    def eta(self, step: int) -> float:
        """Seconds until the last update, at the pace since the first one was compiled, evaluations included."""
        done = step - self._first - 1
        pace = (time.monotonic() - (self._compiled or self.started)) / max(done, 1)
        return pace * (self._run.num_steps - step)

    def finish(self, step: int) -> metrics.Scalars:
        """What is to be reported of the updates since the last report.

        Raises:
            UserError: a loss or a gradient among them is not finite.
        """
        values = jax.device_get(self._values)
        seconds, steps = time.monotonic() - self._since, step - self._start
        bad = metrics.first_not_finite(values)
        if bad is not None:
            raise errors.UserError(
                f"The loss is {values[bad]['loss'] / values[bad]['count']:g} and the gradient's norm "
                f"{values[bad]['grad_norm']:g} in update {self._start + bad + 1}. Try a lower "
                f"--config.schedule.learning_rate, a warm-up (--config.schedule.warmup_epochs), "
                f"--config.optimizer.clip_global_norm=1 or --config.model.dtype=float32."
            )
        rate = steps * self._run.config.batch_size / seconds
        last = values[-1]
        scalars = metrics.means(values, "train") | {
            "learning_rate": float(last["learning_rate"]),
            "grad_norm": float(last["grad_norm"]),
            "param_norm": float(last["param_norm"]),
            "images_per_second": rate,
            "images_per_second_per_device": rate / self._run.mesh.size,
            "step_seconds": seconds / steps,
            "data_wait_percent": 100.0 * self._waited / seconds,
            "memory_bytes": metrics.memory_in_use(),
            "eta_seconds": self.eta(step),
        }
        self._values, self._start, self._waited = [], step, 0.0
        return scalars

    def resume(self) -> None:
        """What was done since `finish` (evaluation, saving) counts for no interval."""
        if not self._values:
            self._since = time.monotonic()


def _line(run: setup.Run, step: int, scalars: metrics.Scalars) -> str:
    return (
        f"step {step}/{run.num_steps}  epoch {run.epochs_at(step):.2f}/{run.epochs_at(run.num_steps):.2f}  "
        f"loss {scalars['train/loss']:.4f}  top-1 {100 * scalars['train/top1']:.2f} %  "
        f"{scalars['images_per_second']:.0f} images/s  data wait {scalars['data_wait_percent']:.0f} %  "
        f"ETA {duration(scalars['eta_seconds'])}"
    )


def _result(run: setup.Run, store: checkpoints.Checkpoints, step: int, scores: metrics.Scalars, seconds: float) -> str:
    best = store.best_step()
    return (
        f"{describe(scores)} on {run.data.num_eval} images after {step} updates ({run.epochs_at(step):.1f} epochs, "
        f"{duration(seconds)}). Checkpoint: {store.path(step)}"
        f"{f' (best: {store.path(best)})' if best is not None and best != step else ''}"
    )


def _report_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, now = metrics.flat(old), metrics.flat(new)
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in now if before.get(name) != now.get(name)
    ]
    if changed:
        logging.warning("The config has changed since the checkpoint was written: %s", "; ".join(changed))
