"""SimAM, and the two attention modules that it is compared with.

Yang, Zhang, Li, Xie: "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
ICML 2021, PMLR 139:11863-11874.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import ArrayLike

from simam_jax.errors import UserError, unknown
from simam_jax.layers import BatchNorm, Conv, Initializer, Linear, at_least_float32, torch_uniform
from simam_jax.ops.moments import mean_cancels, moments
from simam_jax.ops.once import once
from simam_jax.ops.pooling import global_average

IMPLEMENTATIONS = ("auto", "xla", "reference")


def simam(x: ArrayLike, e_lambda: float = 1e-4, *, implementation: str = "auto") -> jax.Array:
    """x * simam_weights(x, e_lambda): every neuron scaled by how much it stands out from its channel (Eq. 5 and 6).

    Args:
        x: (..., H, W, C), floating; statistics are taken over H and W in float32 (float64 for float64).
        e_lambda: the paper's lambda, > 0: 1e-4 on CIFAR, 0.1 on ImageNet and COCO.
        implementation: "xla": few passes over memory, in the gradient too, which keeps x and three numbers a channel;
            reverse mode only. "reference": the plain formula, also for forward mode (`jax.jvp`, `jax.jacfwd`,
            `jax.hessian`). "auto": what is fastest here, which is "xla" on every platform so far.

    Returns:
        An array of x's shape and dtype.

    Raises:
        UserError: x has fewer than 3 dimensions or is not floating; e_lambda is not positive and finite; an unknown
            implementation.
    """
    x = _checked(x, e_lambda)
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", implementation, IMPLEMENTATIONS)
    return (_reference if implementation == "reference" else _simam)(x, e_lambda)


def simam_weights(x: ArrayLike, e_lambda: float = 1e-4) -> jax.Array:
    """The attention weights themselves, sigmoid(1 / e*), where e* is a neuron's minimal energy (Eq. 5).

    With mu the mean and v the unbiased variance of a channel of one image over H and W:

        1 / e* = (x - mu)^2 / (4 (v + lambda)) + 1 / 2

    Args, Raises: as for `simam`. A map of one position has no variance: its weight is sigmoid(1/2).

    Returns:
        An array of x's shape and dtype, in (0.62, 1].
    """
    x = _checked(x, e_lambda)
    return _weights(x.astype(at_least_float32(x.dtype)), e_lambda).astype(x.dtype)


def _checked(x: ArrayLike, e_lambda: float) -> jax.Array:
    x = jnp.asarray(x)
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
    return x


_MAP = (-3, -2)  # the axes of H and W


def _weights(x: jax.Array, e_lambda: float) -> jax.Array:
    # Subtracting one of the channel's own values first is exact and leaves nothing for a large mean to cancel.
    centred = x - lax.stop_gradient(x[..., :1, :1, :])
    centred -= centred.mean(_MAP, keepdims=True)
    d = jnp.square(centred)
    v = d.sum(_MAP, keepdims=True) / degrees_of_freedom(x)
    return jax.nn.sigmoid(d / (4 * (v + e_lambda)) + 0.5)


def degrees_of_freedom(x: jax.Array) -> int:
    return max(x.shape[-3] * x.shape[-2] - 1, 1)


def _reference(x: jax.Array, e_lambda: float) -> jax.Array:
    wide = x.astype(at_least_float32(x.dtype))
    return (wide * _weights(wide, e_lambda)).astype(x.dtype)


# The same in few passes over memory. Forward, one pass reads x for the statistics, one reads x and writes y; backward, one
# reads x and dy for two sums, one reads both again and writes dx. A compiler that sees a value used in both passes, or y
# in what follows, would write it in float32 and read it back: the barriers keep the passes apart. See docs/mathematics.md.
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _simam(x: jax.Array, e_lambda: float) -> jax.Array:
    return attended(x, *statistics(x, e_lambda))


def statistics(x: jax.Array, e_lambda: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A value of each channel, the mean of x less that value, and a = 1 / (4 (v + lambda)), all (..., 1, 1, C)."""
    shift = x[..., :1, :1, :].astype(at_least_float32(x.dtype))
    mean, var = moments(x, shift, _MAP)
    v = var * (x.shape[-3] * x.shape[-2] / degrees_of_freedom(x))
    return shift, mean, 1 / (4 * (v + e_lambda))


def attended(x: jax.Array, shift: jax.Array, mean: jax.Array, a: jax.Array) -> jax.Array:
    """x sigmoid(z) in one division; the exponential cannot overflow, as z is at least 1/2."""
    wide = x.astype(at_least_float32(x.dtype))
    return (wide / (1 + jnp.exp(-a * jnp.square(wide - shift - mean) - 0.5))).astype(x.dtype)


def centred_and_weights(x: jax.Array, shift: jax.Array, mean: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    centred = x - shift - mean
    return centred, jax.nn.sigmoid(a * jnp.square(centred) + 0.5)


def _forward(x: jax.Array, e_lambda: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    of_x = statistics(x, e_lambda)
    return lax.optimization_barrier(attended(x, *of_x)), (x, *of_x)


def _backward(_e_lambda: float, residuals: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array]:
    """With c = x - mu, a = 1 / (4 (v + lambda)), s = sigmoid(a c^2 + 1/2) and h = dy x s (1 - s) c:

    dx = dy s + 2 a (h - mean(h)) - c 8 a^2 sum(h c) / (HW - 1)
    """
    # Held back, or what the forward pass computed from x would be kept in memory for the same here.
    residuals = lax.optimization_barrier(residuals)
    return (lax.platform_dependent(dy, *residuals, cpu=_gradient_on_cpu, default=_gradient),)


def _gradient(dy: jax.Array, x: jax.Array, *statistics: jax.Array) -> jax.Array:
    def terms(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, dy = (each.astype(statistics[0].dtype) for each in (x, dy))
        return _terms(x, dy, *centred_and_weights(x, *statistics))

    c, _, h = terms(x, dy)
    sums = h.sum(_MAP, keepdims=True), (h * c).sum(_MAP, keepdims=True)
    # dy is not held back before its sums: where it is computed just then, they are taken in the same pass.
    x, dy, sums = lax.optimization_barrier((x, dy, sums))
    return _dx(*terms(x, dy), statistics[-1], *sums).astype(x.dtype)


def _gradient_on_cpu(dy: jax.Array, x: jax.Array, *statistics: jax.Array) -> jax.Array:
    """The same for XLA on CPUs, where exponentials cost more than memory."""
    return gradient_from_weights(dy, x, weights_after(dy, x, *statistics), *statistics)


def weights_after(dy: jax.Array, x: jax.Array, *statistics: jax.Array) -> jax.Array:
    """The weights s in memory, for a gradient: they do not need dy, but would be kept from the forward pass on."""

    def weights(x: jax.Array, *statistics: jax.Array) -> jax.Array:
        return centred_and_weights(x.astype(statistics[0].dtype), *statistics)[1]

    return once(weights, x, *statistics, after=dy)


def gradient_from_weights(dy: jax.Array, x: jax.Array, s: jax.Array, *statistics: jax.Array) -> jax.Array:
    """The gradient with sum(h x), which costs XLA on CPUs less than sum(h c): that would have a broadcast mean and then c
    written out, and is taken only where the mean is large."""
    shift, mean, a = statistics
    mu = shift + mean
    wide, dy = (each.astype(mean.dtype) for each in (x, dy))
    c, through_x, h = _terms(wide, dy, wide - shift - mean, s)
    sum_h = h.sum(_MAP, keepdims=True)

    def from_c(x: jax.Array, h: jax.Array) -> jax.Array:
        return (h * (x - shift - mean)).sum(_MAP, keepdims=True)

    def from_x(x: jax.Array, h: jax.Array) -> jax.Array:
        return (h * x).sum(_MAP, keepdims=True) - mu * sum_h

    sum_hc = lax.cond(mean_cancels(mu, 1 / (4 * a)), from_c, from_x, wide, h)
    return _dx(c, through_x, h, a, sum_h, sum_hc).astype(x.dtype)


def _terms(x: jax.Array, dy: jax.Array, c: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c, dy s and h."""
    return c, dy * s, dy * x * s * (1 - s) * c


def _dx(
    c: jax.Array, through_x: jax.Array, h: jax.Array, a: jax.Array, sum_h: jax.Array, sum_hc: jax.Array
) -> jax.Array:
    mean_h = sum_h / (c.shape[-3] * c.shape[-2])
    return through_x + 2 * a * (h - mean_h) - c * (8 * jnp.square(a) * sum_hc / degrees_of_freedom(c))


_simam.defvjp(_forward, _backward)


class SimAM(nn.Module):
    """`simam` as a module without parameters, (..., H, W, C) -> (..., H, W, C).

    Its weights are stored as `weights` where they are asked for: `model.apply(..., mutable=["intermediates"])`.
    """

    e_lambda: float = 1e-4
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", simam_weights(x, self.e_lambda))
        return simam(x, self.e_lambda, implementation=self.implementation)


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
