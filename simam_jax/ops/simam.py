"""SimAM as a function: y = x * sigmoid(1 / e*), where e* is a neuron's minimal energy.

Yang, Zhang, Li, Xie: "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks", ICML 2021,
PMLR 139:11863-11874. docs/mathematics.md derives the form and its gradient.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from simam_jax.errors import UserError, unknown
from simam_jax.ops.dispatch import choose, compute_once, is_symbolic
from simam_jax.ops.moments import at_least_float32, mean_cancels, moments

IMPLEMENTATIONS = ("auto", "reference")
MAP = (-3, -2)  # the axes of H and W in (..., H, W, C)

Axes = tuple[int, ...]


class ChannelStats(NamedTuple):
    """What SimAM knows of a channel of one image, each of size 1 along the axes of the map, float32 or wider.

    Attributes:
        shift: a value of the channel; subtracting it first is exact and leaves little of a large mean.
        mean: the mean of x - shift.
        inv: 1 / (4 (v + lambda)), with v the unbiased variance.
    """

    shift: jax.Array
    mean: jax.Array
    inv: jax.Array


def simam(
    x: ArrayLike, e_lambda: float = 1e-4, *, axes: Sequence[int] = MAP, implementation: str = "auto"
) -> jax.Array:
    """x * simam_weights(x, e_lambda): every neuron scaled by how much it stands out from its channel (Eq. 5 and 6).

    Args:
        x: (..., H, W, C), or of any other shape with `axes`; floating. Statistics are float32 (float64 for float64).
        e_lambda: the paper's lambda, > 0: 1e-4 on CIFAR, 0.1 on ImageNet and COCO.
        axes: those of the map: (-3, -2) of images (N, H, W, C), (-2,) of signals (N, L, C), (-4, -3, -2) of volumes
            (N, D, H, W, C), (-2, -1) where channels come first (N, C, H, W).
        implementation: "auto": few passes over memory, in the gradient too, which keeps x and three numbers a channel;
            reverse mode only. "reference": the plain formula, also for forward mode (`jax.jvp`, `jax.jacfwd`,
            `jax.hessian`).

    Returns:
        An array of x's shape and dtype.

    Raises:
        UserError: x is not floating or lacks an axis of the map; e_lambda is not positive and finite; an unknown
            implementation; forward mode asked of "auto".
    """
    x, axes = _checked(x, e_lambda, axes)
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", implementation, IMPLEMENTATIONS)
    if _is_empty(x):
        return x
    if implementation == "reference":
        wide = x.astype(at_least_float32(x.dtype))
        return (wide * _weights(wide, e_lambda, axes)).astype(x.dtype)
    try:
        return _simam(x, e_lambda, axes)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise UserError(
            "Forward-mode differentiation (jax.jvp, jax.jacfwd, jax.hessian) of simam needs "
            'simam(..., implementation="reference").'
        ) from None


def simam_weights(x: ArrayLike, e_lambda: float = 1e-4, *, axes: Sequence[int] = MAP) -> jax.Array:
    """The attention weights themselves, sigmoid(1 / e*), where e* is a neuron's minimal energy (Eq. 5).

    With mu the mean and v the unbiased variance of a channel of one image over the map:

        1 / e* = (x - mu)^2 / (4 (v + lambda)) + 1 / 2

    Args, Raises: as for `simam`. A map of one position has no variance: its weight is sigmoid(1/2).

    Returns:
        An array of x's shape and dtype, in (0.62, 1].
    """
    x, axes = _checked(x, e_lambda, axes)
    if _is_empty(x):
        return x
    return _weights(x.astype(at_least_float32(x.dtype)), e_lambda, axes).astype(x.dtype)


def _checked(x: ArrayLike, e_lambda: float, axes: Sequence[int]) -> tuple[jax.Array, Axes]:
    """x as an array, and the axes as negative numbers in order."""
    x = jnp.asarray(x)
    if not axes or not all(-x.ndim <= axis < x.ndim for axis in axes):
        raise UserError(
            f"SimAM's map has the axes {tuple(axes)}, and the input the shape {x.shape}: give a map (..., H, W, C), or the "
            "axes of its map, such as axes=(-2,) for signals (N, L, C)."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"SimAM needs floating-point input, got {x.dtype}: convert it, e.g. with x.astype(jnp.float32)."
        )
    if not 0 < e_lambda < float("inf"):
        raise UserError(
            f"SimAM's e_lambda must be positive and finite, got {e_lambda}: take 1e-4 (CIFAR) or 0.1 (ImageNet)."
        )
    unique = {axis % x.ndim - x.ndim for axis in axes}
    if len(unique) < len(axes):
        raise UserError(f"SimAM's axes {tuple(axes)} name an axis of the shape {x.shape} twice.")
    return x, tuple(sorted(unique))


def _is_empty(x: jax.Array) -> bool:
    return not is_symbolic(x) and x.size == 0


def _first(x: jax.Array, axes: Axes) -> jax.Array:
    """The first position of the map, kept with size 1."""
    return x[tuple(slice(0, 1) if axis - x.ndim in axes else slice(None) for axis in range(x.ndim))]


def _weights(x: jax.Array, e_lambda: float, axes: Axes) -> jax.Array:
    centred = x - lax.stop_gradient(_first(x, axes))
    centred -= centred.mean(axes, keepdims=True)
    d = jnp.square(centred)
    v = d.sum(axes, keepdims=True) / degrees_of_freedom(x, axes)
    return jax.nn.sigmoid(d / (4 * (v + e_lambda)) + 0.5)


def positions(x: jax.Array, axes: Axes = MAP) -> int | jax.Array:
    """How many positions the map has; a scalar array where that is symbolic."""
    count = math.prod(x.shape[axis] for axis in axes)
    return jnp.asarray(count, at_least_float32(x.dtype)) if is_symbolic(x) else count


def degrees_of_freedom(x: jax.Array, axes: Axes = MAP) -> int | jax.Array:
    """Positions of the map less one, and at least 1: the divisor of the unbiased variance."""
    count = positions(x, axes)
    return max(count - 1, 1) if isinstance(count, int) else jnp.maximum(count - 1, 1)


# In few passes over memory. Forward, one pass reads x for the statistics, one reads x and writes y; backward, one reads x
# and dy for two sums, one reads both again and writes dx. A compiler that sees a value used in both passes, or y in what
# follows, would write it in float32 and read it back: the barriers keep the passes apart. See docs/mathematics.md.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _simam(x: jax.Array, e_lambda: float, axes: Axes) -> jax.Array:
    return scale_by_attention(x, channel_stats(x, e_lambda, axes))


def channel_stats(x: jax.Array, e_lambda: float, axes: Axes = MAP) -> ChannelStats:
    """The statistics of every channel of every image."""
    shift = _first(x, axes).astype(at_least_float32(x.dtype))
    mean, var = moments(x, shift, axes)
    v = var * (positions(x, axes) / degrees_of_freedom(x, axes))
    return ChannelStats(shift, mean, 1 / (4 * (v + e_lambda)))


def scale_by_attention(x: jax.Array, stats: ChannelStats) -> jax.Array:
    """x sigmoid(z) in one division; the exponential cannot overflow, because z is at least 1/2."""
    wide = x.astype(stats.mean.dtype)
    z = stats.inv * jnp.square(wide - stats.shift - stats.mean) + 0.5
    return (wide / (1 + jnp.exp(-z))).astype(x.dtype)


def centred_and_weights(x: jax.Array, stats: ChannelStats) -> tuple[jax.Array, jax.Array]:
    """c = x - mu and s = sigmoid(c^2 inv + 1/2), of x in the dtype of its statistics."""
    centred = x - stats.shift - stats.mean
    return centred, jax.nn.sigmoid(stats.inv * jnp.square(centred) + 0.5)


def _forward(x: jax.Array, e_lambda: float, axes: Axes) -> tuple[jax.Array, tuple[jax.Array, ChannelStats]]:
    stats = channel_stats(x, e_lambda, axes)
    return lax.optimization_barrier(scale_by_attention(x, stats)), (x, stats)


def _backward(
    _e_lambda: float, axes: Axes, residuals: tuple[jax.Array, ChannelStats], dy: jax.Array
) -> tuple[jax.Array]:
    """With c = x - mu, s = sigmoid(c^2 inv + 1/2) and h = dy x s (1 - s) c over a map of n positions:

    dx = dy s + 2 inv (h - mean(h)) - c 8 inv^2 sum(h c) / (n - 1)

    In training, networks take it through `ops.simam_batch_norm`, which uses the same terms.
    """
    # Barrier: stops XLA from keeping forward intermediates alive for reuse here.
    x, stats = lax.optimization_barrier(residuals)
    return (choose(x, _gradient_in_two_passes, cpu=_gradient_by_weights)(dy, x, stats, axes),)


_simam.defvjp(_forward, _backward)


def _gradient_in_two_passes(dy: jax.Array, x: jax.Array, stats: ChannelStats, axes: Axes) -> jax.Array:
    def terms(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, dy = (each.astype(stats.mean.dtype) for each in (x, dy))
        c, s = centred_and_weights(x, stats)
        return c, *gradient_terms(x, dy, c, s)

    c, _, h = terms(x, dy)
    sums = h.sum(axes, keepdims=True), (h * c).sum(axes, keepdims=True)
    # No barrier on dy before its sums: where dy is computed just then, the sums are taken in the same pass.
    x, dy, sums = lax.optimization_barrier((x, dy, sums))
    sum_h, sum_hc = sums
    c, through_x, h = terms(x, dy)
    return input_gradient(c, through_x, h, stats, sum_h, sum_hc, axes).astype(x.dtype)


def _gradient_by_weights(dy: jax.Array, x: jax.Array, stats: ChannelStats, axes: Axes) -> jax.Array:
    """The same for XLA:CPU, where exponentials cost more than memory: the weights are computed once."""
    return gradient_from_weights(dy, x, weights_after(dy, x, stats), stats, axes)


def weights_after(dy: jax.Array, x: jax.Array, stats: ChannelStats) -> jax.Array:
    """The weights s, recomputed in the backward pass: the data dependence on dy delays them."""

    def weights(x: jax.Array, *stats: jax.Array) -> jax.Array:
        return centred_and_weights(x.astype(stats[0].dtype), ChannelStats(*stats))[1]

    return compute_once(weights, x, *stats, after=dy)


def gradient_from_weights(
    dy: jax.Array, x: jax.Array, s: jax.Array, stats: ChannelStats, axes: Axes = MAP
) -> jax.Array:
    """The gradient in x from the weights s. Uses sum(h x) - mu sum(h), and sum(h c) where that would cancel.

    XLA:CPU sums h x without writing anything; for sum(h c) it broadcasts the mean and writes c.
    """
    shift, mean, inv = stats
    mu = shift + mean
    wide, dy = (each.astype(mean.dtype) for each in (x, dy))
    c = wide - shift - mean
    through_x, h = gradient_terms(wide, dy, c, s)
    sum_h = _sum(h, axes)

    def from_c(x: jax.Array, h: jax.Array) -> jax.Array:
        return _sum(h * (x - shift - mean), axes)

    def from_x(x: jax.Array, h: jax.Array) -> jax.Array:
        return _sum(h * x, axes) - mu * sum_h

    sum_hc = lax.cond(mean_cancels(mu, 1 / (4 * inv)), from_c, from_x, wide, h)
    return input_gradient(c, through_x, h, stats, sum_h, sum_hc, axes).astype(x.dtype)


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over the axes, kept with size 1. What stands before them is one axis for it.

    XLA:CPU takes fifteen times as long for a sum of products over (1, N, HW, C) as over (N, HW, C).
    """
    before = x.ndim + min(axes)
    if is_symbolic(x) or before < 2:
        return x.sum(axes, keepdims=True)
    merged = x.reshape(-1, *x.shape[before:]).sum(axes, keepdims=True)
    return merged.reshape(*x.shape[:before], *merged.shape[1:])


def gradient_terms(x: jax.Array, dy: jax.Array, c: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dy s and h: see `_backward`."""
    return dy * s, dy * x * s * (1 - s) * c


def input_gradient(
    c: jax.Array,
    through_x: jax.Array,
    h: jax.Array,
    stats: ChannelStats,
    sum_h: jax.Array,
    sum_hc: jax.Array,
    axes: Axes = MAP,
) -> jax.Array:
    """dx from the terms and their sums: see `_backward`."""
    inv, mean_h = stats.inv, sum_h / positions(c, axes)
    return through_x + 2 * inv * (h - mean_h) - c * (8 * jnp.square(inv) * sum_hc / degrees_of_freedom(c, axes))
