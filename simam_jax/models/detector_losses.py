"""What a detector learns from: the losses of its two stages, image by image."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.typing import ArrayLike

from simam_jax.models.detector import Detector, Sizes, map_sizes, own_extent, sizes_of, trainable
from simam_jax.models.rpn import RPNOutputs
from simam_jax.ops.boxes import iou
from simam_jax.rcnn.anchors import all_anchors, valid_anchors
from simam_jax.rcnn.assign import assign
from simam_jax.rcnn.losses import box_losses, mask_losses, roi_labels, rpn_losses
from simam_jax.rcnn.masks import mask_targets
from simam_jax.rcnn.proposals import Proposals
from simam_jax.rcnn.sample import Sample, sample, with_targets

BEFORE_NMS = 2000  # anchors of a level that become proposals at most, in training
SAMPLED_ANCHORS = 256  # of an image, at most half of them positive; of rois at most a quarter

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")

Sums = dict[str, tuple[jax.Array, jax.Array]]


class Targets(NamedTuple):
    """The ground truth of a batch, in pixels of the network's input."""

    boxes: jax.Array  # (N, G, 4) float32, zeros from `count` on; without crowds
    labels: jax.Array  # (N, G) int32 in 0..num_classes - 1
    count: jax.Array  # (N,) int32
    masks: jax.Array | None = None  # (N, G, H, ceil(W / 8)) uint8, packed bits of the images' size; for Mask R-CNN


class Chosen(NamedTuple):
    """Choices that are made beforehand, to replay them; None: made here."""

    proposals: Proposals | None = None  # (N, R, ...)
    anchors: Sample | None = None  # (N, 256), of all levels' anchors
    rois: Sample | None = None  # (N, 512), of the ground truth's G rows and the proposals after them


def losses(
    model: Detector,
    variables: Any,
    images: jax.Array,
    targets: Targets,
    keys: jax.Array,
    *,
    extent: ArrayLike | None = None,
    image_size: ArrayLike | None = None,
    chosen: Chosen | None = None,
    frozen_stages: int = 1,
    train_norm: bool = False,
) -> tuple[Sums, Any]:
    """The parts of the loss, and two measures, of every image.

    What is not `trainable` has gradients of 0; proposals, matches and samples have none.

    Args:
        variables: {"params": ..., "batch_stats": ...}.
        images, extent, image_size: as for `model.apply`. A detector with masks needs targets with masks.
        keys: (N,) random keys, one an image.
        frozen_stages: of the backbone, as for `trainable`.
        train_norm: whether batch norm normalises by the statistics of this batch, over whole maps, padding too: there must
            be no extent. Else it uses the running ones, as the reference implementation does.

    Returns:
        By name (sum, count), each (N,) float32, of which `total` makes the loss. Those that are none of `LOSSES` are
        "positives", sampled rois that show an object, and "recall", the ground truth that a proposal overlaps by half or
        more. And the new "batch_stats"; {} without `train_norm`.
    """
    chosen = chosen or Chosen()
    is_trained = partial(trainable, frozen_stages=frozen_stages)
    variables = {**variables, "params": _without_frozen_gradients(variables["params"], is_trained)}
    sizes = sizes_of(images, extent, image_size)
    levels, updates = model.apply(variables, images, extent, train_norm, method="pyramid", mutable=["batch_stats"])
    outputs = _of_variables(model, variables, "rpn", levels, extent)
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    # What the reference implementation pads an image to for itself; a tensor of several images may be larger.
    padded = jnp.minimum(own_extent(sizes.image), sizes.extent)
    found = _first_stage(map_sizes(levels), outputs, targets, padded, keys[:, 0], chosen.anchors)

    proposals = chosen.proposals
    if proposals is None:
        proposals = model.proposals(levels, outputs, sizes, before_nms=BEFORE_NMS)
    second = jax.vmap(partial(_second_stage, model))(targets, proposals, keys[:, 1], chosen.rois)
    logits, deltas = _of_variables(model, variables, "boxes", levels, sizes, second.rois, second.sample.valid)
    classes, boxes, count = jax.vmap(box_losses)(
        logits, deltas, second.rois, targets.boxes, second.labels, second.matches, second.sample
    )
    found |= {"loss_cls": (classes, count), "loss_bbox": (boxes, count)}
    if model.masks:
        found["loss_mask"] = _mask_loss(model, variables, levels, sizes, padded, targets, second)
    ones = jnp.ones(len(images), jnp.float32)
    found["positives"] = second.sample.num_positive.astype(jnp.float32), ones
    found["recall"] = jax.vmap(_recall)(targets, proposals)
    return found, updates["batch_stats"] if train_norm else {}


def total(found: Sums, axis_name: str | None = None) -> jax.Array:
    """The loss, a float32 number: the sum of `LOSSES`, each its sum divided by its count over all images.

    Args:
        found: of `losses`, or its sums over images.
        axis_name: the mapped axis that the images are sharded over, if any: the counts are those of all devices, and the
            losses of the devices add up to that of the batch.
    """
    loss = jnp.float32(0)
    for part, count in (found[name] for name in LOSSES if name in found):
        count = count.sum() if axis_name is None else lax.psum(count.sum(), axis_name)
        loss += part.sum() / jnp.maximum(count, 1)
    return loss


def _of_variables(model: Detector, variables: Any, method: str, *inputs: Any) -> Any:
    return model.apply(variables, *inputs, method=method)


def _without_frozen_gradients(params: Any, is_trained: Callable[[Sequence[str]], bool]) -> Any:
    return unflatten_dict(
        {path: x if is_trained(path) else lax.stop_gradient(x) for path, x in flatten_dict(params).items()}
    )


def _first_stage(
    maps: list[tuple[int, int]],
    outputs: RPNOutputs,
    targets: Targets,
    padded: jax.Array,
    keys: jax.Array,
    chosen: Sample | None,
) -> Sums:
    grid = jnp.concatenate(all_anchors(maps))

    def of_image(logits, deltas, targets: Targets, padded, key, chosen) -> tuple[jax.Array, ...]:
        # Anchors beyond the image's own padding are no candidates here, though they are as proposals.
        valid = jnp.concatenate(valid_anchors(maps, padded))
        matches, _ = assign(grid, valid, targets.boxes, targets.count, positive=0.7, negative=0.3, low_quality=0.3)
        picked = chosen or sample(matches, key, num=SAMPLED_ANCHORS, max_positive=SAMPLED_ANCHORS // 2)
        return rpn_losses(logits, deltas, grid, targets.boxes, matches, picked)

    logits, deltas = (jnp.concatenate(part, axis=1) for part in outputs)
    objectness, box, count = jax.vmap(of_image)(logits, deltas, targets, padded, keys, chosen)
    return {"loss_rpn_cls": (objectness, count), "loss_rpn_bbox": (box, count)}


class _Second(NamedTuple):
    """The rois that the second stage learns from."""

    sample: Sample  # (S,)
    rois: jax.Array  # (S, 4)
    matches: jax.Array  # (S,)
    labels: jax.Array  # (S,)


def _second_stage(
    model: Detector, targets: Targets, proposals: Proposals, key: jax.Array, chosen: Sample | None
) -> _Second:
    """Those of one image."""
    boxes, count = targets.boxes, targets.count
    real = jnp.arange(len(proposals.boxes)) < proposals.count
    low_quality = 0.5 if model.masks else None  # as the reference implementation's two configurations have it
    matches, _ = assign(proposals.boxes, real, boxes, count, positive=0.5, negative=0.5, low_quality=low_quality)
    candidates, matches = with_targets(boxes, count, proposals.boxes, matches)
    picked = chosen or sample(matches, key, num=model.sampled_rois, max_positive=model.sampled_rois // 4)
    labels = roi_labels(targets.labels, matches, picked, model.num_classes)
    return _Second(picked, lax.stop_gradient(candidates[picked.indices]), matches[picked.indices], labels)


def _mask_loss(
    model: Detector,
    variables: Any,
    levels: list[jax.Array],
    sizes: Sizes,
    padded: jax.Array,
    targets: Targets,
    second: _Second,
) -> tuple[jax.Array, jax.Array]:
    rois, matches, labels, positive = (
        x[:, : model.sampled_rois // 4] for x in (second.rois, second.matches, second.labels, second.sample.positive)
    )  # positives come first
    own = jnp.minimum(labels, model.num_classes - 1)
    logits = _of_variables(model, variables, "mask_logits", levels, sizes, rois, positive, own)
    goals = jax.vmap(mask_targets)(targets.masks, padded, rois, matches - 1, second.sample.num_positive)
    return jax.vmap(mask_losses)(logits, goals, positive)


def _recall(targets: Targets, proposals: Proposals) -> tuple[jax.Array, jax.Array]:
    """(recalled, count): the ground truth of an image, and how much of it a proposal overlaps by half or more."""
    real = jnp.arange(len(targets.boxes)) < targets.count
    overlap = iou(targets.boxes.T[:, :, None], proposals.boxes.T[:, None], min_union=1e-6)
    found = real & (overlap.max(1) >= 0.5)
    return found.sum().astype(jnp.float32), real.sum().astype(jnp.float32)
