"""SimAM, the batch norm after it and the activation after that as one operation, which keeps only x for its gradient.

Unfused, x and SimAM(x) are both stored for the backward pass. This operation stores x and recomputes SimAM(x): on CPUs once,
with the weights that SimAM's gradient needs anyway; on GPUs, where arithmetic costs less than memory, in each pass, so that
neither SimAM(x) nor its gradient is ever stored. The activation belongs to it because XLA recomputes the mask of a ReLU from
what batch norm read, and would keep SimAM(x) for that. See docs/mathematics.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simam_jax.ops.batch_norm import GroupMoments, batch_norm, factor_and_offset
from simam_jax.ops.dispatch import barrier_after, choose
from simam_jax.ops.moments import Moments, at_least_float32
from simam_jax.ops.simam import (
    ChannelStats,
    centred_and_weights,
    channel_stats,
    degrees_of_freedom,
    gradient_from_weights,
    gradient_terms,
    scale_by_attention,
    simam,
    weights_after,
)

Activation = Callable[[jax.Array], jax.Array]  # of every number on its own

_LANES = 512  # numbers in a row from which on XLA:GPU computes elements and sums columns in one kernel


class Settings(NamedTuple):
    """The static arguments: everything but arrays."""

    e_lambda: float
    epsilon: float
    group_moments: GroupMoments
    activation: Activation


def simam_batch_norm(
    x: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    e_lambda: float,
    epsilon: float,
    group_moments: GroupMoments = lambda own: own,
    activation: Activation = lambda x: x,
) -> tuple[jax.Array, Moments]:
    """activation(batch_norm(simam(x))), and the moments of simam(x) - shift.

    Args:
        x: (G, n, HW, C), G groups of n images.
        e_lambda, activation: of SimAM, and what follows batch norm.
        The others as for `batch_norm`.
    """
    # On TPUs nothing was measured.
    form = choose(x, _unfused, cpu=_recompute_once, gpu=_recompute_each_pass)
    return form(x, shift, scale, bias, Settings(e_lambda, epsilon, group_moments, activation))


def _unfused(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    return _after_simam(simam(x, of.e_lambda, axes=(-2,)), shift, scale, bias, of)


def _after_simam(y: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    z, moments = batch_norm(y, shift, scale, bias, epsilon=of.epsilon, group_moments=of.group_moments)
    return of.activation(z), moments


# ---- on CPUs


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recompute_once(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    return _forward_once(x, shift, scale, bias, of)[0]


def _forward_once(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    stats = channel_stats(x, of.e_lambda, (-2,))
    return _after_simam(scale_by_attention(x, stats), shift, scale, bias, of), (x, stats, (shift, scale, bias))


def _backward_once(of: Settings, residuals: Any, cotangents: Any) -> Any:
    x, stats, others = residuals
    s = weights_after(cotangents[0], x, stats)
    y = (x * s).astype(x.dtype)
    pullback: Any = jax.vjp(partial(_after_simam, of=of), y, *others)[1]
    dy, *of_others = pullback(cotangents)
    return gradient_from_weights(dy, x, s, stats, (-2,)), *of_others


_recompute_once.defvjp(_forward_once, _backward_once)


# ---- on GPUs


def _recompute_each_pass(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    normalised: Any = _normalised(x, shift, scale, bias, of)
    z, moments = normalised
    return of.activation(z), moments


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalised(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    """SimAM and batch norm in three passes over x, and three over x and dz for the gradient."""
    return _forward_each_pass(x, shift, scale, bias, of)[0]


def _forward_each_pass(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, of: Settings):
    stats, rows = channel_stats(x, of.e_lambda, (-2,)), _Rows(x)
    stats_in_rows, shift_in_rows = ChannelStats(*map(rows.tile, stats)), rows.tile(shift)

    def shifted(x: jax.Array) -> jax.Array:
        """SimAM(x) - shift."""
        wide = rows.of(x).astype(at_least_float32(x.dtype))
        return wide * centred_and_weights(wide, stats_in_rows)[1] - shift_in_rows

    x = barrier_after(x, *stats)
    y = shifted(x)
    means: Any = [(rows.sums(each) / x.shape[2]).mean(1) for each in (y, jnp.square(y))]

    def on_each_device(mean: jax.Array, square: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        own = Moments(mean, jnp.maximum(square - jnp.square(mean), 0))
        (factor, offset), moments = factor_and_offset(own, scale, bias, of.epsilon, of.group_moments)
        # Under shard_map a sum varies over the devices as its terms do: so does what the gradient then sums over them.
        return (factor + jnp.zeros_like(mean), offset + jnp.zeros_like(mean)), moments

    normalisation: Any
    normalisation, pullback = jax.vjp(on_each_device, *means, scale, bias)
    (factor, offset), moments = normalisation
    x = barrier_after(x, factor, offset)
    z = shifted(x) * rows.tile(factor[:, None, None]) + rows.tile(offset[:, None, None])
    return (z.astype(x.dtype).reshape(x.shape), moments), (x, stats, shift, factor, pullback)


def _backward_each_pass(_of: Settings, residuals: Any, cotangents: Any) -> Any:
    x, stats, shift, factor, pullback = residuals
    dz, dmoments = cotangents
    rows = _Rows(x)
    stats_in_rows = ChannelStats(*map(rows.tile, stats))

    def terms(x: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
        """x, c, s and dz in rows."""
        wide, dz = (rows.of(each).astype(stats.mean.dtype) for each in (x, dz))
        return wide, *centred_and_weights(wide, stats_in_rows), dz

    wide, _, s, dz_wide = terms(x, dz)
    dfactor = rows.sums(dz_wide * (wide * s - rows.tile(shift))).sum(1)
    dmean, dsquare, dscale, dbias = pullback(((dfactor, rows.sums(dz_wide).sum(1)), dmoments))
    # dy = dz factor + (dmean + 2 dsquare (y - shift)) / count: one number a channel for each of dz, 1 and y.
    count = x.shape[1] * x.shape[2]
    through_y = 2 * dsquare / count
    coefficients = [each[:, None, None] for each in (factor, dmean / count - through_y * shift, through_y)]
    x, dz = barrier_after((x, dz), *coefficients)
    of_dz, constant, of_y = map(rows.tile, coefficients)

    def simam_terms(x: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
        wide, c, s, dz = terms(x, dz)
        return gradient_terms(wide, dz * of_dz + constant + of_y * (wide * s), c, s)

    c, _, h = simam_terms(x, dz)
    mean_h = rows.sums(h)[:, :, None] / x.shape[2]
    of_c = 8 * jnp.square(stats.inv) * rows.sums(h * c)[:, :, None] / degrees_of_freedom(x, (-2,))
    x, dz = barrier_after((x, dz), mean_h, of_c)
    c, through_x, h = simam_terms(x, dz)
    dx = through_x + 2 * stats_in_rows.inv * (h - rows.tile(mean_h)) - c * rows.tile(of_c)
    return dx.astype(x.dtype).reshape(x.shape), jnp.zeros_like(shift), dscale, dbias


_normalised.defvjp(_forward_each_pass, _backward_each_pass)


class _Rows:
    """x (G, n, HW, C) seen as rows of k positions each, (G, n, HW / k, k C), so that a row fills the lanes of a GPU."""

    def __init__(self, x: jax.Array):
        positions, self._channels = x.shape[2:]
        # One position to a row is no choice: in float32 XLA then transposes the map.
        fitting = (k for k in range(2, positions) if positions % k == 0 and k * self._channels >= _LANES)
        self._k = next(fitting, 1)

    def of(self, x: jax.Array) -> jax.Array:
        """x in rows."""
        return x.reshape(*x.shape[:2], -1, self._k * self._channels)

    def tile(self, values: jax.Array) -> jax.Array:
        """A channel's numbers (..., C), repeated for each position of a row."""
        return jnp.tile(values, (1,) * (values.ndim - 1) + (self._k,))

    def sums(self, rows: jax.Array) -> jax.Array:
        """The sums over all positions, (G, n, C): of rows first, then of the positions in them."""
        return rows.sum(2).reshape(*rows.shape[:2], self._k, self._channels).sum(2)
