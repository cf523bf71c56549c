"""Mean and variance in one pass over memory, however far the mean is from zero."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


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
        shift: of the moments' dtype and a shape that broadcasts to theirs; near x's mean, where that is known: the less it
            leaves of the mean, the less the sums of x - shift and of its square cancel.
    """
    shifted = x.astype(shift.dtype) - shift
    mean, square = (y.mean(axes, keepdims=True) for y in (shifted, jnp.square(shifted)))
    return Moments(mean, jnp.maximum(square - jnp.square(mean), 0))


@moments.defjvp
def _(axes: tuple[int, ...], primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]):
    (x, shift), (dx, dshift) = primals, tangents
    mean, var = moments(x, shift, axes)
    x, dx = x.astype(mean.dtype), dx.astype(mean.dtype)
    dmean = dx.mean(axes, keepdims=True)
    dvar = 2 * ((x * dx).mean(axes, keepdims=True) - (shift + mean) * dmean)
    return Moments(mean, var), Moments(dmean - dshift, dvar)
