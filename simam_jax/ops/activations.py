"""Activations."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), with a gradient from its value, which the next layer keeps anyway; the gradient is 0 at 0, as PyTorch's.

    Written as a select, which XLA computes once. XLA takes a maximum for cheap and recomputes it in everything that reads
    it: the last block of a stage then read the maps of all its blocks.
    """
    return jnp.where(x < 0, 0, x)


@relu.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)
