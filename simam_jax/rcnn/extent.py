"""The extent of an image: the height and width that its tensor would have if it were padded for itself alone.

An image is padded further, to the size of its batch. SimAM takes its statistics over the whole map and convolutions
carry their bias into the padding, so the further padding would change every pixel. It changes nothing if
- SimAM's mean, variance and count run over the extent (`simam`),
- maps are zero beyond the extent before every spatial convolution and before the stem's pooling (`zero_beyond`),
- anchors beyond the extent are no candidates (`rcnn.anchors.valid_anchors`).

Extents are (..., 2) int32, height and width in pixels, and broadcast over the leading axes of maps (..., H, W, C).
"""

import jax
import jax.numpy as jnp

_MAP = (-3, -2)


def at_stride(extent: jax.Array, stride: int) -> jax.Array:
    """The extent in places of a map of this stride, rounded up as strided convolutions do."""
    return -(-jnp.asarray(extent) // stride)


def within(size: tuple[int, int], extent: jax.Array) -> jax.Array:
    """(..., H, W, 1) bool: the places of a map of `size` that lie within an extent in the map's own places."""
    extent = jnp.asarray(extent)[..., None, None, None, :]
    rows, columns = jnp.arange(size[0])[:, None, None], jnp.arange(size[1])[:, None]
    return (rows < extent[..., 0]) & (columns < extent[..., 1])


def zero_beyond(x: jax.Array, extent: jax.Array) -> jax.Array:
    """x (..., H, W, C) with zeros beyond an extent in the map's own places."""
    return jnp.where(within((x.shape[-3], x.shape[-2]), extent), x, 0)


def simam(x: jax.Array, extent: jax.Array, e_lambda: float) -> jax.Array:
    """SimAM (Yang et al., 2021, Eq. 5 and 6) with its mean, variance and count over the extent; zeros beyond.

    Statistics are float32 for half precision. A map of one place has no variance: its weight is sigmoid(1/2).

    Args:
        x: (..., H, W, C) floating.
        extent: (..., 2) in the map's own places.
    """
    inside = within((x.shape[-3], x.shape[-2]), extent)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = inside.sum(_MAP, keepdims=True).astype(wide.dtype)
    # Subtracting one of the channel's own values first is exact and leaves nothing for a large mean to cancel.
    centred = jnp.where(inside, wide - jax.lax.stop_gradient(wide[..., :1, :1, :]), 0)
    centred = jnp.where(inside, centred - centred.sum(_MAP, keepdims=True) / jnp.maximum(count, 1), 0)
    squares = jnp.square(centred)
    variance = squares.sum(_MAP, keepdims=True) / jnp.maximum(count - 1, 1)
    weights = jax.nn.sigmoid(squares / (4 * (variance + e_lambda)) + 0.5)
    return jnp.where(inside, wide * weights, 0).astype(x.dtype)
