"""Pooling of maps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from simam_jax.ops.dispatch import choose
from simam_jax.ops.moments import at_least_float32


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling at stride 2, (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), C); the border never wins.

    Of equal values the first in reading order has the gradient, as in PyTorch.
    """
    return choose(x, by_windows, cpu=_by_slices)(x)


@max_pool.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # XLA:CPU looks for the winner with the coordinates of every element beside it.
    form = choose(primals[0], by_windows, cpu=_by_axes)
    return max_pool(*primals), jax.jvp(form, primals, tangents)[1]


def by_windows(x: jax.Array) -> jax.Array:
    """The definition."""
    padding: Any = ((1, 1), (1, 1))  # Flax's annotation knows the named paddings only
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


def _by_slices(x: jax.Array) -> jax.Array:
    """The same as maxima of three slices of rows and then of columns, which XLA:CPU fuses with what computes x."""
    for axis in (1, 2):
        even, odd = (lax.slice_in_dim(x, first, None, 2, axis) for first in (0, 1))
        before, after = ([(0, 0, 0)] * x.ndim for _ in range(2))
        before[axis], after[axis] = (
            (1, even.shape[axis] - odd.shape[axis] - 1, 0),
            (0, even.shape[axis] - odd.shape[axis], 0),
        )
        lowest = jnp.array(-jnp.inf, x.dtype)
        x = jnp.maximum(jnp.maximum(lax.pad(odd, lowest, before), even), lax.pad(odd, lowest, after))
    return x


def _by_axes(x: jax.Array) -> jax.Array:
    """The same, first within rows and then over them, as selects between whole arrays, whose gradient is the first's."""
    return _pool_axis(_pool_axis(x, axis=2), axis=1)


def _pool_axis(x: jax.Array, axis: int) -> jax.Array:
    border = [(0, 0)] * x.ndim
    border[axis] = (1, 1 + x.shape[axis] % 2)
    best, *others, _ = windows_of_four(jnp.pad(x, border, constant_values=-jnp.inf), axis)
    for other in others:
        best = jnp.where(other > best, other, best)
    return best


def windows_of_four(x: jax.Array, axis: int) -> list[jax.Array]:
    """The elements 0 to 3 of the windows of four, two apart, along an axis of even length n: n / 2 - 1 windows.

    Split and sliced rather than strided: the transpose then joins and adds, without zeros in between.
    """
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    even, odd = (half.squeeze(axis + 1) for half in jnp.split(pairs, 2, axis + 1))
    last = even.shape[axis] - 1
    return [lax.slice_in_dim(half, start, start + last, axis=axis) for start in (0, 1) for half in (even, odd)]


def average_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 average pooling at stride 2, (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), C).

    The last window of an odd edge averages what is there.
    """
    padding: Any = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
    return nn.avg_pool(x, (2, 2), strides=(2, 2), padding=padding, count_include_pad=False)


def global_average(x: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, C), in float32 at least."""
    return x.astype(at_least_float32(x.dtype)).mean((1, 2))
