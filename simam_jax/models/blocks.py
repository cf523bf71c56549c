"""The residual blocks of every network: with and without pre-activation, basic, bottleneck and inverted.

Submodules carry PyTorch's names (`conv1`, `bn1`, ..., `downsample_0`); the attention is always called `attention`.
An extent (N, 2) is that of x, in places: see `ops.extent`.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen as nn

from simam_jax.attention import END, SPATIAL, attend, attend_and_norm
from simam_jax.layers import Dropout, LayerFactory
from simam_jax.ops.activations import relu
from simam_jax.ops.extent import at_stride
from simam_jax.ops.pooling import average_pool_2x2


@functools.cache
def traced_once(block: Callable[..., Any]) -> Callable[..., Any]:
    """The class `block`, or a partial of one, with instances of equal settings and shapes traced once, the first time.

    ResNet-101's update is traced in 3 s instead of 8. What looks into a network while it is traced, such as
    `flax.linen.intercept_methods`, sees one of the equal blocks.
    """
    if isinstance(block, functools.partial):
        return functools.partial(traced_once(block.func), *block.args, **block.keywords)
    return nn.jit(block, static_argnums=(2,))  # train


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), width)."""

    make: LayerFactory
    width: int
    stride: int = 1
    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, extent: jax.Array | None = None) -> jax.Array:
        make, conv, norm = self.make, self.make.conv, self.make.norm
        y = relu(norm(name="bn1")(conv(self.width, 3, self.stride, name="conv1")(x, extent), train))
        extent = at_stride(extent, self.stride)
        y = attend_and_norm(make, self, conv(self.width, 3, name="conv2")(y, extent), train, "bn2", extent=extent)
        y = attend(make, y, train, END, extent)
        return relu(y + shortcut(make, x, self.width, self.stride, train))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with the stride on the 3x3, -> (N, ceil(H / stride), ceil(W / stride), 4 * width).

    `groups` and `group_width` are ResNeXt's (Xie et al., CVPR 2017); `pool` makes ResNet-D's shortcut.
    """

    make: LayerFactory
    width: int
    stride: int = 1
    groups: int = 1
    group_width: int = 64
    pool: bool = False
    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, extent: jax.Array | None = None) -> jax.Array:
        make, conv, norm = self.make, self.make.conv, self.make.norm
        inner, outer = self.width * self.group_width // 64 * self.groups, self.width * self.expansion
        y = relu(norm(name="bn1")(conv(inner, name="conv1")(x), train))
        y = conv(inner, 3, self.stride, self.groups, name="conv2")(y, extent)
        extent = at_stride(extent, self.stride)
        # Not `relu`: here the gradient has what went in at hand anyway.
        y = attend_and_norm(make, self, y, train, "bn2", nn.relu, extent)
        y = norm(name="bn3")(conv(outer, name="conv3")(y), train)
        y = attend(make, y, train, END, extent)
        return relu(y + shortcut(make, x, outer, self.stride, train, pool=self.pool))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU (He et al., ECCV 2016), -> (..., width).

    `wide` makes the block of wide ResNets, whose shortcut starts at the activated input where the width changes;
    `dropout_rate` is that between the convolutions.
    """

    make: LayerFactory
    width: int
    stride: int = 1
    wide: bool = False
    dropout_rate: float = 0.0
    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, conv, norm = self.make, self.make.conv, self.make.norm
        y = relu(norm(name="bn1")(x, train))
        skip = shortcut(
            self.make, y if self.wide and x.shape[-1] != self.width else x, self.width, self.stride, train, norm=False
        )
        y = relu(norm(name="bn2")(conv(self.width, 3, self.stride, name="conv1")(y), train))
        y = Dropout(self.dropout_rate, make.axis_name)(y, train)
        y = conv(self.width, 3, name="conv2")(y)
        for place in (SPATIAL, END):
            y = attend(make, y, train, place)
        return y + skip


class PreActBottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each after batch norm and ReLU (He et al., ECCV 2016), -> (..., 4 * width)."""

    make: LayerFactory
    width: int
    stride: int = 1
    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, conv, norm = self.make, self.make.conv, self.make.norm
        outer = self.width * self.expansion
        y = conv(self.width, name="conv1")(relu(norm(name="bn1")(x, train)))
        y = conv(self.width, 3, self.stride, name="conv2")(relu(norm(name="bn2")(y, train)))
        y = attend_and_norm(make, self, y, train, "bn3", nn.relu)  # as in Bottleneck
        y = conv(outer, name="conv3")(y)
        y = attend(make, y, train, END)
        return y + shortcut(make, x, outer, self.stride, train, norm=False)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection (Sandler et al., CVPR 2018), -> (..., width).

    ImageNet's form leaves out an expansion by 1 and adds the input only where the shape stays; the CIFAR form (`cifar`)
    always expands, projects the input wherever the stride is 1, and its activation is ReLU instead of ReLU6.
    """

    make: LayerFactory
    width: int
    stride: int = 1
    expansion: int = 6
    cifar: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, conv, norm = self.make, self.make.conv, self.make.norm
        activation = nn.relu if self.cifar else nn.relu6
        inner = self.expansion * x.shape[-1]
        y = x
        if self.cifar or self.expansion != 1:
            y = activation(norm(name="bn1")(conv(inner, name="conv1")(y), train))
        y = conv(inner, 3, self.stride, inner, name="conv2")(y)
        y = attend_and_norm(make, self, y, train, "bn2", activation)
        y = norm(name="bn3")(conv(self.width, name="conv3")(y), train)
        y = attend(make, y, train, END)
        if self.stride == 1 and (self.cifar or x.shape[-1] == self.width):
            y += shortcut(make, x, self.width, self.stride, train)
        return y


def shortcut(
    make: LayerFactory, x: jax.Array, width: int, stride: int, train: bool, *, norm: bool = True, pool: bool = False
) -> jax.Array:
    """x itself where its shape stays, else through a 1x1 convolution (`pool`: after 2x2 means) and batch norm."""
    if stride == 1 and x.shape[-1] == width:
        return x
    first = 0
    if pool and stride != 1:
        x, stride, first = average_pool_2x2(x), 1, 1  # PyTorch counts the pooling as layer 0
    x = make.conv(width, stride=stride, name=f"downsample_{first}")(x)
    return make.norm(name=f"downsample_{first + 1}")(x, train) if norm else x
