"""Boxes: float32 x1, y1, x2, y2 in pixels, with x2 - x1 as the width.

The intersection over union (IoU) of everything that JAX computes. Its decisions against a threshold equal those of float32
arithmetic operation by operation, on every platform and under jit: see `exact_product` and `exact_quotient`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = abs(math.log(16 / 1000))  # the log of the factor, 62.5, by which a box grows or shrinks at most


def exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b, rounded to the dtype before anything else happens to it; above 3.4e38 it is 3.4e38.

    XLA fuses a product into the sum that reads it and rounds once instead of twice, also across optimization_barrier,
    reduce_precision and bitcasts. The decisions at an IoU threshold then differ, and two fusions that compute the same
    expression disagree. XLA does not fuse across a minimum.
    """
    return jnp.minimum(a * b, 3.4e38)


def exact_quotient(a: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """a / divisor, rounded once.

    XLA multiplies by the rounded reciprocal instead if it sees that the divisor is a constant, or one for many elements.
    """
    return a / jnp.where(a == a, jnp.asarray(divisor, a.dtype), 1)


def area(boxes: jax.Array) -> jax.Array:
    """The areas (...) of boxes (..., 4), in square pixels."""
    return exact_product(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])


def iou(a: jax.Array, b: jax.Array, *, min_union: float) -> jax.Array:
    """Intersection over union of boxes whose coordinates are the FIRST axis, which vectorises over the boxes.

    Args:
        a, b: (4, ...) float32; the axes after the first broadcast.
        min_union: the union counts as at least this, so that two empty boxes give 0 instead of NaN.

    Returns:
        (...) float32 in [0, 1].
    """
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width = jnp.maximum(jnp.minimum(ax2, bx2) - jnp.maximum(ax1, bx1), 0)
    height = jnp.maximum(jnp.minimum(ay2, by2) - jnp.maximum(ay1, by1), 0)
    intersection = exact_product(width, height)
    areas = exact_product(ax2 - ax1, ay2 - ay1) + exact_product(bx2 - bx1, by2 - by1)
    return intersection / jnp.maximum(areas - intersection, min_union)


def encode(boxes: jax.Array, targets: jax.Array, stds: Sequence[float]) -> jax.Array:
    """Deltas (..., 4) dx, dy, dw, dh, in units of `stds`, that `decode` turns from boxes (..., 4) into targets (..., 4).

    Girshick et al., "Rich feature hierarchies", 2014, appendix C. Boxes and targets must have an area: rows without one
    are infinite or NaN, and callers mask them.
    """
    (x, y, w, h), (tx, ty, tw, th) = _centres(boxes), _centres(targets)
    deltas = jnp.stack([(tx - x) / w, (ty - y) / h, jnp.log(tw / w), jnp.log(th / h)], axis=-1)
    return deltas / jnp.asarray(stds, deltas.dtype)


def decode(boxes: jax.Array, deltas: jax.Array, stds: Sequence[float]) -> jax.Array:
    """Boxes (..., 4) moved and scaled by deltas (..., 4) in units of `stds`; the leading axes broadcast.

    dw and dh are limited to +-log(1000 / 16) after the multiplication by `stds`, dx and dy are not.
    """
    dx, dy, dw, dh = jnp.moveaxis(exact_product(deltas, jnp.asarray(stds, deltas.dtype)), -1, 0)
    x, y, w, h = _centres(boxes)
    x, y = x + exact_product(w, dx), y + exact_product(h, dy)
    w = exact_product(w, jnp.exp(jnp.clip(dw, -MAX_LOG_RATIO, MAX_LOG_RATIO)))
    h = exact_product(h, jnp.exp(jnp.clip(dh, -MAX_LOG_RATIO, MAX_LOG_RATIO)))
    return jnp.stack([x - w * 0.5, y - h * 0.5, x + w * 0.5, y + h * 0.5], axis=-1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes (..., 4) cut to an image of size (2,): height, width."""
    height, width = jnp.asarray(size, boxes.dtype)
    return jnp.clip(boxes, 0, jnp.stack([width, height, width, height]))


def _centres(boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    return (x1 + x2) * 0.5, (y1 + y2) * 0.5, x2 - x1, y2 - y1
