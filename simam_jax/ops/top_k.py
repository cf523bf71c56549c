"""The largest numbers of a row."""

import jax
from jax import lax

from simam_jax.ops.dispatch import choose


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of x (..., N), high first, and their places, int32; of equal numbers the first come first.

    Args:
        x: floating, without NaN.
        k: at most N.
    """
    return choose(x, lax.top_k, tensorflow=_by_sorting)(x, k)


def _by_sorting(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The XLA in TensorFlow 2.21 cannot read the operation that newer JAX makes of `lax.top_k`."""
    places = lax.broadcasted_iota("int32", x.shape, x.ndim - 1)
    negative, places = lax.sort((-x, places), num_keys=1, is_stable=True)
    return -negative[..., :k], places[..., :k]
