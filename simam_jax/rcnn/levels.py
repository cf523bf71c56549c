"""Which pyramid level serves a box (Lin et al., "Feature Pyramid Networks", 2017, Eq. 1)."""

import jax
import jax.numpy as jnp
import numpy as np

from simam_jax.ops.boxes import area

NUM_LEVELS = 4  # P2 to P5
_FINEST = 56  # boxes of a side below twice this come from P2


def _first_side(level: int) -> np.float32:
    """The smallest float32 side for which floor(log2(side / 56 + 1e-6)) is `level` in float32.

    Found beforehand, because log2 and division by a constant are rounded otherwise on some platforms.
    """

    def reached(side: np.float32) -> bool:
        return np.log2(side / np.float32(_FINEST) + np.float32(1e-6)) >= level

    side = np.float32(_FINEST * 2**level)
    while not reached(side):
        side = np.nextafter(side, np.float32(np.inf))
    while reached(np.nextafter(side, np.float32(0))):
        side = np.nextafter(side, np.float32(0))
    return side


_FIRST_SIDES = np.array([_first_side(level) for level in range(1, NUM_LEVELS)])


def level_of(boxes: jax.Array) -> jax.Array:
    """(...) int32 in 0..3, P2 to P5, for boxes (..., 4) in pixels of the network's input."""
    side = jnp.sqrt(area(boxes))
    return (side[..., None] >= _FIRST_SIDES).sum(-1, dtype=jnp.int32)
