"""Batch normalization by the statistics of groups of images, as a function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from simam_jax.ops.moments import Moments, moments

GroupMoments = Callable[[Moments], Moments]  # from the moments of this device's images to those of a group of devices


def batch_norm(
    x: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    group_moments: GroupMoments = lambda own: own,
) -> tuple[jax.Array, Moments]:
    """x normalised by the moments of its groups, then scaled and shifted.

    Args:
        x: (G, n, HW, C), G groups of n images.
        shift: (C,), near the mean of x: the running mean. It keeps the variance from cancelling and changes nothing else.
        scale, bias: (C,).
        epsilon: added to the variance.
        group_moments: from the moments (G, C) of each group on this device to those of the whole group.

    Returns:
        y in x's shape and dtype, and the moments (G, C) of x - shift.
    """
    mean, var = group_moments(Moments(*(each[:, 0, 0] for each in moments(x, shift, (1, 2)))))
    # One factor and one offset per group and channel, so that the gradient needs two reductions over the map only.
    factor = lax.rsqrt(var + epsilon) * scale
    offset = bias - mean * factor
    y = _affine(x.astype(factor.dtype), shift, factor[:, None, None], offset[:, None, None])
    return y.astype(x.dtype), Moments(mean, var)


@jax.custom_jvp
def _affine(x: jax.Array, shift: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return (x - shift) * factor + offset


@_affine.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (x, shift, factor, _), (dx, dshift, dfactor, doffset) = primals, tangents
    # Not (x - shift) * dfactor, whose transpose would keep x - shift in memory for a sum.
    return _affine(*primals), dx * factor + x * dfactor + (doffset - shift * dfactor - dshift * factor)


def over_neighbours(own: Moments, devices: int, axis_name: str) -> Moments:
    """The moments of what groups of `devices` neighbours on the mesh axis have together."""
    mean, var = own
    pair = mean, var + jnp.square(mean)
    if devices == lax.axis_size(axis_name):
        mean, square = lax.pmean(pair, axis_name)
    else:
        # shard_map's check_vma knows no axis_index_groups; these are a few kilobytes.
        everywhere = lax.all_gather(jnp.stack(pair), axis_name)
        first = lax.axis_index(axis_name) // devices * devices
        mean, square = lax.dynamic_slice_in_dim(everywhere, first, devices).mean(0)
    return Moments(mean, jnp.maximum(square - jnp.square(mean), 0))
