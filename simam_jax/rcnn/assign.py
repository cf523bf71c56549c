"""Assignment: which candidate box learns which ground truth."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.boxes import iou
from simam_jax.ops.dispatch import varying_as

IGNORED = -1
NEGATIVE = 0


@partial(jax.jit, static_argnames=("positive", "negative", "low_quality"))
def assign(
    candidates: jax.Array,
    valid: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    *,
    positive: float,
    negative: float,
    low_quality: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The ground truth of each candidate by IoU (Ren et al., "Faster R-CNN", 2015, section 3.1.2).

    A candidate is matched to the ground truth that it overlaps most, the first of equals, if their IoU is at least
    `positive`; it is a negative if that IoU is below `negative`. With `low_quality` the candidates that overlap a ground
    truth most are matched to it too, if their IoU is at least `low_quality`; the last ground truth wins. One pass over the
    candidates for each real ground truth: no matrix.

    Args:
        candidates: (A, 4) float32 anchors or proposals.
        valid: (A,) bool: False for padding, which is ignored.
        targets: (G, 4) float32 ground truth; crowd boxes must not be among them.
        count: () int: how many of them are real.
        positive, negative: IoU, compared in float32.
        low_quality: the smallest IoU of a low-quality match, or None for none.

    Returns:
        matches: (A,) int32: k > 0 for ground truth k - 1, 0 negative, -1 ignored.
        best: (A,) float32, the largest IoU, -1 for padding.
    """
    candidates, targets = lax.stop_gradient((candidates, targets))
    size = candidates.shape[0]
    coordinates = candidates.T
    if not targets.shape[0]:
        targets = jnp.zeros((1, 4), candidates.dtype)  # never read: the loop below has no turns, but it is traced

    def one_target(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, first, last = state
        overlap = jnp.where(valid, iou(coordinates, targets[i][:, None], min_union=1e-6), -1)
        first = jnp.where(overlap > best, i + 1, first)
        if low_quality is not None:
            largest = overlap.max(initial=-1)
            last = jnp.where((overlap == largest) & (largest >= jnp.float32(low_quality)), i + 1, last)
        return jnp.maximum(best, overlap), first, last

    start = jnp.where(valid, jnp.float32(0), -1), jnp.ones(size, jnp.int32), jnp.zeros(size, jnp.int32)
    start = varying_as(start, candidates, valid, targets, count)
    best, first, last = lax.fori_loop(0, jnp.asarray(count, jnp.int32), one_target, start)
    matches = jnp.where(best < jnp.float32(negative), NEGATIVE, IGNORED)
    matches = jnp.where(best >= jnp.float32(positive), first, matches)
    matches = jnp.where(last > 0, last, matches)
    return jnp.where(valid, matches, IGNORED), best
