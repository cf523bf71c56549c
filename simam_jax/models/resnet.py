"""ResNets with post-activation, for ImageNet and CIFAR (He et al., CVPR 2016), ResNeXt and ResNet-D."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from simam_jax.initializers import Initializer, he_normal
from simam_jax.layers import LayerFactory
from simam_jax.models.backbone import Backbone, Features
from simam_jax.models.blocks import traced_once
from simam_jax.ops.extent import at_stride, zero_beyond
from simam_jax.ops.pooling import max_pool


class ResNet(Backbone, kw_only=True):
    """Stages of equal blocks; each stage but the first halves height and width, and each doubles the channels."""

    stage_sizes: tuple[int, ...]  # blocks in each stage
    block: Callable[..., Any]  # BasicBlock or Bottleneck
    width: int = 64  # of the first stage
    stem: str = "7x7"  # 7x7 and deep (three 3x3) bring a quarter of the size; 3x3 keeps it
    kernel_init: Initializer = he_normal

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, extent: jax.Array | None = None) -> Features:
        """As of every backbone; an extent (N, 2) in pixels is where images end, without `train`: see `ops.extent`."""
        make, stages = self.factory(kernel_init=self.kernel_init), {}
        x = self._stem(make, x, train, extent)
        extent = at_stride(extent, 1 if self.stem == "3x3" else 4)
        block = traced_once(self.block) if self.trace_blocks_once else self.block
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(make, self.width * 2**stage, stride, name=f"layer{stage + 1}_{i}")(x, train, extent)
                extent = at_stride(extent, stride)
            name = f"layer{stage + 1}"
            stages[name] = x = self.perturbed(name, x)
        return x, stages

    @nn.nowrap
    def _stem(self, make: LayerFactory, x: jax.Array, train: bool, extent: jax.Array | None) -> jax.Array:
        conv, norm, width, half = make.conv, make.norm, self.width, at_stride(extent, 2)
        if self.stem == "deep":
            x = nn.relu(norm(name="conv1_1")(conv(width // 2, 3, 2, name="conv1_0")(x, extent), train))
            x = nn.relu(norm(name="conv1_4")(conv(width // 2, 3, name="conv1_3")(x, half), train))
            x = conv(width, 3, name="conv1_6")(x, half)
        elif self.stem == "7x7":
            x = conv(width, 7, 2, name="conv1")(x, extent)
        else:
            x = conv(width, 3, name="conv1")(x, extent)
        x = nn.relu(norm(name="bn1")(x, train))
        # The maximum of numbers that are not negative is the same with zeros beside them.
        return x if self.stem == "3x3" else max_pool(zero_beyond(x, half))
