"""Mean and variance in one pass over memory, however far the mean is from zero."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.dispatch import choose


class Moments(NamedTuple):
    """A mean and a variance (of the whole population), float32 or wider."""

    mean: jax.Array
    var: jax.Array


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower: the dtype of parameters and statistics."""
    return jnp.promote_types(dtype, jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def moments(x: jax.Array, shift: jax.Array, axes: tuple[int, ...]) -> Moments:
    """The mean of x - shift and the variance of x over `axes`, which are kept with size 1.

    Args:
        x: floating, of any shape; the moments are float32 (float64 for float64).
        shift: of the moments' dtype and a shape that broadcasts to theirs; near x's mean, where that is known.
    """
    return choose(x, _of_shifted, cpu=_of_unshifted)(x, shift, axes)


@moments.defjvp
def _(axes: tuple[int, ...], primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]):
    (x, shift), (dx, dshift) = primals, tangents
    mean, var = moments(x, shift, axes)
    x, dx = x.astype(mean.dtype), dx.astype(mean.dtype)
    dmean = dx.mean(axes, keepdims=True)
    dvar = 2 * ((x * dx).mean(axes, keepdims=True) - (shift + mean) * dmean)
    return Moments(mean, var), Moments(dmean - dshift, dvar)


def _of_shifted(x: jax.Array, shift: jax.Array, axes: tuple[int, ...]) -> Moments:
    """From the sums of x - shift and of its square: the less the shift leaves of the mean, the less they cancel."""
    shifted = x.astype(shift.dtype) - shift
    mean, square = (y.mean(axes, keepdims=True) for y in (shifted, jnp.square(shifted)))
    return Moments(mean, jnp.maximum(square - jnp.square(mean), 0))


def _of_unshifted(x: jax.Array, shift: jax.Array, axes: tuple[int, ...]) -> Moments:
    """From the sums of x and of its square; in two passes over x - shift where these cancel in a channel.

    XLA:CPU writes x - shift to memory and reads it twice, and sums x and its square without writing anything.
    """
    wide = x.astype(shift.dtype)
    mean, square = (y.mean(axes, keepdims=True) for y in (wide, jnp.square(wide)))
    var = square - jnp.square(mean)

    def two_passes(wide: jax.Array, *_: jax.Array) -> Moments:
        mean = (wide - shift).mean(axes, keepdims=True)
        return Moments(mean, jnp.square(wide - shift - mean).mean(axes, keepdims=True))

    return lax.cond(mean_cancels(mean, var), two_passes, lambda _, *of_x: Moments(*of_x), wide, mean - shift, var)


def mean_cancels(mean: jax.Array, var: jax.Array) -> jax.Array:
    """Whether a mean is so large against the deviation that sums which it dominates lose two digits of their seven."""
    return jnp.any(jnp.square(mean) > 2**6 * var)
