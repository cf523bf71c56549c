"""What windows two apart see, as whole arrays: from these Winograd's tiles and max pooling are put together."""

import jax
import jax.numpy as jnp
from jax import lax


def overlapping(x: jax.Array, axis: int) -> list[jax.Array]:
    """The elements 0 to 3 of the windows of four, two apart, along an axis of even length n: n / 2 - 1 windows.

    Split and sliced rather than strided: the transpose then joins and adds, without zeros in between.
    """
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (half.squeeze(axis + 1) for half in jnp.split(pairs, 2, axis + 1))
    last = even.shape[axis] - 1
    return [lax.slice_in_dim(half, start, start + last, axis=axis) for start in (0, 1) for half in (even, odd)]
