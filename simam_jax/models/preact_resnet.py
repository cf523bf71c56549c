"""ResNets with pre-activation for CIFAR (He et al., ECCV 2016), and the wide ones (Zagoruyko, Komodakis, BMVC 2016)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from simam_jax.initializers import Initializer, torch_uniform
from simam_jax.models.backbone import Backbone, Features
from simam_jax.models.blocks import traced_once


class PreActResNet(Backbone, kw_only=True):
    """A 3x3 convolution to 16 channels, three stages of blocks, batch norm and ReLU at the end."""

    stage_sizes: tuple[int, ...]  # blocks in each stage
    block: Callable[..., Any]  # PreActBlock or PreActBottleneck
    width: int = 16  # of the first stage
    kernel_init: Initializer = torch_uniform
    dropout_rate: float = 0.0  # between the convolutions of a wide block

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Features:
        make, stages = self.factory(kernel_init=self.kernel_init), {}
        extra = {"dropout_rate": self.dropout_rate} if self.dropout_rate else {}
        x = make.conv(16, 3, name="conv1")(x)
        block = traced_once(self.block) if self.trace_blocks_once else self.block
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(make, self.width * 2**stage, stride, name=f"layer{stage + 1}_{i}", **extra)(x, train)
            name = f"layer{stage + 1}"
            stages[name] = x = self.perturbed(name, x)
        return nn.relu(make.norm(name="bn")(x, train)), stages
