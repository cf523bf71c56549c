"""A feature pyramid (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017)."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from simam_jax.initializers import xavier_uniform, zeros
from simam_jax.layers import Conv
from simam_jax.ops.extent import at_stride

STRIDES = (4, 8, 16, 32)  # of the maps that a backbone hands over


class FPN(nn.Module):
    """The outputs of a backbone's four stages to the five levels P2 to P6, (N, H, W, width) each.

    P6 is P5 at every second place.
    """

    width: int = 256

    @nn.compact
    def __call__(self, stages: Sequence[jax.Array], extent: jax.Array | None = None) -> list[jax.Array]:
        """
        Args:
            stages: maps (N, H, W, C) of the strides 4, 8, 16 and 32.
            extent: (N, 2) in pixels, where images end: see `ops.extent`.
        """
        levels: list[jax.Array] = []
        for i in reversed(range(len(STRIDES))):
            x = Conv(self.width, kernel_init=xavier_uniform, bias_init=zeros, name=f"lateral_convs_{i}")(stages[i])
            levels.insert(0, x + _doubled(levels[0], like=x) if levels else x)
        for i, (x, stride) in enumerate(zip(levels, STRIDES, strict=True)):
            smooth = Conv(self.width, 3, kernel_init=xavier_uniform, bias_init=zeros, name=f"fpn_convs_{i}")
            levels[i] = smooth(x, at_stride(extent, stride))
        return [*levels, levels[-1][:, ::2, ::2]]


def _doubled(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with every place repeated in both directions, cut to the size of the next finer map."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, : like.shape[1], : like.shape[2]]
