"""The task of `config.task = "classification"`: one label an image, softmax cross-entropy, top-1 and top-5."""

import dataclasses
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from simam_jax import data, models, weights
from simam_jax.classification import metrics, mixing
from simam_jax.errors import UserError
from simam_jax.models import variable_shapes
from simam_jax.models.costs import summarize
from simam_jax.ops.images import normalize
from simam_jax.ops.parts import apply_in_parts
from simam_jax.preprocessing import Preprocessing
from simam_jax.task import AXIS, Batch, MeanEvaluator, Scores, Sums, Task, Tree, eval_batch_size

SHOWN_IMAGES = 4  # in a picture for TensorBoard


def make_task(config: ConfigDict) -> Task:
    """The classification task that `config` describes.

    Raises:
        UserError: anything in the config or the data that cannot be done, named.
    """
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    train, evaluation = open_data(config.data)
    model = models.create_model(
        config.model.name,
        num_classes=len(train.class_names),
        attention=config.model.attention,
        attention_param=config.model.attention_param,
        dtype=config.model.dtype,
        bn_group_size=config.model.bn_group_size,
        axis_name=AXIS,
        trace_blocks_once=True,
    )
    check_groups(config, jax.device_count())
    spec = {
        "task": "classification",
        "model": model.spec(),
        "class_names": list(train.class_names),
        "preprocessing": {field.name: config.data[field.name] for field in dataclasses.fields(Preprocessing)},
    }
    size = config.data.image_size
    return Task(
        spec=spec,
        title=f"{config.model.name} (attention {config.model.attention})",
        num_train=train.num_examples,
        num_eval=evaluation.num_examples,
        best="top1",
        example=(
            {
                "image": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
                "label": jax.ShapeDtypeStruct((), np.int32),
            },
        ),
        shapes=partial(variable_shapes, model),
        init=partial(weights.initial_variables, model, spec, config),
        train_batches=partial(_train_batches, config, train),
        eval_batches=partial(_eval_batches, config, evaluation),
        loss=partial(loss, model, config),
        measure=partial(measure, model, config),
        evaluator=MeanEvaluator,
        describe=describe,
        check_meta=lambda meta: weights.check_class_names(meta, spec, "the checkpoint", config.data.match_classes),
        costs=partial(_costs, model, config),
        pictures=_pictures(model, config, evaluation),
    )


def open_data(config: ConfigDict) -> tuple[data.Records, data.Records]:
    """The training and the evaluation records of `config` (the section config.data).

    Raises:
        UserError: they cannot be opened, or their classes differ.
    """
    train, evaluation = (data.open_records(config, split) for split in (config.train_split, config.eval_split))
    if train.class_names != evaluation.class_names:
        raise UserError(
            f"{config.train_split!r} has {len(train.class_names)} classes and {config.eval_split!r} "
            f"{len(evaluation.class_names)}, or other names: both need the same."
        )
    return train, evaluation


def loss(
    model: Any, config: ConfigDict, variables: Tree, batch: Batch, key: jax.Array
) -> tuple[jax.Array, tuple[Tree, Sums]]:
    """The mean cross-entropy of one device's images, after mixup and CutMix where `config.classification` asks for them.

    Returns:
        The loss, and the new batch statistics with the sums `top1` and `top5`, of labels before mixing.
    """
    settings, labels = config.classification, batch["label"]
    mix_key, dropout_key = jax.random.split(key)
    images = normalize(batch["image"], config.data.mean, config.data.std, model.dtype)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), settings.label_smoothing)
    if settings.mixup_alpha or settings.cutmix_alpha:
        index = jax.lax.axis_index(AXIS) * labels.shape[0] + jnp.arange(labels.shape[0])
        images, targets = mixing.mix(
            mix_key, index, images, targets, mixup_alpha=settings.mixup_alpha, cutmix_alpha=settings.cutmix_alpha
        )
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key})
    hits = metrics.hits(logits, labels)
    sums = {name: (jnp.sum(hit, dtype=jnp.float32), jnp.float32(len(labels))) for name, hit in hits.items()}
    return optax.softmax_cross_entropy(logits, targets).mean(), (updates.get("batch_stats", {}), sums)


def measure(model: Any, config: ConfigDict, variables: Tree, batch: Batch) -> dict[str, jax.Array]:
    """Of every image its cross-entropy, and whether its label is the first or among the first five."""
    images = normalize(batch["image"], config.data.mean, config.data.std, model.dtype)
    logits = apply_in_parts(partial(model.apply, variables), images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {"loss": losses} | metrics.hits(logits, batch["label"])


def describe(scores: Scores) -> str:
    """The scores, or the means of the updates, as a reader wants them."""
    return f"top-1 {100 * scores['top1']:.2f} %, top-5 {100 * scores['top5']:.2f} %, loss {scores['loss']:.4f}"


def _train_batches(config: ConfigDict, records: data.Records, start_step: int) -> Iterator[Batch]:
    from simam_jax.classification.decode import train_decode  # brings TensorFlow

    return data.train_batches(
        records,
        train_decode(config.data, config.seed),
        seed=config.seed,
        start_step=start_step,
        batch_size=config.batch_size,
        prefetch=config.data.prefetch,
        max_unreadable=config.data.max_unreadable,
    )


def _eval_batches(config: ConfigDict, records: data.Records) -> Iterator[Batch]:
    from simam_jax.classification.decode import eval_decode

    size = eval_batch_size(config)
    return data.eval_batches(records, eval_decode(config.data), batch_size=size, prefetch=config.data.prefetch)


def _costs(model: Any, config: ConfigDict) -> dict[str, str]:
    each_block = model.with_backbone(trace_blocks_once=False)  # each is counted
    totals = summarize(each_block, config.data.image_size)
    return {
        "model": f"{config.model.name}, attention {config.model.attention}, {model.num_classes} classes",
        "parameters": f"{totals.params / 1e6:.2f} M",
        "FLOPs": f"{totals.flops / 1e9:.2f} G for one image of {config.data.image_size} pixels squared",
    }


def check_groups(config: ConfigDict, num_devices: int) -> None:
    """Raises `UserError` unless a micro-batch divides into batch-norm groups and, for mixing, into pairs."""
    accum, group = config.optimizer.grad_accum_steps, config.model.bn_group_size
    local = config.batch_size // (num_devices * accum)
    each = f"{local} images on each of {num_devices} devices" + (
        f" (in each of {accum} micro-batches)" if accum > 1 else ""
    )
    if local % 2 and (config.classification.mixup_alpha or config.classification.cutmix_alpha):
        unit = 2 * num_devices * accum
        raise UserError(
            f"config.batch_size={config.batch_size} makes {each}, which mixup and CutMix cannot divide into pairs: take a "
            f"multiple of {unit}."
        )
    possible = [g for g in range(1, local + 1) if local % g == 0]
    possible += [local * m for m in range(2, num_devices + 1) if num_devices % m == 0]
    if group and group not in possible:
        raise UserError(
            f"config.model.bn_group_size={group} cannot be made of {each}. "
            f"Possible: 0 (all of one device), {', '.join(map(str, possible))}."
        )


def _pictures(model: Any, config: ConfigDict, records: data.Records):
    """What draws SimAM's weights over the first evaluation images; None where the run does not ask for it.

    Raises:
        UserError: it is asked of a network without SimAM.
    """
    if not config.visualize_every_epochs:
        return None
    if model.attention != "simam":
        raise UserError(
            f"config.visualize_every_epochs={config.visualize_every_epochs} draws SimAM's weights, which a network with "
            f"config.model.attention={model.attention} does not have: set it to 0."
        )

    @functools.cache
    def pixels() -> np.ndarray:
        from simam_jax.classification.decode import eval_decode

        decode = eval_decode(config.data)
        batch = next(data.eval_batches(records, decode, batch_size=SHOWN_IMAGES, process_index=0, process_count=1))
        return batch["image"][batch["mask"] > 0]

    def draw(variables: Tree) -> dict[str, np.ndarray]:
        from simam_jax.classification import explain, figures

        images = normalize(jnp.asarray(pixels()), config.data.mean, config.data.std, model.dtype)
        seen = explain.attention_weights(model, variables, images)
        return {"attention": figures.render(figures.attention_figure(pixels(), seen))[None]}

    return draw
