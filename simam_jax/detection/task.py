"""The task of `config.task = "detection"`: boxes, and masks where the network has them; Faster and Mask R-CNN."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from simam_jax import models, weights
from simam_jax.data import detection_sources as sources
from simam_jax.detection import pipeline
from simam_jax.detection.apply import compiler_options, detections, prepared
from simam_jax.detection.detections import Detections
from simam_jax.detection.drawing import SHOWN
from simam_jax.detection.evaluation import CocoEvaluator, describe_scores, truth_of
from simam_jax.detection.masks import Masks
from simam_jax.detection.rows import pixels_of
from simam_jax.errors import UserError, naming_extras
from simam_jax.models import Detector, variable_shapes
from simam_jax.models.costs import summarize
from simam_jax.models.detector import own_extent, trainable
from simam_jax.models.detector_losses import LOSSES, Targets, losses, total
from simam_jax.preprocessing import DetectionPreprocessing
from simam_jax.task import AXIS, Batch, Scores, Sums, Task, Tree

SHOWN_IMAGES = 4  # pictures for TensorBoard
SHOWN_SCORE = 0.3  # from which on objects are drawn


def make_task(config: ConfigDict) -> Task:
    """The detection task that `config` describes.

    Raises:
        UserError: anything in the config or the data that cannot be done, named.
    """
    with naming_extras():  # before an epoch is trained that cannot be scored
        import cv2  # noqa: F401
        import pycocotools  # noqa: F401
    model = _model(config)
    evaluation = sources.open_examples(config.data, "eval", masks=model.masks)
    if sources.is_named(config.data, "train"):
        train = sources.open_examples(config.data, "train", masks=model.masks)
        _check_classes(train, evaluation)
    else:  # enough to score a checkpoint; a run that trains says that it has no images
        train = evaluation.none()
    model = model.clone(num_classes=len(train.class_names))
    _check_batches(config)
    fields = {field.name: config.data[field.name] for field in dataclasses.fields(DetectionPreprocessing)}
    preprocessing = DetectionPreprocessing(**fields)
    spec = {
        "task": "detection",
        "model": model.spec(),
        "class_names": list(train.class_names),
        "category_ids": train.category_ids.tolist(),
        "preprocessing": fields,
    }
    truth = functools.cache(lambda: truth_of(evaluation, evaluation.annotations()))
    data = pipeline.Training(config, train, preprocessing, masks=model.masks)
    return Task(
        spec=spec,
        title=f"{config.model.name} (attention {config.model.attention})",
        num_train=len(train),
        num_eval=len(evaluation),
        best="segm_AP" if model.masks else "bbox_AP",
        example=data.example(),
        shapes=partial(variable_shapes, model),
        init=partial(weights.initial_variables, model, spec, config),
        train_batches=data.batches,
        eval_batches=partial(pipeline.eval_batches, config, evaluation, preprocessing),
        loss=partial(loss, model, config),
        measure=partial(measure, model, preprocessing),
        evaluator=lambda: CocoEvaluator(truth(), masks=model.masks),
        describe=describe,
        check_meta=lambda meta: weights.check_class_names(meta, spec, "the checkpoint", config.data.match_classes),
        costs=partial(_costs, model, config, preprocessing, data),
        trainable=partial(trainable, frozen_stages=config.detection.frozen_stages),
        pictures=_pictures(model, config, evaluation, preprocessing),
        batch_statistics=config.detection.batch_norm == "trained",
        images_of=data.names,
        compiler_options=compiler_options(),
    )


def _model(config: ConfigDict) -> Detector:
    """The detector, for as many classes as it usually has."""
    if config.model.name not in models.list_models("detection"):
        raise UserError(
            f"config.model.name={config.model.name} is no detector. Known: {', '.join(models.list_models('detection'))}."
        )
    return models.create_model(
        config.model.name,
        attention=config.model.attention,
        attention_param=config.model.attention_param,
        dtype=config.model.dtype,
        bn_group_size=config.model.bn_group_size,
        axis_name=AXIS,
        trace_blocks_once=True,
    )


def _check_classes(train: sources.Examples, evaluation: sources.Examples) -> None:
    if train.class_names != evaluation.class_names:
        missing = sorted(set(train.class_names) ^ set(evaluation.class_names))
        raise UserError(
            f"The training data have {len(train.class_names)} classes and the evaluation data "
            f"{len(evaluation.class_names)}: both need the same, in the same order. "
            + (f"Only on one side: {', '.join(missing[:10])}." if missing else "They are in another order.")
        )


def _check_batches(config: ConfigDict) -> None:
    """Raises `UserError` unless a device's images divide into the groups whose extent is shared."""
    settings, accum = config.detection, config.optimizer.grad_accum_steps
    local = config.batch_size // (jax.device_count() * accum)
    if local % settings.images_per_group:
        raise UserError(
            f"config.detection.images_per_group={settings.images_per_group} does not divide the {local} images that a device "
            f"computes at once: take a divisor, or 1."
        )
    if settings.batch_norm == "trained" and settings.frozen_stages:
        raise UserError(
            f"config.detection.batch_norm=trained also trains the stages that config.detection.frozen_stages="
            f"{settings.frozen_stages} freezes: set it to 0."
        )


def loss(
    model: Detector, config: ConfigDict, variables: Tree, batch: Batch, key: jax.Array
) -> tuple[jax.Array, tuple[Tree, Sums]]:
    """The sum of the parts of the loss, each over all images of all devices divided by its count over them.

    Returns:
        The loss, and the new batch statistics with the sums of every part, of "positives" and of "recall".
    """
    settings = config.detection
    size, train_norm = batch["image_size"], settings.batch_norm == "trained"
    images = prepared(batch["image"], size, config.data.mean, config.data.std, model.dtype)
    extent = None if train_norm else _extent(size, settings.images_per_group)
    index = lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    targets = Targets(batch["boxes"], batch["labels"], batch["count"], batch.get("masks"))
    found, batch_stats = losses(
        model,
        variables,
        images,
        targets,
        keys,
        extent=extent,
        image_size=size,
        frozen_stages=settings.frozen_stages,
        train_norm=train_norm,
    )
    sums = {name: (part.sum(), count.sum()) for name, (part, count) in found.items()}
    # The trainer takes the mean over the devices, and the losses of the devices add up.
    return total(sums, AXIS) * lax.axis_size(AXIS), (batch_stats, sums)


def _extent(sizes: jax.Array, group: int) -> jax.Array:
    """(N, 2): of every `group` neighbouring images the largest extent."""
    return jnp.repeat(own_extent(sizes).reshape(-1, group, 2).max(1), group, axis=0)


def measure(model: Detector, preprocessing: DetectionPreprocessing, variables: Tree, batch: Batch) -> Tree:
    """Of every image what the network finds in it, in its own pixels, with `index` and `original_size`."""
    size = batch["image_size"]
    scale = size.astype(jnp.float32) / batch["original_size"].astype(jnp.float32)
    scale = jnp.tile(scale[:, ::-1], 2)
    found = detections(model, preprocessing, variables, batch["image"], size, scale)
    outputs = {name: x for name, x in found._asdict().items() if x is not None}
    return outputs | {"index": batch["index"], "original_size": batch["original_size"]}


def describe(scores: Scores) -> str:
    """The scores, or the means of the updates, as a reader wants them."""
    if any(name.endswith("_AP") for name in scores):
        return describe_scores(scores)
    parts = ", ".join(f"{name.removeprefix('loss_')} {scores[name]:.3f}" for name in LOSSES if name in scores)
    return f"loss {scores['loss']:.4f} ({parts}), proposals' recall {100 * scores['recall']:.1f} %"


def _costs(
    model: Detector, config: ConfigDict, preprocessing: DetectionPreprocessing, data: pipeline.Training
) -> dict[str, str]:
    each_block = model.with_backbone(trace_blocks_once=False)  # each is counted
    height, width = preprocessing.bucket(preprocessing.min_size, preprocessing.max_size)
    totals = summarize(each_block, height, width)
    shapes = ", ".join(f"{h}x{w}: {count}" for (h, w), count in data.counts().items())
    return {
        "model": f"{config.model.name}, attention {config.model.attention}, {model.num_classes} classes",
        "parameters": f"{totals.params / 1e6:.2f} M",
        "FLOPs": f"{totals.flops / 1e9:.2f} G for one image of {height} x {width} pixels",
        "buckets": f"{shapes} images; at most {data.most_objects} objects in an image",
    }


def _pictures(model: Detector, config: ConfigDict, evaluation: sources.Examples, preprocessing: DetectionPreprocessing):
    """What draws the ground truth and the network's objects in the first evaluation images; None where not asked for."""
    if not config.visualize_every_epochs:
        return None
    found_in = jax.jit(partial(measure, model, preprocessing), compiler_options=compiler_options())

    def draw(variables: Tree) -> dict[str, np.ndarray]:
        drawn = {}
        for index in range(min(SHOWN_IMAGES, len(evaluation))):
            row = pipeline.eval_row_of(evaluation, preprocessing, index)
            batch = jax.tree.map(lambda x: x[None], row)
            found = jax.tree.map(lambda x: np.asarray(x)[0], found_in(variables, batch))
            drawn[f"detections/{index}"] = _side_by_side(evaluation, index, found)[None]
        return drawn

    return draw


def _side_by_side(evaluation: sources.Examples, index: int, found: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 (H, 2 W, 3): the ground truth, and what the network found."""
    example = evaluation.read(index)
    pixels, count = pixels_of(example), int(found["count"])
    masks = example.masks() if example.masks and "masks" in found else None
    truth = Detections(
        example.boxes, np.ones(len(example.boxes), np.float32), example.labels, masks, evaluation.class_names
    )
    boxes, scores, labels = (found[name][:count] for name in ("boxes", "scores", "labels"))
    seen = Masks(found["masks"][:count], boxes, pixels.shape[:2]) if "masks" in found else None
    ours = Detections(boxes, scores, labels, seen, evaluation.class_names)
    longest = max(*pixels.shape[:2], SHOWN)
    pictures = (each.draw(pixels, threshold=SHOWN_SCORE, longest=longest) for each in (truth, ours))
    return np.concatenate(list(map(np.asarray, pictures)), axis=1)
