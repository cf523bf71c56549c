"""The head of a region proposal network (Ren et al., "Faster R-CNN", NeurIPS 2015)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import linen as nn

from simam_jax.initializers import Initializer, zeros
from simam_jax.layers import Conv
from simam_jax.ops.extent import at_stride
from simam_jax.rcnn.anchors import RATIOS, STRIDES

_normal = Initializer("normal", 0.01)


class RPNOutputs(NamedTuple):
    """Of every level, its anchors in the order of `rcnn.anchors`."""

    logits: list[jax.Array]  # (N, A)
    deltas: list[jax.Array]  # (N, A, 4)


class RPNHead(nn.Module):
    """P2 to P6 to objectness and deltas of every anchor: three layers that all levels share."""

    width: int = 256

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array], extent: jax.Array | None = None) -> RPNOutputs:
        """
        Args:
            levels: (N, H, W, C) of the strides 4 to 64.
            extent: (N, 2) in pixels, where images end: see `ops.extent`.
        """
        num = len(RATIOS)
        shared = Conv(self.width, 3, kernel_init=_normal, bias_init=zeros, name="rpn_conv")
        objectness = Conv(num, kernel_init=_normal, bias_init=zeros, name="rpn_cls")
        box = Conv(4 * num, kernel_init=_normal, bias_init=zeros, name="rpn_reg")
        logits, deltas = [], []
        for x, stride in zip(levels, STRIDES, strict=True):
            y = nn.relu(shared(x, at_stride(extent, stride)))
            logits.append(objectness(y).reshape(x.shape[0], -1))
            deltas.append(box(y).reshape(x.shape[0], -1, 4))
        return RPNOutputs(logits, deltas)
