"""Pooling; max pooling and its gradient as each platform computes them fastest."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.export import is_symbolic_dim

from simam_jax.layers import at_least_float32
from simam_jax.ops.windows import overlapping


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling at stride 2, (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), C); the border never wins.

    Of equal values the first in reading order has the gradient, as in PyTorch.
    """
    if any(map(is_symbolic_dim, x.shape)):  # jax.export's targets know no conditionals
        return _by_windows(x)
    return lax.platform_dependent(x, cpu=_by_slices, default=_by_windows)


@max_pool.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    def tangent(pool):
        return lambda x, dx: jax.jvp(pool, (x,), (dx,))[1]

    # XLA for CPUs looks for the winner with the coordinates of every element beside it.
    on_cpu, default = tangent(_by_axes), tangent(_by_windows)
    return max_pool(*primals), lax.platform_dependent(*primals, *tangents, cpu=on_cpu, default=default)


def _by_windows(x: jax.Array) -> jax.Array:
    padding: Any = ((1, 1), (1, 1))  # Flax's annotation knows the named paddings only
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


def _by_slices(x: jax.Array) -> jax.Array:
    """The same as maxima of whole arrays, first over rows: XLA for CPUs fuses these with what computes x."""
    return _largest_of_three(_largest_of_three(x, axis=1), axis=2)


def _largest_of_three(x: jax.Array, axis: int) -> jax.Array:
    even, odd = (lax.slice_in_dim(x, first, None, 2, axis) for first in (0, 1))
    before, after = ([(0, 0, 0)] * x.ndim for _ in range(2))
    before[axis] = (1, x.shape[axis] % 2 - 1, 0)
    after[axis] = (0, x.shape[axis] % 2, 0)
    nothing = jnp.array(-jnp.inf, x.dtype)
    return jnp.maximum(jnp.maximum(lax.pad(odd, nothing, before), even), lax.pad(odd, nothing, after))


def _by_axes(x: jax.Array) -> jax.Array:
    """The same, first within rows and then over them, as choices between whole arrays, whose gradient is the first's."""
    return _pool_axis(_pool_axis(x, axis=2), axis=1)


def _pool_axis(x: jax.Array, axis: int) -> jax.Array:
    border = [(0, 0)] * x.ndim
    border[axis] = (1, 1 + x.shape[axis] % 2)
    best, *others, _ = overlapping(jnp.pad(x, border, constant_values=-jnp.inf), axis)
    for other in others:
        best = jnp.where(other > best, other, best)
    return best


def halve(x: jax.Array) -> jax.Array:
    """2x2 average pooling at stride 2, (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), C).

    The last window of an odd edge averages what is there.
    """
    padding: Any = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
    return nn.avg_pool(x, (2, 2), strides=(2, 2), padding=padding, count_include_pad=False)


def global_average(x: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, C), in float32 at least."""
    return x.astype(at_least_float32(x.dtype)).mean((1, 2))
