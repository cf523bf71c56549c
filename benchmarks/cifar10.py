"""A whole CIFAR-10 run of a recipe with data and augmentation on the device: minutes on a GPU, and no TensorFlow.

python -m benchmarks.cifar10 FOLDER [--config cifar10_resnet20_simam] [--attention none] [--seeds 0 1 2] [--epochs 164]

FOLDER holds train/CLASS/* and test/CLASS/*. Model, loss, optimizer, rates and update are those of `train.py`; the order of the
images and their crops are drawn by JAX instead of the input pipeline, from the same distributions. Prints the test accuracy after
every tenth of the run, and for each seed a line of JSON with all of them.
"""

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from simam_jax import create_model
from simam_jax.classification import task
from simam_jax.errors import UserError, run_cli
from simam_jax.models import init_variables
from simam_jax.task import AXIS
from simam_jax.training import optimizer, step
from simam_jax.training.state import create_state

EVALUATIONS = 10  # of a run
EVAL_BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="cifar10_resnet20_simam")
    parser.add_argument("--attention", default="simam")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, help="the schedule is shortened in proportion")
    args = parser.parse_args()
    config = importlib.import_module(f"configs.{args.config}").get_config(f"attention={args.attention}")
    if args.epochs:
        shorter = args.epochs / config.num_epochs
        config.num_epochs = args.epochs
        config.schedule.step_epochs = tuple(shorter * epoch for epoch in config.schedule.step_epochs)
    sets = {split: _read(args.folder / split) for split in ("train", "test")}
    for seed in args.seeds:
        start = time.perf_counter()
        accuracies = _run(config, seed, sets)
        run = {"attention": args.attention, "seed": seed, "epochs": config.num_epochs, "top1": accuracies}
        print(json.dumps(run | {"seconds": round(time.perf_counter() - start, 1)}), flush=True)


def _read(folder: Path) -> tuple[jax.Array, jax.Array]:
    """All images (N, H, W, 3) uint8 of a tree with a folder for each class, and their labels (N,)."""
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    files = [(path, label) for label, place in enumerate(classes) for path in sorted(place.iterdir())]
    if not files:
        raise UserError(f"{folder} holds no CLASS/IMAGE files.")
    with ThreadPoolExecutor() as threads:
        pixels = list(threads.map(lambda file: np.asarray(Image.open(file[0]).convert("RGB")), files))
    return jnp.asarray(np.stack(pixels)), jnp.asarray([label for _, label in files], jnp.int32)


def _run(config: ConfigDict, seed: int, sets: dict[str, tuple[jax.Array, jax.Array]]) -> list[float]:
    """Top-1 of the test set, in percent, after each tenth of the run."""
    images, labels = sets["train"]
    count, size = len(images), config.batch_size
    steps = optimizer.steps_in(config.num_epochs, count, size)
    rate = optimizer.learning_rate(config.schedule, num_examples=count, batch_size=size, num_steps=steps)
    sgd, mesh = optimizer.sgd(config.optimizer, rate), step.make_mesh()
    model = create_model(
        config.model.name,
        num_classes=int(labels.max()) + 1,
        attention=config.model.attention,
        bn_group_size=config.model.bn_group_size,
        axis_name=AXIS,
    )
    variables = init_variables(model, jax.random.key(seed))
    state = jax.device_put(create_state(variables, sgd, seed=seed, ema=False), step.replicated(mesh))
    update = step.make_train_step(partial(task.loss, model, config), sgd, rate, mesh)
    batch = _batches(config, seed, images, labels)

    @partial(jax.jit, donate_argnums=0)
    def advance(state: Any, start: jax.Array, end: jax.Array) -> tuple[Any, jax.Array]:
        def one(index: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            state, values = update(carry[0], batch(index))
            return state, 0.99 * carry[1] + 0.01 * values["scalars"]["loss"]

        return jax.lax.fori_loop(start, end, one, (state, jnp.float32(0)))

    hits = jax.jit(lambda variables, images, labels: _hits(model, config, variables, images, labels))
    accuracies: list[float] = []
    for start, end in itertools.pairwise(round(steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)):
        state, loss = advance(state, jnp.asarray(start), jnp.asarray(end))
        accuracies.append(round(100 * float(hits(state.variables, *sets["test"])), 2))
        print(f"seed {seed}: {end}/{steps} updates, mean loss {loss:.4f}, {accuracies[-1]} %", flush=True)
    return accuracies


def _batches(config: ConfigDict, seed: int, images: jax.Array, labels: jax.Array) -> Callable[[jax.Array], Any]:
    """The batch of an update: the images of a permutation an epoch, padded and cropped, half of them mirrored."""
    count, size, pad = len(images), config.batch_size, config.data.crop_padding
    side = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    keys = jax.random.split(jax.random.key(seed), 2)
    epochs = jnp.arange(int(np.ceil(config.num_epochs)) + 1)
    order = jax.lax.map(lambda epoch: jax.random.permutation(jax.random.fold_in(keys[0], epoch), count), epochs)

    def augmented(index: jax.Array, top: jax.Array, left: jax.Array, mirrored: jax.Array) -> jax.Array:
        crop = jax.lax.dynamic_slice(padded, (index, top, left, 0), (1, side, side, 3))[0]
        return jnp.where(mirrored, crop[:, ::-1], crop)

    def batch(number: jax.Array) -> dict[str, jax.Array]:
        positions = number * size + jnp.arange(size)
        index = order[positions // count, positions % count]
        key, flips = jax.random.split(jax.random.fold_in(keys[1], number))
        top, left = jax.random.randint(key, (2, size), 0, 2 * pad + 1)
        mirrored = jax.random.bernoulli(flips, 0.5, (size,))
        return {"image": jax.vmap(augmented)(index, top, left, mirrored), "label": labels[index]}

    return batch


def _hits(model: Any, config: ConfigDict, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The fraction of images whose label comes first."""

    def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        found = task.measure(model, config, variables, {"image": inputs[0], "label": inputs[1]})
        return found["top1"].mean()

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, EVAL_BATCH, *x.shape[1:])

    return jax.lax.map(part, (cut(images), cut(labels))).mean()


if __name__ == "__main__":
    run_cli(main)
