"""Mean and variance in one pass over memory, as each platform computes them fastest, however far the mean is from zero."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

Moments = tuple[jax.Array, jax.Array]


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower: the dtype of parameters and statistics."""
    return jnp.promote_types(dtype, jnp.float32)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def moments(x: jax.Array, shift: jax.Array, axes: tuple[int, ...]) -> Moments:
    """The mean of x - shift and the variance of x (of the whole population) over `axes`, which are kept with size 1.

    Args:
        x: floating, of any shape; the moments are float32 (float64 for float64).
        shift: of the moments' dtype and a shape that broadcasts to theirs; near x's mean, where that is known.
    """
    one_pass, on_cpu = partial(_one_pass, axes=axes), partial(_on_cpu, axes=axes)
    if any(map(is_symbolic_dim, x.shape)):  # jax.export's targets know no conditionals
        return one_pass(x, shift)
    return lax.platform_dependent(x, shift, cpu=on_cpu, default=one_pass)


@moments.defjvp
def _(axes: tuple[int, ...], primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]):
    (x, shift), (dx, dshift) = primals, tangents
    mean, var = moments(x, shift, axes)
    x, dx = x.astype(mean.dtype), dx.astype(mean.dtype)
    dmean = dx.mean(axes, keepdims=True)
    return (mean, var), (dmean - dshift, 2 * ((x * dx).mean(axes, keepdims=True) - (shift + mean) * dmean))


def _one_pass(x: jax.Array, shift: jax.Array, axes: tuple[int, ...]) -> Moments:
    """From the sums of x - shift and of its square: the less the shift leaves of the mean, the less they cancel."""
    shifted = x.astype(shift.dtype) - shift
    mean, square = (y.mean(axes, keepdims=True) for y in (shifted, jnp.square(shifted)))
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def _on_cpu(x: jax.Array, shift: jax.Array, axes: tuple[int, ...]) -> Moments:
    """From the sums of x and of its square, and only where these cancel in a channel from x - shift, in two passes.

    XLA for CPUs writes x - shift to memory and reads it twice, but sums x and its square without writing anything.
    """
    wide = x.astype(shift.dtype)
    mean, square = (y.mean(axes, keepdims=True) for y in (wide, jnp.square(wide)))
    var = square - jnp.square(mean)

    def two_passes(wide: jax.Array, *_: jax.Array) -> Moments:
        mean = (wide - shift).mean(axes, keepdims=True)
        return mean, jnp.square(wide - shift - mean).mean(axes, keepdims=True)

    return lax.cond(mean_cancels(mean, var), two_passes, lambda _, *of_x: of_x, wide, mean - shift, var)


def mean_cancels(mean: jax.Array, var: jax.Array) -> jax.Array:
    """Whether a mean is so large against the deviation that sums which it dominates lose two digits of their seven."""
    return jnp.any(jnp.square(mean) > 2**6 * var)
