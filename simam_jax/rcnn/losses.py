"""The losses of one image, as sums, and what the reference implementation divides them by.

A loss is a sum over the images of a batch, divided by the sum of a count over the same images, so each function returns
`(sums..., count)`: callers add both up over the batch (and over devices) before they divide. Matches and samples are
arguments, so that a stored choice can be replayed. Rows of padding are masked before every logarithm and absolute value.
"""

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.boxes import encode
from simam_jax.rcnn.proposals import BOX_STDS, RPN_STDS
from simam_jax.rcnn.sample import Sample


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Elementwise, for logits and targets in [0, 1] of one shape."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(...) for logits (..., C) and labels (...) int32."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), labels[..., None], axis=-1)[..., 0]


def l1(predicted: jax.Array, targets: jax.Array, rows: jax.Array) -> jax.Array:
    """The sum of absolute differences (..., 4) over the chosen rows (...)."""
    return jnp.abs(jnp.where(rows[..., None], predicted - targets, 0)).sum()


def matched_deltas(
    chosen: jax.Array, targets: jax.Array, matches: jax.Array, rows: jax.Array, stds: tuple[float, ...]
) -> jax.Array:
    """(S, 4) deltas from chosen boxes (S, 4) to the ground truth (G, 4) that each matches (S,); zeros off `rows` (S,)."""
    if not targets.shape[0]:
        return jnp.zeros_like(chosen)
    matched = targets[jnp.clip(matches - 1, 0, targets.shape[0] - 1)]
    return lax.stop_gradient(jnp.where(rows[:, None], encode(chosen, matched, stds), 0))


def rpn_losses(
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    targets: jax.Array,
    matches: jax.Array,
    sample: Sample,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(objectness, box, count) of the RPN, float32, over its sampled anchors.

    The count is max(positives, 1) + max(negatives, 1), as in the reference implementation.

    Args:
        logits, deltas, anchors: (A,), (A, 4), (A, 4), all levels in the anchors' order.
        targets: (G, 4) ground truth.
        matches: (A,) of `assign`.
        sample: of these anchors.
    """
    chosen = sample.indices
    logit = logits[chosen].astype(jnp.float32)
    entropy = binary_cross_entropy(logit, sample.positive.astype(jnp.float32))
    goal = matched_deltas(anchors[chosen], targets, matches[chosen], sample.positive, RPN_STDS)
    box = l1(deltas[chosen].astype(jnp.float32), goal, sample.positive)
    num_negative = sample.count - sample.num_positive
    count = jnp.maximum(sample.num_positive, 1) + jnp.maximum(num_negative, 1)
    return jnp.where(sample.valid, entropy, 0).sum(), box, count.astype(jnp.float32)


def roi_labels(labels: jax.Array, matches: jax.Array, sample: Sample, num_classes: int) -> jax.Array:
    """(S,) int32: the class of each sampled roi, `num_classes` for background.

    Args:
        labels: (G,) classes of the ground truth.
        matches: (R,) of `sample.with_targets`.
    """
    if not labels.shape[0]:
        return jnp.full(sample.indices.shape, num_classes)
    matched = labels[jnp.clip(matches[sample.indices] - 1, 0, labels.shape[0] - 1)]
    return jnp.where(sample.positive, matched, num_classes)


def box_losses(
    logits: jax.Array,
    deltas: jax.Array,
    rois: jax.Array,
    targets: jax.Array,
    labels: jax.Array,
    matches: jax.Array,
    sample: Sample,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(class, box, count) of the second stage, float32. The count is the number of sampled rois.

    Args:
        logits, deltas: (S, C + 1), (S, 4 C), for the sampled rois; the last class is background.
        rois: (S, 4), the sampled rois.
        targets: (G, 4) ground truth.
        labels: (S,) of `roi_labels`.
        matches: (S,) int32, the match of each sampled roi.
        sample: what these rois are.
    """
    num_rois, num_classes = logits.shape[0], logits.shape[-1] - 1
    entropy = jnp.where(sample.valid, cross_entropy(logits.astype(jnp.float32), labels), 0).sum()
    of_class = deltas.reshape(num_rois, num_classes, 4)
    own = jnp.minimum(labels, num_classes - 1)[:, None, None]
    predicted = jnp.take_along_axis(of_class, own, axis=1)[:, 0].astype(jnp.float32)
    goal = matched_deltas(rois, targets, matches, sample.positive, BOX_STDS)
    return entropy, l1(predicted, goal, sample.positive), sample.count.astype(jnp.float32)


def mask_losses(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mask, count) over the real positives, float32. The count is their number; each adds the mean over its pixels.

    Args:
        logits: (P, 28, 28), of the class of each.
        targets: (P, 28, 28) bool of `masks.mask_targets`.
        valid: (P,) bool.
    """
    entropy = binary_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32)).mean((1, 2))
    return jnp.where(valid, entropy, 0).sum(), valid.sum().astype(jnp.float32)
