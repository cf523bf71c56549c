"""MobileNetV2 (Sandler et al., CVPR 2018), for ImageNet and for CIFAR."""

from functools import partial

import jax
from flax import linen as nn

from simam_jax.initializers import Initializer, he_normal, torch_uniform, zeros
from simam_jax.layers import Linear
from simam_jax.models.backbone import Backbone, Features
from simam_jax.models.blocks import InvertedResidual, traced_once

# Table 2 of the paper: expansion, width, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

MobileNetLinear = partial(Linear, kernel_init=Initializer("normal", 0.01), bias_init=zeros)


class MobileNetV2(Backbone, kw_only=True):
    """Seven stages of inverted residuals. The CIFAR form has stride 1 in the stem and in the second stage."""

    cifar: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> Features:
        if self.cifar:
            make, activation = self.factory(kernel_init=torch_uniform), nn.relu
        else:
            make, activation = self.factory(kernel_init=he_normal, linear=MobileNetLinear), nn.relu6
        conv, norm, stages, index = make.conv, make.norm, {}, 0

        x = conv(32, 3, 1 if self.cifar else 2, name="conv1")(x)
        x = activation(norm(name="bn1")(x, train))
        make_block = traced_once(InvertedResidual) if self.trace_blocks_once else InvertedResidual
        for stage, (expansion, width, size, stride) in enumerate(STAGES):
            if self.cifar and stage == 1:
                stride = 1
            for i in range(size):
                block = make_block(make, width, stride if i == 0 else 1, expansion, self.cifar, name=f"layers_{index}")
                x, index = block(x, train), index + 1
            name = f"layer{stage + 1}"
            stages[name] = x = self.perturbed(name, x)
        return activation(norm(name="bn2")(conv(1280, name="conv2")(x), train)), stages
