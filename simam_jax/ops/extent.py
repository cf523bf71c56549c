"""The extent of an image: its size rounded up to a multiple of 32, as if it were padded alone (mmdetection's `pad_shape`).

An image is padded further, to the shape of its batch. SimAM takes its statistics over the whole map and convolutions
carry their bias into the padding, so the further padding would change every pixel. It changes nothing if
- what runs over the whole map (SimAM's mean, variance and count; other means and maxima) runs over the extent,
- maps are zero beyond the extent before every spatial convolution and before the stem's pooling (`zero_beyond`),
- anchors beyond the extent are no candidates (`rcnn.anchors.valid_anchors`).

Extents are (..., 2) int32, height and width in pixels, and broadcast over the leading axes of maps (..., H, W, C). Where
functions take an extent or None, None is the whole map.
"""

import jax
import jax.numpy as jnp

from simam_jax.ops.moments import at_least_float32
from simam_jax.ops.simam import MAP


def at_stride(extent: jax.Array | None, stride: int) -> jax.Array | None:
    """The extent in places of a map of this stride, rounded up as strided convolutions do."""
    return None if extent is None else -(-jnp.asarray(extent) // stride)


def within(size: tuple[int, int], extent: jax.Array) -> jax.Array:
    """(..., H, W, 1) bool: the places of a map of `size` that lie within an extent in the map's own places."""
    extent = jnp.asarray(extent)[..., None, None, None, :]
    rows, columns = jnp.arange(size[0])[:, None, None], jnp.arange(size[1])[:, None]
    return (rows < extent[..., 0]) & (columns < extent[..., 1])


def fill_beyond(x: jax.Array, extent: jax.Array | None, value: float) -> jax.Array:
    """x (..., H, W, C) with `value` beyond an extent in the map's own places."""
    return x if extent is None else jnp.where(within((x.shape[-3], x.shape[-2]), extent), x, value)


def zero_beyond(x: jax.Array, extent: jax.Array | None) -> jax.Array:
    """x (..., H, W, C) with zeros beyond an extent in the map's own places."""
    return fill_beyond(x, extent, 0)


def average(x: jax.Array, extent: jax.Array) -> jax.Array:
    """(..., C): the mean of x (..., H, W, C) over an extent in the map's own places, in float32 at least."""
    wide = zero_beyond(x, extent).astype(at_least_float32(x.dtype))
    return wide.sum(MAP) / jnp.asarray(extent).prod(-1)[..., None]


def simam(x: jax.Array, extent: jax.Array, e_lambda: float) -> jax.Array:
    """x * simam_weights(x, extent, e_lambda), and zeros beyond the extent. For its gradient only x is kept."""

    @jax.checkpoint
    def scaled(x: jax.Array, extent: jax.Array) -> jax.Array:
        inside, weights = _weights(x, extent, e_lambda)
        return jnp.where(inside, x * weights, 0).astype(x.dtype)

    return scaled(x, jnp.asarray(extent))


def simam_weights(x: jax.Array, extent: jax.Array, e_lambda: float) -> jax.Array:
    """SimAM's weights (Yang et al., 2021, Eq. 5) with mean, variance and count over the extent; zeros beyond.

    Statistics are float32 for half precision. A map of one place has no variance: its weight is sigmoid(1/2).

    Args:
        x: (..., H, W, C) floating.
        extent: (..., 2) in the map's own places.
        e_lambda: as for `ops.simam.simam`.
    """
    inside, weights = _weights(x, extent, e_lambda)
    return jnp.where(inside, weights, 0).astype(x.dtype)


def _weights(x: jax.Array, extent: jax.Array, e_lambda: float) -> tuple[jax.Array, jax.Array]:
    """(..., H, W, 1) bool, what lies within, and the weights in float32 at least."""
    inside = within((x.shape[-3], x.shape[-2]), extent)
    wide = x.astype(at_least_float32(x.dtype))
    count = inside.sum(MAP, keepdims=True).astype(wide.dtype)
    # Subtracting one of the channel's own values first is exact and leaves nothing for a large mean to cancel.
    centred = jnp.where(inside, wide - jax.lax.stop_gradient(wide[..., :1, :1, :]), 0)
    centred = jnp.where(inside, centred - centred.sum(MAP, keepdims=True) / jnp.maximum(count, 1), 0)
    squares = jnp.square(centred)
    variance = squares.sum(MAP, keepdims=True) / jnp.maximum(count - 1, 1)
    return inside, jax.nn.sigmoid(squares / (4 * (variance + e_lambda)) + 0.5)
