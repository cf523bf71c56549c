"""Greedy non-maximum suppression in blocks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.boxes import exact_product, iou

_BLOCK = 256
_MIN_UNION = 1.2e-38  # the smallest normal float32: changes nothing but 0 / 0


class _State(NamedTuple):
    block: jax.Array  # the next one
    kept: jax.Array  # (4, most + _BLOCK) boxes that were kept, zeros after them
    indices: jax.Array  # (most + _BLOCK,) their places among the inputs
    count: jax.Array


@partial(jax.jit, static_argnames=("threshold", "most"))
def nms(
    boxes: jax.Array, scores: jax.Array, groups: jax.Array, valid: jax.Array, *, threshold: float, most: int
) -> tuple[jax.Array, jax.Array]:
    """The boxes that no better box of their group overlaps by more than `threshold`, best first.

    Groups are kept apart as in the reference implementation: each is moved by its number times the largest coordinate
    plus 1. Equal scores keep the order of the input. Nothing here has a gradient.

    The boxes are taken in blocks of 256, by score. A block is first cut by the boxes kept before it. Then, within the
    block, a box lives if no living better box suppresses it: this is repeated until nothing changes, and its only fixed
    point is what the greedy loop keeps. So a few wide steps replace one step for each box.

    Args:
        boxes: (N, 4) float32 x1, y1, x2, y2; not negative, or groups may touch.
        scores: (N,) float32.
        groups: (N,) integers >= 0: levels or classes.
        valid: (N,) bool: False for padding.
        threshold: the IoU, compared in float32, above which the worse box goes.
        most: how many boxes to return at most.

    Returns:
        indices: (most,) int32 into the input, 0 from `count` on.
        count: () int32.
    """
    boxes, scores = lax.stop_gradient((boxes, scores))
    size = boxes.shape[0]
    blocks = -(-max(size, 1) // _BLOCK)
    padding = blocks * _BLOCK - size

    largest = jnp.max(jnp.where(valid[:, None], boxes, -jnp.inf), initial=-jnp.inf)
    offsets = exact_product(groups.astype(boxes.dtype), jnp.where(valid.any(), largest, 0) + 1)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True).astype(jnp.int32)
    ordered = jnp.where(valid[:, None], boxes + offsets[:, None], 0)[order].T
    ordered = jnp.pad(ordered, ((0, 0), (0, padding)))
    order = jnp.pad(order, (0, padding))
    num_valid = valid.sum(dtype=jnp.int32)

    def unfinished(state: _State) -> jax.Array:
        return (state.block * _BLOCK < num_valid) & (state.count < most)

    def next_block(state: _State) -> _State:
        start = state.block * _BLOCK
        block = lax.dynamic_slice_in_dim(ordered, start, _BLOCK, axis=1)
        places = lax.dynamic_slice_in_dim(order, start, _BLOCK)

        def cut(chunk: jax.Array, alive: jax.Array) -> jax.Array:
            better = lax.dynamic_slice_in_dim(state.kept, chunk * _BLOCK, _BLOCK, axis=1)
            return alive & ~_overlaps(better, block, threshold).any(0)

        alive = start + jnp.arange(_BLOCK) < num_valid
        alive = lax.fori_loop(0, -(-state.count // _BLOCK), cut, alive)
        alive = _greedy(block, alive, threshold)

        # The living first; the next block overwrites the zeros after them.
        first = jnp.argsort(~alive, stable=True)
        return _State(
            state.block + 1,
            lax.dynamic_update_slice_in_dim(state.kept, jnp.where(alive, block, 0)[:, first], state.count, axis=1),
            lax.dynamic_update_slice_in_dim(state.indices, jnp.where(alive, places, 0)[first], state.count, axis=0),
            state.count + alive.sum(dtype=jnp.int32),
        )

    # `kept` is read in whole blocks, of which the last may reach beyond the boxes that were written.
    room = -(-most // _BLOCK) * _BLOCK + _BLOCK
    zero = jnp.zeros((), jnp.int32)
    state = _State(zero, jnp.zeros((4, room), boxes.dtype), jnp.zeros(room, jnp.int32), zero)
    state = lax.while_loop(unfinished, next_block, state)
    return state.indices[:most], jnp.minimum(state.count, most)


def _overlaps(better: jax.Array, worse: jax.Array, threshold: float) -> jax.Array:
    """(len(better), len(worse)) bool: the IoU exceeds the threshold."""
    return iou(better[:, :, None], worse[:, None, :], min_union=_MIN_UNION) > jnp.float32(threshold)


def _greedy(block: jax.Array, alive: jax.Array, threshold: float) -> jax.Array:
    index = jnp.arange(_BLOCK)
    suppresses = _overlaps(block, block, threshold) & (index[:, None] < index)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, now = state
        return now, alive & ~(suppresses & now[:, None]).any(0)

    return lax.while_loop(lambda state: (state[0] != state[1]).any(), step, (jnp.zeros_like(alive), alive))[1]
