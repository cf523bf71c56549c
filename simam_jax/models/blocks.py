"""The residual blocks of every network: with and without pre-activation, basic, bottleneck and inverted.

Submodules carry PyTorch's names (`conv1`, `bn1`, ..., `downsample_0`); the attention is always called `attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from simam_jax.attention import CBAM, SimAM, SqueezeExcite
from simam_jax.layers import BatchNorm, Conv, Dropout, Initializer, Linear, he_normal, relu
from simam_jax.ops.pooling import halve
from simam_jax.ops.simam_norm import Activation, simam_then_normalise


@dataclass(frozen=True)
class Layers:
    """What all layers of one network have in common, and their constructors."""

    attention: str  # none, simam, se, cbam
    attention_param: float
    bn_group_size: int
    axis_name: str | None
    kernel_init: Initializer = he_normal
    linear: Callable[..., nn.Module] = Linear

    @property
    def conv(self) -> Callable[..., nn.Module]:
        return partial(Conv, kernel_init=self.kernel_init)

    @property
    def norm(self) -> Callable[..., nn.Module]:
        return partial(BatchNorm, group_size=self.bn_group_size, axis_name=self.axis_name)

    def attend(self, x: jax.Array, train: bool, *kinds: str) -> jax.Array:
        """x through the network's attention if that is one of `kinds`, else x: a block says where each kind sits."""
        if self.attention not in kinds:
            return x
        if self.attention == "simam":
            return SimAM(self.attention_param, name="attention")(x)
        reduction = int(self.attention_param)
        if self.attention == "se":
            return SqueezeExcite(reduction, self.linear, name="attention")(x)
        return CBAM(reduction, self.linear, self.kernel_init, self.norm, name="attention")(x, train)

    def simam_and_norm(self, x: jax.Array, train: bool, name: str, activation: Activation = lambda x: x) -> jax.Array:
        """x through SimAM, if that is the network's attention, batch norm and an activation: in training as one function."""
        norm = self.norm(name=name)
        if self.attention == "simam":
            attention = SimAM(self.attention_param, name="attention")
            if train and not attention.is_mutable_collection("intermediates"):
                return norm(x, train, simam_then_normalise(self.attention_param, activation))
            x = attention(x)
        return activation(norm(x, train))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), width)."""

    layers: Layers
    width: int
    stride: int = 1
    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm, attend = self.layers.conv, self.layers.norm, self.layers.attend
        y = relu(norm(name="bn1")(conv(self.width, 3, self.stride, name="conv1")(x), train))
        y = self.layers.simam_and_norm(conv(self.width, 3, name="conv2")(y), train, "bn2")
        y = attend(y, train, "se", "cbam")
        return relu(y + shortcut(self.layers, x, self.width, self.stride, train))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with the stride on the 3x3, -> (N, ceil(H / stride), ceil(W / stride), 4 * width).

    `groups` and `group_width` are ResNeXt's (Xie et al., CVPR 2017); `pool` makes ResNet-D's shortcut.
    """

    layers: Layers
    width: int
    stride: int = 1
    groups: int = 1
    group_width: int = 64
    pool: bool = False
    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm, attend = self.layers.conv, self.layers.norm, self.layers.attend
        inner, outer = self.width * self.group_width // 64 * self.groups, self.width * self.expansion
        y = relu(norm(name="bn1")(conv(inner, name="conv1")(x), train))
        y = conv(inner, 3, self.stride, self.groups, name="conv2")(y)
        # Not `relu`: here the gradient has what went in at hand anyway.
        y = self.layers.simam_and_norm(y, train, "bn2", nn.relu)
        y = norm(name="bn3")(conv(outer, name="conv3")(y), train)
        y = attend(y, train, "se", "cbam")
        return relu(y + shortcut(self.layers, x, outer, self.stride, train, pool=self.pool))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU (He et al., ECCV 2016), -> (..., width).

    `wide` makes the block of wide ResNets, whose shortcut starts at the activated input where the width changes;
    `dropout_rate` is that between the convolutions.
    """

    layers: Layers
    width: int
    stride: int = 1
    wide: bool = False
    dropout_rate: float = 0.0
    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = self.layers.conv, self.layers.norm
        y = relu(norm(name="bn1")(x, train))
        skip = shortcut(
            self.layers, y if self.wide and x.shape[-1] != self.width else x, self.width, self.stride, train, norm=False
        )
        y = relu(norm(name="bn2")(conv(self.width, 3, self.stride, name="conv1")(y), train))
        y = Dropout(self.dropout_rate, self.layers.axis_name)(y, train)
        y = conv(self.width, 3, name="conv2")(y)
        return self.layers.attend(y, train, "simam", "se", "cbam") + skip


class PreActBottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each after batch norm and ReLU (He et al., ECCV 2016), -> (..., 4 * width)."""

    layers: Layers
    width: int
    stride: int = 1
    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm, attend = self.layers.conv, self.layers.norm, self.layers.attend
        outer = self.width * self.expansion
        y = conv(self.width, name="conv1")(relu(norm(name="bn1")(x, train)))
        y = conv(self.width, 3, self.stride, name="conv2")(relu(norm(name="bn2")(y, train)))
        y = self.layers.simam_and_norm(y, train, "bn3", nn.relu)  # as in Bottleneck
        y = conv(outer, name="conv3")(y)
        y = attend(y, train, "se", "cbam")
        return y + shortcut(self.layers, x, outer, self.stride, train, norm=False)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection (Sandler et al., CVPR 2018), -> (..., width).

    ImageNet's form leaves out an expansion by 1 and adds the input only where the shape stays; the CIFAR form (`cifar`)
    always expands, projects the input wherever the stride is 1, and its activation is ReLU instead of ReLU6.
    """

    layers: Layers
    width: int
    stride: int = 1
    expansion: int = 6
    cifar: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm, attend = self.layers.conv, self.layers.norm, self.layers.attend
        activation = nn.relu if self.cifar else nn.relu6
        inner = self.expansion * x.shape[-1]
        y = x
        if self.cifar or self.expansion != 1:
            y = activation(norm(name="bn1")(conv(inner, name="conv1")(y), train))
        y = conv(inner, 3, self.stride, inner, name="conv2")(y)
        y = self.layers.simam_and_norm(y, train, "bn2", activation)
        y = norm(name="bn3")(conv(self.width, name="conv3")(y), train)
        y = attend(y, train, "se", "cbam")
        if self.stride == 1 and (self.cifar or x.shape[-1] == self.width):
            y += shortcut(self.layers, x, self.width, self.stride, train)
        return y


def shortcut(
    layers: Layers, x: jax.Array, width: int, stride: int, train: bool, *, norm: bool = True, pool: bool = False
) -> jax.Array:
    """x itself where its shape stays, else through a 1x1 convolution (`pool`: after 2x2 means) and batch norm."""
    if stride == 1 and x.shape[-1] == width:
        return x
    first = 0
    if pool and stride != 1:
        x, stride, first = halve(x), 1, 1  # PyTorch counts the pooling as layer 0
    x = layers.conv(width, stride=stride, name=f"downsample_{first}")(x)
    return layers.norm(name=f"downsample_{first + 1}")(x, train) if norm else x
