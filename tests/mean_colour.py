"""A second task, to prove that the loop learns whatever a `Task` describes: the mean colour of an image.

    PYTHONPATH=. python tests/mean_colour.py --config configs/digits_resnet20_simam.py --config.task=mean_colour --workdir DIR

Run as a program it is train.py, with this task in the table.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from simam_jax import data
from simam_jax.ops.images import normalize
from simam_jax.task import MeanEvaluator, Task

SIZE = 8


class Network(nn.Module):
    """(N, S, S, 3) -> (N, 3). `stem` is frozen."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def errors(model, variables, batch):
    """The squared error of every image, (N,)."""
    images = normalize(batch["image"], (0.3, 0.3, 0.3), (0.3, 0.3, 0.3))
    colour = batch["image"].astype(jnp.float32).mean((1, 2)) / 255
    return jnp.square(model.apply(variables, images) - colour).mean(1)


def loss(model, variables, batch, _key):
    each = errors(model, variables, batch)
    within = (jnp.sum(each < 0.01, dtype=jnp.float32), jnp.float32(len(each)))
    return each.mean(), ({}, {"close": within})


def measure(model, variables, batch):
    each = errors(model, variables, batch)
    return {"loss": each, "close": each < 0.01}


def make_task(config) -> Task:
    from simam_jax.data.images import whole  # brings TensorFlow

    def decode(record, _key):
        return {"image": whole(record["image"], size=SIZE)}

    train, evaluation = (data.open_records(config.data, split) for split in ("train", "test"))
    model = Network()
    image = jnp.zeros((1, SIZE, SIZE, 3))
    return Task(
        spec={"task": "mean_colour", "model": {"name": "tests/mean_colour"}},
        title="mean colour",
        num_train=train.num_examples,
        num_eval=evaluation.num_examples,
        best="close",
        example=({"image": jax.ShapeDtypeStruct((SIZE, SIZE, 3), np.uint8)},),
        shapes=partial(jax.eval_shape, model.init, jax.random.key(0), image),
        init=lambda key: model.init(key, image),
        train_batches=lambda step: data.train_batches(
            train, decode, seed=config.seed, start_step=step, batch_size=config.batch_size
        ),
        eval_batches=lambda: data.eval_batches(evaluation, decode, batch_size=config.batch_size),
        loss=partial(loss, model),
        measure=partial(measure, model),
        evaluator=MeanEvaluator,
        describe=lambda scores: f"close {100 * scores['close']:.1f} %, error {scores['loss']:.5f}",
        trainable=lambda path: path[0] != "stem",
    )


if __name__ == "__main__":
    from absl import app

    import train
    from simam_jax.tasks import TASKS

    TASKS["mean_colour"] = make_task
    train.errors.run_cli(lambda: app.run(train.main, flags_parser=train.parse))
