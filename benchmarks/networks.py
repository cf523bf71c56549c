"""The contestants of `train_step` and `inference`: our networks, and PyTorch's, eager and compiled, channels last."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

import simam_jax
from benchmarks.measure import Run
from configs import base
from simam_jax import models
from simam_jax.classification import task
from simam_jax.ops.parts import apply_in_parts
from simam_jax.task import AXIS
from simam_jax.training import optimizer, state
from simam_jax.training import step as steps

MODELS = ("resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2")


def batch_of(count: int, size: int) -> dict[str, np.ndarray]:
    """Random uint8 images (count, size, size, 3) and labels."""
    random = np.random.default_rng(0)
    return {
        "image": random.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        "label": random.integers(0, 1000, count, dtype=np.int32),
    }


def train_step_on(mesh: Mesh, name: str, attention: str, count: int, dtype: str = "float32"):
    """The update of `train.py`, its model, and what makes a state of variables: `step(make_state(variables), batch)`."""
    config = base.get_config()
    config.batch_size, config.model.bn_group_size = count, 0
    settings = {"attention": attention, "axis_name": AXIS, "dtype": dtype, "trace_blocks_once": True}
    model = simam_jax.create_model(name, num_classes=1000, **settings)

    def rate(_step: ArrayLike) -> jax.Array:
        return jnp.asarray(0.1)

    sgd = optimizer.sgd(config.optimizer, rate)

    def make_state(variables: state.Tree) -> state.TrainState:
        return state.create_state(variables, sgd, seed=0, ema=False)

    loss = partial(task.loss, model, config)
    return steps.make_train_step(loss, sgd, rate, mesh), model, make_state


def compiled_train_step(name: str, attention: str, count: int, size: int, dtype: str = "float32"):
    """The same compiled for the devices of this machine, with its state and batch on them."""
    mesh = steps.make_mesh()
    step, model, make_state = train_step_on(mesh, name, attention, count, dtype)
    train_state = jax.device_put(make_state(models.init_variables(model, jax.random.key(0))), steps.replicated(mesh))
    batch = jax.device_put(batch_of(count, size), steps.batch_sharded(mesh))
    return step.lower(train_state, batch).compile(), train_state, batch


def our_training(name: str, attention: str, count: int, size: int) -> Run:
    step, train_state, batch = compiled_train_step(name, attention, count, size)
    held = [train_state]

    def run() -> None:
        held[0], values = step(held[0], batch)
        jax.block_until_ready(values)

    return run


def our_inference(name: str, attention: str, count: int, size: int) -> Run:
    model = simam_jax.create_model(name, num_classes=1000, attention=attention)
    variables = models.init_variables(model, jax.random.key(0))
    images = jax.device_put(batch_of(count, size)["image"].astype(np.float32) / 255)
    # As the Predictor and evaluations apply it.
    apply = jax.jit(lambda variables, images: apply_in_parts(partial(model.apply, variables), images))
    return lambda: jax.block_until_ready(apply(variables, images))


def torch_training(name: str, attention: str, count: int, size: int, *, compiled: bool) -> Run:
    import torch

    from benchmarks import torch_networks

    model = torch_networks.create(name, attention)
    batch = batch_of(count, size)
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)  # its memory is channels last
    labels = torch.from_numpy(batch["label"]).long()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(forward(images.float() / 255), labels).backward()
        sgd.step()

    return run


def torch_inference(name: str, attention: str, count: int, size: int, *, compiled: bool) -> Run:
    import torch

    from benchmarks import torch_networks

    model = torch_networks.create(name, attention).eval()
    images = torch.from_numpy(batch_of(count, size)["image"]).permute(0, 3, 1, 2).float() / 255
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        with torch.inference_mode():
            forward(images)

    return run
