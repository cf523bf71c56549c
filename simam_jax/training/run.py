"""From a config to the parts of a run: devices, task, schedule, optimizer. For training, evaluation and check."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import optax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simam_jax import errors
from simam_jax.compilation_cache import use_compilation_cache
from simam_jax.task import Task
from simam_jax.training.optimizer import Schedule, learning_rate, scaled, sgd, steps_in, warmup_steps
from simam_jax.training.state import TrainState, create_state
from simam_jax.training.step import check_divisible, make_eval_step, make_mesh, make_train_step, replicated

FEW_IMAGES = 8  # batch statistics of fewer are mostly noise


@dataclass(frozen=True)
class Run:
    """What `config` stands for on this machine."""

    config: ConfigDict
    mesh: Mesh
    task: Task
    rate: Schedule
    optimizer: optax.GradientTransformation
    num_steps: int

    def steps_in(self, epochs: float) -> int:
        """Updates in that many epochs."""
        return steps_in(epochs, self.task.num_train, self.config.batch_size)

    def epochs_at(self, step: int) -> float:
        """Passes over the training set after that many updates."""
        return step * self.config.batch_size / self.task.num_train

    def every(self, epochs: float) -> set[int]:
        """The updates after which something that happens every so many epochs is due; the last one always."""
        count = int(self.epochs_at(self.num_steps) / epochs) if epochs else 0
        return {self.steps_in(epochs * k) for k in range(1, count + 1)} | {self.num_steps}

    def train_step(self) -> Callable[..., Any]:
        """The update: see `step.make_train_step`."""
        return make_train_step(
            self.task.loss,
            self.optimizer,
            self.rate,
            self.mesh,
            trainable=self.task.trainable,
            micro_batches=self.config.optimizer.grad_accum_steps,
            ema_decay=self.config.ema_decay,
            compiler_options=self.task.compiler_options,
        )

    def eval_step(self) -> Callable[..., Any]:
        """The measure of an evaluation batch: see `step.make_eval_step`."""
        return make_eval_step(self.task.measure, self.mesh, self.task.compiler_options)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside its arrays: the task's spec and the config."""
        return {**self.task.spec, "config": plain(self.config)}


def build(config: ConfigDict, make_task: Callable[[ConfigDict], Task], *, training: bool = True) -> Run:
    """Checks the config against this machine and the data, and makes the parts; without `training`, those of evaluation.

    Raises:
        UserError: anything in the config that cannot be done, named.
    """
    use_compilation_cache(config.compilation_cache_dir)
    mesh = make_mesh()
    check_divisible(config, mesh.size)
    task = make_task(config)
    num_steps = config.num_steps or steps_in(config.num_epochs, task.num_train, config.batch_size)
    if training and num_steps < 1:
        raise errors.UserError(
            f"config.num_epochs={config.num_epochs} and config.num_steps={config.num_steps} make no update "
            f"({task.num_train} training images)."
        )
    schedule = scaled(config.schedule, config.batch_size)
    rate = learning_rate(schedule, num_examples=task.num_train, batch_size=config.batch_size, num_steps=num_steps)
    run = Run(config, mesh, task, rate, sgd(config.optimizer, rate), num_steps)
    if training and (odd := "; ".join(_odd(run))):
        logging.warning("This run is small for its settings: %s.", odd)
    return run


def _odd(run: Run) -> Iterator[str]:
    """Settings that work and are seldom meant."""
    config, num_train = run.config, run.task.num_train
    if config.batch_size > num_train:
        yield (
            f"an update of {config.batch_size} images sees the {num_train} of the training set more than once "
            f"(--config.batch_size={num_train} or less)"
        )
    warmup = warmup_steps(config.schedule, num_train, config.batch_size)
    if warmup >= run.num_steps:
        yield (
            f"the warm-up of {warmup} updates fills the run of {run.num_steps}, so that the rate never reaches "
            f"{config.schedule.learning_rate} (a smaller --config.schedule.warmup_epochs, or 0)"
        )
    micro_batch = config.batch_size // config.optimizer.grad_accum_steps
    if run.task.batch_statistics and run.num_steps > 1 and micro_batch < FEW_IMAGES:
        yield (
            f"batch norm takes statistics over {micro_batch} images at most (a larger --config.batch_size, or fewer "
            f"--config.optimizer.grad_accum_steps)"
        )


def initial_state(run: Run) -> TrainState:
    """The state before the first update, on all devices."""
    seed, task = run.config.seed, run.task
    variables = task.init(jax.random.key(seed))
    state = create_state(variables, run.optimizer, seed=seed, ema=bool(run.config.ema_decay), trainable=task.trainable)
    return jax.device_put(state, replicated(run.mesh))


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON's types."""
    return json.loads(config.to_json_best_effort())
