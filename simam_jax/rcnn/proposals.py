"""Boxes out of the network's outputs: the RPN's proposals and the final detections of one image."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.boxes import clip, decode
from simam_jax.ops.nms import nms
from simam_jax.ops.top_k import top_k

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
MIN_SCORE, MAX_IOU, MOST = 0.05, 0.5, 100  # of the final detections


class Proposals(NamedTuple):
    boxes: jax.Array  # (R, 4) float32 in pixels of the network's input, best first, zeros from `count` on
    scores: jax.Array  # (R,) float32
    count: jax.Array  # () int32


class Detections(NamedTuple):
    boxes: jax.Array  # (D, 4) float32 in pixels of the image as it was read, best first, zeros from `count` on
    scores: jax.Array  # (D,) float32
    labels: jax.Array  # (D,) int32 in 0..C - 1
    count: jax.Array  # () int32
    masks: jax.Array | None = None  # (D, 28, 28) float32 probabilities over the box, zeros from `count` on


@partial(jax.jit, static_argnames=("before_nms", "most", "threshold", "min_bbox_size"))
def propose(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    valid: Sequence[jax.Array],
    image_size: jax.Array,
    *,
    before_nms: int,
    most: int = 1000,
    threshold: float = 0.7,
    min_bbox_size: float = -1.0,
) -> Proposals:
    """The RPN's proposals: the best anchors of every level, decoded, cut to the image, and suppressed level by level.

    Args:
        logits, deltas, anchors, valid: (A,), (A, 4), (A, 4) and (A,) bool of each level, in the anchors' order.
        image_size: (2,) height and width of the resized image, without padding.
        before_nms: how many anchors of a level take part.
        most: how many proposals are returned at most.
        min_bbox_size: a box must be wider and higher than this: below 0 none is dropped, as in the reference
            implementation; 0 drops boxes without an area, as its successors do.
    """
    parts = []
    for level, (logit, delta, anchor, inside) in enumerate(zip(logits, deltas, anchors, valid, strict=True)):
        score = jnp.where(inside, jax.nn.sigmoid(logit.astype(jnp.float32)), -1)
        if score.shape[0] > before_nms:
            score, best = top_k(score, before_nms)
            delta, anchor = delta[best], anchor[best]
        box = clip(decode(anchor, delta.astype(jnp.float32), RPN_STDS), image_size)
        parts.append((box, score, jnp.full(score.shape, level)))
    boxes, scores, levels = lax.stop_gradient(tuple(jnp.concatenate(part) for part in zip(*parts, strict=True)))
    real = scores >= 0
    if min_bbox_size >= 0:
        real &= ((boxes[:, 2:] - boxes[:, :2]) > min_bbox_size).all(-1)
    indices, count = nms(boxes, scores, levels, real, threshold=threshold, most=most)
    found = _first(count, boxes[indices], scores[indices])
    return Proposals(found[0], found[1], count)


@partial(jax.jit, static_argnames=("score_threshold", "iou_threshold", "most"))
def detect(
    logits: jax.Array,
    deltas: jax.Array,
    rois: jax.Array,
    count: jax.Array,
    image_size: jax.Array,
    scale: jax.Array,
    *,
    score_threshold: float = MIN_SCORE,
    iou_threshold: float = MAX_IOU,
    most: int = MOST,
) -> Detections:
    """The final detections: every class above the threshold, suppressed class by class, the best `most`.

    Suppression runs on boxes that are already divided by `scale`.

    Args:
        logits: (R, C + 1), the last for background.
        deltas: (R, 4 C), one box for each class.
        rois: (R, 4), of which the first `count` are real.
        image_size: (2,) height and width of the resized image, without padding.
        scale: (4,) the resized image's size over the original's: width, height, width, height.
    """
    num_rois, num_classes = rois.shape[0], logits.shape[-1] - 1
    scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[:, :num_classes]
    real = (jnp.arange(num_rois) < count)[:, None] & (scores > jnp.float32(score_threshold))
    labels = jnp.broadcast_to(jnp.arange(num_classes, dtype=jnp.int32), scores.shape)

    deltas = deltas.astype(jnp.float32).reshape(num_rois, num_classes, 4)
    boxes = clip(decode(rois[:, None], deltas, BOX_STDS), image_size) / scale
    boxes, scores, labels, real = (
        x.reshape(-1, *x.shape[2:]) for x in lax.stop_gradient((boxes, scores, labels, real))
    )
    indices, count = nms(boxes, scores, labels, real, threshold=iou_threshold, most=most)
    found = _first(count, boxes[indices], scores[indices], labels[indices])
    return Detections(found[0], found[1], found[2], count)


def _first(count: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The arrays with zeros from row `count` on."""
    rows = jnp.arange(arrays[0].shape[0]) < count
    return [jnp.where(rows.reshape(-1, *[1] * (array.ndim - 1)), array, 0) for array in arrays]
