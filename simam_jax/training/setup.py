"""From a config to the parts of a run: devices, data, model, schedule, optimizer. For training, evaluation and check."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import optax
from absl import logging
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simam_jax import checkpoints, convert, data, errors, models
from simam_jax.preprocessing import Preprocessing
from simam_jax.training.optimizer import Schedule, learning_rate, sgd, steps_in
from simam_jax.training.state import TrainState, Tree, create_state, init_variables
from simam_jax.training.step import AXIS, check_divisible, make_mesh, whole_on


@dataclasses.dataclass(frozen=True)
class Run:
    """What `config` stands for on this machine."""

    config: ConfigDict
    mesh: Mesh
    data: data.DatasetInfo
    model: nn.Module
    rate: Schedule
    optimizer: optax.GradientTransformation
    num_steps: int

    def steps_in(self, epochs: float) -> int:
        """Updates in that many epochs."""
        return steps_in(epochs, self.data.num_train, self.config.batch_size)

    def epochs_at(self, step: int) -> float:
        """Passes over the training set after that many updates."""
        return step * self.config.batch_size / self.data.num_train

    def every(self, epochs: float) -> set[int]:
        """The updates after which something that happens every so many epochs is due; the last one always."""
        count = int(self.epochs_at(self.num_steps) / epochs) if epochs else 0
        return {self.steps_in(epochs * k) for k in range(1, count + 1)} | {self.num_steps}

    def meta(self) -> checkpoints.Meta:
        """What a checkpoint says of itself beside its arrays."""
        preprocessing = [field.name for field in dataclasses.fields(Preprocessing)]
        return {
            "model": self.model_spec(),
            "class_names": list(self.data.class_names),
            "preprocessing": {name: self.config.data[name] for name in preprocessing},
            "config": plain(self.config),
        }

    def model_spec(self) -> checkpoints.Meta:
        """The arguments of `create_model`, as JSON."""
        model = self.model
        return {
            "name": self.config.model.name,
            "num_classes": model.num_classes,
            "attention": model.attention,
            "attention_param": model.attention_param,
            "dtype": model.dtype.name,
        }


def build(config: ConfigDict) -> Run:
    """Checks the config against this machine and the data, and makes the parts.

    Raises:
        UserError: anything in the config that cannot be done, named.
    """
    _use_compilation_cache(config.compilation_cache_dir)
    mesh = make_mesh()
    check_divisible(config, mesh.size)
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    info = data.describe(config.data)
    model = models.create_model(
        config.model.name,
        num_classes=info.num_classes,
        attention=config.model.attention,
        attention_param=config.model.attention_param,
        dtype=config.model.dtype,
        bn_group_size=config.model.bn_group_size,
        axis_name=AXIS,
    )
    if config.visualize_every_epochs and config.model.attention != "simam":
        raise errors.UserError(
            f"config.visualize_every_epochs={config.visualize_every_epochs} draws SimAM's weights, which a network with "
            f"config.model.attention={config.model.attention} does not have: set it to 0."
        )
    num_steps = config.num_steps or steps_in(config.num_epochs, info.num_train, config.batch_size)
    if num_steps < 1:
        raise errors.UserError(
            f"config.num_epochs={config.num_epochs} and config.num_steps={config.num_steps} make no update."
        )
    rate = learning_rate(
        config.schedule, num_examples=info.num_train, batch_size=config.batch_size, num_steps=num_steps
    )
    return Run(config, mesh, info, model, rate, sgd(config.optimizer, rate), num_steps)


def _use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory`; "auto": the user's own cache, as who can write there can run code."""
    if directory == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = str(Path(base) / "simam_jax" / "compiled")
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def initial_state(run: Run) -> TrainState:
    """The state before the first update, on all devices: freshly drawn, or with the weights of `config.init_from`."""
    variables = init_variables(run.model, jax.random.key(run.config.seed))
    if run.config.init_from:
        variables = _start_from(run, variables)
    state = create_state(variables, run.optimizer, seed=run.config.seed, ema=bool(run.config.ema_decay))
    return jax.device_put(state, whole_on(run.mesh))


def _start_from(run: Run, fresh: Tree) -> Tree:
    """`fresh` with the weights of `config.init_from`; with `init_skip_head` the classifier stays fresh."""
    path, skip_head = run.config.init_from, run.config.init_skip_head
    if Path(path).is_dir():
        model, found = checkpoints.load(path)
        same = ("attention", "attention_param")  # what the parameters' names and shapes do not tell
        if any(getattr(model, name) != getattr(run.model, name) for name in same):
            had, has = ({name: getattr(m, name) for name in same} for m in (model, run.model))
            logging.warning("config.init_from=%s was trained with %s, this run has %s.", path, had, has)
    else:
        _, found = convert.load_torch(path, skip_head=skip_head, **run.model_spec())
    if skip_head:
        found = found | {"params": found["params"] | {convert.HEAD: fresh["params"][convert.HEAD]}}
    if checkpoints.layout(found) != checkpoints.layout(fresh):
        raise errors.UserError(
            f"The weights of config.init_from={path} do not fit {run.config.model.name} with "
            f"{run.data.num_classes} classes: {_differences(found, fresh)}. Another number of classes is no obstacle with --config.init_skip_head=True."
        )
    return found


def _differences(found: Tree, wanted: Tree) -> str:
    shapes = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (found, wanted))
    has, needs = (flatten_dict(tree, sep="/") for tree in shapes)
    lines = [f"missing {name}" for name in sorted(set(needs) - set(has))]
    lines += [f"unexpected {name}" for name in sorted(set(has) - set(needs))]
    lines += [
        f"{name} is {has[name]} and not {needs[name]}"
        for name in sorted(set(has) & set(needs))
        if has[name] != needs[name]
    ]
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON's types."""
    return json.loads(config.to_json_best_effort())
