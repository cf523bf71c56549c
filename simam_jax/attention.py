"""SimAM, and the two attention modules that it is compared with.

Yang, Zhang, Li, Xie: "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
ICML 2021, PMLR 139:11863-11874.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import ArrayLike

from simam_jax.errors import UserError
from simam_jax.layers import BatchNorm, Conv, Initializer, Linear, at_least_float32, global_average, torch_uniform


def simam(x: ArrayLike, e_lambda: float = 1e-4) -> jax.Array:
    """x * simam_weights(x, e_lambda): every neuron scaled by how much it stands out from its channel (Eq. 5 and 6).

    Args:
        x: (..., H, W, C), floating; statistics are taken over H and W in float32 (float64 for float64).
        e_lambda: the paper's lambda, > 0: 1e-4 on CIFAR, 0.1 on ImageNet and COCO.

    Returns:
        An array of x's shape and dtype.

    Raises:
        UserError: x has fewer than 3 dimensions or is not floating; e_lambda is not positive and finite.
    """
    x = jnp.asarray(x)
    return (x * _weights(x, e_lambda)).astype(x.dtype)


def simam_weights(x: ArrayLike, e_lambda: float = 1e-4) -> jax.Array:
    """The attention weights themselves, sigmoid(1 / e*), where e* is a neuron's minimal energy (Eq. 5).

    With mu the mean and v the unbiased variance of a channel of one image over H and W:

        1 / e* = (x - mu)^2 / (4 (v + lambda)) + 1 / 2

    Args, Raises: as for `simam`. A map of one position has no variance: its weight is sigmoid(1/2).

    Returns:
        An array of x's shape and dtype, in (0.62, 1].
    """
    x = jnp.asarray(x)
    return _weights(x, e_lambda).astype(x.dtype)


def _weights(x: jax.Array, e_lambda: float) -> jax.Array:
    if x.ndim < 3:
        raise UserError(f"SimAM needs a map (..., H, W, C) of at least 3 dimensions, got the shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"SimAM needs floating-point input, got {x.dtype}: convert it, e.g. with x.astype(jnp.float32)."
        )
    if not 0 < e_lambda < float("inf"):
        raise UserError(
            f"SimAM's e_lambda must be positive and finite, got {e_lambda}: take 1e-4 (CIFAR) or 0.1 (ImageNet)."
        )
    x = x.astype(at_least_float32(x.dtype))
    # Subtracting one of the channel's own values first is exact and leaves nothing for a large mean to cancel.
    centred = x - lax.stop_gradient(x[..., :1, :1, :])
    centred -= centred.mean((-3, -2), keepdims=True)
    d = jnp.square(centred)
    n = max(x.shape[-3] * x.shape[-2] - 1, 1)
    v = d.sum((-3, -2), keepdims=True) / n
    return jax.nn.sigmoid(d / (4 * (v + e_lambda)) + 0.5)


class SimAM(nn.Module):
    """`simam` as a module without parameters, (..., H, W, C) -> (..., H, W, C).

    Its weights are stored as `weights` where they are asked for: `model.apply(..., mutable=["intermediates"])`.
    """

    e_lambda: float = 1e-4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", simam_weights(x, self.e_lambda))
        return simam(x, self.e_lambda)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: channels scaled by a two-layer perceptron of their means, (N, H, W, C) -> (N, H, W, C).

    Hu, Shen, Sun: "Squeeze-and-Excitation Networks", CVPR 2018; here without biases.
    """

    reduction: int = 16
    linear: Callable[..., nn.Module] = Linear

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        hidden = self.linear(_reduced(channels, self.reduction), use_bias=False, name="fc_0")(global_average(x))
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
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        channels, wide = x.shape[-1], at_least_float32(x.dtype)
        inner = self.linear(_reduced(channels, self.reduction), name="ChannelGate_mlp_1")
        outer = self.linear(channels, name="ChannelGate_mlp_3")
        brightest = _maximum(x.reshape(x.shape[0], -1, channels), axis=1)[:, 0]
        score = sum(outer(nn.relu(inner(pooled))) for pooled in (global_average(x), brightest.astype(wide)))
        x = x * nn.sigmoid(score)[:, None, None].astype(x.dtype)

        summary = jnp.concatenate([_maximum(x, axis=-1), x.mean(-1, keepdims=True)], -1)
        score = Conv(1, 7, kernel_init=self.kernel_init, name="SpatialGate_spatial_conv")(summary)
        score = self.norm(momentum=0.99, name="SpatialGate_spatial_bn")(score, train)
        return x * nn.sigmoid(score)


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
