"""Greedy non-maximum suppression in blocks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.boxes import exact_product, iou
from simam_jax.ops.dispatch import varying_as
from simam_jax.ops.top_k import top_k


class Form(NamedTuple):
    """How the work is cut: so many boxes are sorted at a time, and so many of them suppressed at a time."""

    segment: int
    block: int  # divides the segment


FORM = Form(segment=2048, block=256)  # measured on CPUs alone
_MIN_UNION = 1.2e-38  # the smallest normal float32: changes nothing but 0 / 0


class _State(NamedTuple):
    left: jax.Array  # (N,) scores of the boxes that were not taken yet, -inf for the others
    kept: jax.Array  # (4, most + blocks) boxes that were kept, zeros after them
    indices: jax.Array  # (most + blocks,) their places among the inputs
    count: jax.Array


@partial(jax.jit, static_argnames=("threshold", "most", "form"))
def nms(
    boxes: jax.Array,
    scores: jax.Array,
    groups: jax.Array,
    valid: jax.Array,
    *,
    threshold: float,
    most: int,
    form: Form = FORM,
) -> tuple[jax.Array, jax.Array]:
    """The boxes that no better box of their group overlaps by more than `threshold`, best first.

    Groups are kept apart as in the reference implementation: each is moved by its number times the largest coordinate
    plus 1. Equal scores keep the order of the input. Nothing here has a gradient.

    The boxes are taken in blocks, by score. A block is first cut by the boxes kept before it. Then, within the
    block, a box lives if no living better box suppresses it: this is repeated until nothing changes, and its only fixed
    point is what the greedy loop keeps. So a few wide steps replace one step for each box. Boxes are sorted in
    segments, because `most` are often found among the first.

    Args:
        boxes: (N, 4) float32 x1, y1, x2, y2; not negative, or groups may touch.
        scores: (N,) float32.
        groups: (N,) integers >= 0: levels or classes.
        valid: (N,) bool: False for padding.
        threshold: the IoU, compared in float32, above which the worse box goes.
        most: how many boxes to return at most.
        form: how the work is cut; changes nothing but the speed.

    Returns:
        indices: (most,) int32 into the input, 0 from `count` on.
        count: () int32.
    """
    boxes, scores = lax.stop_gradient((boxes, scores))
    segment, size = form
    padding = max(segment - boxes.shape[0], 0)
    largest = jnp.max(jnp.where(valid[:, None], boxes, -jnp.inf), initial=-jnp.inf)
    offsets = exact_product(groups.astype(boxes.dtype), jnp.where(valid.any(), largest, 0) + 1)
    moved = jnp.pad(boxes + offsets[:, None], ((0, padding), (0, 0)))
    scores = jnp.pad(jnp.where(valid, scores, -jnp.inf), (0, padding), constant_values=-jnp.inf)

    def unfinished(state: _State) -> jax.Array:
        return (state.count < most) & (state.left > -jnp.inf).any()

    def next_segment(state: _State) -> _State:
        best, places = top_k(state.left, segment)
        num = (best > -jnp.inf).sum(dtype=jnp.int32)
        ordered = jnp.where(best > -jnp.inf, moved[places].T, 0)

        def goes_on(progress: tuple[jax.Array, ...]) -> jax.Array:
            start, _, _, count = progress
            return (start < num) & (count < most)

        def next_block(progress: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start, kept, indices, count = progress
            block = lax.dynamic_slice_in_dim(ordered, start, size, axis=1)

            def cut(chunk: jax.Array, alive: jax.Array) -> jax.Array:
                better = lax.dynamic_slice_in_dim(kept, chunk * size, size, axis=1)
                return alive & (_overlap(block, better).max(1) <= jnp.float32(threshold))

            alive = start + jnp.arange(size) < num
            alive = lax.fori_loop(0, -(-count // size), cut, varying_as(alive, block, kept, count))
            alive = _greedy(block, alive, threshold)

            # The living first; the next block overwrites the zeros after them.
            first = jnp.argsort(~alive, stable=True)
            own = lax.dynamic_slice_in_dim(places, start, size)
            return (
                start + size,
                lax.dynamic_update_slice_in_dim(kept, jnp.where(alive, block, 0)[:, first], count, axis=1),
                lax.dynamic_update_slice_in_dim(indices, jnp.where(alive, own, 0)[first], count, axis=0),
                count + alive.sum(dtype=jnp.int32),
            )

        left = state.left.at[places].set(-jnp.inf)
        found = lax.while_loop(goes_on, next_block, varying_as((jnp.int32(0), *state[1:]), scores, moved))
        return _State(left, *found[1:])

    # `kept` is read in whole blocks, of which the last may reach beyond the boxes that were written.
    room = -(-most // size) * size + size
    state = _State(scores, jnp.zeros((4, room), boxes.dtype), jnp.zeros(room, jnp.int32), jnp.int32(0))
    state = lax.while_loop(unfinished, next_segment, varying_as(state, scores, moved))
    count = jnp.minimum(state.count, most)
    return jnp.where(jnp.arange(most) < count, state.indices[:most], 0), count


def _overlap(worse: jax.Array, better: jax.Array) -> jax.Array:
    """(len(worse), len(better)) IoU. XLA for CPUs vectorises its maximum, and a test of it for any box would be slower."""
    return iou(worse[:, :, None], better[:, None, :], min_union=_MIN_UNION)


def _greedy(block: jax.Array, alive: jax.Array, threshold: float) -> jax.Array:
    index = jnp.arange(block.shape[1])
    overlap = jnp.where(index < index[:, None], _overlap(block, block), 0)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, now = state
        return now, alive & (jnp.where(now, overlap, 0).max(1) <= jnp.float32(threshold))

    start = varying_as((jnp.zeros_like(alive), alive), block, alive)
    return lax.while_loop(lambda state: (state[0] != state[1]).any(), step, start)[1]
