"""Pixels as networks take them."""

import jax
import jax.numpy as jnp


def normalize(
    images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype | type = jnp.float32
) -> jax.Array:
    """uint8 (N, H, W, C) in 0..255 to `dtype` with the given mean and deviation per channel, both of pixels in 0..1."""
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = -jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) * scale + shift).astype(dtype)
