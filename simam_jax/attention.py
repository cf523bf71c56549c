"""SimAM and the two attention modules that it is compared with, and where each of them sits in a residual block."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from simam_jax.errors import UserError
from simam_jax.initializers import Initializer, torch_uniform
from simam_jax.layers import BatchNorm, Conv, LayerFactory, Linear, SimAMBatchNorm
from simam_jax.ops import extent as of_extent
from simam_jax.ops.moments import at_least_float32
from simam_jax.ops.pooling import global_average
from simam_jax.ops.simam import MAP, simam, simam_weights
from simam_jax.ops.simam_batch_norm import Activation


class SimAM(nn.Module):
    """`simam` as a module without parameters, (..., H, W, C) -> (..., H, W, C), or with other `axes` of the map.

    Its weights are stored as `weights` where they are asked for: `model.apply(..., mutable=["intermediates"])`.
    """

    e_lambda: float = 1e-4
    axes: Sequence[int] = MAP
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, extent: jax.Array | None = None) -> jax.Array:
        """SimAM of x, over an extent (N, 2) if there is one: see `ops.extent`."""
        if self.is_mutable_collection("intermediates"):
            whole = extent is None
            weights = (
                simam_weights(x, self.e_lambda, axes=self.axes)
                if whole
                else of_extent.simam_weights(x, extent, self.e_lambda)
            )
            self.sow("intermediates", "weights", weights)
        if extent is not None:
            return of_extent.simam(x, extent, self.e_lambda)
        return simam(x, self.e_lambda, axes=self.axes, implementation=self.implementation)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: channels scaled by a two-layer perceptron of their means, (N, H, W, C) -> (N, H, W, C).

    Hu, Shen, Sun: "Squeeze-and-Excitation Networks", CVPR 2018; here without biases.
    """

    reduction: int = 16
    linear: Callable[..., nn.Module] = Linear

    @nn.compact
    def __call__(self, x: jax.Array, extent: jax.Array | None = None) -> jax.Array:
        channels = x.shape[-1]
        hidden = self.linear(_reduced(channels, self.reduction), use_bias=False, name="fc_0")(_average(x, extent))
        gate = nn.sigmoid(self.linear(channels, use_bias=False, name="fc_2")(nn.relu(hidden)))
        return x * gate[:, None, None].astype(x.dtype)


class CBAM(nn.Module):
    """Convolutional block attention: a gate per channel, then one per position, (N, H, W, C) -> (N, H, W, C).

    Woo, Park, Lee, Kweon: "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """

    reduction: int = 16
    linear: Callable[..., nn.Module] = Linear
    kernel_init: Initializer = torch_uniform
    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, extent: jax.Array | None = None) -> jax.Array:
        channels, wide = x.shape[-1], at_least_float32(x.dtype)
        inner = self.linear(_reduced(channels, self.reduction), name="ChannelGate_mlp_1")
        outer = self.linear(channels, name="ChannelGate_mlp_3")
        brightest = _maximum(of_extent.fill_beyond(x, extent, -jnp.inf).reshape(x.shape[0], -1, channels), axis=1)[:, 0]
        score = sum(outer(nn.relu(inner(pooled))) for pooled in (_average(x, extent), brightest.astype(wide)))
        x = x * nn.sigmoid(score)[:, None, None].astype(x.dtype)

        summary = jnp.concatenate([_maximum(x, axis=-1), x.mean(-1, keepdims=True)], -1)
        score = Conv(1, 7, kernel_init=self.kernel_init, name="SpatialGate_spatial_conv")(summary, extent)
        score = self.norm(momentum=0.99, name="SpatialGate_spatial_bn")(score, train)
        return x * nn.sigmoid(score)


def _average(x: jax.Array, extent: jax.Array | None) -> jax.Array:
    """(N, C): the mean over the map, or over an extent of it."""
    return global_average(x) if extent is None else of_extent.average(x, extent)


def _maximum(x: jax.Array, axis: int) -> jax.Array:
    """The maximum along `axis`, kept with size 1; its gradient goes to the first place that has it, as in PyTorch.

    The gradient of jnp.max looks for equal values again: where the compiler computes x a second time with other rounding
    there are none, and it divides by zero.
    """
    return jnp.take_along_axis(x, jnp.argmax(x, axis, keepdims=True), axis)


def _reduced(channels: int, reduction: int) -> int:
    if not 1 <= reduction <= channels:
        raise UserError(f"A reduction of {reduction} leaves nothing of {channels} channels: take 1 to {channels}.")
    return channels // reduction


# ---- in a residual block

SPATIAL = "spatial"  # directly after the block's spatial convolution, before its batch norm
END = "end"  # after the last layer of the block's branch, before the input is added


class Kind(NamedTuple):
    """A kind of attention: where it sits in a block, and how it is applied there."""

    place: str
    apply: Callable[[LayerFactory, jax.Array, bool, jax.Array | None], jax.Array]  # make, x, train, extent -> y


def _simam(make: LayerFactory, x: jax.Array, train: bool, extent: jax.Array | None) -> jax.Array:  # noqa: ARG001
    return SimAM(make.attention_param, name="attention")(x, extent)


def _squeeze_excite(make: LayerFactory, x: jax.Array, train: bool, extent: jax.Array | None) -> jax.Array:  # noqa: ARG001
    return SqueezeExcite(int(make.attention_param), make.linear, name="attention")(x, extent)


def _cbam(make: LayerFactory, x: jax.Array, train: bool, extent: jax.Array | None) -> jax.Array:
    cbam = CBAM(int(make.attention_param), make.linear, make.kernel_init, make.norm, name="attention")
    return cbam(x, train, extent)


# By the names of `create_model`. CONTRIBUTING.md says where else a new kind of attention needs a word.
KINDS = {"simam": Kind(SPATIAL, _simam), "se": Kind(END, _squeeze_excite), "cbam": Kind(END, _cbam)}


def attend(make: LayerFactory, x: jax.Array, train: bool, place: str, extent: jax.Array | None = None) -> jax.Array:
    """x through the network's attention, if that sits at this place of a block."""
    kind = KINDS.get(make.attention)
    return kind.apply(make, x, train, extent) if kind and kind.place == place else x


def attend_and_norm(
    make: LayerFactory,
    block: nn.Module,
    x: jax.Array,
    train: bool,
    name: str,
    activation: Activation = lambda x: x,
    extent: jax.Array | None = None,
) -> jax.Array:
    """x after a spatial convolution through attention, the batch norm of that name and an activation.

    In training SimAM is fused with these, except where someone looks at its weights (`mutable=["intermediates"]`).
    Batch statistics know no extent: with `train` there must be none.
    """
    if train and make.attention == "simam" and not block.is_mutable_collection("intermediates"):
        norm = SimAMBatchNorm(
            group_size=make.bn_group_size,
            axis_name=make.axis_name,
            e_lambda=make.attention_param,
            activation=activation,
            name=name,
        )
        return norm(x, train)
    return activation(make.norm(name=name)(attend(make, x, train, SPATIAL, extent), train))
