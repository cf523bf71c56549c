"""Anchors: the boxes at every place of the five maps from which the RPN starts.

The order, everywhere: levels P2 to P6; within a level rows, then columns, then the three ratios.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height / width
SCALE = 8  # an anchor's side in strides

Sizes = Sequence[tuple[int, int]]  # height and width of each map


def base_anchors(stride: int) -> np.ndarray:
    """(3, 4) float32: the anchors of the first place, centred at 0, 0."""
    height = np.sqrt(np.asarray(RATIOS, np.float32))
    width = 1 / height
    half = np.stack([width, height], axis=1) * np.float32(stride) * np.float32(SCALE) * np.float32(0.5)
    return np.concatenate([-half, half], axis=1)


def grid_anchors(size: tuple[int, int], stride: int) -> jax.Array:
    """(H * W * 3, 4) float32 anchors of a map of `size`."""
    y, x = (jnp.arange(n, dtype=jnp.float32) * stride for n in size)
    x, y = jnp.meshgrid(x, y)
    shifts = jnp.stack([x, y, x, y], axis=-1)[:, :, None]
    return (shifts + base_anchors(stride)).reshape(-1, 4)


def all_anchors(sizes: Sizes) -> list[jax.Array]:
    """The anchors of every level, for maps of `sizes` with the strides 4 to 64."""
    return [grid_anchors(size, stride) for size, stride in zip(sizes, STRIDES, strict=True)]


def valid_anchors(sizes: Sizes, extent: jax.Array) -> list[jax.Array]:
    """(H * W * 3,) bool for every level: the anchor's place lies within an extent (2,), height and width in pixels."""
    flags = []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        rows, columns = -(-jnp.asarray(extent) // stride)
        inside = (jnp.arange(height)[:, None] < rows) & (jnp.arange(width) < columns)
        flags.append(jnp.repeat(inside.reshape(-1), len(RATIOS)))
    return flags
