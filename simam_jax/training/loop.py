"""A run from its beginning, or from its last checkpoint, to its end."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from simam_jax import checkpoints, data, errors
from simam_jax.progress import Progress, duration
from simam_jax.training import distributed, interruption, metrics, prefetch, setup
from simam_jax.training.evaluation import describe, evaluate
from simam_jax.training.meter import Meter
from simam_jax.training.pictures import AttentionPicture
from simam_jax.training.profile import Profiler
from simam_jax.training.step import make_eval_step, make_train_step


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
        raise errors.UserError(
            f"{folder} cannot be written: {error}. {store.last_good()}. Make room, then start the same command again."
        ) from error
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
    picture = AttentionPicture(run)
    report_at = eval_at | save_at | picture.due
    profiler = Profiler(config.profile_steps, folder)
    meter = Meter(run, first)

    # ---- update, look, save
    with (
        interruption.watched() as stop_requested,
        contextlib.closing(distributed.Watchdog(config.max_step_seconds)) as watchdog,
        contextlib.closing(metrics.MetricWriter(folder, setup.plain(config))) as writer,
    ):
        progress.show("compiling")
        for step in range(first + 1, num_steps + 1):
            meter.resume()
            profiler.before(step)
            state, values = train_step(state, meter.wait_for(batches))
            meter.add(values)
            watchdog.beat(step)
            profiler.after(step, values)
            store.check()
            stop = stop_requested(step) and step < num_steps

            if step % config.log_every_steps == 0 or step in report_at or stop:
                scalars = meter.report(step, store.last_good)
                writer.write(step, run.epochs_at(step), scalars)
                progress.say(_line(run, step, scalars))
            else:
                progress.show(f"step {step}/{num_steps}  ETA {duration(meter.eta(step))}")

            if step in eval_at and not stop:
                scores = evaluate(run, eval_step, state.variables, "eval", progress)
                if state.ema is not None:
                    scores |= evaluate(run, eval_step, state.ema, "eval_ema", progress)
                writer.write(step, run.epochs_at(step), scores)
                progress.say(f"step {step}/{num_steps}  {describe(scores)}")
                watchdog.beat(step)
            if step in picture.due:
                writer.write_images(step, picture.draw(state.variables))
            if step in save_at or stop:
                top1 = scores.get("eval_ema/top1", scores["eval/top1"]) if step in eval_at and not stop else None
                clock = {"elapsed_seconds": before + meter.seconds_since_start()}
                store.save(state, run.meta() | clock | {"scores": scores}, top1)
            if stop:
                store.wait()
                progress.say(
                    f"Stopped on request after update {step}, saved in {store.path(step)}. "
                    f"The same command goes on from there."
                )
                break
        else:
            store.wait()
            progress.say(f"Finished. {_result(run, store, num_steps, scores, before + meter.seconds_since_start())}")


def _line(run: setup.Run, step: int, scalars: metrics.Scalars) -> str:
    line = (
        f"step {step}/{run.num_steps}  epoch {run.epochs_at(step):.2f}/{run.epochs_at(run.num_steps):.2f}  "
        f"loss {scalars['train/loss']:.4f}  top-1 {100 * scalars['train/top1']:.2f} %"
    )
    if "step_seconds" in scalars:  # not where the only update was the one that compiled
        line += (
            f"  {scalars['images_per_second']:.0f} images/s  data wait {scalars['data_wait_percent']:.0f} %  "
            f"ETA {duration(scalars['eta_seconds'])}"
        )
    return line


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
